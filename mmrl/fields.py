"""The check that a recipe's components find the fields that they read, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmrl.registry import ComponentError, find, writers

# Written by a component that declares nothing: it may write any field, so nothing can be refused after it.
ANYTHING = "*"


@dataclass(frozen=True)
class Stage:
    """One component of a recipe, in the order in which they run.

    where: its place in the recipe, such as `readings.0`. who: kind and name. reads, writes: fields (`mmrl.registry`).
    """

    where: str
    who: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]


def check_fields(stages: Iterable[Stage], given: Iterable[str] = ()) -> set[str]:
    """The fields that are filled at the end.

    Args:
        given: fields that are filled at the beginning, such as those of stored rollouts.
    Raises:
        ComponentError: a stage reads a field that none before it writes; the message names components that would.
    """
    filled = set(given)
    for stage in stages:
        missing = [name for name in stage.reads if name not in filled]
        if missing and ANYTHING not in filled:
            raise ComponentError(
                f"{stage.where}: {stage.who} reads {', '.join(missing)}, which nothing in this recipe writes before. "
                + "; ".join(_remedy(name) for name in missing)
            )
        filled.update(stage.writes)
    return filled


def _remedy(name: str) -> str:
    """What a user can add to the recipe so that the field is written."""
    if name == "forks":
        return "forks: sample several steps per state, such as plan: {0: 8}"
    if name == "chains":
        return "chains: fork at the prompt alone, such as plan: {0: 8}"
    if name == "texts":
        return "texts: take a policy that writes"
    sources: list[str] = []
    if name == "step_reward":
        sources.append("any step reward (`step_rewards:`)")
    readings = writers(name)
    if readings:
        sources.append(f"the readings {', '.join(readings)} (`readings:`)")
    policies = [_with_option(policy, name) for policy in writers(name, "policies")]
    if policies:
        sources.append(f"the policies {', '.join(policies)}")
    if not sources:
        return f"no component that is known writes {name}"
    return f"{name} is written by {' or '.join(sources)}"


def _with_option(policy: str, name: str) -> str:
    """A policy that can write a field, with the option that makes it do so, where one is declared."""
    options = find("policies", policy).facts.get("may_write", {})
    if isinstance(options, Mapping) and name in options:
        return f"{policy} with {options[name]}"
    return policy
