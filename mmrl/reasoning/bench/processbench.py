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
    keys = ("f1", "error_acc", "correct_acc")
    return Result({k: mean([g[k] for g in groups.values()]) for k in keys}, groups)


def _split(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    predicted = [None if s.scores[0] is None else first_error(s.scores[0], tau=threshold) for s in scored]
    return percent(predicted, [s.item.truth for s in scored]) | {"items": len(scored)}


def percent(predicted: Sequence[int | None], labels: Sequence[int]) -> dict[str, float]:
    """Accuracies and F1 in percent (F1 = 2ab / (a + b), 0 if both are 0); None matches nothing."""
    s = first_error_score(predicted, labels)
    return {"f1": 100 * s.f1, "error_acc": 100 * s.error_acc, "correct_acc": 100 * s.correct_acc}


BENCH = register("benchmarks", "processbench")(Benchmark(read_row, measure, "f1", lenient=True))
