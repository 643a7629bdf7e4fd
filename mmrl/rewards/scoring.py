"""Outcome rewards on samples: isolated, timed, counted. A failed call leaves its samples unscored, never 0."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmrl.capabilities import ErrorKeeper, GroupReward
from mmrl.finite import NotFiniteError
from mmrl.rewards.isolation import NotNumbersError, as_number, as_values
from mmrl.rollout import OutcomeReward, Rollout, Sample

log = logging.getLogger(__name__)

LARGEST = 1e15  # of a reward: credit squares it, in float32


class RewardError(RuntimeError):
    """A reward broke its contract, or too many samples could not be scored."""


@dataclass(frozen=True)
class Scored:
    """total: (L,) float64 weighted sum, NaN where any reward gave none. parts: each reward's own (L,) numbers.

    seconds: wall time per reward. unscored: samples per reward that got None, NaN or an exception.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    unscored: Mapping[str, int]


def score(
    samples: Sequence[Sample],
    rewards: Mapping[str, tuple[OutcomeReward, float]],
    max_unscored: float = 0.2,
) -> Scored:
    """Call every reward (name -> (function, weight)) on all samples at once and sum them by weight.

    None and NaN mean "not scorable". A reward that raises, SystemExit included, is asked again prompt by prompt, then
    sample by sample (a `GroupReward` by prompt alone); what it still raises on is unscored, its traceback is logged.
    A sample that one reward could not score has no total, so it leaves its group's statistics.

    Raises:
        RewardError: a reward returned another number of values than samples, a value that is no number or is
            beyond `LARGEST`; or more than `max_unscored` of the samples have no total.
    """
    parts: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    trouble: str | None = None
    for name, (reward, _) in rewards.items():
        start = time.perf_counter()
        parts[name], error = _values(name, reward, samples)
        kept = reward.last_error if isinstance(reward, ErrorKeeper) else None
        trouble = error or kept or trouble
        seconds[name] = time.perf_counter() - start
    weighted = [weight * parts[name] for name, (_, weight) in rewards.items()]
    total = torch.stack(weighted).sum(0)
    missing = float(total.isnan().double().mean())
    if missing > max_unscored:
        counts = {name: int(p.isnan().sum()) for name, p in parts.items()}
        raise RewardError(
            f"{missing:.0%} of {len(samples)} samples have no reward (limit {max_unscored:.0%}); unscored per reward: "
            f"{counts}" + (f"; last error: {trouble}" if trouble else "") + ". Mend the reward, or raise "
            "run.max_unscored if this share is expected"
        )
    return Scored(total, parts, seconds, {k: int(p.isnan().sum()) for k, p in parts.items()})


def _values(name: str, reward: OutcomeReward, samples: Sequence[Sample]) -> tuple[Tensor, str | None]:
    """(L,) numbers, NaN where the reward gives none or raises even on a sample alone; and its last error."""
    values = torch.full((len(samples),), torch.nan, dtype=torch.float64)
    comparing = isinstance(reward, (GroupReward, partial))
    by_prompt: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_prompt.setdefault(sample.prompt.id, []).append(i)
    parts = [list(range(len(samples)))] if samples else []
    trouble: str | None = None
    lost = 0
    while parts:
        part = parts.pop()
        own = [samples[i] for i in part]
        try:
            values[part] = _as_tensor(name, reward(own), own)
            continue
        except (RewardError, NotFiniteError):
            raise
        except (Exception, SystemExit) as error:
            if trouble is None:
                log.error("reward %r raised on %d samples:\n%s", name, len(part), traceback.format_exc())
            trouble = f"{type(error).__name__}: {error}"
        prompts = {s.prompt.id for s in own}
        if len(prompts) > 1:
            parts += [by_prompt[p] for p in prompts]
        elif len(part) > 1 and not comparing:
            parts += [[i] for i in part]
        else:
            lost += len(part)
    if lost:
        log.warning("reward %r left %d of %d samples unscored; last error: %s", name, lost, len(samples), trouble)
    return values, trouble


def write_outcomes(rollout: Rollout, samples: Sequence[Sample], total: Tensor) -> Rollout:
    """The rollout with the rewards of its leaves; a leaf without one is unfinished and leaves all statistics."""
    leaves = torch.tensor([s.step for s in samples])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, total))


def wrong_count(name: str, got: int, samples: int) -> str:
    """Message for a reward that does not return one value per sample."""
    return (
        f"reward {name!r} returned {got} values for {samples} samples; return one per sample, "
        "None where it cannot be scored"
    )


def out_of_bounds(number: float) -> str:
    """What is wrong with a reward beyond `LARGEST`, and the way out."""
    size = "infinite" if math.isinf(number) else f"{number:g}, beyond {LARGEST:g}, and its credit would overflow"
    return f"{size}; bound it"


def _as_tensor(name: str, raw: Sequence[float | None], samples: Sequence[Sample]) -> Tensor:
    try:
        values = as_values(raw)
    except NotNumbersError as error:
        raise RewardError(f"reward {name!r}: {error}") from None
    if len(values) != len(samples):
        raise RewardError(wrong_count(name, len(values), len(samples)))
    out = []
    for i, v in enumerate(values):
        try:
            number = as_number(v)
        except TypeError as error:
            raise RewardError(
                f"reward {name!r}: sample {i} got {str(error)!r}, which is no number; return float or None"
            ) from error
        if number is not None and abs(number) > LARGEST:
            where = f"sample {i} (prompt {samples[i].prompt.id!r})"
            raise RewardError(f"reward {name!r}: {where} is {out_of_bounds(number)}")
        out.append(math.nan if number is None else number)
    return torch.tensor(out, dtype=torch.float64)
