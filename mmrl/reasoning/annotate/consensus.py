"""Keep what Monte-Carlo estimates and a judge agree on, and report what that costs.

Both say where a solution's first error is (-1 = nowhere, None = unknown); `consensus` makes labels of the two:

    Monte Carlo 2, judge 2, 4 steps, rule exact     ->  1, 1, 0, None
    Monte Carlo 1, judge 2, 4 steps, rule within_1  ->  1, None, 0, None
    Monte Carlo 1, judge 2, 4 steps, rule exact     ->  None, the solution is dropped
"""

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
    """Counts and shares of the `total` solutions that a rule was applied to.

    Shares are in [0, 1], None without anything to count.

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
    nothing_left = all(label is None for label in labels)
    return None if nothing_left else labels


def _tolerated(mc: int, judge: int, rule: Rule) -> bool:
    """True where two different first errors do not drop the solution."""
    if rule == "within_1":
        return min(mc, judge) >= 0 and abs(mc - judge) <= 1
    return rule == "step"


def _agreed(mc: int, judge: int, num_steps: int) -> Labels:
    """Labels by the later of two first errors, unlabelled from the earlier one up to the step before it."""
    # No error (-1) is later than any error.
    earlier, later = sorted(num_steps if first < 0 else first for first in (mc, judge))
    labels = list(labels_up_to(-1 if later == num_steps else later, num_steps))
    labels[earlier:later] = [None] * (later - earlier)
    return tuple(labels)


def vote(votes: Sequence[Sequence[float | None]]) -> Labels:
    """Per-step majority of k verifications (SPARK): right iff more than half of the votes are 1, so a tie is wrong.

    Args:
        votes: (k, T) of 1, 0, or None where a verification says nothing about the step; without any vote it is None.

    Raises:
        ValueError: no votes, or rows of different lengths.
    """
    lengths = [len(row) for row in votes]
    if len(set(lengths)) != 1:
        raise ValueError(f"votes must be k >= 1 rows of one length, not of lengths {lengths}")
    majority: list[float | None] = []
    for step in zip(*votes, strict=True):
        verdicts = [verdict for verdict in step if verdict is not None]
        majority.append(float(2 * sum(verdicts) > len(verdicts)) if verdicts else None)
    return tuple(majority)


def consensus_report(
    mc: Sequence[int | None], judge: Sequence[int | None], labels: Sequence[Labels | None]
) -> ConsensusReport:
    """The report of any rule, from each solution's two first errors and its labels, None = dropped.

    Raises:
        ValueError: the three differ in length.
    """
    pairs: list[tuple[int | None, int | None]] = []
    agreements: list[float] = []
    kept: list[Labels] = []
    for mc_error, judge_error, row in zip(mc, judge, labels, strict=True):
        pairs.append((mc_error, judge_error))
        if mc_error is not None and judge_error is not None:
            agreements.append(float(mc_error == judge_error))
        if row is not None:
            kept.append(row)
    step_labels = [label for row in kept for label in row if label is not None]
    return ConsensusReport(
        total=len(pairs),
        kept=len(kept),
        unparsed=sum(judge_error is None for _, judge_error in pairs),
        kept_frac=len(kept) / len(pairs) if pairs else None,
        agreement=_mean(agreements),
        right_frac=_mean(step_labels),
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
    mc_errors: list[int | None] = []
    for record in records:
        if record.mc is None or len(record.mc) != len(record.steps):
            raise ValueError(
                f"record {record.id!r} has no Monte-Carlo count for each of its {len(record.steps)} steps"
            )
        mc_errors.append(mc_first_error(mc_values(record.mc), threshold))
    all_labels: list[Labels | None] = []
    kept = []
    for record, mc_error, judge_error in zip(records, mc_errors, judge, strict=True):
        labels = consensus(mc_error, judge_error, len(record.steps), rule)
        all_labels.append(labels)
        if labels is not None:
            kept.append(_labelled(record, labels, mc_error, judge_error, rule))
    return kept, consensus_report(mc_errors, judge, all_labels)


def _labelled(record: SolutionRecord, labels: Labels, mc: int | None, judge: int | None, rule: Rule) -> SolutionRecord:
    """The record with the rule's labels; its first error is unknown where the two differ about it."""
    first = judge if mc == judge or rule == "agree_on_correct" else None
    return replace(record, labels=labels, label_kind="hard", scope="prefix", first_error=first)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
