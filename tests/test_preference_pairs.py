"""Pairs from trees: which steps each builder compares, on trees small enough to check by eye."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import flatten, random_forest

from mmrl.preference import (
    Pairs,
    build_pairs,
    fork_of,
    segment_steps,
    select_steps,
)
from mmrl.registry import ComponentError, build, find, names
from mmrl.registry import rows as rows_of
from mmrl.tree import StepTree

n = math.nan


def tree(parent, outcome, group=None, **more):
    """A tree whose leaves have the given outcomes (NaN: unfinished); inner steps have None."""
    inner = set(parent)
    status = [0 if i in inner else (2 if o != o else 1) for i, o in enumerate(outcome)]
    return StepTree(parent, group or [0] * len(parent), status, outcome, **more)


def candidates(scores, **more):
    """Steps after one state, with step rewards."""
    return tree([-1] * len(scores), [n] * len(scores), step_reward=scores, **more)


def rows(pairs):
    return list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))


def ends(pairs):
    return list(zip(pairs.chosen_end.tolist(), pairs.rejected_end.tolist(), strict=True))


@pytest.fixture
def fork():
    """Steps 0 and 1 after the prompt; 2, 3 after 0; 4, 5 after 1. Leaves 1, 0, 0, 0.2: values .5 and .1."""
    return tree([-1, -1, 0, 0, 1, 1], [n, n, 1.0, 0.0, 0.0, 0.2])


# --- builders ----------------------------------------------------------------------------------------------------


def test_siblings_takes_every_pair_above_the_threshold():
    t = candidates([0.2, 0.9, 0.5, 0.5])
    got = build_pairs(t, "siblings", {"by": "step_reward", "threshold": 0.35})
    assert rows(got) == [(1, 2), (1, 3), (1, 0)]
    torch.testing.assert_close(got.gap, torch.tensor([0.4, 0.4, 0.7]))
    assert got.counts == {"forks": 1, "unscored": 0, "equal": 1, "below_threshold": 2}


def test_lpo_picks_best_and_worst_by_softmax_difference():
    t = candidates([20.1, 19.3, 20.9, 19.8])
    options = {"by": "step_reward", "squash": True}
    got = build_pairs(t, "extremes", {**options, "threshold": 0.6})
    assert rows(got) == [(2, 1)] and float(got.gap) == pytest.approx(0.664037, abs=1e-6)
    assert not len(build_pairs(t, "extremes", {**options, "threshold": 0.67}))


@pytest.mark.parametrize("tau, gap", [(0.35, 0.730888), (0.5, 1.098612), (0.6, 1.386294)])
def test_score_gap_that_a_threshold_asks_for(tau, gap):
    for extra, kept in ((1e-4, 1), (-1e-4, 0)):
        t = candidates([0.0, gap + extra])
        assert len(build_pairs(t, "extremes", {"by": "step_reward", "squash": True, "threshold": tau})) == kept


def test_depth_range():
    t = tree([-1, -1, 0, 0, 1], [n] * 5, step_reward=[0.0, 0.4, 0.4, 0.0, n])
    assert rows(build_pairs(t, "extremes", {"by": "step_reward", "first_depth": 1})) == [(2, 3)]
    assert rows(build_pairs(t, "extremes", {"by": "step_reward", "last_depth": 0})) == [(1, 0)]


def test_values_decide_contrastive_pairs():
    scores = {"by": "value", "divergence": "tags.d"}
    for values, want in (([0.2, 0.9, 0.5], [(1, 0)]), ([0.3, 0.3], [])):
        t = tree([-1] * len(values), [0.0] * len(values), value=values, tags={"d": torch.ones(len(values))})
        assert rows(build_pairs(t, "contrastive", scores)) == want


def test_contrastive_uses_the_steps_that_depend_most_on_what_is_seen():
    """Path 0, 2, 4 diverges by 1, 5, 3; each has an alternative, whose own divergence is unknown."""
    t = tree([-1, -1, 0, 0, 2, 2], [n, 0.0, n, 0.0, 1.0, 0.0], tags={"divergence": torch.tensor([1.0, n, 5, n, 3, n])})
    assert rows(build_pairs(t, "contrastive", {"k": 2})) == [(2, 3), (4, 5)]
    assert rows(build_pairs(t, "contrastive", {"k": 1})) == [(2, 3)]
    assert rows(build_pairs(t, "contrastive", {"k": 3})) == [(0, 1), (2, 3), (4, 5)]


def test_select_steps():
    assert select_steps([0.1, 0.5, 0.2, 0.5]) == [1, 3]
    assert select_steps([0.3, 0.3, 0.3], 1) == [0]
    assert select_steps([0.1, 0.2]) == [0, 1]


def test_leaves_part_at_their_fork(fork):
    got = build_pairs(fork, "leaves", {})
    assert rows(got) == [(2, 3)] and ends(got) == [(2, 3)] and float(got.gap) == 1  # both lie below step 0
    deep = tree([-1, -1, 0, 1, 2], [n, n, n, 0.3, 0.9])
    got = build_pairs(deep, "leaves", {})
    assert rows(got) == [(0, 1)] and ends(got) == [(4, 3)]
    assert got.segments(deep, "chosen")[0].tolist() == [0, 2, 4]
    assert got.segments(deep, "rejected")[0].tolist() == [1, 3]
    assert build_pairs(deep, "leaves", {"threshold": 0.7}).counts["below_threshold"] == 1


def test_first_wrong_step():
    """0 right, then 2 wrong against right 3 (.9) and 4 (.7); below the wrong 1 nothing is compared."""
    t = tree([-1, -1, 0, 0, 0, 1, 1], [n, n, 0.0, 1.0, 1.0, 0.0, 1.0],
             step_reward=[0.8, 0.1, 0.2, 0.9, 0.7, 0.1, 0.9], ok=[True, False, False, True, True, False, True])  # fmt: skip
    assert rows(build_pairs(t, "first_wrong", {"by": "step_reward"})) == [(0, 1), (3, 2)]
    assert rows(build_pairs(t, "first_wrong", {})) == [(0, 1), (3, 2)]  # by ok: the first of the right ones
    one_sided = t.replace(ok=torch.tensor([True, True, False, False, False, False, False]))
    got = build_pairs(one_sided, "first_wrong", {})
    assert not len(got) and got.counts["one_sided"] == 3
    unscored = t.replace(step_reward=torch.tensor([n, 0.1, 0.2, 0.9, 0.7, 0.1, 0.9]))
    assert rows(build_pairs(unscored, "first_wrong", {"by": "step_reward"})) == []  # an unknown prefix is not right


def test_best_path_compares_along_the_best_steps_only():
    """Q: 0 (.9) over 1 (.2); below 0: 2 (.4) over 3 (.1); below 1: 4, 5, off the path."""
    t = tree([-1, -1, 0, 0, 1, 1], [n, n, 1.0, 0.0, 1.0, 0.0], value=[0.9, 0.2, 0.4, 0.1, 0.8, 0.0])
    assert rows(build_pairs(t, "best_path", {"by": "value"})) == [(0, 1), (2, 3)]


def test_recalibrated_continuation():
    """Step 1 lowers the value (.5 -> 0) and fails below; sibling 0 reaches the right leaf 4 by 2."""
    t = tree([-1, -1, 0, 1, 2, 2], [n, n, n, 0.0, 1.0, 0.5])
    got = build_pairs(t, "recalibrated", {})
    assert rows(got)[0] == (0, 1) and ends(got)[0] == (4, 3)
    assert got.segments(t, "chosen")[0][:3].tolist() == [0, 2, 4]
    assert float(got.gap[0]) == 0.75
    # leaf 5 (.5, not right) deviates from 2, worth .75, and its right sibling is leaf 4
    assert rows(got)[1] == (4, 5)
    hopeless = tree([-1, -1], [0.0, 0.0])
    assert build_pairs(hopeless, "recalibrated", {}).counts == {"failed": 2, "one_sided": 2}


def test_recalibrated_only_where_a_solution_deviates():
    """The prompt is worth .533: the failed .6 is no deviation although 1 is better, the failed 0 is one."""
    got = build_pairs(tree([-1, -1, -1], [1.0, 0.6, 0.0]), "recalibrated", {})
    assert rows(got) == [(0, 2)] and got.counts == {"failed": 2, "one_sided": 1}


def test_recalibrated_only_against_a_right_end():
    """The prompt is worth .3 and 0 falls below it, but the better sibling ends at .6, which is not right."""
    got = build_pairs(tree([-1, -1], [0.6, 0.0]), "recalibrated", {})
    assert not len(got) and got.counts == {"failed": 2, "one_sided": 2}
    assert rows(build_pairs(tree([-1, -1], [0.6, 0.0]), "recalibrated", {"right_at": 0.6})) == [(0, 1)]


# --- properties --------------------------------------------------------------------------------------------------


@given(st.integers(0, 3000), st.sampled_from(sorted(set(names("pairs")) - {"contrastive"})))
@settings(max_examples=60, deadline=None)
def test_pairs_of_any_tree_are_siblings_with_a_gap(seed, name):
    t = random_forest(seed)
    got = build_pairs(t, name, {})  # checked inside
    assert bool((t.parent[got.chosen] == t.parent[got.rejected]).all())
    assert bool((t.group[got.chosen] == t.group[got.rejected]).all()) and bool((got.gap > 0).all())
    steps = got.steps(t)
    assert len(steps) == len(torch.unique(steps))


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_scores_moved_alike_give_the_same_pairs(seed):
    t = random_forest(seed)
    moved = t.replace(value=t.value * 2 + 3)
    for name in ("extremes", "siblings", "best_path"):
        assert rows(build_pairs(t, name, {"by": "value"})) == rows(build_pairs(moved, name, {"by": "value"}))


def test_chains_of_a_tree_give_the_same_leaf_pairs():
    """Leaves are compared alike whether their common steps are shared or written out."""
    for seed in range(10):
        t = random_forest(seed, unfinished=0.0)
        chains, source = flatten(t)
        a, b = build_pairs(t, "leaves", {}), build_pairs(chains, "leaves", {})
        assert len(a) == len(b)
        torch.testing.assert_close(a.gap, b.gap)
        assert t.outcome[a.chosen_end].tolist() == t.outcome[source[b.chosen_end]].tolist()


# --- errors ------------------------------------------------------------------------------------------------------


def made(w, l, gap=1.0):  # noqa: E741
    one = torch.ones(1)
    w, l = torch.tensor([w]), torch.tensor([l])  # noqa: E741
    return Pairs(w, l, w, l, gap * one, one)


@pytest.mark.parametrize(
    "w, l, gap, message",
    [
        (2, 4, 1.0, "pair 0: steps 2 and 4 share no parent"),
        (2, 2, 1.0, "compare a step with itself"),
        (2, 3, 0.0, r"steps 2 and 3 have equal scores \(gap 0\)"),
    ],
)
def test_bad_pairs(fork, w, l, gap, message):  # noqa: E741
    with pytest.raises(ValueError, match=message):
        made(w, l, gap).check(fork)
    assert rows(made(2, 3).check(fork).swap()) == [(3, 2)]


def test_bad_segments(fork):
    with pytest.raises(ValueError, match="segment 0: step 4 does not lie below step 0"):
        segment_steps(fork, torch.tensor([0]), torch.tensor([4]))
    with pytest.raises(ValueError, match="one lies above the other"):
        fork_of(fork, 0, 2)
    with pytest.raises(ValueError, match="belong to two prompts"):
        fork_of(tree([-1, -1], [0.0, 1.0], group=[0, 1]), 0, 1)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("extreme", {}, r"unknown pair builder 'extreme' \(did you mean extremes\?\)"),
        ("extremes", {"bye": "value"}, r"unknown key pairs.bye='value' \(did you mean by\?\)"),
        ("extremes", {"by": "values"}, r"one of outcome, best, value, .* or tags.<name> \(did you mean value\?\)"),
        ("contrastive", {"divergence": "divergence"}, "pairs.divergence='divergence': a score of steps is one of"),
        ("contrastive", {"k": 0}, "pairs.k=0: input should be greater than 0"),
        ("extremes", {"by": "step_reward"}, "no step of the rollout has one; name a step reward"),
        ("extremes", {"threshold": [0.3, 0.5]}, "pairs.threshold=.0.3, 0.5.: input should be a valid number"),
        ("first_wrong", {}, "no step of the rollout has one; mark right steps"),
        ("contrastive", {}, "has no tag 'divergence'"),
    ],
)
def test_errors(fork, name, options, message):
    with pytest.raises((ValueError, ComponentError), match=message):
        build_pairs(fork, name, options)


def test_equal_and_missing_scores_are_counted():
    """The fork after the prompt has equal scores, the one below step 0 one score only; 4 has no sibling."""
    t = tree([-1, -1, 0, 0, 1], [n] * 5, step_reward=[0.5, 0.5, 0.3, n, 0.1])
    got = build_pairs(t, "extremes", {"by": "step_reward"})
    assert not len(got) and got.counts == {"forks": 1, "unscored": 1, "equal": 1, "below_threshold": 0}
    assert got.left_out() == "0 pairs (1 forks, 1 unscored, 1 equal, 0 below threshold)"


def test_every_preset_has_a_builder():
    for row in rows_of("preferences"):
        pairs = dict(row.facts["pairs"])
        assert callable(build("pairs", "pairs", pairs.pop("name"), pairs))


@pytest.mark.parametrize(
    "name, options, reads",
    [
        ("extremes", {}, "forks outcome"),
        ("extremes", {"by": "best"}, "forks outcome"),
        ("extremes", {"by": "tags.mine"}, "forks tags.mine"),
        ("extremes", {"by": "step_reward"}, "forks step_reward"),
        ("siblings", {"by": "value"}, "forks value"),
        ("first_wrong", {}, "forks ok"),
        ("contrastive", {}, "forks outcome tags.divergence"),
        ("recalibrated", {}, "outcome forks"),
    ],
)
def test_builders_declare_what_they_read(name, options, reads):
    assert find("pairs", name).reads(options) == tuple(reads.split())


@pytest.mark.parametrize(
    "name, options, reads",
    [
        ("dpo", {}, ""),
        ("dpo", {"gamma": 0.5}, "step_reward"),
        ("full_step_dpo", {}, "step_reward"),
        ("full_step_dpo", {"gamma": 0}, ""),
        ("mcts_dpo", {}, "tags.visits"),
        ("t_reg", {"smooth_by_visits": True}, "tags.visits actions.token_reward"),
    ],
)
def test_losses_declare_what_they_read(name, options, reads):
    assert find("preferences", name).reads(options) == tuple(reads.split())
