"""Step-DPO on the shapes task: what the recipe compares, and the figures of docs/guides/step_dpo.md."""

import json
import math
from pathlib import Path

import pytest
import torch
from families import family_folder

from mmrl.config import load_config
from mmrl.trainers.step_preference import StepPreferenceTrainer

RECIPE = Path(__file__).parents[2] / "configs" / "vision" / "shapes_step_dpo.yaml"
COMMON = ["run.cpu=true", "run.trackers=[]", "run.report=false"]
TINY = [
    "run.iterations=1", "run.prompts_per_iteration=2", "task.train=8", "task.held_out=2", "policy.max_new_tokens=12",
]  # fmt: skip


def every_other(self, rollout):
    """Step rewards of a random model, which never writes a right line: 1 and 0 in turn."""
    return rollout.with_tree(rollout.tree.replace(step_reward=(torch.arange(len(rollout.tree)) % 2).double()))


def test_the_recipe_starts_at_ln_2(tmp_path, monkeypatch):
    monkeypatch.setenv("MMRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mmrl.trainers.rewarder.Rewarder.reward_steps", every_other)
    model = f"policy.model={family_folder('qwen2_5_vl')}"
    trainer = StepPreferenceTrainer(load_config(RECIPE, [*COMMON, *TINY, model, f"run.output={tmp_path / 'r'}"]))
    batch = trainer.batch(trainer.run.rollout(0))
    tree, pairs = batch.rollout.tree, batch.pairs
    assert torch.equal(tree.parent[pairs.chosen], tree.parent[pairs.rejected])
    assert bool((tree.step_reward[pairs.chosen] == 1).all() and (tree.step_reward[pairs.rejected] == 0).all())
    assert torch.equal(pairs.chosen, pairs.chosen_end) and torch.equal(pairs.rejected, pairs.rejected_end)
    told = trainer.update(batch)
    assert len(pairs) > 0 and told["policy/grad_norm"] > 0
    assert told["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told["preference/margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_step_dpo_lifts_accuracy(tmp_path):
    """Half of the recipe's iterations, about one minute of one core once the base model is made."""
    half = ["run.iterations=40", "run.eval_every=40", "task.held_out=512"]
    StepPreferenceTrainer(load_config(RECIPE, [*COMMON, *half, f"run.output={tmp_path / 'r'}"])).train()
    rows = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    first, last = (r for r in rows if "eval/accuracy" in r)
    assert 0.4 <= first["eval/accuracy"] <= 0.65
    assert last["eval/accuracy"] >= first["eval/accuracy"] + 0.1
    assert last["eval/steps"] >= first["eval/steps"] + 0.06
