"""What can be refused of a training recipe before task, model or rewards are loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mmrl.config import Component, ConfigError
from mmrl.recipe import TrainingConfig
from mmrl.registry import find
from mmrl.rollout import BranchPlan
from mmrl.trainers.optimizers import check_optim
from mmrl.trainers.processes import check_trackers
from mmrl.trainers.run_folder import RunFolder


def preflight(config: TrainingConfig, components: Sequence[tuple[str, str, Component]] = ()) -> None:
    """Check trackers, optimizer and schedule, and components with their options.

    Args:
        components: (kind, section, what the recipe says there) of those that will be made from the recipe.
    Raises:
        ConfigError, ComponentError: the first fault.
    """
    check_trackers(config.run.trackers)
    check_optim(config.optim, config.run.iterations)
    for kind, section, component in components:
        find(kind, component.name).check(component.options, section)


def check_folder(config: TrainingConfig) -> None:
    """Refuse a run folder that a run of this recipe could not use; of several processes the loop does it for all.

    Raises:
        ConfigError: it holds a run, cannot be written, or another process has it.
    """
    # An error of one process here would leave the others waiting for it.
    if os.environ.get("WORLD_SIZE", "1") == "1":
        RunFolder(config.run.output).check(config)


def check_plan(policy: Component, plan: BranchPlan) -> None:
    """Refuse a plan that is deeper than the policy's steps, where its row tells by the fact `steps`, an option's name.

    Raises:
        ConfigError: a depth lies beyond the last step.
    """
    row = find("policies", policy.name)
    option = row.facts.get("steps")
    if option is not None:
        steps = policy.options.get(option, row.options[option].default)
        try:
            plan.check(int(steps))
        except ValueError as error:
            raise ConfigError(f"{error} (policy.{option}={steps})") from None
