"""Which solutions are worth an annotator's or a trainer's time: ActPRM, the Balanced-Information Score."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from mmrl.annotate.targets import Values, soft


def is_confident(heads: Sequence[Sequence[float]], *, d_p: float = 0.9, d_std: float = 0.01) -> bool:
    """ActPRM: whether the heads agree and are sure on every step up to the first they call wrong.

    u = first t with mean < 1/2, else the last; confident iff for all t <= u: std <= d_std (ddof 1) and
    (mean >= d_p or mean <= 1 - d_p). d_p > 1 or d_std < 0 makes nothing confident.

    Args:
        heads: (n, T) probabilities in [0, 1] that step t is right, n >= 2.

    Raises:
        ValueError: fewer than two heads, rows of different lengths, no steps.
    """
    if len(heads) < 2 or len({len(h) for h in heads}) != 1 or not heads[0]:
        raise ValueError(f"heads must be n >= 2 rows of one length T >= 1, not of lengths {[len(h) for h in heads]}")
    for step in zip(*heads, strict=True):
        mean = fmean(step)
        if stdev(step) > d_std or not (mean >= d_p or mean <= 1 - d_p):
            return False
        if mean < 0.5:
            break
    return True


def to_annotate(batch: Sequence[Sequence[Sequence[float]]], *, d_p: float = 0.9, d_std: float = 0.01) -> list[int]:
    """Positions of the solutions that are not confident and go to the annotator; may be empty.

    The choice shifts the share of right labels: report it.
    """
    return [i for i, heads in enumerate(batch) if not is_confident(heads, d_p=d_p, d_std=d_std)]


def balanced_information(values: Values, alpha: float = 0.05) -> float:
    """Balanced-Information Score (p (1 - p) + alpha) R: mixed labels, reliable right ones.

    p: share of sampled steps with a value above 0; R: mean value of those, 1 without any.

    Raises:
        ValueError: no step was sampled.
    """
    known = [v for v in soft(values) if v is not None]
    if not known:
        raise ValueError("no step was sampled, so the solution has no score")
    above = [v for v in known if v > 0]
    p = len(above) / len(known)
    return (p * (1 - p) + alpha) * (fmean(above) if above else 1.0)
