"""Monte-Carlo values of steps and the training targets made of them. None = not sampled, and stays None."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmrl.reasoning.records import Counts
from mmrl.registry import register

Values = Sequence[float | None]  # per step in [0, 1]
Targets = tuple[float | None, ...]

_Z95 = 1.96  # two-sided 95 % of a normal variable, rounded as usual
_SLACK = 1e-9  # 0.6 / 0.75 is 0.7999999999999999


@dataclass(frozen=True)
class ValueEstimate:
    """What `correct` of `total` says about a step's value, all in [0, 1]."""

    value: float  # m = c/k
    stderr: float  # sqrt(m (1 - m) / k)
    beta_mean: float  # (c + 1) / (k + 2), posterior mean under a uniform prior
    low: float  # Wilson 95 % interval
    high: float


def estimate(counts: Counts) -> ValueEstimate:
    """Value of a step and how sure it is (Math-Shepherd's m = c/k; the intervals are as defined here).

    Raises:
        ValueError: nothing was sampled, or correct is not within 0..total.
    """
    m, k = _value(counts), counts.total
    if m is None:
        raise ValueError("no completions were sampled (total 0), so there is no estimate; keep the step unlabelled")
    z2 = _Z95**2
    middle, scale = (m + z2 / (2 * k)) / (1 + z2 / k), _Z95 / (1 + z2 / k)
    half = scale * math.sqrt(m * (1 - m) / k + z2 / (4 * k * k))
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return ValueEstimate(m, math.sqrt(m * (1 - m) / k), (counts.correct + 1) / (k + 2), low, high)


def mc_values(mc: Sequence[Counts]) -> Targets:
    """m_t = correct / total per step, None where total is 0 (an early stop leaves such steps, they are no zeros)."""
    return tuple(_value(c) for c in mc)


def _value(counts: Counts) -> float | None:
    if not 0 <= counts.correct <= counts.total:
        raise ValueError(f"{counts}: correct must lie within 0..total")
    return counts.correct / counts.total if counts.total else None


@register("label_rules", "hard_gt", source="Math-Shepherd, VisualPRM")
def hard_gt(values: Values, threshold: float = 0.0) -> Targets:
    """y = 1[m > threshold]; threshold 0 is `hard_gt0` (Math-Shepherd, VisualPRM)."""
    return _each(values, lambda m: m > threshold)


@register("label_rules", "hard_ge")
def hard_ge(values: Values, tau: float) -> Targets:
    """y = 1[m >= tau]."""
    return _each(values, lambda m: m >= tau)


@register("label_rules", "soft", source="MM-PRM")
def soft(values: Values) -> Targets:
    """y = m (MM-PRM)."""
    return _each(values, lambda m: m)


@register("label_rules", "log_boost", source="PROPA")
def log_boost(values: Values, a: float = 10.0) -> Targets:
    """y = ln(1 + a m) / ln(1 + a), which lifts small values (PROPA); a > 0."""
    if a <= 0:
        raise ValueError(f"log_boost: a={a} must be above 0")
    return _each(values, lambda m: math.log1p(a * m) / math.log1p(a))


def advantage(values: Values, start: float) -> Targets:
    """m_t - m_(t-1) in [-1, 1], with m_(-1) = `start`, the value of the empty prefix (VisualPRM's ablation).

    None where the step or the one before it was not sampled.
    """
    return _from_pairs(values, start, lambda before, m: m - before)


def signs(advantages: Sequence[float | None]) -> tuple[int | None, ...]:
    """Classes -1, 0, 1 of advantages."""
    return tuple(None if a is None else (a > 0) - (a < 0) for a in advantages)


@register("label_rules", "relative_progress", source="GenPRM")
def relative_progress(values: Values, start: float, ratio: float = 0.8) -> Targets:
    """y = 1 iff m_t > 0 and m_t / m_(t-1) >= ratio (GenPRM). Any value above 0 after a 0 is progress."""
    return _from_pairs(values, start, lambda before, m: m > 0 and m >= (ratio - _SLACK) * before)


@register("label_rules", "rel_effective", source="StepWiser")
def rel_effective(values: Values, start: float, gamma: float, threshold: float = 0.0) -> Targets:
    """y = 1 iff m_t + gamma (m_t - m_(t-1)) > threshold (StepWiser's Rel-Effective)."""
    return _from_pairs(values, start, lambda before, m: m + gamma * (m - before) > threshold + _SLACK)


def _each(values: Values, rule: Callable[[float], float]) -> Targets:
    for t, v in enumerate(values):
        if v is not None and not 0 <= v <= 1:
            raise ValueError(f"step {t} has value {v}; Monte-Carlo values lie in [0, 1], None = not sampled")
    return tuple(None if v is None else float(rule(v)) for v in values)


def _from_pairs(values: Values, start: float, rule: Callable[[float, float], float]) -> Targets:
    """`rule(value before the step, value after it)` per step."""
    (first,), rest = soft((start,)), soft(values)
    pairs = zip((first, *rest), rest, strict=False)
    return tuple(None if before is None or m is None else float(rule(before, m)) for before, m in pairs)
