"""Active selection: only the solutions that an ensemble of scorers is not sure of are annotated (ActPRM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from pydantic import Field

from mmrl.config import Section
from mmrl.reasoning.records import SolutionRecord
from mmrl.reasoning.solutions import score_records
from mmrl.rollout import StepReward
from mmrl.scorers.scoring import ScorerSpec


class ActiveConfig(Section):
    """Leave out of `records` what the scorers agree on and are sure of."""

    scorers: list[ScorerSpec] = Field(min_length=2)  # saved scorers, such as one recipe run with several seeds
    d_p: float = 0.9  # sure: mean probability at least d_p or at most 1 - d_p; above 1 nobody is
    d_std: float = 0.01  # agreed: standard deviation (ddof 1) at most d_std


def unsure(
    records: Sequence[SolutionRecord], scorers: Sequence[StepReward], *, d_p: float, d_std: float
) -> list[SolutionRecord]:
    """The solutions that go to the annotator: some scorer cannot take them, or they are not confident together.

    The choice shifts the share of right labels.
    """
    # Per record its scores by every scorer.
    scored = zip(*(score_records(scorer, records) for scorer in scorers), strict=True)
    kept = []
    for record, rows in zip(records, scored, strict=True):
        heads = [row for row in rows if row is not None and not any(map(math.isnan, row))]
        if len(heads) < len(rows) or not is_confident(heads, d_p=d_p, d_std=d_std):
            kept.append(record)
    return kept


def is_confident(heads: Sequence[Sequence[float]], *, d_p: float = 0.9, d_std: float = 0.01) -> bool:
    """True where n scorers agree and are sure on every step up to the first they call wrong.

    u = first t with mean < 1/2, else the last; confident iff for all t <= u: std <= d_std and (mean >= d_p or mean <=
    1 - d_p).

    Args:
        heads: (n, T) probabilities in [0, 1] that step t is right, n >= 2.

    Raises:
        ValueError: fewer than two, rows of different lengths, no steps.
    """
    lengths = [len(row) for row in heads]
    if len(heads) < 2 or len(set(lengths)) != 1 or not heads[0]:
        raise ValueError(f"heads must be n >= 2 rows of one length T >= 1, not of lengths {lengths}")
    for step in zip(*heads, strict=True):
        mean = fmean(step)
        if stdev(step) > d_std or not (mean >= d_p or mean <= 1 - d_p):
            return False
        if mean < 0.5:
            break
    return True
