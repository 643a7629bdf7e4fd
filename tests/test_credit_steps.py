"""Step rewards by hand: thoughts (runs of equal verdicts), search turns, blended rewards."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import lone_chain, random_chains, random_forest

from mmrl.credit import compose, estimate
from mmrl.credit.estimate import apply_transform
from mmrl.tree import StepTree
from mmrl.tree_ops import path_sum

n = math.nan


def check_close(x, want, atol=1e-6):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0, equal_nan=True)


def transformed(tree, name, **options):
    return apply_transform(tree, {"name": name, **options})


# ---- thoughts -------------------------------------------------------------------------------------------------------

# one right answer with the verdicts right right wrong wrong right beside a failed one with a right step
THOUGHTS = StepTree(
    [-1, 0, 1, 2, 3, -1], [0] * 6, [0, 0, 0, 0, 1, 1], [n, n, n, n, 1.0, 0.0],
    tags={"wrong": torch.tensor([0, 0, 1, 1, 0, 0])},
)  # fmt: skip


def split(tree, step):
    """The forest with one step cut in two halves that look alike; the second one keeps what followed."""
    last = len(tree)
    again = torch.cat([torch.arange(last), torch.tensor([step])])
    parent = torch.where(tree.parent == step, last, tree.parent)
    status, outcome = tree.status[again].clone(), tree.outcome[again].clone()
    status[step], outcome[step] = 0, n
    return StepTree(
        torch.cat([parent, torch.tensor([step])]), tree.group[again], status, outcome, value=tree.value[again],
        root_value=tree.root_value, tags={k: v[again] for k, v in tree.tags.items()},
    )  # fmt: skip


def test_a_thought_earns_one_reward():
    check_close(transformed(THOUGHTS, "tp_reward").step_reward, [0.5, 0.5, -0.25, -0.25, 1.0, 0.25])
    cut = split(THOUGHTS, 0)
    third = 1 / 3
    in_old_order = transformed(cut, "tp_reward").step_reward[torch.argsort(cut.order)]
    check_close(in_old_order, [third, third, -0.25, -0.25, 1.0, 0.25, third])


def test_tp_grpo_by_hand():
    """Thoughts 1, -.5, 1 and .25 with mean .4375 and std .718070, each given to all its steps, nothing accumulated."""
    want = [0.783350, 0.783350, -1.305583, -1.305583, 0.783350, -0.261117]
    check_close(estimate(THOUGHTS, "tp_grpo", eps=0.0).adv, want)


def test_an_unjudged_step_belongs_to_the_thought_before_it():
    tree = THOUGHTS.replace(tags={"wrong": [0.0, n, 0.0, 1.0, 0.0, 0.0]})
    check_close(transformed(tree, "tp_reward").step_reward, [0.5, n, 0.5, -0.5, 1.0, 0.25])
    adv = estimate(tree, "tp_grpo", eps=0.0).adv
    check_close(adv, [0.783350, 0, 0.783350, -1.305583, 0.783350, -0.261117])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), step=st.integers(0, 19))
@pytest.mark.parametrize("make", [random_forest, random_chains])
def test_cutting_a_step_in_two_changes_no_thought(make, seed, step):
    tree = make(seed)
    cut = split(tree, min(step, len(tree) - 1))
    before, after = transformed(tree, "tp_reward"), transformed(cut, "tp_reward")
    # what the trajectories through a step earn together, from its place on to their ends
    sums, sums_cut = (t.accumulate(t.leaves_below * t.step_reward) for t in (before, after))
    first, first_cut = tree.parent < 0, cut.parent < 0
    totals, totals_cut = (
        torch.zeros(tree.num_groups, dtype=torch.float64).index_add_(0, t.group[at], x[at])
        for t, at, x in ((tree, first, sums), (cut, first_cut, sums_cut))
    )
    torch.testing.assert_close(totals_cut, totals)
    if make is random_chains:
        leaf, leaf_cut = tree.is_finished, cut.is_finished
        paths = path_sum(tree, before.step_reward)[leaf].sort().values
        torch.testing.assert_close(path_sum(cut, after.step_reward)[leaf_cut].sort().values, paths)
    adv = estimate(cut, "tp_grpo").adv[torch.argsort(cut.order)]
    torch.testing.assert_close(adv[:-1], estimate(tree, "tp_grpo").adv)
    torch.testing.assert_close(adv[-1], adv[min(step, len(tree) - 1)])


# ---- sources of step rewards, by hand -------------------------------------------------------------------------------


def search():
    """Two turns: the second finds nothing new about the first gold text and reads an old document again."""
    return lone_chain(
        [n, n], outcome=0.5, value=[0.4, 0.0], root_value=[0.3],
        tags={"similarity": [[0.5, 0.1], [0.4, 0.7]], "documents": [[1, 1, 0], [1, 0, 1]]},
    )  # fmt: skip


def test_stepsearch_takes_redundancy_from_the_gain():
    """Gains (.5 + .1)/2 and .6/2, redundancy 0 and 1/2."""
    check_close(transformed(search(), "stepsearch", scale=0.6).step_reward, [0.18, 0.6 * (0.3 - 0.5)])
    # gae with gamma = lam = 1: reward to go plus outcome, minus the value before
    check_close(estimate(search(), "stepsearch").adv, [0.18 - 0.12 + 0.5 - 0.3, -0.12 + 0.5 - 0.4])


def test_blend_by_hand():
    tree = lone_chain([0.2, 0.5], tags={"auxiliary": [1.0, -1.0]})
    check_close(transformed(tree, "blend", phi=[0.1, 2.0, 0.5]).step_reward, [1.0, 0.6])
    two = compose(tree, ["step_grpo"], [{"name": "blend", "phi": [0.0, 1.0, 0.5]}]).adv  # .7 and 0
    check_close(two, [0.707105, -0.707105], 1e-5)
