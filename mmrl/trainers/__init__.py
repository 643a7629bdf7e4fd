"""Trainers: thin loops over pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrl.config import parse_config
from mmrl.recipe import TrainingConfig
from mmrl.registry import find


def trainer_of(recipe: TrainingConfig | Mapping[str, Any], **own: Any) -> Any:
    """The trainer a recipe names, built with everything else the recipe names.

    Args:
        recipe: as it was read, or its sections. Sections of components that are given are not needed.
        own: components in place of those of the recipe, `policy`, `task`, `rewards` or `scorer`, and `callbacks`
            beside those of the recipe.
    Raises:
        ConfigError, ComponentError: what can be told of a recipe is told before anything is loaded.
    """
    if not isinstance(recipe, TrainingConfig):
        sections = dict(recipe)
        for section in ("policy", "task", "scorer"):
            if section in own:
                cls = type(own[section])
                sections.setdefault(section, f"{cls.__module__}:{cls.__qualname__}")
        recipe = parse_config(sections)
    return find("trainers", recipe.trainer).target(recipe, **own)
