"""How step rewards of video agents enter advantages: the recipes configs/credit/video_*.yaml on small trees."""

import math
from pathlib import Path

import pytest
import torch
import yaml
from tiny import random_chains, random_forest

from mmrl.credit import compose
from mmrl.credit.estimate import CreditConfig
from mmrl.credit.norm import norm
from mmrl.tree import StepTree

FOLDER = Path(__file__).parents[2] / "configs" / "credit"
MODES = ["sum", "future", "random_group", "mix", "bonus", "delta", "srgpo", "ui_s1"]
NORMALISED = [m for m in MODES if m != "bonus"]  # the bonus is added as it is
# which of them compare returns: adding a constant to every step reward changes those of long trajectories more
BY_RETURN = {"future", "mix", "ui_s1"}


def credit(mode, tree):
    section = CreditConfig.model_validate(yaml.safe_load((FOLDER / f"video_{mode}.yaml").read_text())["credit"])
    return compose(tree, [e.spec for e in section.estimators], section.transforms or [], whiten=section.whiten)


def chains(lengths, outcomes, rewards, groups=None, observed=1):
    """Independent responses; between two turns lie `observed` tokens of no step, and every turn has two of its own."""
    parent, group, status, outcome, start = [], [], [], [], []
    for c, length in enumerate(lengths):
        for k in range(length):
            parent.append(len(parent) - 1 if k else -1)
            group.append(groups[c] if groups else 0)
            status.append(0 if k < length - 1 else 1)
            outcome.append(outcomes[c] if k == length - 1 else math.nan)
            start.append((2 + observed) * len(start) + observed)
    start = torch.tensor(start)
    return StepTree(
        parent, group, status, outcome, step_reward=rewards, ok=[True] * len(parent), tok_start=start,
        tok_end=start + 2, root_value=torch.zeros(max(group) + 1),
    )  # fmt: skip


def ragged(shift=0.0, bonus=0.0):
    """Lengths 2, 3, 3; outcomes 1, 0, 1."""
    rewards = torch.tensor([0.5, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]) + bonus
    return chains([2, 3, 3], [1.0 + shift, 0.0 + shift, 1.0 + shift], rewards)


def check_close(got, want):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=torch.float64), atol=1e-4, rtol=0)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_sum_is_video_com_s_group():
    tree = chains([2, 1, 3, 1], [1.75, 0.75, 1.0, 0.0], None)
    check_close(credit("sum", tree).adv, [1.2123] * 2 + [-0.1732] + [0.1732] * 3 + [-1.2123])


def test_future_compares_the_same_turn():
    tree = chains([4, 1, 1, 1], [0.0] * 4, [1, 1, 1, 1, 1.0, 0.55, 1.5])
    check_close(credit("future", tree).adv[[0, 4, 5, 6]], [1.1127, -0.3997, -1.1775, 0.4645])
    check_close(credit("future", tree).adv[1:4], [0.0] * 3)  # nobody else has a second turn
    two = chains([2, 2], [0.0, 0.0], [1.0, 1.0, 0.0, 0.0])  # G: 1.5, 1 and 0, 0
    check_close(credit("future", two).adv, [0.7071, 0.7071, -0.7071, -0.7071])


def test_random_group_is_immediate():
    tree = ragged()
    z = norm(tree.step_reward, torch.zeros(8, dtype=torch.long)).z  # eight turns fit into one set of 16
    check_close(credit("random_group", tree).adv, z)


def test_mix_is_the_weighted_sum():
    tree = ragged()
    episode = compose(tree, [{"name": "grpo"}]).adv
    check_close(credit("mix", tree).adv, episode + credit("future", tree).adv)
    per_step = torch.tensor([0.72457, 0.72457, -1.20761, -1.20761, -1.20761, 0.72457, 0.72457, 0.72457])
    check_close(credit("srgpo", tree).adv, per_step + 0.5 * credit("random_group", tree).adv)
    scores = norm(tree.step_reward, tree.group).z
    check_close(credit("ui_s1", tree).adv, scores + credit("future", tree).adv)


def test_bonus_is_added_as_it_is():
    tree = chains([4, 2], [1.0, 0.0], [0.5, -0.05, -0.1, 0.5, -0.1, math.nan])
    want = [0.7071 + c for c in (0.5, -0.05, -0.1, 0.5)] + [-0.7071 - 0.1, -0.7071]
    check_close(credit("bonus", tree).adv, want)


