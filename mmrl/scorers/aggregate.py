"""Aggregates: from the step scores of one solution to one number by which solutions are ranked.

    aggregate("min")([.9, .4, .8])   # .4

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
# The number, or the pair of numbers, by which candidates are ordered.
Key = float | tuple[float, float]

# Distance from 0 and 1 that probabilities keep before logarithms and odds.
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
    checked = _checked(scores)
    return checked[-1] if checked else -math.inf


@register("aggregates", "mean")
def mean(scores: Scores) -> float:
    """Arithmetic mean (VisualPRM's default)."""
    checked = _checked(scores)
    return math.fsum(checked) / len(checked) if checked else -math.inf


@register("aggregates", "product")
def product(scores: Scores) -> float:
    """Probability that all steps are good, were they independent."""
    probabilities = _probabilities(scores)
    return math.prod(probabilities) if probabilities else -math.inf


@register("aggregates", "sum_logprob")
def sum_logprob(scores: Scores) -> float:
    """sum ln p; ranks as `product` does."""
    clamped = _clamped(scores)
    return math.fsum(map(math.log, clamped)) if clamped else -math.inf


@register("aggregates", "sum_logit")
def sum_logit(scores: Scores) -> float:
    """Sum of log-odds ln(p / (1 - p))."""
    clamped = _clamped(scores)
    return math.fsum(math.log(p / (1 - p)) for p in clamped) if clamped else -math.inf


@register("aggregates", "geometric")
def geometric(scores: Scores) -> float:
    """exp(mean ln p): `product` without its preference for short solutions."""
    clamped = _clamped(scores)
    return math.exp(math.fsum(map(math.log, clamped)) / len(clamped)) if clamped else -math.inf


@register("aggregates", "mean_odds")
def mean_odds(scores: Scores) -> float:
    """Mean of p / (1 - p)."""
    clamped = _clamped(scores)
    return math.fsum(p / (1 - p) for p in clamped) / len(clamped) if clamped else -math.inf


@register("aggregates", "harmonic")
def harmonic(scores: Scores) -> float:
    """T / sum(1 / p)."""
    clamped = _clamped(scores)
    return len(clamped) / math.fsum(1 / p for p in clamped) if clamped else -math.inf


@register("aggregates", "softmin")
def softmin(scores: Scores, *, tau: PositiveFloat = 0.1) -> float:
    """sum softmax(-s / tau) s (PURE): the minimum for tau -> 0, the mean for tau -> inf."""
    checked = _checked(scores)
    if not checked:
        return -math.inf
    # The smallest score is taken off first, so that exp cannot overflow.
    lowest = min(checked)
    weights = [math.exp((lowest - score) / tau) for score in checked]
    weighted = math.fsum(weight * score for weight, score in zip(weights, checked, strict=True))
    return weighted / math.fsum(weights)


@register("aggregates", "first_below")
def first_below(scores: Scores, *, tau: float = 0.5) -> float:
    """Share of the solution before the first step with p < tau; 1 without such a step."""
    checked = _checked(scores)
    if not checked:
        return -math.inf
    for position, score in enumerate(checked):
        if score < tau:
            return position / len(checked)
    return 1.0


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


def _checked(scores: Scores) -> list[float]:
    """The scores as Python floats; raises ValueError for NaN."""
    checked = [float(score) for score in scores]
    for step, score in enumerate(checked):
        if math.isnan(score):
            raise ValueError(
                f"step {step} of {len(checked)} has no score (NaN); score every step, or leave the solution out"
            )
    return checked


def _probabilities(scores: Scores) -> list[float]:
    """The scores, checked to be probabilities."""
    checked = _checked(scores)
    for step, score in enumerate(checked):
        if not 0 <= score <= 1:
            raise ValueError(
                f"step {step} scored {score:g}, which is no probability; this aggregate takes logs or products: map "
                "scores to [0, 1], or use min, mean or last"
            )
    return checked


def _clamped(scores: Scores) -> list[float]:
    return [min(max(p, EPS), 1 - EPS) for p in _probabilities(scores)]
