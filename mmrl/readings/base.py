"""The protocol of readings, which fill fields of a rollout between its rewards and its credit, and their call.

Fields are named as in a recipe: `value`, `root_value`, `ok`, `step_reward`, `tags.NAME`, `actions.NAME`. A reading is
a row of the registry kind `readings` that declares which fields it reads and writes.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrl.finite import NotFiniteError
from mmrl.registry import Row
from mmrl.rewards.scoring import RewardError
from mmrl.rollout import Answer, Policy, Prompt, Rollout, Sample

log = logging.getLogger(__name__)

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class ReadingContext:
    """Arguments of a reading beside the rollout.

    policy: the one in training, with its present weights.
    outcome: samples -> (L,) float64, the weighted sum of the recipe's rewards, NaN where one gives none.
    seed, iteration: random numbers should depend on (seed, iteration, prompt id) alone, so that a run can be resumed.
    answer: prompt -> its right answer as the policy should write it; None for a task without right answers.
    cost: counter to which readings add their costs, by the names that their rows declare (`costs`); logged per leaf.
    """

    policy: Policy
    outcome: Callable[[Sequence[Sample]], Tensor]
    seed: int = 0
    iteration: int = 0
    answer: Callable[[Prompt], Answer] | None = None
    cost: Counter[str] = field(default_factory=Counter)


class Reading(Protocol):
    """(rollout, context) -> the fields it fills.

    Shapes: (N,) or (N, ...) per step for `value`, `ok`, `step_reward` and `tags.NAME`, (G,) per prompt for
    `root_value`, (A,) or (A, ...) per action for `actions.NAME`. NaN means "no opinion".
    """

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values: ...


def keeps_reference(row: Row, options: Mapping[str, Any]) -> bool:
    """True when the policy must keep its initial weights for this reading.

    The row declares it by its fact `reference`: a bool, or a function of the options.
    """
    fact = row.facts.get("reference", False)
    if callable(fact):
        defaults = {name: option.default for name, option in row.options.items()}
        fact = fact(defaults | dict(options))
    return bool(fact)


@dataclass
class ReadingRecord:
    """One call of a reading: wall seconds, prompts set aside, and per field the sum and the count of its numbers."""

    seconds: float = 0.0
    failed_prompts: int = 0
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)


def fill(
    rollout: Rollout,
    readings: Mapping[str, tuple[Reading, Sequence[str]]],
    context: ReadingContext,
    limit: float = 0.2,
) -> tuple[Rollout, dict[str, ReadingRecord]]:
    """The rollout with the fields of every reading (name -> (reading, fields it declares)), in order.

    A reading that raises is called again prompt by prompt; prompts on which it still raises are set aside: their
    leaves become unfinished and leave all statistics, the other prompts stay.

    Args:
        limit: share of prompts set aside above which this is an error.
    Raises:
        RewardError: a reading breaks its contract (another field, shape, an infinite number), or more than `limit` of
            the prompts had to be set aside.
    """
    records: dict[str, ReadingRecord] = {}
    for name, (reading, writes) in readings.items():
        record = records[name] = ReadingRecord()
        start = time.perf_counter()
        values, failed, error = _read(name, reading, rollout, context)
        record.seconds = time.perf_counter() - start
        record.failed_prompts = len(failed)
        if len(failed) > limit * len(rollout.prompts):
            ids = ", ".join(repr(rollout.prompts[i].id) for i in failed[:3])
            raise RewardError(
                f"reading {name!r} raised on {len(failed)} of {len(rollout.prompts)} prompts (limit {limit:.0%}), "
                f"such as {ids}; last error: {error}. Mend it, or take it out of `readings`"
            )
        checked = _checked(name, values, writes, rollout)
        for field_name, column in checked.items():
            numbers = column[column.isfinite()] if column.dtype.is_floating_point else column
            numbers = numbers.double()
            record.sums[field_name] = (float(numbers.sum()), numbers.numel())
        rollout = _set_aside(write(rollout, checked), failed)
    return rollout, records


def write(rollout: Rollout, values: Values) -> Rollout:
    """The rollout with fields replaced; they are named as in the module's docstring."""
    tree, payload = rollout.tree, dict(rollout.actions.payload)
    changes: dict[str, object] = {}
    tags = dict(tree.tags)
    for name, column in values.items():
        if name.startswith("tags."):
            tags[name.removeprefix("tags.")] = column
        elif name.startswith("actions."):
            payload[name.removeprefix("actions.")] = column
        else:
            changes[name] = column
    actions = replace(rollout.actions, payload=payload)
    return replace(rollout, tree=tree.replace(tags=tags, **changes), actions=actions)


