"""Trainers: thin loops over pure functions."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmrl.config import TrainingConfig

_CLASSES = {
    "branch_grpo": "branch_grpo.BranchGrpo",
    "step_reward": "step_reward.StepRewardTrainer",
    "imitation": "sft.ImitationTrainer",
    "step_preference": "step_preference.StepPreferenceTrainer",
    "sample_loss": "sample_loss.SampleLossTrainer",
}


def trainer_of(config: TrainingConfig) -> Any:
    """The trainer a recipe names, built with everything else the recipe names."""
    module, _, name = _CLASSES[config.trainer].partition(".")
    return getattr(import_module(f"mmrl.trainers.{module}"), name)(config)
