import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flatten, random_forest

from mmrl.credit import ESTIMATORS, NORM_PRESETS, Norm, estimate, norm
from mmrl.credit.select import prune_depths, prune_width
from mmrl.tree import StepTree

n = math.nan
LIFTED = ("grpo", "dr_grpo", "rloo")


def close(x, want, atol=1e-6):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0)


WORKED = [
    # name, options, T8, C7
    ("grpo", {}, [0.288675, -0.866024, 0.866024, 0, -0.866024, 0.866024, -0.866024, 0],
     [0.577349, 0.577349, 0.577349, -1.154699, -1.154699, 0.577349, 0.577349]),
    ("dr_grpo", {}, [0.166667, -0.5, 0.5, 0, -0.5, 0.5, -0.5, 0], [1 / 3, 1 / 3, 1 / 3, -2 / 3, -2 / 3, 1 / 3, 1 / 3]),
    ("rloo", {}, [0.222222, -0.666667, 0.666667, 0, -0.666667, 0.666667, -0.666667, 0], [0.5, 0.5, 0.5, -1, -1, 0.5, 0.5]),
    ("tree_rpo", {}, [0.707105, -0.707105, 0.707105, -0.707105, -0.707106, 0.707106, -0.707105, 0],
     [0.577349, 0.577349, 0.577349, -1.154699, -1.154699, 0.577349, 0.577349]),
    ("tree_rpo", {"unary": "zero"}, [0.707105, -0.707105, 0.707105, -0.707105, -0.707106, 0.707106, 0, 0],
     [0.577349, 0, 0, -1.154699, 0, 0.577349, 0]),
    ("tree_rpo", {"scale": "none"}, [0.375, -0.375, 0.25, -0.25, -0.5, 0.5, -0.375, 0],
     [1 / 3, 1 / 3, 1 / 3, -2 / 3, -2 / 3, 1 / 3, 1 / 3]),
    ("tree_rpo", {"scale": "loo"}, [0.75, -0.75, 0.5, -0.5, -1, 1, -0.75, 0], [0.5, 0.5, 0.5, -1, -1, 0.5, 0.5]),
    ("tree_rpo", {"scale": "bernoulli"}, [0.774595, -0.774595, 0.577349, -0.577349, -0.999998, 0.999998, -0.774595, 0],
     [0.707105, 0.707105, 0.707105, -1.414211, -1.414211, 0.707105, 0.707105]),
    ("tree_rpo", {"value": "leaf_mean", "scale": "none"}, [1 / 3, -1 / 3, 0.25, -0.25, -0.5, 0.5, -1 / 3, 0],
     [1 / 3, 1 / 3, 1 / 3, -2 / 3, -2 / 3, 1 / 3, 1 / 3]),
    ("tree_rpo", {"value": "leaf_mean"}, [0.707105, -0.707105, 0.707105, -0.707105, -0.707106, 0.707106, -0.707105, 0],
     [0.577349, 0.577349, 0.577349, -1.154699, -1.154699, 0.577349, 0.577349]),
    ("branch_depth", {}, [0.707107, -0.707107, 1, 0, -0.707107, 0.707107, -1, 0],
     [0.577350, 0.577350, 0, -1.154701, -1.154701, 0.577350, 0.577350]),
    ("branch_depth", {"value": "edge_softmax"},
     [0.707107, -0.707107, 0.853067, 0.247416, -0.707107, 0.707107, -1.100483, 0],
     [0.577350, 0.577350, 0, -1.154701, -1.154701, 0.577350, 0.577350]),
]  # fmt: skip


@pytest.mark.parametrize("name, options, on_t8, on_c7", WORKED)
def test_worked_numbers(t8, c7, name, options, on_t8, on_c7):
    close(estimate(t8, name, **options).adv, on_t8)
    close(estimate(c7, name, **options).adv, on_c7)


def test_child_minus_parent_telescopes_to_grpo(t8):
    adv = estimate(t8, "child_minus_parent").adv
    leaf = estimate(t8, "grpo").adv
    for path in ([0, 2], [0, 3, 4], [0, 3, 5], [1, 6]):
        assert float(adv[path].sum()) == pytest.approx(float(leaf[path[-1]]), abs=1e-5)
    assert adv[6] == 0  # an only active child decided nothing


BINARY = [0.30, 0.34, 0.28, 0.40, 0.22, 0.35, 0.31, 0.33]


def branch_tree(leaves, splits, steps):
    """A diffusion-shaped tree: `steps` transitions, two children at each split, leaf rewards in order."""
    parent, last = [], [-1]
    for i in range(steps):
        k = 2 if i in splits else 1
        new = []
        for p in last:
            for _ in range(k):
                parent.append(p)
                new.append(len(parent) - 1)
        last = new
    n_nodes = len(parent)
    status, outcome = torch.zeros(n_nodes, dtype=torch.long), torch.full((n_nodes,), n)
    status[last], outcome[last] = 1, torch.tensor(leaves)
    return StepTree(parent, [0] * n_nodes, status, outcome)


