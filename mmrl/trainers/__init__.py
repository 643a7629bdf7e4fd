"""Trainers: thin loops over pure functions."""

from __future__ import annotations

from typing import Any

from mmrl.recipe import TrainingConfig
from mmrl.registry import find


def trainer_of(config: TrainingConfig) -> Any:
    """The trainer a recipe names, built with everything else the recipe names."""
    return find("trainers", config.trainer).target(config)
