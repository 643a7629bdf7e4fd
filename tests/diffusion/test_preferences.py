"""Pairs and presets of denoising preferences: thresholds that rise with noise, and who may name them."""

import math

import pytest
import torch
from tiny import recipe

from diffusion.preferences import dynamic_threshold
from mmrl.config import parse_config
from mmrl.preference import build_pairs
from mmrl.registry import ComponentError, find
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer
from mmrl.tree import StepTree

# standard deviations of DDIM-eta with 20 steps, t = 1, 51, ..., 951
STDS = [.0206, .0406, .1673, .2144, .2509, .2836, .3144, .3442, .3732, .4016, .4293, .4565, .4829, .5087, .5336,
        .5576, .5807, .6029, .6241, .6444]  # fmt: skip


@pytest.fixture
def forks():
    """A first fork (0, 1) and a last one (2, 3) with one gap of .4."""
    rewards = [0.0, 0.4, 0.4, 0.0, math.nan]
    tags = {"std": torch.tensor([1.0, 1.0, 0.1, 0.1, 0.1])}
    return StepTree([-1, -1, 0, 0, 1], [0] * 5, [0, 0, 2, 2, 2], [math.nan] * 5, step_reward=rewards, tags=tags)


def test_dynamic_thresholds_of_lpo():
    std = torch.tensor(STDS, dtype=torch.float64)
    at = [0, 1, 2, 5, 10, 15, 19]
    want = torch.tensor([0.35, 0.3548, 0.3853, 0.4132, 0.4483, 0.4791, 0.5], dtype=torch.float64)
    torch.testing.assert_close(dynamic_threshold(std, 0.35, 0.5)[at], want, atol=5e-5, rtol=0)
    torch.testing.assert_close(dynamic_threshold(std, 0.45, 0.6)[at], want + 0.1, atol=5e-5, rtol=0)
    assert dynamic_threshold(torch.ones(2), 0.35, 0.5).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("noise", ["depth", "std"])
def test_noisy_steps_must_differ_more(forks, noise):
    """Only the quiet fork passes [.3, .5]."""
    options = {"by": "step_reward", "threshold": [0.3, 0.5], "noise": noise}
    got = build_pairs(forks, "noise_extremes", options)
    assert got.chosen.tolist() == [2] and got.rejected.tolist() == [3] and got.counts["below_threshold"] == 1


def test_one_threshold_is_that_of_extremes(forks):
    options = {"by": "step_reward", "squash": True, "threshold": 0.1, "last_depth": 0}
    ours, core = (build_pairs(forks, name, options) for name in ("noise_extremes", "extremes"))
    assert ours.chosen.tolist() == core.chosen.tolist() == [1] and torch.equal(ours.gap, core.gap)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"threshold": [0.5, 0.3]}, "low <= high"),
        ({"threshold": [0.3, 0.5], "noise": "std", "by": "tags.mine"}, "has no tag 'std'"),
        ({"spread": "std"}, "unknown key pairs.spread='std'"),
    ],
)
def test_pairs_that_cannot_be_built(options, message):
    tags = {"mine": torch.tensor([0.0, 1.0])}
    bare = StepTree([-1, -1], [0, 0], [1, 1], [0.0, 1.0], tags=tags)
    with pytest.raises((ValueError, ComponentError), match=message):
        build_pairs(bare, "noise_extremes", options)


@pytest.mark.parametrize(
    "options, reads",
    [
        ({"by": "tags.mine", "noise": "std", "threshold": [0.1, 0.2]}, "forks tags.mine tags.std"),
        ({"by": "step_reward", "noise": "std"}, "forks step_reward"),
        ({}, "forks outcome"),
    ],
)
def test_pairs_declare_what_they_read(options, reads):
    assert " ".join(find("pairs", "noise_extremes").reads(options)) == reads


@pytest.mark.parametrize("loss", ["lpo", "spo"])
def test_a_policy_of_texts_is_refused_before_it_is_made(tmp_path, loss):
    """Their beta and clip range are for log-probs that are means over a latent."""
    tree = recipe(tmp_path / "none", tmp_path, loss={"name": loss, "kl": None}, pairs={"name": "extremes"})
    tree["loss"].pop("kl")
    tree |= {"trainer": "step_preference", "policy": {"name": "vision", "model": "not loaded"}}
    message = f"loss: preference loss '{loss}' needs the protocol NoisePredictor .*those that do: diffusion$"
    with pytest.raises(ComponentError, match=message):
        StepPreferenceTrainer(parse_config(tree, model=StepPreferenceConfig))
