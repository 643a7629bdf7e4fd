"""Second looks at Monte-Carlo labels: SCAN's denoising, a judge's agreement, the most informative solutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat

from mmrl.reasoning.annotate.consensus import Rule, filter_records
from mmrl.reasoning.annotate.denoise import scan_labels, scan_use
from mmrl.reasoning.annotate.direct import LabelContext, Labeller
from mmrl.reasoning.annotate.labels import labels_up_to, local_first_error, mc_first_error
from mmrl.reasoning.annotate.targets import mc_values
from mmrl.reasoning.records import SolutionRecord
from mmrl.registry import build, register

# The records that are left, and a report.
Refined = tuple[list[SolutionRecord], dict[str, Any]]


@register("refinements", "scan", source="SCAN")
def scan(records: Sequence[SolutionRecord], *, eps: float = 0.5, window: int = 2) -> Refined:
    """SCAN: right solutions of questions the annotator knows are all right, wrong ones get windowed soft labels.

    What the verifier had no verdict on cannot be denoised and is left out, counted as `unverified`.

    Needs `meta["root"]`, the counts of the empty prefix, as Monte-Carlo annotation of questions leaves them.

    Raises:
        ValueError: a record without counts.
    """
    kept: list[SolutionRecord] = []
    used = dict.fromkeys(("positive", "estimate", "drop", "unverified"), 0)
    for record in records:
        correct, total = record.meta.get("root") or (0, 0)
        if record.mc is None or not record.meta.get("root"):
            raise ValueError(f"record {record.id!r} lacks mc or meta.root; annotate questions by monte_carlo")
        if record.final_correct is None or not total:
            used["unverified"] += 1
            continue
        consistency = correct / total
        use = scan_use(record.final_correct, consistency, eps)
        used[use] += 1
        if use == "positive":
            ones = labels_up_to(-1, len(record.steps))
            kept.append(replace(record, labels=ones, label_kind="hard", scope="prefix", first_error=-1))
        elif use == "estimate":
            values = mc_values(record.mc)
            first = mc_first_error(values)
            # Without a step of value 0 there is no error to put the window before.
            if first is not None and first >= 0:
                labels = scan_labels(values, first, consistency, window=window)
                kept.append(replace(record, labels=labels, label_kind="soft", scope="prefix", first_error=first))
    return kept, {"refine": "scan", "kept_frac": len(kept) / max(len(records), 1), **used}


def consensus(
    records: Sequence[SolutionRecord], judge: Labeller, *, rule: Rule = "exact", threshold: float = 0.0
) -> Refined:
    """Keep the records whose first error a judge finds at the same step (`mmrl.reasoning.annotate.consensus`).

    threshold: Monte-Carlo values up to it are errors. The judge's hard labels give its first error; a solution it
    cannot label counts as unparsed.
    """
    first_errors: list[int | None] = []
    for labels in judge(records):
        first_errors.append(None if labels is None else local_first_error(labels))
    kept, report = filter_records(records, first_errors, rule, threshold=threshold)
    measures: Mapping[str, Any] = asdict(report)
    # JSON has no pairs as keys.
    confusion = {f"{mc_error},{judge_error}": count for (mc_error, judge_error), count in report.confusion.items()}
    return kept, {"refine": "consensus", "rule": rule, **measures, "confusion": confusion}


@register("refinements", "consensus", source="The Lessons of Developing PRMs; VL-PRM")
def judged_consensus(
    records: Sequence[SolutionRecord],
    *,
    judge: Mapping[str, Any] = {"name": "judge"},
    rule: Rule = "exact",
    threshold: float = 0.0,
    context: LabelContext,
) -> Refined:
    """`consensus` with an annotation method that has an opinion on solutions: its name and options."""
    options = dict(judge)
    labeller = build("annotations", "refine.judge", str(options.pop("name", "")), options, context=context)
    return consensus(records, labeller, rule=rule, threshold=threshold)


@register("refinements", "balanced_information", source="Balanced-Information Score")
def balanced_information(
    records: Sequence[SolutionRecord], *, share: Annotated[float, Field(gt=0, le=1)], alpha: NonNegativeFloat = 0.05
) -> Refined:
    """Keep the `share` of every source's solutions that tell most: mixed labels, with reliable right ones.

    The score is (p (1 - p) + alpha) R, p the share of sampled steps with a value above 0 and R the mean value of those
    (1 without any). Of a source with n solutions the ceil(share n) highest stay, the earlier on ties; one that nothing
    was sampled of is left out.
    """
    by_source: dict[str, list[tuple[float, int]]] = {}
    for i, record in enumerate(records):
        values = [value for value in mc_values(record.mc or ()) if value is not None]
        if values:
            by_source.setdefault(record.source, []).append((-information(values, alpha), i))
    kept: list[int] = []
    for rows in by_source.values():
        # Without the small number 0.07 * 100, which is 7.000000000000001, would become 8.
        count = math.ceil(share * len(rows) - 1e-9)
        kept += [i for _, i in sorted(rows)[:count]]
    report = {"refine": "balanced_information", "kept_frac": len(kept) / max(len(records), 1)}
    return [records[i] for i in sorted(kept)], report


def information(values: Sequence[float], alpha: float = 0.05) -> float:
    """(p (1 - p) + alpha) R of one solution's sampled values, see `balanced_information`."""
    above = [value for value in values if value > 0]
    p = len(above) / len(values)
    return (p * (1 - p) + alpha) * (fmean(above) if above else 1.0)