def _read(name: str, reading: Reading, rollout: Rollout, context: ReadingContext) -> tuple[Values, list[int], str]:
    """The values of all prompts, the indices of those on which the reading raised, and its last error."""
    try:
        return reading(rollout, context), [], ""
    except (RewardError, NotFiniteError):
        raise
    except (Exception, SystemExit) as error:
        text = f"{type(error).__name__}: {error}"
        log.error("reading %r raised on %d prompts:\n%s", name, len(rollout.prompts), traceback.format_exc())
        if len(rollout.prompts) == 1:
            return {}, [0], text
    parts: dict[int, Values] = {}
    failed: list[int] = []
    for i in range(len(rollout.prompts)):
        try:
            parts[i] = reading(rollout.select([i]), context)
        except (RewardError, NotFiniteError):
            raise
        except (Exception, SystemExit) as error:
            text = f"{type(error).__name__}: {error}"
            failed.append(i)
    return _joined(rollout, parts), failed, text


def _joined(rollout: Rollout, parts: Mapping[int, Values]) -> Values:
    """Values of single prompts put together; prompts without any are NaN, False or 0."""
    columns: dict[str, Tensor] = {}
    for prompt_index, values in parts.items():
        steps = (rollout.tree.group == prompt_index).nonzero().flatten()
        for name, value in values.items():
            part = torch.as_tensor(value)
            # The length of the whole column, and the places of this prompt's entries in it.
            if name == "root_value":
                size, places = len(rollout.prompts), torch.tensor([prompt_index])
            elif name.startswith("actions."):
                size, places = rollout.actions.logp.numel(), rollout.tree.actions_of(steps)
            else:
                size, places = len(rollout.tree), steps
            if name not in columns:
                empty = torch.nan if part.dtype.is_floating_point else 0
                columns[name] = torch.full((size, *part.shape[1:]), empty, dtype=part.dtype)
            columns[name][places] = part.cpu()
    return columns


def _set_aside(rollout: Rollout, failed: Sequence[int]) -> Rollout:
    """The rollout with the leaves of some prompts unfinished."""
    if not failed:
        return rollout
    tree = rollout.tree
    leaves = (tree.is_leaf & torch.isin(tree.group, torch.tensor(failed))).nonzero().flatten()
    return rollout.with_tree(tree.with_outcomes(leaves, torch.full((len(leaves),), torch.nan)))


def _checked(name: str, values: Values, writes: Sequence[str], rollout: Rollout) -> dict[str, Tensor]:
    """The values of a reading as CPU tensors, checked to be declared, of the right length and not infinite."""
    columns: dict[str, Tensor] = {}
    for field_name, raw in values.items():
        if field_name not in writes:
            raise RewardError(
                f"reading {name!r} returned {field_name!r}, which it does not declare; it declares {list(writes)}"
            )
        column = torch.as_tensor(raw).detach().cpu()
        if field_name.startswith("actions."):
            size, unit = rollout.actions.logp.numel(), "actions"
        elif field_name == "root_value":
            size, unit = len(rollout.prompts), "prompts"
        else:
            size, unit = len(rollout.tree), "steps"
        if column.shape[:1] != (size,):
            raise RewardError(
                f"reading {name!r}: {field_name} has shape {tuple(column.shape)} for {size} {unit}; one entry each, "
                "NaN where it has no opinion"
            )
        if column.dtype.is_floating_point and bool(column.isinf().any()):
            entry = int(column.isinf().nonzero()[0][0])
            raise RewardError(f"reading {name!r}: {field_name} of entry {entry} is infinite; bound it")
        columns[field_name] = column
    return columns
