"""A reading fills fields of a rollout between its rewards and its credit; here is its protocol, and how it is called.

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
    """What a reading may use beside the rollout.

    policy: the one in training, with its present weights.
    outcome: samples -> (L,) float64, the weighted sum of the recipe's rewards, NaN where one gives none.
    seed, iteration: random numbers should depend on (seed, iteration, prompt id) alone, so that a run can be resumed.
    answer: the right answer of a prompt as the task would have it written; None for a task that has none.
    cost: what readings add to the iteration's costs, by the names that their rows declare (`costs`); shown per leaf.
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
    """Whether the policy must keep its initial weights: the fact `reference`, or what that says of the options."""
    fact = row.facts.get("reference", False)
    defaults = {name: o.default for name, o in row.options.items()}
    return bool(fact(defaults | dict(options)) if callable(fact) else fact)


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

    A reading that raises is asked again prompt by prompt; prompts on which it still raises are set aside: their leaves
    become unfinished and leave all statistics, their neighbours stay.

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
            ids = ", ".join(repr(rollout.prompts[g].id) for g in failed[:3])
            raise RewardError(
                f"reading {name!r} raised on {len(failed)} of {len(rollout.prompts)} prompts (limit {limit:.0%}), "
                f"such as {ids}; last error: {error}. Mend it, or take it out of `readings`"
            )
        checked = _checked(name, values, writes, rollout)
        for key, x in checked.items():
            finite = x[x.isfinite()].double() if x.dtype.is_floating_point else x.double()
            record.sums[key] = (float(finite.sum()), finite.numel())
        rollout = _set_aside(write(rollout, checked), failed)
    return rollout, records


def write(rollout: Rollout, values: Values) -> Rollout:
    """The rollout with fields replaced; names as in the module's head."""
    tree, payload = rollout.tree, dict(rollout.actions.payload)
    changes: dict[str, object] = {}
    tags = dict(tree.tags)
    for name, x in values.items():
        if name.startswith("tags."):
            tags[name.removeprefix("tags.")] = x
        elif name.startswith("actions."):
            payload[name.removeprefix("actions.")] = x
        else:
            changes[name] = x
    actions = replace(rollout.actions, payload=payload)
    return replace(rollout, tree=tree.replace(tags=tags, **changes), actions=actions)


def _read(name: str, reading: Reading, rollout: Rollout, context: ReadingContext) -> tuple[Values, list[int], str]:
    """The values of all prompts; which prompts failed, and the last error."""
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
    for g in range(len(rollout.prompts)):
        try:
            parts[g] = reading(rollout.select([g]), context)
        except (RewardError, NotFiniteError):
            raise
        except (Exception, SystemExit) as error:
            text = f"{type(error).__name__}: {error}"
            failed.append(g)
    return _joined(rollout, parts), failed, text


def _joined(rollout: Rollout, parts: Mapping[int, Values]) -> Values:
    """Values of single prompts put together; prompts without any are NaN, False or 0."""
    out: dict[str, Tensor] = {}
    for g, values in parts.items():
        nodes = (rollout.tree.group == g).nonzero().flatten()
        for name, x in values.items():
            x = torch.as_tensor(x)
            size, place = len(rollout.tree), nodes
            if name == "root_value":
                size, place = len(rollout.prompts), torch.tensor([g])
            elif name.startswith("actions."):
                size, place = rollout.actions.logp.numel(), rollout.tree.actions_of(nodes)
            if name not in out:
                empty = torch.nan if x.dtype.is_floating_point else 0
                out[name] = torch.full((size, *x.shape[1:]), empty, dtype=x.dtype)
            out[name][place] = x.cpu()
    return out


def _set_aside(rollout: Rollout, failed: Sequence[int]) -> Rollout:
    """The rollout with the leaves of some prompts unfinished."""
    if not failed:
        return rollout
    tree = rollout.tree
    leaves = (tree.is_leaf & torch.isin(tree.group, torch.tensor(failed))).nonzero().flatten()
    return rollout.with_tree(tree.with_outcomes(leaves, torch.full((len(leaves),), torch.nan)))


def _checked(name: str, values: Values, writes: Sequence[str], rollout: Rollout) -> dict[str, Tensor]:
    """The values as CPU tensors of the right shape; a declared field that is missing only where all prompts failed."""
    out: dict[str, Tensor] = {}
    sizes = {"root_value": len(rollout.prompts)}
    for key, raw in values.items():
        if key not in writes:
            raise RewardError(
                f"reading {name!r} returned {key!r}, which it does not declare; it declares {list(writes)}"
            )
        x = torch.as_tensor(raw).detach().cpu()
        actions = key.startswith("actions.")
        size = rollout.actions.logp.numel() if actions else sizes.get(key, len(rollout.tree))
        if x.shape[:1] != (size,):
            what = "actions" if actions else "prompts" if key == "root_value" else "steps"
            raise RewardError(
                f"reading {name!r}: {key} has shape {tuple(x.shape)} for {size} {what}; one entry each, NaN where it "
                "has no opinion"
            )
        if x.dtype.is_floating_point and bool(x.isinf().any()):
            raise RewardError(
                f"reading {name!r}: {key} of entry {int(x.isinf().nonzero()[0][0])} is infinite; bound it"
            )
        out[key] = x
    return out
