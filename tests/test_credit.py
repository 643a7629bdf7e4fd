import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flatten, random_chains, random_forest

from mmrl.credit import NORM_PRESETS, Norm, compose, estimate, norm
from mmrl.credit.estimate import apply_transform
from mmrl.credit.select import prune_depths, prune_width
from mmrl.credit.transforms import thoughts
from mmrl.registry import find, names, rows
from mmrl.rollout import Prompt
from mmrl.trainers.history import OutcomeHistory
from mmrl.tree import FINISHED, UNFINISHED, StepTree
from mmrl.tree_ops import lift, path_sum, returns, to_go

n = math.nan
OUTCOME_ONLY = ("grpo", "dr_grpo", "rloo", "tree_rpo", "propa", "branch_depth", "child_minus_parent", "portool", "salt",
                "reinforce_pp_baseline", "rapo", "ddpo")  # fmt: skip
# Statistics over the whole batch, by design: another prompt changes them.
BATCH_WIDE = ("srgpo", "reinforce_pp_baseline", "rapo", "prime", "ddpo")
# Defined through lift, so flattening a tree into its paths gives the same; the rest count a shared step once.
LIFTED = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "fold_grpo", "capo", "pav", "salt")


def forest_for(name, seed, **options):
    """A random forest, of chains where the estimator needs them."""
    return random_chains(seed) if name in ("prime", "vsrm") else random_forest(seed, **options)


def check_close(x, want, atol=1e-6):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0)


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
        check_close(by_depth[d], [0.707107, -0.707107], 1e-5)
    for d in (2, 3):
        check_close(by_depth[d], [0.163989, 1.038597, -1.366575, 0.163989], 1e-5)
    leaves = [-0.305638, 0.446701, -0.681807, 1.575209, -1.810315, 0.634786, -0.117553, 0.258616]
    for d in (4, 5):
        check_close(by_depth[d], leaves, 1e-5)
    spread = estimate(tree, "branch_depth", spread="leaf").adv
    check_close(spread[tree.depth == 0], [0.258617, -0.258617], 1e-5)
    ddof0 = estimate(tree, "branch_depth", ddof=0).adv
    check_close(ddof0[tree.depth == 2], [0.189358, 1.199269, -1.577985, 0.189358], 1e-5)
    small = branch_tree([0.2, 0.6, 0.1, 0.9], {0, 2}, 5)
    check_close(
        estimate(small, "branch_depth").adv[small.depth == 4], [-0.676252, 0.405751, -0.946753, 1.217254], 1e-5
    )


def test_sibling_centring_on_the_worked_diffusion_tree():
    tree = branch_tree(BINARY, {0, 2, 4}, 6)
    adv = estimate(tree, "tree_rpo", value="leaf_mean", scale="none", unary="zero").adv
    check_close(adv[tree.depth == 4], [-0.02, 0.02, -0.06, 0.06, -0.065, 0.065, -0.01, 0.01])
    check_close(adv[tree.depth == 2], [-0.01, 0.01, -0.0175, 0.0175])
    check_close(adv[tree.depth == 0], [0.01375, -0.01375])


