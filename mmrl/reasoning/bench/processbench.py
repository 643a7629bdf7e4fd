"""ProcessBench: find the first wrong step of a solution (exact match), F1 of erroneous and correct solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, mean, of_groups
from mmrl.reasoning.formats.benches import processbench
from mmrl.registry import register
from mmrl.scorers.metrics import first_error, first_error_score

SPLITS = ("gsm8k", "math", "olympiadbench", "omnimath")


def read_row(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """Published layout: one file per split, named after it. Another file is one split, unless ids say `split-n`."""
    (record,) = processbench(row, name)
    named = record.id.rpartition("-")[0]
    return [Item((record,), named if named in SPLITS else stem, record.first_error)]


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """Per split, in percent: error_acc, correct_acc, f1 = their harmonic mean; then the mean of the splits.

    A prediction is the first step with a score below the threshold; a solution without scores matches nothing.
    """
    groups = {name: _split(part, threshold) for name, part in of_groups(scored).items()}
    metrics = {}
    for name in ("f1", "error_acc", "correct_acc"):
        metrics[name] = mean([measures[name] for measures in groups.values()])
    return Result(metrics, groups)


def _split(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """Measures of one split."""
    predicted: list[int | None] = []
    for entry in scored:
        scores = entry.scores[0]
        predicted.append(None if scores is None else first_error(scores, tau=threshold))
    return percent(predicted, [entry.item.truth for entry in scored]) | {"items": len(scored)}


def percent(predicted: Sequence[int | None], labels: Sequence[int]) -> dict[str, float]:
    """Accuracies and F1 in percent (F1 = 2ab / (a + b), 0 if both are 0); None matches nothing."""
    score = first_error_score(predicted, labels)
    return {"f1": 100 * score.f1, "error_acc": 100 * score.error_acc, "correct_acc": 100 * score.correct_acc}


BENCH = register("benchmarks", "processbench")(Benchmark(read_row, measure, "f1", lenient=True))
