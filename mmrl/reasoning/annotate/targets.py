"""Monte-Carlo values of steps and the training targets made of them: the label rules of `mmrl annotate`.

A value m_t is the share of right completions after step t, in [0, 1]. None = not sampled, and stays None:

    values .5, .25, 0, None  ->  hard_gt 1, 1, 0, None    soft .5, .25, 0, None
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mmrl.reasoning.records import Counts
from mmrl.registry import register

# Per step in [0, 1], None = not sampled.
Values = Sequence[float | None]
Targets = tuple[float | None, ...]

# Two-sided 95 % of a normal variable, rounded as usual.
_Z95 = 1.96
# Without it a step would fail its limit by rounding: 0.6 / 0.75 is 0.7999999999999999, below a ratio of 0.8.
_SLACK = 1e-9


@dataclass(frozen=True)
class ValueEstimate:
    """The value of a step and how sure it is, from `correct` of `total` completions; all in [0, 1]."""

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
    # Wilson's interval: centre and half width, both divided by 1 + z^2 / k.
    z2 = _Z95**2
    centre = (m + z2 / (2 * k)) / (1 + z2 / k)
    half = _Z95 / (1 + z2 / k) * math.sqrt(m * (1 - m) / k + z2 / (4 * k * k))
    return ValueEstimate(
        value=m,
        stderr=math.sqrt(m * (1 - m) / k),
        beta_mean=(counts.correct + 1) / (k + 2),
        low=max(centre - half, 0.0),
        high=min(centre + half, 1.0),
    )


def mc_values(mc: Sequence[Counts]) -> Targets:
    """m_t = correct / total per step, None where total is 0 (an early stop leaves such steps, they are no zeros)."""
    return tuple(_value(counts) for counts in mc)


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
    """`rule(value after the step)` per sampled step."""
    for t, value in enumerate(values):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"step {t} has value {value}; Monte-Carlo values lie in [0, 1], None = not sampled")
    return tuple(None if value is None else float(rule(value)) for value in values)


def _from_pairs(values: Values, start: float, rule: Callable[[float, float], float]) -> Targets:
    """`rule(value before the step, value after it)` per step for which both are known."""
    # `soft` checks that they are values.
    after = soft(values)
    before = (*soft((start,)), *after[:-1])
    targets: list[float | None] = []
    for m_before, m in zip(before, after, strict=False):
        targets.append(None if m_before is None or m is None else float(rule(m_before, m)))
    return tuple(targets)