def test_width_and_depth_pruning():
    tree = branch_tree(BINARY, {0, 2, 4}, 6)
    leaves = tree.is_finished.nonzero().flatten()
    kept = prune_width(tree, "top", 4)
    assert [i for i, leaf in enumerate(leaves.tolist()) if kept[leaf]] == [1, 3, 5, 7]
    extreme = prune_width(tree, "extreme", 4)
    assert [i for i, leaf in enumerate(leaves.tolist()) if extreme[leaf]] == [2, 3, 4, 5]
    assert bool(kept[tree.depth <= 4].all()) and bool(prune_width(tree, "none", 4).all())
    best = prune_width(tree, "best_of_n", 4)
    assert bool((best == (tree.accumulate(torch.isin(torch.arange(len(tree)), leaves[2:6]).double()) > 0)).all())
    assert int(best[tree.depth == 0].sum()) == 2 and int(best[tree.depth == 5].sum()) == 4
    chains = StepTree([-1, 0, -1, 2, -1, 4, -1, 6], [0] * 8, [0, 1] * 4, [n, 0.2, n, 0.9, n, 0.4, n, 0.1])
    assert prune_width(chains, "best_of_n", 0).tolist() == [False, False, True, True, False, False, True, True]
    assert bool(prune_width(chains, "extreme", 0)[chains.depth == 0].all())  # which trains every first step
    twenty = branch_tree([float(i) for i in range(16)], {0, 3, 6, 9}, 20)
    assert int(prune_depths(twenty, 15, 9, 30, 0).sum()) == 138  # 8.625 trained edges per leaf
    assert twenty.depth[prune_depths(twenty, 15, 9, 30, 65)].max() == 12
    assert twenty.depth[prune_depths(twenty, 15, 9, 30, 10_000)].max() == 8


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), steps=st.integers(4, 60))
@pytest.mark.parametrize("name", names("estimators"))
def test_properties_on_random_forests(name, seed, steps):
    tree = forest_for(name, seed, steps=steps)
    out = estimate(tree, name)
    assert bool(out.adv.isfinite().all()) and bool((out.adv[~out.valid] == 0).all())
    assert bool(out.returns.isfinite().all())
    if name in OUTCOME_ONLY:  # constant outcomes give exactly 0
        flat = torch.where(tree.is_finished, 0.1 + 0.2 + 1e6, n)
        assert bool((estimate(tree.replace(outcome=flat), name).adv == 0).all())
    if name in BATCH_WIDE:
        return
    # another prompt's rewards change nothing, not even the last bit
    other, reward = tree.outcome.clone(), tree.step_reward.clone()
    other[tree.is_finished & (tree.group == 1)] *= 0.37
    reward[tree.group == 1] *= 0.61
    again = estimate(tree.replace(outcome=other, step_reward=reward), name)
    assert torch.equal(again.adv[tree.group != 1], out.adv[tree.group != 1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("name", names("estimators"))
def test_permuting_steps_permutes_the_result(name, seed):
    tree = forest_for(name, seed)
    want = estimate(tree, name).adv
    g = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(len(tree), generator=g)
    place = torch.argsort(shuffle)
    parent = torch.where(tree.parent[shuffle] >= 0, place[tree.parent[shuffle].clamp(min=0)], -1)
    swap = torch.randperm(tree.num_groups, generator=g)
    moved = StepTree(
        parent, swap[tree.group[shuffle]], tree.status[shuffle], tree.outcome[shuffle], logp=tree.logp[shuffle],
        step_reward=tree.step_reward[shuffle], value=tree.value[shuffle], root_value=tree.root_value[torch.argsort(swap)],
        state_key=tree.state_key[shuffle], edge_key=tree.edge_key[shuffle], ok=None if tree.ok is None else tree.ok[shuffle],
        tags={k: v[shuffle] for k, v in tree.tags.items()},
    )  # fmt: skip
    got = torch.empty_like(want)
    got[shuffle[moved.order]] = estimate(moved, name).adv
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-7)


@settings(max_examples=40, deadline=None)
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
    torch.testing.assert_close(whole.adv * whole.weight, summed, atol=1e-7, rtol=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
@pytest.mark.parametrize("spec", [{"name": "gate"}, {"name": "renorm"}, {"name": "tp_reward"}], ids=str)
def test_lifted_transforms_are_means_over_flattened_trajectories(spec, seed):
    tree = random_forest(seed)
    chains, source = flatten(tree)
    copies = apply_transform(chains, spec).step_reward
    mean = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, source, copies) / tree.leaves_below.clamp(min=1)
    torch.testing.assert_close(apply_transform(tree, spec).step_reward, mean, atol=1e-9, rtol=0)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_sums_that_must_vanish(seed):
    tree = random_forest(seed)
    for name in ("grpo", "dr_grpo", "rloo"):
        adv = estimate(tree, name).adv[tree.is_finished]
        group = tree.group[tree.is_finished]
        assert float(torch.zeros(3, dtype=torch.float64).index_add_(0, group, adv).abs().max()) < 1e-9
    sib = estimate(tree, "tree_rpo", unary="zero").adv
    assert float(torch.zeros(len(tree), dtype=torch.float64).index_add_(0, tree.sibling_set, sib).abs().max()) < 1e-9
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


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invalid_steps_might_as_well_not_exist(seed):
    tree = random_forest(seed, unfinished=0.5)
    if not bool(tree.valid.any()):
        return
    kept = tree.select(tree.valid)
    for row in rows("estimators"):
        name = row.name
        if name in ("prime", "vsrm") or ("forks" in row.reads() and not _has_forks(kept)):
            continue
        torch.testing.assert_close(
            estimate(kept, name).adv, estimate(tree, name).adv[tree.valid], atol=1e-9, rtol=1e-9
        )


def _has_forks(tree):
    first = torch.bincount(tree.group[tree.parent < 0], minlength=tree.num_groups)
    return not tree.is_chains or int(first.max()) > 1


# ---- guarantees of the transforms -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_guarantees_of_the_transforms(seed):
    tree = random_forest(seed)
    valid, leaf = tree.valid, tree.is_finished
    r = tree.step_reward

    def run(*specs):
        out = tree
        for s in specs:
            out = apply_transform(out, s)
        return out

    clipped = run({"name": "clip", "eta": 0.4})
    assert float(path_sum(clipped, clipped.step_reward).max()) <= 0  # adding steps never pays
    inner = valid & ~tree.is_leaf
    torch.testing.assert_close(to_go(tree, run({"name": "delta"}).step_reward)[inner], r[inner])
    both = run({"name": "clip", "eta": 0.4}, {"name": "delta"})
    torch.testing.assert_close(to_go(tree, both.step_reward)[inner], clipped.step_reward[inner])
    shaped = run({"name": "potential"})
    torch.testing.assert_close(
        estimate(shaped, "fold_grpo").adv, estimate(tree, "fold_grpo").adv, atol=1e-6, rtol=1e-6
    )
    gained = path_sum(shaped, shaped.step_reward) - path_sum(tree, torch.where(valid, r, 0.0))
    torch.testing.assert_close(gained[leaf], -tree.root_value[tree.group[leaf]])
    progress = run({"name": "progress"})
    torch.testing.assert_close(
        path_sum(progress, progress.step_reward)[leaf], (tree.value - tree.root_value[tree.group])[leaf]
    )
    red = run({"name": "red"})
    torch.testing.assert_close(path_sum(red, red.step_reward)[leaf], (r - tree.root_value[tree.group])[leaf])
    failed = valid & (lift(tree, (tree.outcome >= 0.5).double()) == 0)
    assert bool((run({"name": "gate"}).step_reward[failed] == 0).all())
    sure = torch.where(leaf, (tree.outcome >= 0.5).double(), n)
    renormed = apply_transform(tree.replace(outcome=sure), {"name": "renorm"})
    success, failure = lift(tree, sure.nan_to_num(0.0)) == 1, lift(tree, sure.nan_to_num(0.0)) == 0
    assert bool((renormed.step_reward[valid & success] >= 0).all()) and bool(
        (renormed.step_reward[valid & failure] <= 0).all()
    )
    mixed = run({"name": "mix", "dense": 0.3})
    torch.testing.assert_close(mixed.outcome[leaf], 0.7 * tree.outcome[leaf])
    torch.testing.assert_close(mixed.step_reward[valid], 0.3 * r[valid])
    alarm = run({"name": "alarm"})
    low = leaf & (tree.outcome <= 0.5)
    assert torch.equal(alarm.outcome[low], tree.outcome[low])
    gain = run({"name": "info_gain"})
    assert float(path_sum(gain, gain.step_reward).max()) <= 1 + 1e-9
    again = run({"name": "redundancy"}).step_reward
    assert float(again.min()) >= 0 and float(again.max()) <= 1
    pruned = run({"name": "step_prune"})
    assert bool((pruned.outcome[leaf & (tree.outcome < 0.5)] == 0).all())
    assert torch.equal(run({"name": "blend", "phi": [0, 1, 0]}).step_reward[valid], r[valid])
    severity = run({"name": "severity"}).step_reward
    order = torch.argsort(tree.tags["severity"][valid])
    assert bool((severity[valid][order].diff() <= 0).all())
    thought = thoughts(tree)
    assert torch.equal(tree.tags["wrong"], tree.tags["wrong"][thought])
    page = run({"name": "mixed_grained", "page": 0.6}).outcome[leaf]
    assert float(page.min()) >= 0 and float(page.max()) <= 1 if len(page) else True
    filled = run({"name": "unfinished_outcome", "outcome": -1.0})
    assert not bool((filled.status == 2).any())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_guarantees_on_chains(seed):
    tree = random_chains(seed)
    leaf = tree.is_finished
    exact = apply_transform(tree, {"name": "spa", "exact": True, "beta": 0.0})
    torch.testing.assert_close(path_sum(exact, exact.step_reward)[leaf], tree.outcome[leaf])
    steps = apply_transform(tree, {"name": "vsrm"}).step_reward
    d = apply_transform(tree, {"name": "progress"}).step_reward
    strong = d.abs() > 0.05
    assert torch.equal(steps[strong], d[strong])
    gae = estimate(tree, "gae", gamma=1.0, lam=1.0)
    before = torch.where(tree.parent >= 0, tree.value[tree.parent.clamp(min=0)], tree.root_value[tree.group])
    torch.testing.assert_close((gae.adv + before)[tree.valid], returns(tree, 1.0)[tree.valid])
    torch.testing.assert_close(gae.returns, returns(tree, 1.0))


def test_bootstrap_continues_an_unfinished_leaf_with_its_value():
    tree = StepTree([-1, 0], [0, 0], [0, 2], [n, n], step_reward=[0.0, 0.0], value=[0.4, 0.7], root_value=[0.5])
    out = estimate(tree, "gae", ["bootstrap"], gamma=1.0, lam=1.0)
    check_close(out.adv, [0.2, 0.3])
    assert bool((estimate(tree, "grpo").adv == 0).all())


# ---- combinations that mean nothing ---------------------------------------------------------------------------------

SINGLE = StepTree([-1, 0], [0, 0], [0, 1], [n, 1.0])


def bare(tree):
    """Outcomes only."""
    return StepTree(tree.parent, tree.group, tree.status, tree.outcome)


@pytest.mark.parametrize(
    "number, call, message",
    [
        (1, lambda t: compose(t, [{"name": "grpo"}], ["delta"]), "'grpo' does not read step rewards, so those of transform 'delta'.*append the fold"),
        (2, lambda t: estimate(bare(t), "process_grpo"), "'process_grpo' needs step_reward, but every step is NaN"),
        (2, lambda t: estimate(bare(t), "capo"), r"'capo' needs tags\['wrong'\]"),
        (1, lambda t: estimate(t, "pav", ["gate"]), "'pav' does not read step rewards, so those of transform 'gate'.*append the fold"),
        (1, lambda t: estimate(t, "stepsearch", ["delta"]), "'stepsearch' does not read step rewards, so those of transform 'delta'"),
        (1, lambda t: estimate(t, "vsrm", ["severity"]), "'vsrm' does not read step rewards, so those of transform 'severity'"),
        (1, lambda t: estimate(t, "portool", ["delta"]), "'portool' does not read step rewards"),
        (1, lambda t: estimate(t, "grpo", ["fold", "delta"]), "'grpo' does not read step rewards, so those of transform 'delta'"),
        (1, lambda t: estimate(t, "grpo", ["delta", {"name": "mix", "dense": 0.5}]), "'grpo' does not read step rewards, so those of transform 'mix'"),
        (3, lambda t: compose(t, [{"name": "process_grpo"}], kind="value"), "'value' with 'process_grpo' sums state values.*put delta or progress"),
        (3, lambda t: compose(t, ["igpo"], kind="value"), "'value' with 'igpo' sums state values"),
        (3, lambda t: compose(t, ["grpo"], ["fold", "delta", "fold"], kind="value"), "'value' with 'fold' sums state values.*put delta or progress before it"),
        (3, lambda t: compose(t, ["process_grpo"], ["fold", "delta"], kind="value"), "'value' with 'fold' sums state values"),
        (4, lambda t: compose(t, [{"name": "gae"}], ["progress", "delta"]), "'progress' and 'delta' both difference"),
        (4, lambda t: compose(t, [{"name": "gae"}], ["red", "progress"]), "'red' and 'progress' both difference"),
        (5, lambda t: estimate(bare(t), "gae", ["potential"]), "transform 'potential' needs value on every step; step 0"),
        (5, lambda t: estimate(t, "gae", [{"name": "potential", "gamma": 0.9}]), "'potential' has gamma 0.9 and estimator 'gae' 1.0"),
        (5, lambda t: estimate(t, "gae", [{"name": "reward_machine", "machine": {}, "gamma": 0.9}]), "'reward_machine' has gamma 0.9 and estimator 'gae' 1.0"),
        (5, lambda t: estimate(t, "process_grpo", ["potential"], gamma=0.9), "'potential' has gamma 1.0 and estimator 'process_grpo' 0.9"),
        (5, lambda t: estimate(t, "gae", [{"name": "potential", "terminal": 1.0}]), "unknown key potential.terminal=1.0; transform 'potential' takes gamma"),
        (6, lambda t: estimate(bare(t), "gigpo"), "'gigpo' needs state_key, but every step has -1"),
        (6, lambda t: estimate(bare(t), "salt"), "'salt' needs edge_key"),
        (6, lambda t: estimate(t.replace(ok=None), "ui_s1"), "'ui_s1' needs ok"),
        (6, lambda t: estimate(t.replace(root_value=None), "pav"), "'pav' needs root_value.*prompt 0"),
        (7, lambda t: estimate(t, "vsrm"), "'vsrm' needs chains, but step 0 branches; take a plan that forks at the prompt alone"),
        (7, lambda t: apply_transform(t, {"name": "spa", "exact": True}), "transform 'spa' needs chains, but step 0 branches"),
        (8, lambda t: estimate(t.replace(outcome=t.outcome * 3), "grpo", scale="bernoulli"), r"'bernoulli' needs values in \[0, 1\]; step"),
        (8, lambda t: estimate(t.replace(outcome=t.outcome * 3), "ppr"), r"renorm needs outcomes in \[0, 1\], found 3"),
        (9, lambda t: estimate(SINGLE, "branch_depth"), "'branch_depth' compares steps of one prompt, but every prompt is a single chain"),
        (9, lambda t: estimate(SINGLE, "tree_rpo"), "'tree_rpo' compares steps"),
        (10, lambda t: compose(t, [{"name": "grpo"}], whiten=True), "whiten with 'grpo' .*normalises twice.*allow_double_norm"),
        (10, lambda t: compose(t, ["reinforce_pp_baseline"], whiten=True), "whiten with 'reinforce_pp_baseline' .*normalises twice"),
        (10, lambda t: compose(t, ["prime"], whiten=True), "whiten with 'prime' .*normalises twice"),
        (10, lambda t: compose(t, ["capo"], whiten=True), "whiten with 'capo' .*normalises twice"),
        (10, lambda t: compose(t, ["salt"], whiten=True), "whiten with 'salt' .*normalises twice"),
        (11, lambda t: compose(t, [{"name": "grpo"}], counting="leaf", repeats_prefix=True), "counting 'leaf' with a trainer that repeats"),
        (13, lambda t: estimate(t.replace(tags=t.tags | {"reward_source": torch.arange(8)}), "srgpo"), r"tags\['reward_source'\] has 7 values.*use step_grpo"),
        (14, lambda t: estimate(t.replace(logp=None, tags={"off_policy": torch.ones(8)}), "rapo"), "step 0 is replayed .* no behaviour logp"),
    ],
)  # fmt: skip
def test_combinations_without_meaning_name_both_and_the_fix(t8, number, call, message):
    tree = t8.replace(tags={"contribution": torch.rand(8), "implicit": torch.rand(8)})
    with pytest.raises(ValueError, match=message):
        call(tree)


def test_optimism_is_warned_of(t8):
    with pytest.warns(UserWarning, match="optimism bias"):
        estimate(t8.replace(outcome=t8.outcome * 0.7), "portool", agg="max")


def test_what_is_allowed(t8):
    compose(t8, [{"name": "grpo"}], ["delta", "fold"])
    compose(t8, [{"name": "grpo"}, {"name": "step_grpo", "weight": 0.5}], ["delta"])
    compose(t8, [{"name": "process_grpo"}], ["delta"], kind="value")
    compose(t8, ["igpo"], ["delta", "fold"], kind="value")
    compose(t8, ["grpo"], [{"name": "mixed_grained", "page": 0.5}], kind="value")  # a mean, not a sum
    compose(t8, [{"name": "portool", "w_format": 0.1}], [{"name": "clip", "eta": 0.3}])
    compose(t8, [{"name": "process_grpo", "gamma": 0.9}], [{"name": "potential", "gamma": 0.9}])
    compose(t8, [{"name": "dr_grpo"}], whiten=True)
    compose(t8, [{"name": "salt", "base": "rloo"}], whiten=True)
    whitened = compose(t8, [{"name": "grpo"}], whiten=True, allow_double_norm=True).adv[t8.valid]
    assert float(whitened.mean().abs()) < 1e-9 and float(whitened.std()) == pytest.approx(1, abs=1e-6)


def test_composition_is_the_weighted_sum(t8):
    both = compose(t8, [{"name": "grpo"}, {"name": "gigpo", "weight": 0.3, "gamma": 0.9}])
    want = estimate(t8, "grpo").adv + 0.3 * estimate(t8, "gigpo", gamma=0.9).adv
    torch.testing.assert_close(both.adv, want)
    assert [e["name"] for e in both.info["estimators"]] == ["grpo", "gigpo"] and both.info["transforms"] == []


def test_presets_by_name(t8):
    ours = estimate(t8, "grpo", preset="flow_grpo").adv
    torch.testing.assert_close(ours, estimate(t8, "grpo", ddof=0, eps=1e-4).adv)
    with pytest.raises(ValueError, match=r"grpo.preset='vrl': input should be 'verl', .* \(did you mean verl\?\)"):
        estimate(t8, "grpo", preset="vrl")


def test_batch_scale_uses_one_spread_for_all_prompts():
    outcome = torch.tensor([0.0, 1.0, 10.0, 30.0], dtype=torch.float64)
    tree = StepTree([-1] * 4, [0, 0, 1, 1], [1] * 4, outcome)
    want = torch.tensor([-0.5, 0.5, -10.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(estimate(tree, "grpo", scale="batch", eps=0.0).adv, want / want.std())
    # Flow-GRPO: numpy's std of the rewards as they are, 12.0494 here, plus 1e-4
    flow = estimate(tree, "grpo", preset="flow_grpo", scale="global_std").adv
    torch.testing.assert_close(flow, want / (outcome.std(correction=0) + 1e-4))
    check_close(flow, [-0.041496, 0.041496, -0.829911, 0.829911])


def test_process_grpo_discounts_the_later_steps(c7):
    z = estimate(c7, "step_grpo").adv
    want = [z[0] + 0.5 * z[1] + 0.25 * z[2], z[1] + 0.5 * z[2], z[2], z[3] + 0.5 * z[4], z[4], z[5] + 0.5 * z[6], z[6]]
    check_close(estimate(c7, "process_grpo", gamma=0.5).adv, want)


def test_reinforce_pp_baseline_counts_a_trajectory_once():
    """Tokens 1, 1, 6 and outcomes 0, 0, 3: centred -1, -1, 2 have std sqrt(3) over trajectories."""
    tree = StepTree([-1] * 3, [0] * 3, [1] * 3, [0.0, 0.0, 3.0], tok_start=[0, 1, 2], tok_end=[1, 2, 8])
    got = compose(tree, [{"name": "reinforce_pp_baseline", "count_by": "trajectory", "weight": 0.5}]).adv
    check_close(got, [-0.288675, -0.288675, 0.577350])
    # over tokens the mean is 10/8 and the variance (2 * 2.25^2 + 6 * 0.75^2) / 7
    check_close(estimate(tree, "reinforce_pp_baseline").adv, [-1.620185, -1.620185, 0.540062])


def tracked(trackers, prompts, rewards, size, min_count):
    """DDPO's statistics per prompt by their definition: append, then compare with the newest `size` of the prompt."""
    out = [0.0] * len(rewards)
    for name in sorted(set(prompts)):
        mine = [i for i, p in enumerate(prompts) if p == name]
        trackers[name] = (trackers.get(name, []) + [rewards[i] for i in mine])[-size:]
        known = torch.tensor(trackers[name] if len(trackers[name]) >= min_count else rewards, dtype=torch.float64)
        for i in mine:
            out[i] = float((rewards[i] - known.mean()) / (known.std(correction=0) + 1e-6))
    return out


@pytest.mark.parametrize("size, min_count, each", [(6, 4, 2), (16, 16, 3), (3, 2, 4), (5, 2, 1)])
def test_ddpo_follows_its_tracker_over_iterations(size, min_count, each):
    g = torch.Generator().manual_seed(each)
    trackers, history = {}, OutcomeHistory.of([{"name": "ddpo", "buffer": size, "min_count": min_count}])
    for _ in range(6):
        prompts = [Prompt(f"p{k}", {}) for k in torch.randperm(5, generator=g)[:3].tolist()]
        group = [k for k in range(3) for _ in range(each)]
        rewards = torch.rand(3 * each, generator=g, dtype=torch.float64)
        tree = StepTree([-1] * len(group), group, [1] * len(group), rewards)
        spec = {"name": "ddpo", "buffer": size, "min_count": min_count}
        credit = compose(tree, [spec], past=history.past(prompts))
        history.add(prompts, tree, credit)
        check_close(credit.adv, tracked(trackers, [prompts[k].id for k in group], rewards.tolist(), size, min_count))
    assert history.outcomes == {p: pytest.approx(r) for p, r in trackers.items()}


def test_ddpo_with_a_full_buffer_is_grpo_and_sees_transformed_outcomes():
    tree = StepTree([-1] * 4, [0, 0, 1, 1], [1] * 4, [0.0, 1.0, 2.0, 5.0], step_reward=[0.5, 0.0, 1.0, 0.0])
    got = estimate(tree, "ddpo", buffer=2, min_count=2).adv
    torch.testing.assert_close(got, estimate(tree, "grpo", ddof=0).adv)
    history = OutcomeHistory.of([{"name": "ddpo"}])
    prompts = [Prompt("a", {}), Prompt("b", {})]
    history.add(prompts, tree, compose(tree, ["ddpo"], ["fold"], past=history.past(prompts)))
    assert history.outcomes == {"a": [0.5, 1.0], "b": [3.0, 5.0]}
    assert OutcomeHistory.of([{"name": "grpo"}]) is None
    for options, message in (
        ({"buffer": 4}, "min_count=16 is above ddpo.buffer=4"),
        ({"buffer": 1}, "ddpo.buffer=1: input should be greater than or equal to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(tree, "ddpo", **options)
    with pytest.raises(ValueError, match="past holds outcomes of 3 prompts, the tree has 2"):
        compose(tree, ["ddpo"], past=[[1.0], [], []])


def test_a_function_of_ones_own_by_dotted_path(t8, tmp_path, monkeypatch):
    """It declares nothing, so no transform is refused beside it."""
    (tmp_path / "own_credit.py").write_text(
        "from mmrl.credit import Norm\n"
        "from mmrl.credit.steps import step_grpo\n"
        "def mine(tree, *, factor: float = 1.0):\n"
        "    credit = step_grpo(tree, how=Norm(scale='none'))\n"
        "    return credit._replace(adv=factor * credit.adv)\n"
        "def doubled(tree):\n"
        "    return tree.replace(step_reward=2 * tree.step_reward)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    got = compose(t8, [{"name": "own_credit:mine", "factor": 3.0}], ["delta", "own_credit:doubled"], kind="value").adv
    torch.testing.assert_close(got, 6 * estimate(t8, "step_grpo", ["delta"], scale="none").adv)


def test_srgpo_counts_an_outcome_once_per_step():
    """SeeNav's episode scores per step (1, 0, 0, 1, 1); no step part, as all step rewards are equal."""
    tree = StepTree([-1, -1, 1, -1, 3], [0] * 5, [1, 0, 1, 0, 1], [1.0, n, 0.0, n, 1.0], step_reward=[0.5] * 5)
    got = estimate(tree, "srgpo").adv
    check_close(got, [0.730297, -1.095445, -1.095445, 0.730297, 0.730297], 1e-5)
    assert not estimate(tree, "srgpo", w_episode=0.0).adv.any()


def test_random_sets_are_seeded_and_given_back():
    tree = random_forest(0)
    tree = tree.replace(tags={k: v for k, v in tree.tags.items() if k != "set_id"})
    a, b, c = (estimate(tree, "srgpo", set_size=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.adv, b.adv) and not torch.equal(a.adv, c.adv)
    sizes = torch.bincount(a.info["set_id"][a.info["set_id"] >= 0])
    assert bool((sizes[:-1] == 4).all()) and int(sizes.sum()) == int(tree.valid.sum())


def test_extremes_give_no_nan():
    lone = StepTree([-1], [0], [1], [1.0], step_reward=[0.5], value=[0.5], root_value=[0.5])
    cut = StepTree([-1, -1], [0, 0], [2, 2], [n, n], step_reward=[0.5, 0.2], value=[0.5, 0.1], root_value=[0.5])
    deep = 5000
    chain = StepTree(torch.arange(deep) - 1, torch.zeros(deep, dtype=torch.long), torch.arange(deep) // (deep - 1),
                     torch.where(torch.arange(deep) == deep - 1, 1.0, n), step_reward=torch.rand(deep),
                     value=torch.rand(deep), root_value=[0.5])  # fmt: skip
    wide = 100_000
    star = StepTree(torch.where(torch.arange(wide) == 0, -1, 0), torch.zeros(wide, dtype=torch.long),
                    torch.where(torch.arange(wide) == 0, 0, 1), torch.where(torch.arange(wide) == 0, n, torch.rand(wide)),
                    step_reward=torch.rand(wide), value=torch.rand(wide), root_value=[0.5])  # fmt: skip
    for name in ("grpo", "rloo", "reinforce_pp_baseline", "process_grpo", "fold_grpo", "gae", "pav", "igpo", "rapo"):
        for tree in (lone, cut, chain, star):
            out = estimate(tree, name)
            assert bool(out.adv.isfinite().all()), name
        assert bool((estimate(cut, name).adv == 0).all())
    for name in ("tree_rpo", "branch_depth", "portool", "child_minus_parent"):
        assert bool(estimate(star, name).adv.isfinite().all())


def test_all_processes_share_batch_statistics():
    """Two ranks, each with half of the prompts, through all_sum, give the advantages of one process."""
    tree = random_forest(3, groups=4, steps=60)
    halves = [tree.select((tree.group // 2) == k) for k in (0, 1)]
    cases = [("reinforce_pp_baseline", {}), ("rapo", {}), ("ddpo", {})]
    for name in names("estimators"):
        # srgpo draws its sets in one process
        if "preset" in find("estimators", name).options and name != "srgpo":
            cases += [(name, {"scale": "batch"}), (name, {"scale": "global_std"})]
    for name, options in cases:
        whole = estimate(tree, name, **options).adv
        # every call to all_sum is answered with the sum over both ranks, found by running both in step
        got = _in_step(
            lambda t, s, name=name, options=options: compose(t, [{"name": name, **options}], all_sum=s).adv, halves
        )
        for k in (0, 1):
            torch.testing.assert_close(got[k], whole[(tree.group // 2) == k], atol=1e-9, rtol=1e-9)


def _in_step(function, trees):
    """Run `function(tree, all_sum)` for every tree in a thread of its own, all_sum meeting at a barrier."""
    import threading

    barrier, shared, out = threading.Barrier(len(trees)), [None] * len(trees), [None] * len(trees)

    def work(k):
        def all_sum(x):
            shared[k] = x
            barrier.wait()
            total = torch.stack(shared).sum(0)
            barrier.wait()
            return total

        out[k] = function(trees[k], all_sum)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(trees))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return out


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
    check_close(norm(x, sets).z, [-1, 1, 0], 1e-5)
    check_close(norm(x, sets, Norm(**NORM_PRESETS["flow_grpo"])).z, [-1.223995, 1.223995, 0], 1e-6)
    lone = norm(torch.tensor([2.0]), torch.zeros(1, dtype=torch.long))
    assert lone.z.tolist() == [0] and lone.info["singleton_sets"] == 1
    assert norm(torch.tensor([2.0]), torch.zeros(1, dtype=torch.long), Norm(singleton="raw")).z.tolist() == [2]
    with pytest.raises(ValueError, match=r"'bernoulli' needs values in \[0, 1\]"):
        norm(torch.tensor([2.0, 0.0]), torch.zeros(2, dtype=torch.long), Norm(scale="bernoulli"))


def test_info_counts(t8):
    info = estimate(t8, "grpo").info
    assert info["groups"] == 1 and info["zero_spread_groups"] == 0 and info["valid_frac"] == 7 / 8


@pytest.mark.parametrize(
    "outcome, flat", [([1.0, 0.0], 0), ([1.0, 1.0], 1), ([1.0, math.nan], 1), ([math.nan] * 2, 1)]
)
def test_a_group_of_one_or_none_counts_as_one_without_spread(outcome, flat):
    status = [FINISHED if x == x else UNFINISHED for x in outcome]
    assert estimate(StepTree([-1, -1], [0, 0], status, outcome), "grpo").info["zero_spread_groups"] == flat


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: estimate(t, "grop"), r"unknown estimator 'grop' \(did you mean grpo\?\)"),
        (
            lambda t: estimate(t, "grpo", sclae="none"),
            r"unknown key grpo.sclae='none' \(did you mean scale\?\); estimator 'grpo' takes scale",
        ),
        (lambda t: estimate(t, "grpo", transforms=["clipp"]), "unknown transform 'clipp'"),
        (
            lambda t: estimate(t, "grpo", scale="max"),
            "grpo.scale='max': input should be 'std', 'none', 'loo', 'bernoulli', 'batch' or 'global_std'",
        ),
        (
            lambda t: estimate(t.replace(logp=None), "branch_depth", value="edge_softmax"),
            "needs logp on every branching step; step 0 has none",
        ),
    ],
)
def test_errors_name_the_fix(t8, call, message):
    with pytest.raises(ValueError, match=message):
        call(t8)


def test_without_splits_branch_depth_is_plain_grpo():
    """Chains of one length: every depth holds the same outcomes, so depth-wise and group-wise agree."""
    steps, count = 5, 6
    g = torch.Generator().manual_seed(0)
    index = torch.arange(steps * count)
    last = index % steps == steps - 1
    outcome = torch.where(last, torch.rand(steps * count, generator=g), torch.nan)
    tree = StepTree(torch.where(index % steps == 0, -1, index - 1), torch.zeros_like(index), last.long(), outcome)
    grpo = estimate(tree, "grpo", eps=1e-8).adv
    for name in ("branch_depth", "tree_rpo"):
        torch.testing.assert_close(estimate(tree, name, eps=1e-8).adv, grpo)
