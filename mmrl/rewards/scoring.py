"""Calling outcome rewards on samples: every reward is timed, failures are counted, and results are checked.

A sample on which a reward failed is unscored (NaN), never 0: a zero would be learned from.
"""

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
from mmrl.rewards.isolation import NotNumbersError, as_number, as_values, samples_by_prompt
from mmrl.rollout import OutcomeReward, Rollout, Sample

log = logging.getLogger(__name__)

# The largest size of a reward; credit squares rewards, in float32.
LARGEST = 1e15


class RewardError(RuntimeError):
    """A reward broke its contract, or too many samples could not be scored."""


@dataclass(frozen=True)
class Scored:
    """Scores of L samples.

    total: (L,) float64 weighted sum, NaN where any reward gave none. parts: name -> (L,) numbers of each reward.
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

    None and NaN mean "not scorable". A reward that raises, SystemExit included, is called again prompt by prompt, then
    sample by sample (a `GroupReward` by prompt alone); samples on which it still raises are unscored, its traceback is
    logged. A sample that one reward could not score has no total, so it leaves its group's statistics.

    Raises:
        RewardError: a reward returned another number of values than samples, a value that is no number or is
            beyond `LARGEST`; or more than `max_unscored` of the samples have no total.
    """
    parts: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    last_error: str | None = None
    for name, (reward, _) in rewards.items():
        start = time.perf_counter()
        parts[name], error = _values(name, reward, samples)
        # An isolated reward does not raise; it keeps the message.
        kept_error = reward.last_error if isinstance(reward, ErrorKeeper) else None
        last_error = error or kept_error or last_error
        seconds[name] = time.perf_counter() - start
    weighted = [weight * parts[name] for name, (_, weight) in rewards.items()]
    total = torch.stack(weighted).sum(0)
    missing = float(total.isnan().double().mean())
    unscored = {name: int(numbers.isnan().sum()) for name, numbers in parts.items()}
    if missing > max_unscored:
        cause = f"; last error: {last_error}" if last_error else ""
        raise RewardError(
            f"{missing:.0%} of {len(samples)} samples have no reward (limit {max_unscored:.0%}); unscored per reward: "
            f"{unscored}{cause}. Mend the reward, or raise run.max_unscored if this share is expected"
        )
    return Scored(total, parts, seconds, unscored)


def _values(name: str, reward: OutcomeReward, samples: Sequence[Sample]) -> tuple[Tensor, str | None]:
    """(L,) numbers, NaN where the reward gives none or raises even on a sample alone; and its last error."""
    values = torch.full((len(samples),), torch.nan, dtype=torch.float64)
    compares_samples = isinstance(reward, (GroupReward, partial))
    by_prompt = samples_by_prompt(samples)
    # A stack of parts to try: all samples, and where the reward raises the prompts of a part, then its samples.
    parts = [list(range(len(samples)))] if samples else []
    last_error: str | None = None
    lost = 0
    while parts:
        part = parts.pop()
        part_samples = [samples[i] for i in part]
        try:
            values[part] = _as_tensor(name, reward(part_samples), part_samples)
            continue
        except (RewardError, NotFiniteError):
            raise
        except (Exception, SystemExit) as error:
            if last_error is None:
                log.error("reward %r raised on %d samples:\n%s", name, len(part), traceback.format_exc())
            last_error = f"{type(error).__name__}: {error}"
        prompt_ids = {sample.prompt.id for sample in part_samples}
        if len(prompt_ids) > 1:
            parts += [by_prompt[prompt_id] for prompt_id in prompt_ids]
        elif len(part) > 1 and not compares_samples:
            parts += [[i] for i in part]
        else:
            lost += len(part)
    if lost:
        log.warning("reward %r left %d of %d samples unscored; last error: %s", name, lost, len(samples), last_error)
    return values, last_error


def write_outcomes(rollout: Rollout, samples: Sequence[Sample], total: Tensor) -> Rollout:
    """The rollout with the rewards of its leaves; a leaf without one is unfinished and leaves all statistics."""
    leaves = torch.tensor([sample.step for sample in samples])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, total))


def wrong_count(name: str, got: int, samples: int) -> str:
    """Message for a reward that does not return one value per sample."""
    return (
        f"reward {name!r} returned {got} values for {samples} samples; return one per sample, "
        "None where it cannot be scored"
    )


def out_of_bounds(number: float) -> str:
    """The end of a message about a reward beyond `LARGEST`: its size, and the remedy."""
    size = "infinite" if math.isinf(number) else f"{number:g}, beyond {LARGEST:g}, and its credit would overflow"
    return f"{size}; bound it"


def _as_tensor(name: str, raw: Sequence[float | None], samples: Sequence[Sample]) -> Tensor:
    """The result of a reward as (L,) float64, None as NaN; raises RewardError for anything that is no number."""
    try:
        values = as_values(raw)
    except NotNumbersError as error:
        raise RewardError(f"reward {name!r}: {error}") from None
    if len(values) != len(samples):
        raise RewardError(wrong_count(name, len(values), len(samples)))
    numbers = []
    for i, value in enumerate(values):
        try:
            number = as_number(value)
        except TypeError as error:
            raise RewardError(
                f"reward {name!r}: sample {i} got {str(error)!r}, which is no number; return float or None"
            ) from error
        if number is not None and abs(number) > LARGEST:
            where = f"sample {i} (prompt {samples[i].prompt.id!r})"
            raise RewardError(f"reward {name!r}: {where} is {out_of_bounds(number)}")
        numbers.append(math.nan if number is None else number)
    return torch.tensor(numbers, dtype=torch.float64)