def test_branch_depth_on_the_worked_diffusion_tree():
    tree = branch_tree(BINARY, {0, 2, 4}, 6)
    adv = estimate(tree, "branch_depth").adv
    by_depth = [adv[tree.depth == d] for d in range(6)]
    for d in (0, 1):
        close(by_depth[d], [0.707107, -0.707107], 1e-5)
    for d in (2, 3):
        close(by_depth[d], [0.163989, 1.038597, -1.366575, 0.163989], 1e-5)
    leaves = [-0.305638, 0.446701, -0.681807, 1.575209, -1.810315, 0.634786, -0.117553, 0.258616]
    for d in (4, 5):
        close(by_depth[d], leaves, 1e-5)
    spread = estimate(tree, "branch_depth", spread="leaf").adv
    close(spread[tree.depth == 0], [0.258617, -0.258617], 1e-5)
    ddof0 = estimate(tree, "branch_depth", ddof=0).adv
    close(ddof0[tree.depth == 2], [0.189358, 1.199269, -1.577985, 0.189358], 1e-5)
    small = branch_tree([0.2, 0.6, 0.1, 0.9], {0, 2}, 5)
    close(estimate(small, "branch_depth").adv[small.depth == 4], [-0.676252, 0.405751, -0.946753, 1.217254], 1e-5)


def test_sibling_centring_on_the_worked_diffusion_tree():
    tree = branch_tree(BINARY, {0, 2, 4}, 6)
    adv = estimate(tree, "tree_rpo", value="leaf_mean", scale="none", unary="zero").adv
    close(adv[tree.depth == 4], [-0.02, 0.02, -0.06, 0.06, -0.065, 0.065, -0.01, 0.01])
    close(adv[tree.depth == 2], [-0.01, 0.01, -0.0175, 0.0175])
    close(adv[tree.depth == 0], [0.01375, -0.01375])


def test_width_and_depth_pruning():
    tree = branch_tree(BINARY, {0, 2, 4}, 6)
    leaves = tree.is_finished.nonzero().flatten()
    kept = prune_width(tree, "top", 4)
    assert [i for i, leaf in enumerate(leaves.tolist()) if kept[leaf]] == [1, 3, 5, 7]
    extreme = prune_width(tree, "extreme", 4)
    assert [i for i, leaf in enumerate(leaves.tolist()) if extreme[leaf]] == [2, 3, 4, 5]
    assert bool(kept[tree.depth <= 4].all()) and bool(prune_width(tree, "none", 4).all())
    twenty = branch_tree([float(i) for i in range(16)], {0, 3, 6, 9}, 20)
    assert int(prune_depths(twenty, 15, 9, 30, 0).sum()) == 138  # 8.625 trained edges per leaf
    assert twenty.depth[prune_depths(twenty, 15, 9, 30, 65)].max() == 12
    assert twenty.depth[prune_depths(twenty, 15, 9, 30, 10_000)].max() == 8


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(4, 60))
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_properties_on_random_forests(name, seed, steps):
    tree = random_forest(seed, steps=steps)
    out = estimate(tree, name)
    assert bool(out.adv.isfinite().all()) and bool((out.adv[~out.valid] == 0).all())
    # another prompt's rewards change nothing, not even the last bit
    other = tree.outcome.clone()
    other[tree.is_finished & (tree.group == 1)] += 0.37
    again = estimate(tree.replace(outcome=other), name)
    assert torch.equal(again.adv[tree.group != 1], out.adv[tree.group != 1])
    # constant outcomes give exactly 0
    flat = torch.where(tree.is_finished, 0.1 + 0.2 + 1e6, n)
    assert bool((estimate(tree.replace(outcome=flat), name).adv == 0).all())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_permuting_steps_permutes_the_result(name, seed):
    tree = random_forest(seed)
    want = estimate(tree, name).adv
    g = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(len(tree), generator=g)
    place = torch.argsort(shuffle)
    parent = torch.where(tree.parent[shuffle] >= 0, place[tree.parent[shuffle].clamp(min=0)], -1)
    swap = torch.randperm(tree.num_groups, generator=g)
    moved = StepTree(
        parent, swap[tree.group[shuffle]], tree.status[shuffle], tree.outcome[shuffle], logp=tree.logp[shuffle]
    )
    got = torch.empty_like(want)
    got[shuffle[moved.order]] = estimate(moved, name).adv
    torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", LIFTED)
