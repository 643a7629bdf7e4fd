"""Outcome rewards on samples: isolated, timed, counted. A failed call leaves its samples unscored, never 0."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.rollout import OutcomeReward, Rollout, Sample

log = logging.getLogger(__name__)


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

    None and NaN mean "not scorable". A reward that raises, SystemExit included, leaves all its samples unscored; its
    traceback is logged.
    A sample that one reward could not score has no total, so it leaves its group's statistics.

    Raises:
        RewardError: a reward returned another number of values than samples, a value that is no number or is
            infinite; or more than `max_unscored` of the samples have no total.
    """
    parts: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    trouble: str | None = None
    for name, (reward, _) in rewards.items():
        start = time.perf_counter()
        try:
            raw: Sequence[float | None] = reward(samples)
            trouble = getattr(reward, "last_error", None) or trouble  # an isolated reward keeps its own
        except RewardError:
            raise
        except (Exception, SystemExit) as error:
            trouble = f"{type(error).__name__}: {error}"
            log.error("reward %r raised on %d samples:\n%s", name, len(samples), traceback.format_exc())
            raw = [None] * len(samples)
        seconds[name] = time.perf_counter() - start
        parts[name] = _as_tensor(name, raw, samples)
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


def _as_tensor(name: str, raw: Sequence[float | None], samples: Sequence[Sample]) -> Tensor:
    try:
        values = list(raw)
    except TypeError as error:
        raise RewardError(f"reward {name!r} returned {raw!r}; return a sequence with one value per sample") from error
    if len(values) != len(samples):
        raise RewardError(wrong_count(name, len(values), len(samples)))
    out = []
    for i, v in enumerate(values):
        try:
            number = math.nan if v is None else float(v)
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {name!r}: sample {i} got {v!r}, which is no number; return float or None"
            ) from error
        if math.isinf(number):
            raise RewardError(f"reward {name!r}: sample {i} (prompt {samples[i].prompt.id!r}) is infinite; bound it")
        out.append(number)
    return torch.tensor(out, dtype=torch.float64)