def test_delta_telescopes():
    p = [[0.2, 0.2, 0.4, 0.8], [0.0, 0.6]]
    increments = [b - a for path in p for a, b in zip([0.0, *path], path, strict=False)]
    tree = chains([4, 2], [0.0, 0.0], increments)
    r = torch.tensor(increments)
    z = (r - r.mean()) / (r.std() + 1e-6)
    want = [float(z[k:4].sum()) for k in range(4)] + [float(z[4:].sum()), float(z[5])]
    check_close(credit("delta", tree).adv, want)
    scores = tree.replace(step_reward=torch.tensor([x for path in p for x in path]))
    red = compose(scores, [{"name": "process_grpo"}], ["red"], kind="value")  # of a model that scores the state
    check_close(red.adv, want)


# ---- invariants -----------------------------------------------------------------------------------------------------


def test_sum_gives_all_tokens_of_a_response_the_same():
    tree = ragged()
    adv = credit("sum", tree).adv
    assert adv[:2].unique().numel() == adv[2:5].unique().numel() == adv[5:].unique().numel() == 1


@pytest.mark.parametrize("mode", MODES)
def test_observations_get_nothing(mode):
    tree = ragged()
    owner = tree.step_of_action(24)
    adv = credit(mode, tree).adv
    tokens = torch.where(owner >= 0, adv[owner.clamp(min=0)], 0.0)
    assert (owner < 0).tolist() == [True, False, False] * 8
    assert not tokens[owner < 0].any() and tokens[owner >= 0].count_nonzero() == 2 * adv.count_nonzero()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reward", [0.0, 0.1 + 0.2, 1e6])
def test_equal_rewards_give_nothing(mode, reward):
    steps = 0.0 if mode == "bonus" else reward
    assert not credit(mode, chains([3, 3, 3], [reward] * 3, [steps] * 9)).adv.any()


@pytest.mark.parametrize("mode", ["sum", "future", "mix"])
def test_groups_of_one_give_nothing(mode):
    assert not credit(mode, chains([3, 2], [0.3, 0.9], [0.1, 0.9, 0.4, 0.2, 0.7], groups=[0, 1])).adv.any()


@pytest.mark.parametrize("mode", MODES)
def test_the_outcome_of_a_group_of_one_gives_nothing(mode):
    """What is left there comes from comparing turns with one another, or is the bonus."""
    low, high = (credit(mode, chains([3], [r], [0.1, 0.9, 0.4])).adv for r in (0.0, 5.0))
    check_close(low, high)


@pytest.mark.parametrize("mode", MODES)
def test_a_constant_on_every_outcome_changes_nothing(mode):
    check_close(credit(mode, ragged(shift=3.0)).adv, credit(mode, ragged()).adv)


@pytest.mark.parametrize("mode", NORMALISED)
def test_a_constant_on_every_step_reward_changes_nothing(mode):
    if mode in BY_RETURN:
        pair = [chains([3, 3], [1.0, 0.0], torch.tensor([0.0, 1, 0, 1, 1, 0]) + c) for c in (0.0, 2.0)]
    else:
        pair = [ragged(), ragged(bonus=2.0)]
    check_close(credit(mode, pair[1]).adv, credit(mode, pair[0]).adv)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_any_lengths_and_branches(mode, seed):
    """Ragged chains and trees: finite, 0 off the finished paths, and no turn is met by a later one's place."""
    for tree in (random_chains(seed), random_forest(seed)):
        tags = {k: v for k, v in tree.tags.items() if k != "set_id"}
        out = credit(mode, tree.replace(tags=tags))
        assert out.adv.shape == (len(tree),) and bool(out.adv.isfinite().all())
        assert not out.adv[~out.valid].any()


@pytest.mark.parametrize("mode", ["sum", "future", "mix", "delta", "ui_s1"])
def test_a_second_question_changes_nothing(mode):
    one = ragged()
    two = StepTree.concatenate([one, chains([1, 2], [5.0, -5.0], [3.0, 0.0, 9.0])])
    check_close(credit(mode, two).adv[:8], credit(mode, one).adv)


def test_a_short_response_leaves_the_others_alone():
    """Where one response ended early, the later turns are compared among the rest only."""
    tree, without = ragged(), chains([3, 3], [0.0, 1.0], [0, 1.0, 0, 1.0, 0, 1.0])
    check_close(credit("future", tree).adv[[4, 7]], credit("future", without).adv[[2, 5]])
