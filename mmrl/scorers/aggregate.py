"""Step scores of one solution -> one number to rank solutions by.

Every aggregate takes a sequence of T scores and keyword options. A solution without steps gets -inf, so it never wins;
a step without a score (NaN) is an error. Those that take logarithms, odds or products need probabilities; before logs
and odds they are clamped to [1e-6, 1 - 1e-6]. Products and sums favour short solutions; min, mean and last do not in
that way. Which one fits is a property of the checkpoint: models trained on Monte-Carlo values read as values (last),
those trained on judged steps as verdicts (min, product).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import PositiveFloat

from mmrl.registry import build, register

Scores = Sequence[float]
Key = float | tuple[float, float]  # what candidates are ordered by

EPS = 1e-6


@register("aggregates", "min")
def minimum(scores: Scores) -> float:
    """The weakest step."""
    return min(_checked(scores), default=-math.inf)


@register("aggregates", "max")
def maximum(scores: Scores) -> float:
    """The strongest step."""
    return max(_checked(scores), default=-math.inf)


@register("aggregates", "last")
def last(scores: Scores) -> float:
    """The last step: the value of the finished solution."""
    s = _checked(scores)
    return s[-1] if s else -math.inf


@register("aggregates", "mean")
def mean(scores: Scores) -> float:
    """Arithmetic mean (VisualPRM's default)."""
    s = _checked(scores)
    return math.fsum(s) / len(s) if s else -math.inf


@register("aggregates", "product")
def product(scores: Scores) -> float:
    """Probability that all steps are good, were they independent."""
    s = _probabilities(scores)
    return math.prod(s) if s else -math.inf


@register("aggregates", "sum_logprob")
def sum_logprob(scores: Scores) -> float:
    """sum ln p; ranks as `product` does."""
    s = _clamped(scores)
    return math.fsum(map(math.log, s)) if s else -math.inf


@register("aggregates", "sum_logit")
def sum_logit(scores: Scores) -> float:
    """Sum of log-odds ln(p / (1 - p))."""
    s = _clamped(scores)
    return math.fsum(math.log(p / (1 - p)) for p in s) if s else -math.inf


@register("aggregates", "geometric")
def geometric(scores: Scores) -> float:
    """exp(mean ln p): `product` without its preference for short solutions."""
    s = _clamped(scores)
    return math.exp(math.fsum(map(math.log, s)) / len(s)) if s else -math.inf


@register("aggregates", "mean_odds")
def mean_odds(scores: Scores) -> float:
    """Mean of p / (1 - p)."""
    s = _clamped(scores)
    return math.fsum(p / (1 - p) for p in s) / len(s) if s else -math.inf


@register("aggregates", "harmonic")
def harmonic(scores: Scores) -> float:
    """T / sum(1 / p)."""
    s = _clamped(scores)
    return len(s) / math.fsum(1 / p for p in s) if s else -math.inf


@register("aggregates", "softmin")
def softmin(scores: Scores, *, tau: PositiveFloat = 0.1) -> float:
    """sum softmax(-s / tau) s (PURE): the minimum for tau -> 0, the mean for tau -> inf."""
    s = _checked(scores)
    if not s:
        return -math.inf
    low = min(s)
    return _weighted(s, [math.exp((low - x) / tau) for x in s])


@register("aggregates", "first_below")
def first_below(scores: Scores, *, tau: float = 0.5) -> float:
    """Share of the solution before the first step with p < tau; 1 without such a step."""
    s = _checked(scores)
    return next((t for t, p in enumerate(s) if p < tau), len(s)) / len(s) if s else -math.inf


@register("aggregates", "min_then_last")
def min_then_last(scores: Scores) -> tuple[float, float]:
    """(min, last): orders by the weakest step, ties by the last one. A key to rank by, not a number to add up."""
    return minimum(scores), last(scores)


def aggregate(name: str, **options: Any) -> Callable[[Scores], Key]:
    """The aggregate called `name`, with its options set.

    Raises:
        ComponentError: unknown name or option, or a value out of range.
    """
    function: Callable[[Scores], Key] = build("aggregates", "aggregate", name, options)
    return function


def _weighted(scores: Scores, weights: Sequence[float]) -> float:
    return math.fsum(w * s for w, s in zip(weights, scores, strict=True)) / math.fsum(weights)


def _checked(scores: Scores) -> list[float]:
    s = [float(p) for p in scores]
    for t, p in enumerate(s):
        if math.isnan(p):
            raise ValueError(f"step {t} of {len(s)} has no score (NaN); score every step, or leave the solution out")
    return s


def _probabilities(scores: Scores) -> list[float]:
    s = _checked(scores)
    for t, p in enumerate(s):
        if not 0 <= p <= 1:
            raise ValueError(
                f"step {t} scored {p:g}, which is no probability; this aggregate takes logs or products: map scores "
                "to [0, 1], or use min, mean or last"
            )
    return s


def _clamped(scores: Scores) -> list[float]:
    return [min(max(p, EPS), 1 - EPS) for p in _probabilities(scores)]
