"""A step scorer that learns along with the policy, and the transforms a trained scorer brings."""

import pytest
import torch
from families import family_folder, saved_prm

from mmrl.config import ConfigError, parse_config
from mmrl.rollout import BranchPlan, Prompt
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.tree import FINISHED
from vision.policy import VisionPolicy
from vision.prm import VisionPrm

FOLDER = str(family_folder("text"))
PRM = str(saved_prm("text"))


class Words:
    prompts = tuple(Prompt(f"p{i}", {"question": f"{i}?"}) for i in range(4))
    eval_prompts = prompts[:1]
    rewards = ()

    def judges(self, samples):
        return {}


def config(tmp_path, **sections):
    return parse_config({
        "task": {"name": "words"}, "policy": {"name": "vision"}, "plan": {0: 4},
        "step_rewards": [{"name": "vision_prm", "model": PRM}], "credit": {"estimators": [{"name": "process_grpo"}]},
        "run": {"output": str(tmp_path), "iterations": 2, "prompts_per_iteration": 2, "cpu": True, "trackers": []},
    } | sections)  # fmt: skip


def trainer(tmp_path, **sections):
    policy = VisionPolicy.build(model=FOLDER, max_new_tokens=8, max_steps=4)
    rewards = {"longer": (lambda samples: [float(len(s.output) > 8) for s in samples], 1.0)}
    return BranchGrpo(config(tmp_path, **sections), policy, Words(), rewards)


def test_a_trained_scorer_brings_clip_and_delta(tmp_path):
    assert [t if isinstance(t, str) else t["name"] for t in trainer(tmp_path / "a")._transforms] == ["clip", "delta"]
    named = {"estimators": [{"name": "process_grpo"}], "transforms": []}
    assert trainer(tmp_path / "b", credit=named)._transforms == []


def test_increments_are_neither_clipped_nor_differenced(tmp_path):
    section = {"name": "vision", "model": FOLDER, "max_new_tokens": 8, "max_steps": 4}
    implicit = {"name": "mmrl.scorers.implicit:ImplicitPrm.build", "policy": section}
    assert trainer(tmp_path, step_rewards=[implicit])._transforms == []


def test_online_updates_move_the_scorer_and_lower_its_loss(tmp_path):
    t = trainer(tmp_path, online={"scorer": "vision_prm", "lr": 3e-3, "spread": True})
    online = t.run.rewarder.online
    rollout = t.policy.rollout(Words.prompts, BranchPlan({0: 2, 1: 2}), seed=0)
    tree = rollout.tree
    outcome = torch.where(tree.is_leaf, (torch.arange(len(tree)) % 2).double(), torch.nan)
    status = torch.where(tree.is_leaf, torch.tensor(FINISHED, dtype=tree.status.dtype), tree.status)
    rollout = rollout.with_tree(tree.replace(outcome=outcome, status=status))
    label = online.labels(rollout)
    for v in range(len(tree)):
        below = [u for u in range(len(tree)) if tree.is_leaf[u] and v in path_to(tree.parent.tolist(), u)]
        assert label[v] == pytest.approx(float(outcome[below].mean()))
    losses = [online.update(rollout)["online/loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.02
    online.config.spread = False
    assert bool((online.labels(rollout).isnan() == ~tree.is_leaf).all())


def path_to(parent, v):
    out = [v]
    while parent[out[-1]] >= 0:
        out.append(parent[out[-1]])
    return out


def test_a_run_trains_both_and_resumes(tmp_path):
    online = {"online": {"scorer": "vision_prm", "lr": 1e-3}}
    metrics = trainer(tmp_path / "r", **online).train()
    assert metrics["online/loss"] > 0 and "step_reward/vision_prm" in metrics
    whole = trainer(tmp_path / "w", **online)
    whole.train()
    run = whole.config.run.model_dump(mode="json") | {"output": str(tmp_path / "cut")}
    trainer(tmp_path, **online, run=run | {"iterations": 1}).train()
    again = trainer(tmp_path, **online, run=run | {"resume": True})
    again.train()
    for a, b in zip(
        whole.run.rewarder.online.scorer.model.parameters(),
        again.run.rewarder.online.scorer.model.parameters(),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_what_cannot_learn_along_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no trainable step reward or reading; trainable here: vision_prm"):
        trainer(tmp_path / "a", online={"scorer": "other"})
    frozen = VisionPrm.build(model=FOLDER)
    for p in frozen.model.parameters():
        p.requires_grad_(False)
    t = trainer(tmp_path / "b")
    from mmrl.trainers.online import OnlineConfig, OnlineScorer

    with pytest.raises(ConfigError, match="no trainable parameter"):
        OnlineScorer(frozen, t.loop, OnlineConfig(scorer="vision_prm"))
