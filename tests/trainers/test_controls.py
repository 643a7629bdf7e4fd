"""Rewards that compare with another prompt's answers: those are sampled beside, and nothing is trained on them."""

import json

import pytest
import torch
from tiny import recipe

from mmrl.config import ConfigError, parse_config
from mmrl.recipe import RewardConfig
from mmrl.rollout import Prompt
from mmrl.task import build_reward
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.stored import store_rollouts


class Contrast:
    """Mean brightness against that of the next class; even classes have nothing to compare with."""

    def __init__(self):
        self.calls = []

    def controls(self, prompts):
        odd = [p for p in prompts if p.inputs["label"] % 2]
        return [Prompt(f"{p.id}/twin", {"label": (p.inputs["label"] + 1) % 10}) for p in odd]

    def __call__(self, samples, controls=()):
        self.calls.append((samples, controls))
        return [float(s.output.mean()) for s in samples]


def trainer(model, output, **sections):
    """One with a plain reward beside the comparing one, which reward and trainer are returned."""
    config = parse_config(recipe(model, output, plan={0: 6}, run={"iterations": 1, "eval_every": 1}, **sections))
    seen, contrast = [], Contrast()

    def plain(samples):
        seen.append([s.prompt.id for s in samples])
        return [0.0] * len(samples)

    return BranchGrpo(config, rewards={"contrast": (contrast, 1.0), "plain": (plain, 1.0)}), contrast, seen


def test_controls_are_sampled_half_as_often_and_never_trained_on(tiny_model, tmp_path):
    t, contrast, seen = trainer(tiny_model, tmp_path / "r")
    prompts = t.run.task.prompts[:3]
    rollout = t.run.rewarded(prompts, 0)
    ((samples, controls),) = contrast.calls
    assert [s.prompt.id for s in controls] == ["class-1/twin"] * 3
    assert len({float(s.output.sum()) for s in controls}) == 3
    assert [p.id for p in rollout.prompts] == ["class-0", "class-1", "class-2"]
    assert len(samples) == 18 and seen == [[s.prompt.id for s in samples]]
    assert t.run.meter.cost["leaves"] == 18 and t.run.meter.cost["calls"] == (18 + 3) * 5 + 3 + 1


def test_others_are_sampled_as_without(tiny_model, tmp_path):
    """What a prompt draws depends on nothing beside it."""
    t, _, _ = trainer(tiny_model, tmp_path / "r")
    prompts = t.run.task.prompts[:2]
    plain = t.policy.rollout(prompts, t.run.plan, seed=0)
    assert torch.equal(t.run.rewarded(prompts, 0).actions.payload["latent"], plain.actions.payload["latent"])


def test_a_run_evaluates_without_controls(tiny_model, tmp_path):
    t, contrast, _ = trainer(tiny_model, tmp_path / "r")
    t.train()
    first, *training, last = contrast.calls
    assert not first[1] and not last[1] and len(training) == 1 and training[0][1]
    row = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[1])
    assert row["reward/std"] > 0 and row["reward/plain"] == 0


def test_stored_rollouts_have_none(tiny_model, tmp_path):
    t, _, _ = trainer(tiny_model, tmp_path / "a", rewards=[{"name": "tiny:constant", "timeout_s": 0}])
    store_rollouts(t.run, tmp_path / "disk", 1)
    same, contrast, _ = trainer(tiny_model, tmp_path / "b", rollouts=str(tmp_path / "disk"))
    same.sample(0)  # the outcomes stored hold the comparison
    assert not contrast.calls
    file = tmp_path / "disk" / "recipe.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rewards": []}))
    with pytest.raises(ConfigError, match="rewards: contrast compares with prompts that stored rollouts do not have"):
        trainer(tiny_model, tmp_path / "c", rollouts=str(tmp_path / "disk"))[0].sample(0)


def test_a_process_apart_is_refused():
    with pytest.raises(ConfigError, match=r"rewards\.0: temporal_contrast compares with other prompts"):
        build_reward(RewardConfig(name="temporal_contrast", timeout_s=5), "rewards.0")
