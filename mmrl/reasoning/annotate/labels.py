"""Labels of steps and their first error: one in terms of the other. None = unlabelled; first error -1 = no error.

Local labels judge each step on its own; prefix labels are 0 from the first error on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from mmrl.reasoning.annotate.targets import Values, hard_gt, mc_values
from mmrl.reasoning.records import SolutionRecord

Labels = tuple[float | None, ...]
After = Literal["mask", "zero", "keep"]


def mc_first_error(values: Values, threshold: float = 0.0) -> int | None:
    """First t with m_t <= threshold, -1 without one; None when an unsampled step comes first (Math-Shepherd).

    Raises:
        ValueError: no steps.
    """
    return local_first_error(hard_gt(values, threshold))


def local_first_error(labels: Sequence[float | None]) -> int | None:
    """First step with label 0, -1 when all are 1, None when an unlabelled step comes before either is certain.

    Raises:
        ValueError: no steps, or a soft label.
    """
    _check_hard(labels)
    for t, label in enumerate(labels):
        if label is None:
            return None
        if label == 0:
            return t
    return -1


def labels_up_to(first_error: int, num_steps: int) -> Labels:
    """1 before the first error, 0 at it, None after it; -1 gives all 1.

    Raises:
        ValueError: no steps, or a first error outside -1..num_steps-1.
    """
    check_first_error(first_error, num_steps)
    if first_error < 0:
        return (1.0,) * num_steps
    return (1.0,) * first_error + (0.0,) + (None,) * (num_steps - first_error - 1)


def after_error(labels: Sequence[float | None], first_error: int, how: After = "mask") -> Labels:
    """`labels` with what follows the first error unlabelled (mask), wrong, sampled or not (zero), or as it is (keep).

    Raises:
        ValueError: no steps, a first error outside -1..T-1, or an unknown `how`.
    """
    check_first_error(first_error, len(labels))
    if how not in ("mask", "zero", "keep"):
        raise ValueError(f"after the first error: {how!r} is none of mask, zero, keep")
    if first_error < 0 or how == "keep":
        return tuple(labels)
    rest = None if how == "mask" else 0.0
    return (*labels[: first_error + 1], *[rest] * (len(labels) - first_error - 1))


def label_mc(
    record: SolutionRecord,
    target: Callable[[Values], Labels] = hard_gt,
    *,
    after: After = "mask",
    threshold: float = 0.0,
) -> SolutionRecord:
    """The record with labels and first error made of its Monte-Carlo counts; prefix scope, as counts see prefixes.

    target: values -> labels, one of `mmrl.reasoning.annotate.targets`. When the first error is not known because
    steps were not sampled, nothing can follow it and the labels stay as the target gives them.

    Raises:
        ValueError: no counts, or not one per step.
    """
    if record.mc is None or len(record.mc) != len(record.steps):
        count = None if record.mc is None else len(record.mc)
        raise ValueError(f"record {record.id!r} has {count} Monte-Carlo counts for {len(record.steps)} steps")
    values = mc_values(record.mc)
    first, labels = mc_first_error(values, threshold), target(values)
    if first is not None:
        labels = after_error(labels, first, after)
    hard = all(label in (0, 1, None) for label in labels)
    return replace(record, labels=labels, label_kind="hard" if hard else "soft", scope="prefix", first_error=first)


def _check_hard(labels: Sequence[float | None]) -> None:
    if not labels:
        raise ValueError("no steps; a solution without steps has no labels")
    soft = [t for t, label in enumerate(labels) if label not in (0, 1, None)]
    if soft:
        raise ValueError(f"step {soft[0]} has the soft label {labels[soft[0]]}; make labels hard (0, 1 or None) first")


def check_first_error(first_error: int, num_steps: int) -> None:
    """Raises ValueError when it lies outside -1..num_steps-1, or there are no steps."""
    if num_steps < 1 or not -1 <= first_error < num_steps:
        raise ValueError(f"first error {first_error} is outside -1..{num_steps - 1} of {num_steps} steps")
