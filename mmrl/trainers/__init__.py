"""Trainers: thin loops over pure functions."""

from __future__ import annotations

from typing import Any

from mmrl.recipe import TrainingConfig
from mmrl.registry import find


def trainer_of(config: TrainingConfig) -> Any:
    """The trainer a recipe names, built with everything else the recipe names.

    Raises:
        ConfigError: a tracker that is not there, before anything is loaded; and whatever the trainer refuses.
    """
    from mmrl.trainers.loop import check_trackers

    check_trackers(config.run.trackers)
    return find("trainers", config.trainer).target(config)