def test_leaf_counting_equals_flattened_trajectories(name, seed):
    tree = random_forest(seed)
    if not bool(tree.is_finished.any()):
        return
    whole = estimate(tree, name, counting="leaf")
    chains, source = flatten(tree)
    flat = estimate(chains, name)
    summed = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, source, flat.adv)
    torch.testing.assert_close(whole.adv * whole.weight, summed, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_sums_that_must_vanish(seed):
    tree = random_forest(seed)
    for name in LIFTED:
        adv = estimate(tree, name).adv[tree.is_finished]
        group = tree.group[tree.is_finished]
        assert float(torch.zeros(3, dtype=torch.float64).index_add_(0, group, adv).abs().max()) < 1e-9
    sib = estimate(tree, "tree_rpo", unary="zero").adv
    assert float(torch.zeros(len(tree), dtype=torch.float64).index_add_(0, tree.sib, sib).abs().max()) < 1e-9
    depth = estimate(tree, "branch_depth").adv
    key = tree.depth * 3 + tree.group
    assert float(torch.zeros(int(key.max()) + 1, dtype=torch.float64).index_add_(0, key, depth).abs().max()) < 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), a=st.floats(0.1, 50), b=st.floats(-100, 100))
def test_affine_rewards(seed, a, b):
    tree = random_forest(seed)
    moved = tree.replace(outcome=tree.outcome * a + b)
    for name in ("dr_grpo", "rloo"):
        torch.testing.assert_close(
            estimate(moved, name).adv, a * estimate(tree, name).adv, atol=1e-9 * (a + abs(b)), rtol=0
        )
    for name in ("grpo", "tree_rpo", "branch_depth", "child_minus_parent"):
        torch.testing.assert_close(estimate(moved, name).adv, estimate(tree, name).adv, atol=1e-3, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invalid_steps_might_as_well_not_exist(seed):
    tree = random_forest(seed, unfinished=0.5)
    if not bool(tree.valid.any()):
        return
    kept = tree.select(tree.valid)
    for name in ESTIMATORS:
        torch.testing.assert_close(estimate(kept, name).adv, estimate(tree, name).adv[tree.valid])


def test_chains_make_tree_rpo_equal_grpo(c7):
    torch.testing.assert_close(estimate(c7, "tree_rpo").adv, estimate(c7, "grpo").adv)


def test_float32_rewards_near_1000():
    r = torch.tensor([1000.1, 1000.2, 1000.3, 1000.4])
    make = lambda x: StepTree([-1] * 4, [0] * 4, [1] * 4, x)  # noqa: E731
    single, double = estimate(make(r), "grpo").adv, estimate(make(r.double()), "grpo").adv
    torch.testing.assert_close(single, double, atol=1e-6, rtol=0)
    assert bool((estimate(make(torch.full((4,), 1000.1)), "grpo").adv == 0).all())


def test_norm_presets_and_singletons():
    x, sets = torch.tensor([0.1, 0.5, 0.3]), torch.zeros(3, dtype=torch.long)
    close(norm(x, sets).z, [-1, 1, 0], 1e-5)
    close(norm(x, sets, Norm(**NORM_PRESETS["flow_grpo"])).z, [-1.223995, 1.223995, 0], 1e-6)
    lone = norm(torch.tensor([2.0]), torch.zeros(1, dtype=torch.long))
    assert lone.z.tolist() == [0] and lone.info["singleton_sets"] == 1
    assert norm(torch.tensor([2.0]), torch.zeros(1, dtype=torch.long), Norm(singleton="raw")).z.tolist() == [2]
    with pytest.raises(ValueError, match=r"'bernoulli' needs values in \[0, 1\]"):
        norm(torch.tensor([2.0, 0.0]), torch.zeros(2, dtype=torch.long), Norm(scale="bernoulli"))


def test_info_counts(t8):
    info = estimate(t8, "grpo").info
    assert info["groups"] == 1 and info["zero_spread_groups"] == 0 and info["valid_frac"] == 7 / 8


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: estimate(t, "grop"), r"unknown estimator 'grop' \(did you mean grpo\?\)"),
        (lambda t: estimate(t, "grpo", sclae="none"), r"grpo has no option 'sclae' \(did you mean scale\?\)"),
        (lambda t: estimate(t, "grpo", transforms=["clipp"]), "unknown transform 'clipp'"),
        (lambda t: estimate(t, "grpo", scale="max"), "scale 'max' is none of"),
        (
            lambda t: estimate(t.replace(logp=None), "branch_depth", value="edge_softmax"),
            "needs logp on every branching step; step 0 has none",
        ),
    ],
)
def test_errors_name_the_fix(t8, call, message):
    with pytest.raises(ValueError, match=message):
        call(t8)
