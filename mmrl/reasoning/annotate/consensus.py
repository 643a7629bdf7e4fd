"""Keep what Monte-Carlo estimates and a judge agree on, and report what that costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mmrl.reasoning.annotate.labels import Labels, check_first_error, labels_up_to, mc_first_error
from mmrl.reasoning.annotate.targets import mc_values
from mmrl.reasoning.records import SolutionRecord

Rule = Literal["exact", "within_1", "step", "agree_on_correct"]


@dataclass(frozen=True)
class ConsensusReport:
    """What a rule did to `total` solutions. Shares are in [0, 1], None without anything to count.

    agreement: equal first errors among the solutions for which both are known. unparsed: the judge's is unknown.
    confusion: (Monte-Carlo first error, judge's first error) -> solutions. right_frac: label 1 among labelled steps
    that were kept. mean_steps: of kept solutions.
    """

    total: int
    kept: int
    unparsed: int
    kept_frac: float | None
    agreement: float | None
    right_frac: float | None
    mean_steps: float | None
    confusion: Mapping[tuple[int | None, int | None], int]


def consensus(mc: int | None, judge: int | None, num_steps: int, rule: Rule = "exact") -> Labels | None:
    """Hard labels of a solution by two first errors (-1 = none, None = unknown), or None when it is dropped.

    exact: both equal (Lessons of Developing PRMs). within_1: equal, or two errors at neighbouring steps. step: always
    kept unless no step is left. agree_on_correct: the judge's first error counts; its "all right" only when
    Monte Carlo says so too (VL-PRM300K). Where two kept first errors differ, the steps from the earlier to the one
    before the later are unlabelled: there alone the two disagree about the prefix (as defined here).

    Raises:
        ValueError: an unknown rule, or a first error outside -1..num_steps-1.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"consensus rule {rule!r} is none of {', '.join(get_args(Rule))}")
    for first_error in (mc, judge):
        if first_error is not None:
            check_first_error(first_error, num_steps)
    if judge is None:
        return None
    if rule == "agree_on_correct":
        return labels_up_to(judge, num_steps) if judge >= 0 or mc == -1 else None
    if mc is None or (mc != judge and not _tolerated(mc, judge, rule)):
        return None
    labels = _agreed(mc, judge, num_steps)
    return labels if any(y is not None for y in labels) else None


def _tolerated(mc: int, judge: int, rule: Rule) -> bool:
    return rule == "step" or (rule == "within_1" and min(mc, judge) >= 0 and abs(mc - judge) <= 1)


def _agreed(a: int, b: int, num_steps: int) -> Labels:
    low, high = sorted(num_steps if e < 0 else e for e in (a, b))
    later = labels_up_to(-1 if high == num_steps else high, num_steps)
    return tuple(None if low <= t < high else y for t, y in enumerate(later))


def vote(votes: Sequence[Sequence[float | None]]) -> Labels:
    """Per-step majority of k verifications (SPARK): right iff more than half of the votes are 1, so a tie is wrong.

    Args:
        votes: (k, T) of 1, 0, or None where a verification says nothing about the step; without any vote it is None.

    Raises:
        ValueError: no votes, or rows of different lengths.
    """
    if not votes or len({len(v) for v in votes}) != 1:
        raise ValueError(f"votes must be k >= 1 rows of one length, not of lengths {[len(v) for v in votes]}")
    columns = [[v for v in step if v is not None] for step in zip(*votes, strict=True)]
    return tuple(float(2 * sum(step) > len(step)) if step else None for step in columns)


def consensus_report(
    mc: Sequence[int | None], judge: Sequence[int | None], labels: Sequence[Labels | None]
) -> ConsensusReport:
    """The report of any rule, from each solution's two first errors and its labels, None = dropped.

    Raises:
        ValueError: the three differ in length.
    """
    pairs = [(a, b) for a, b, _ in zip(mc, judge, labels, strict=True)]
    known = [a == b for a, b in pairs if a is not None and b is not None]
    kept = [y for y in labels if y is not None]
    labelled = [y for row in kept for y in row if y is not None]
    return ConsensusReport(
        total=len(pairs),
        kept=len(kept),
        unparsed=sum(b is None for _, b in pairs),
        kept_frac=_mean([float(y is not None) for y in labels]),
        agreement=_mean([float(x) for x in known]),
        right_frac=_mean(labelled),
        mean_steps=_mean([float(len(row)) for row in kept]),
        confusion=dict(Counter(pairs)),
    )


def filter_records(
    records: Sequence[SolutionRecord], judge: Sequence[int | None], rule: Rule = "exact", *, threshold: float = 0.0
) -> tuple[list[SolutionRecord], ConsensusReport]:
    """The records that pass, with the rule's labels, and the report over all of them.

    Args:
        judge: the judge's first error per record. threshold: Monte-Carlo values up to it are errors.

    Raises:
        ValueError: a record without one count per step; `judge` of another length.
    """
    found: list[int | None] = []
    for r in records:
        if r.mc is None or len(r.mc) != len(r.steps):
            raise ValueError(f"record {r.id!r} has no Monte-Carlo count for each of its {len(r.steps)} steps")
        found.append(mc_first_error(mc_values(r.mc), threshold))
    pairs = list(zip(records, found, judge, strict=True))
    labels = [consensus(a, b, len(r.steps), rule) for r, a, b in pairs]
    kept = [_labelled(r, y, a, b, rule) for (r, a, b), y in zip(pairs, labels, strict=True) if y is not None]
    return kept, consensus_report(found, judge, labels)


def _labelled(record: SolutionRecord, labels: Labels, mc: int | None, judge: int | None, rule: Rule) -> SolutionRecord:
    first = judge if mc == judge or rule == "agree_on_correct" else None
    return replace(record, labels=labels, label_kind="hard", scope="prefix", first_error=first)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
