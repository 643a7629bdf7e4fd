"""Several rewards, each normalised among the samples of a prompt before they are added."""

import math

import pytest
import torch
from tiny import brightness, recipe

from mmrl.config import ConfigError, parse_config
from mmrl.credit.norm import group_scaled_sum
from mmrl.trainers.branch_grpo import BranchGrpo


def total(a, b, group, weights=(1.0, 1.0)):
    parts = [torch.tensor(x, dtype=torch.float64) for x in (a, b)]
    return group_scaled_sum(list(zip(parts, weights, strict=True)), torch.tensor(group))


def test_worked_numbers():
    """Prompt 0: a (0, 1, 3) has mean 4/3 and std 1.527525, b (10, 30, 20) mean 20 and std 10; prompt 1: a has no spread."""
    got = total([0.0, 1.0, 3.0, 5.0, 5.0], [10.0, 30.0, 20.0, 1.0, 2.0], [0, 0, 0, 1, 1], (1.0, 0.5))
    a = [-0.872872, -0.218218, 1.091089]
    want = [a[0] - 0.5, a[1] + 0.5, a[2], -0.353553, 0.353553]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=2e-4, rtol=0)


def test_a_reward_a_thousand_times_as_large_changes_nothing():
    small = total([0.0, 1.0, 3.0], [1.0, 3.0, 2.0], [0, 0, 0])
    large = total([0.0, 1.0, 3.0], [1000.0, 3000.0, 2000.0], [0, 0, 0])
    torch.testing.assert_close(small, large, atol=1e-3, rtol=0)


def test_a_sample_without_a_reward_leaves_the_others_statistics():
    got = total([0.0, 1.0, 9.0], [1.0, 3.0, math.nan], [0, 0, 0])
    assert bool(got[2].isnan()) and got[:2].tolist() == pytest.approx([-(2**0.5), 2**0.5], abs=1e-3)


def dark(samples):
    return [-1000 * x for x in brightness(samples)]


def test_a_run_logs_rewards_as_they_are_and_learns_from_the_scaled_sum(tiny_model, tmp_path):
    """Two rewards that oppose each other, one a thousand times as large: scaled, the heavier weight decides."""
    rewards = [{"name": "tiny:brightness", "timeout_s": 0, "weight": 2.0},
               {"name": "test_reward_scale:dark", "timeout_s": 0}]  # fmt: skip
    trainers = [
        BranchGrpo(parse_config(recipe(tiny_model, tmp_path / how, rewards=rewards, reward_scale=how)))
        for how in ("none", "group")
    ]
    plain, scaled = (t.sample(0).tree for t in trainers)
    leaves = plain.is_finished
    for tree, sign in ((plain, -1), (scaled, 1)):
        for group in range(tree.num_groups):
            own = leaves & (tree.group == group)
            bright = -plain.outcome[own]
            assert bool(((tree.outcome[own] - tree.outcome[own].mean()) * sign * (bright - bright.mean()) >= 0).all())
    assert float(scaled.outcome[leaves].mean().abs()) < 1e-6
    names = [t.run.rewarder.names() for t in trainers]
    assert "reward_scale" not in names[0][0] and names[1][0]["reward_scale"] == "group"


def test_an_unknown_scale_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="reward_scale='prompt': input should be 'none' or 'group'"):
        parse_config(recipe(tiny_model, tmp_path, reward_scale="prompt"))
