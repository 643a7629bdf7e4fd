"""Who writes a field and who reads it: a recipe that reads what nothing writes is refused before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mmrl.registry import ComponentError, find, writers

ANYTHING = "*"  # written by a component that declares nothing: it may write any field, so nothing can be refused


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
        given: fields that are there at the beginning, such as those of stored rollouts.
    Raises:
        ComponentError: a stage reads a field that none before it writes; the message names what would write it.
    """
    filled = set(given)
    for stage in stages:
        missing = [] if ANYTHING in filled else [f for f in stage.reads if f not in filled]
        if missing:
            raise ComponentError(
                f"{stage.where}: {stage.who} reads {', '.join(missing)}, which nothing in this recipe writes before. "
                + "; ".join(_remedy(f) for f in missing)
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
    found: list[str] = []
    if name == "step_reward":
        found.append("any step reward (`step_rewards:`)")
    readings = writers(name)
    if readings:
        found.append(f"the readings {', '.join(readings)} (`readings:`)")
    policies = [_with_option(policy, name) for policy in writers(name, "policies")]
    if policies:
        found.append(f"the policies {', '.join(policies)}")
    return f"{name} is written by {' or '.join(found)}" if found else f"no component that is known writes {name}"


def _with_option(policy: str, name: str) -> str:
    """A policy that can write a field, with the option that makes it."""
    options = find("policies", policy).facts.get("may_write", {})
    return f"{policy} with {options[name]}" if isinstance(options, Mapping) and name in options else policy
