"""Second looks at Monte-Carlo labels: SCAN's denoising, keeping what a judge agrees with, or what tells most."""

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

Refined = tuple[list[SolutionRecord], dict[str, Any]]  # what is left, and a report


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
    for r in records:
        correct, total = r.meta.get("root") or (0, 0)
        if r.mc is None or not r.meta.get("root"):
            raise ValueError(f"record {r.id!r} lacks mc or meta.root; annotate questions by monte_carlo")
        if r.final_correct is None or not total:
            used["unverified"] += 1
            continue
        consistency = correct / total
        use = scan_use(r.final_correct, consistency, eps)
        used[use] += 1
        if use == "positive":
            ones = labels_up_to(-1, len(r.steps))
            kept.append(replace(r, labels=ones, label_kind="hard", scope="prefix", first_error=-1))
        elif use == "estimate":
            first = mc_first_error(mc_values(r.mc))
            if first is not None and first >= 0:
                labels = scan_labels(mc_values(r.mc), first, consistency, window=window)
                kept.append(replace(r, labels=labels, label_kind="soft", scope="prefix", first_error=first))
    return kept, {"refine": "scan", "kept_frac": len(kept) / max(len(records), 1), **used}


def consensus(
    records: Sequence[SolutionRecord], judge: Labeller, *, rule: Rule = "exact", threshold: float = 0.0
) -> Refined:
    """Keep the records whose first error a judge finds at the same step (`mmrl.reasoning.annotate.consensus`).

    threshold: Monte-Carlo values up to it are errors. The judge's hard labels give its first error; a solution it
    cannot label counts as unparsed.
    """
    found = [None if y is None else local_first_error(y) for y in judge(records)]
    kept, report = filter_records(records, found, rule, threshold=threshold)
    told: Mapping[str, Any] = asdict(report)
    confusion = {f"{a},{b}": n for (a, b), n in report.confusion.items()}
    return kept, {"refine": "consensus", "rule": rule, **told, "confusion": confusion}


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
        values = [v for v in mc_values(record.mc or ()) if v is not None]
        if values:
            by_source.setdefault(record.source, []).append((-information(values, alpha), i))
    kept: list[int] = []
    for rows in by_source.values():
        count = math.ceil(share * len(rows) - 1e-9)  # 0.07 * 100 is 7.000000000000001
        kept += [i for _, i in sorted(rows)[:count]]
    report = {"refine": "balanced_information", "kept_frac": len(kept) / max(len(records), 1)}
    return [records[i] for i in sorted(kept)], report


def information(values: Sequence[float], alpha: float = 0.05) -> float:
    """(p (1 - p) + alpha) R of one solution's sampled values, see `balanced_information`."""
    above = [v for v in values if v > 0]
    p = len(above) / len(values)
    return (p * (1 - p) + alpha) * (fmean(above) if above else 1.0)
