"""Steps without a score, and tags that hold something else than a function reads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lone_chain, random_chains, random_forest

from mmrl.credit import estimate
from mmrl.credit.estimate import apply_transform
from mmrl.registry import names
from mmrl.tree import StepTree
from mmrl.tree_ops import path_sum, to_go

n = math.nan


def check_close(x, want, atol=1e-6):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0, equal_nan=True)


def transformed(tree, name, **options):
    return apply_transform(tree, {"name": name, **options})


# ---- steps without a score ------------------------------------------------------------------------------------------


def test_red_differences_to_the_nearest_scored_step():
    tree = lone_chain([0.1, n, 0.35, 0.8], root_value=[0.05])
    check_close(transformed(tree, "red").step_reward, [0.05, n, 0.25, 0.45])
    late = lone_chain([n, 0.4, n, n], root_value=[0.05])
    check_close(transformed(late, "red").step_reward, [n, 0.35, n, n])


def test_delta_differences_to_the_nearest_scored_steps_below():
    check_close(transformed(lone_chain([0.2, n, 0.5, 0.9]), "delta").step_reward, [-0.3, n, 0.5, 0])
    # 0 has the scored child 1 and the unscored child 2, which stands for its child 4 (and the leaf 5, worth 0)
    tree = StepTree([-1, 0, 0, 1, 2, 2, 4], [0] * 7, [0, 0, 0, 1, 0, 1, 1], [n, n, n, 1.0, n, 0.0, 1.0],
                    step_reward=[0.9, 0.6, n, 0.1, 0.4, 0.2, 0.3])  # fmt: skip
    reward = transformed(tree, "delta").step_reward
    check_close(reward, [0.9 - 0.6 / 3 - 0.4 / 3, 0.6, n, 0, 0.4, 0, 0])
    check_close(to_go(tree, reward.nan_to_num(0.0))[[0, 1, 4]], [0.9, 0.6, 0.4])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_sums_telescope_over_unscored_steps(seed):
    tree = random_forest(seed)
    scored = torch.rand(len(tree), generator=torch.Generator().manual_seed(seed)) < 0.6
    tree = tree.replace(step_reward=torch.where(scored, tree.step_reward, n))
    if not bool((scored & tree.valid).any()):
        return
    red = transformed(tree, "red").step_reward.nan_to_num(0.0)
    here = scored & tree.valid
    torch.testing.assert_close(path_sum(tree, red)[here], (tree.step_reward - tree.root_value[tree.group])[here])
    delta = transformed(tree, "delta").step_reward.nan_to_num(0.0)
    inner = here & ~tree.is_leaf
    torch.testing.assert_close(to_go(tree, delta)[inner], tree.step_reward[inner])


OWN_SCORE = [  # formulas of a step's own score
    ("clip", {"eta": 0.5}), ("red", {}), ("gate", {}), ("mix", {"dense": 0.5}), ("blend", {"phi": [0.1, 1.0, 0.3]}),
    ("delta", {}), ("renorm", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, options", OWN_SCORE)
def test_a_step_without_a_score_keeps_none(name, options):
    tree = random_forest(1, unfinished=0.0)
    unscored = torch.arange(len(tree)) % 3 == 0
    tree = tree.replace(step_reward=torch.where(unscored, n, tree.step_reward))
    # the leaf rewards of these two are made of outcomes alone
    read = torch.ones_like(unscored) if name not in ("delta", "renorm") else ~tree.is_leaf
    assert torch.equal(transformed(tree, name, **options).step_reward.isnan(), unscored & read)


@pytest.mark.parametrize(
    "name, options, written",
    [
        ("severity", {}, "severity"),
        ("info_gain", {}, "similarity"),
        ("spa", {}, "contribution"),
        ("tp_reward", {}, "wrong"),
    ],
)
def test_a_step_without_a_tag_gets_no_score(name, options, written):
    tree = random_forest(1, unfinished=0.0)
    unscored = torch.arange(len(tree)) % 3 == 0
    values = tree.tags[written].double()
    values[unscored] = n
    got = transformed(tree.replace(tags=tree.tags | {written: values}), name, **options).step_reward
    assert torch.equal(got.isnan(), unscored)


def test_terms_of_their_own_are_added_to_nothing():
    """Shaping must reach every step, or it would not cancel along a path."""
    tree = lone_chain([n, 0.5, n], value=[0.4, 0.7, 0.9], root_value=[0.1])
    shaped = transformed(tree, "potential")
    check_close(shaped.step_reward, [0.3, 0.8, -0.7])
    check_close(estimate(shaped, "fold_grpo").adv, [0.0, 0.0, 0.0])
    machine = {"events": ["a"], "start": "s", "edges": [["s", "a", "accept"]]}
    events = tree.replace(tags={"events": torch.tensor([[0], [1], [0]])})
    check_close(transformed(events, "reward_machine", machine=machine).step_reward, [0, 1.5, 0])
    # an auxiliary reward that is missing adds nothing; a task reward that is missing stays so
    aux = tree.replace(tags={"auxiliary": [1.0, n, 1.0]})
    check_close(transformed(aux, "blend", phi=[0.0, 1.0, 2.0]).step_reward, [n, 0.5, n])


def test_path_sums_read_zero_and_path_means_count_scored_steps():
    tree = lone_chain([0.2, n, 0.6], outcome=0.5)
    check_close(transformed(tree, "fold").outcome[-1:], [1.3])
    check_close(transformed(tree, "mixed_grained", page=0.25).outcome[-1:], [0.25 * 0.5 + 0.75 * 0.4])
    check_close(transformed(lone_chain([1.0, n, 1.0]), "spark").outcome[-1:], [1.0])
    check_close(transformed(lone_chain([1.0, n, 0.0]), "spark").outcome[-1:], [0.5])
    check_close(transformed(lone_chain([1.0, n, 1.0]), "spark", rule="all").outcome[-1:], [1.0])
    # beside a scored path: without items the page reward stands alone, without verdicts nothing is known
    two = StepTree([-1, -1], [0, 0], [1, 1], [0.5, 0.5], step_reward=[1.0, n])
    check_close(transformed(two, "mixed_grained", page=0.25).outcome, [0.875, 0.5])
    judged = transformed(two, "spark")
    assert judged.status.tolist() == [1, 2]
    check_close(judged.outcome, [1.0, n])


def test_exact_contributions_are_shared_by_the_scored_steps():
    tree = lone_chain([n] * 3, outcome=2.0, tags={"contribution": [0.2, n, 0.4], "grounded": [1, 1, 0]})
    check_close(transformed(tree, "spa", exact=True, beta=0.5).step_reward, [0.9 + 0.5, n, 1.1])


@pytest.mark.parametrize("name", names("estimators"))
def test_estimators_bear_unscored_steps(name):
    """A third of all scores is missing: every number stays finite, and such a step adds nothing to a statistic."""
    tree = random_chains(3) if name in ("prime", "vsrm") else random_forest(3)
    gone = torch.arange(len(tree)) % 3 == 1
    scores = ("wrong", "implicit", "similarity", "set_id")
    holes = {
        k: torch.where(gone.reshape(-1, *[1] * (v.ndim - 1)), n, v.double())
        for k, v in tree.tags.items()
        if k in scores
    }
    tree = tree.replace(step_reward=torch.where(gone, n, tree.step_reward), tags=tree.tags | holes)
    assert bool(estimate(tree, name).adv.isfinite().all())


def test_prime_centres_the_scored_tokens():
    """Without the unscored token in the middle the first chain is [0.1, -0.2]: the worked numbers stay."""
    tree = StepTree(
        [-1, 0, 1, -1, 3, 4, -1, 6], [0] * 8, [0, 0, 1, 0, 0, 1, 0, 1], [n, n, 1.0, n, n, 0.0, n, 1.0],
        tags={"implicit": [0.1, n, -0.2, 0.3, 0.0, 0.1, -0.1, 0.2]},
    )  # fmt: skip
    want = [-0.916667, -0.958333, -0.958333, 1.0, -0.5, -0.5, 0.583333, 1.291667]
    check_close(estimate(tree, "prime").returns, want)


# ---- tags that hold something else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, tags, message",
    [
        (("severity", {}), {"severity": [0, -1, 2]}, r"tags\['severity'\] of step 1 is -1; give a whole number from 0 to 3"),
        (("severity", {}), {"severity": [0, 4, 2]}, r"tags\['severity'\] of step 1 is 4"),
        (("severity", {"rewards": [0.0, -1.0]}), {"severity": [0, 1, 2]}, r"of step 2 is 2; give a whole number from 0 to 1"),
        (("severity", {}), {"severity": [0, 0.5, 2]}, r"of step 1 is 0.5"),
        (("severity", {}), {"severity": [n, n, n]}, r"tags\['severity'\] is NaN \(not scored\) on every step; score some"),
        (("tp_reward", {}), {"wrong": [[0], [1], [0]]}, r"tags\['wrong'\] has shape \(3, 1\); give one number per step, shape \(3,\)"),
        (("tp_reward", {}), {"wrong": [0, 2, 1]}, r"tags\['wrong'\] of step 1 is 2; give a whole number from 0 to 1"),
        (("blend", {}), {"auxiliary": [0.0, math.inf, 0.0]}, r"tags\['auxiliary'\] of step 1 is inf; give a finite number"),
        (("info_gain", {}), {"similarity": [0.1, 0.2, 0.3]}, r"tags\['similarity'\] has shape \(3,\); give one row per step"),
        (("redundancy", {}), {"documents": [[0, 3], [0, 1], [1, 0]]}, r"tags\['documents'\] of step 0 is \[0, 3\]"),
        (("spa", {}), {"contribution": [0.1, 0.2, 0.3], "grounded": [[1], [0], [1]]}, r"tags\['grounded'\] has shape \(3, 1\)"),
        (("attribution", {"weights": [0.5, 0.5]}), {"attribution": [[1.0], [0.0], [0.0]]}, "2 weights for the 1 columns"),
        (("contrastive", {}), {"baseline": [0.1, 0.2, n]}, "contrastive: leaf 2 has no baseline answer"),
        (("alarm", {}), {"aspect": [[0.1], [0.2], [0.3]]}, r"tags\['aspect'\] has shape \(3, 1\)"),
    ],
)  # fmt: skip
def test_tags_of_another_kind_are_refused(call, tags, message):
    name, options = call
    with pytest.raises(ValueError, match=message):
        transformed(lone_chain([0.1, 0.2, 0.3], tags=tags), name, **options)


@pytest.mark.parametrize(
    "name, tags, message",
    [
        ("capo", {"wrong": [0.0, 0.3, 1.0]}, r"tags\['wrong'\] of step 1 is 0.3"),
        ("tp_grpo", {"wrong": [n, n, n]}, r"tags\['wrong'\] is NaN"),
        ("oprl", {"implicit": [[0.1], [0.2], [0.3]]}, r"tags\['implicit'\] has shape \(3, 1\)"),
        ("prime", {"implicit": [n, n, n]}, r"tags\['implicit'\] is NaN"),
        ("srgpo", {"set_id": [[0], [0], [0]]}, r"tags\['set_id'\] has shape"),
        ("srgpo", {"reward_source": [[0], [0], [0]]}, r"tags\['reward_source'\] has shape"),
        ("spark", {"format_ok": [1, 2, 1]}, r"tags\['format_ok'\] of step 1 is 2"),
        ("rapo", {"off_policy": [0, 7, 0]}, r"tags\['off_policy'\] of step 1 is 7"),
    ],
)
def test_estimators_refuse_tags_of_another_kind(name, tags, message):
    with pytest.raises(ValueError, match=message):
        estimate(lone_chain([0.1, 0.2, 0.3], tags=tags), name)


def test_what_an_unfinished_path_holds_does_not_matter():
    tree = StepTree([-1, -1], [0, 0], [1, 2], [1.0, n], tags={"severity": [1, -1]})
    check_close(transformed(tree, "severity").step_reward, [-1.0, 0.0])
