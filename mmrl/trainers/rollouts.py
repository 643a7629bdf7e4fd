"""`mmrl rollouts`: a recipe in, a folder of rewarded rollouts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmrl.config import ConfigError
from mmrl.job import stamp
from mmrl.recipe import PolicyConfig, TrainingConfig
from mmrl.trainers.run import Run
from mmrl.trainers.stored import store_rollouts
from mmrl.tree import StepTree


def run_rollouts(config: TrainingConfig, out: Path) -> dict[str, Any]:
    """Store the rollouts of `run.iterations` iterations of a recipe; numbers on all of them (main process only).

    Raises:
        ConfigError: a recipe that samples nothing, or a folder with rollouts of another one.
    """
    if not isinstance(config, PolicyConfig):
        raise ConfigError(
            f"mmrl rollouts takes a recipe with a policy and a plan; trainer={config.trainer!r} has none"
        )
    run = Run(config)
    store_rollouts(run, out, config.run.iterations, model=stamp(str(config.policy.options.get("model", ""))))
    if not run.loop.is_main:
        return {}
    trees = [StepTree.load(file.parent) for file in sorted(out.glob("[!.]*/rollout.json"))]
    outcomes = [outcome for tree in trees for outcome in tree.outcome[tree.is_finished].tolist()]
    return {
        "rollouts": len(trees),
        "prompts": sum(tree.num_groups for tree in trees),
        "leaves": sum(int(tree.is_leaf.sum()) for tree in trees),
        "reward": sum(outcomes) / max(len(outcomes), 1),
    }
