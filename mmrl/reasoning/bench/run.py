"""Run a benchmark: read, score, measure, show a table, write a JSON report that names every setting."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.jsonl import Quarantined, count_reasons
from mmrl.reasoning.bench import (  # noqa: F401 - enter their rows
    hard2verify,
    mpbench,
    pairs,
    prmbench,
    processbench,
    visualprocessbench,
)
from mmrl.reasoning.bench.base import Benchmark, Result, Score, Scored, data_files, remembered, score_items, tune
from mmrl.registry import build
from mmrl.scorers.metrics import bootstrap, evaluate_steps
from mmrl.workdir import write_text


def run_bench(
    name: str,
    data: Path,
    score: Score,
    *,
    threshold: float = 0.5,
    aggregate: str = "min",
    tune_on: Path | None = None,
    media_root: Path | None = None,
    max_bad: float = 0.05,
    resamples: int = 200,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure a scorer, print the table, write the report to `out` and return it.

    Args:
        data: file or folder in the published layout. tune_on: another split or file of the same layout on which the
            threshold is chosen instead of `threshold`; a note tells if it is one of the files of `data`.
        score: records -> step scores. aggregate: how they become the score of a response, where one is needed.
        resamples: of the 95 % bootstrap interval over problems of the headline measure; 0 for none.
    Raises:
        ValueError: unknown benchmark, tune_on is the test data, no usable row, or scores that do not fit.
    """
    bench = find_bench(name)
    score = remembered(score)
    source = "given"
    if tune_on is not None:
        threshold, source = _tuned(bench, data, tune_on, score, aggregate, media_root, max_bad), f"tuned on {tune_on}"
    items, bad = bench.read(data, media_root=media_root, max_bad=max_bad)
    scored = score_items(items, score, lenient=bench.lenient)
    result = bench.measure(scored, threshold, aggregate)
    if tune_on is not None and tune_on.resolve() in [f.resolve() for f in data_files(data)]:
        result = replace(
            result, notes=(*result.notes, f"{tune_on}, where the threshold was tuned, is part of the data")
        )
    settings: dict[str, Any] = {"aggregate": aggregate, **bench.settings}
    if bench.thresholded:
        settings |= {"threshold": threshold, "threshold_source": source}
    report = {
        "benchmark": name, "data": str(data), "items": len(items), "headline": bench.headline,
        "metrics": dict(result.metrics), "interval": interval(bench, scored, threshold, aggregate, resamples),
        "groups": {k: dict(v) for k, v in result.groups.items()},
        "steps": step_measures(scored, threshold) if bench.stepwise else {}, "settings": settings,
        "notes": list(result.notes), "quarantined": [b._asdict() for b in bad], "reasons": count_reasons(bad),
    }  # fmt: skip
    report = _finite(report)
    if out is not None:
        write_text(out, json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    show(name, result, settings, bad)
    return report


def find_bench(name: str) -> Benchmark:
    """The benchmark called `name`; ComponentError with the known names."""
    bench: Benchmark = build("benchmarks", "benchmark", name, {})
    return bench


def _tuned(
    bench: Benchmark, data: Path, tune_on: Path, score: Score, aggregate: str, media_root: Path | None, max_bad: float
) -> float:
    if not bench.thresholded:
        raise ValueError("this benchmark has no threshold to tune; leave tune_on out")
    if tune_on.resolve() == data.resolve():
        raise ValueError(f"tune_on {tune_on} is the test data; tune on another split, or give the threshold")
    items, _ = bench.read(tune_on, media_root=media_root, max_bad=max_bad)
    return tune(bench, items, score, aggregate=aggregate)


def interval(
    bench: Benchmark, scored: Sequence[Scored], threshold: float, aggregate: str, resamples: int
) -> dict[str, float]:
    """95 % bootstrap interval of the headline measure over problems (equal question and images)."""
    if not resamples:
        return {}
    problem = [(s.item.records[0].question, s.item.records[0].images) for s in scored]

    def headline(index: NDArray[np.intp]) -> float:
        return bench.measure([scored[i] for i in index], threshold, aggregate).metrics[bench.headline]

    statistic = headline if bench.quick is None else bench.quick(scored, threshold)
    found = bootstrap(statistic, problem, resamples=resamples)
    return {"low": found.low, "high": found.high, "resamples": resamples, "undefined": found.undefined}


def step_measures(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """AUC, calibration and the like over labelled steps, by step kind and by third of the solution.

    Empty when scores are no probabilities; solutions without scores are left out.
    """
    kept = [(s.item, s.scores[0]) for s in scored if s.scores[0] is not None]
    scores = [list(p) for _, p in kept]
    if not kept or any(not 0 <= p <= 1 for own in scores for p in own):
        return {}
    records = [i.records[0] for i, _ in kept]
    labels = [r.labels or (None,) * len(r.steps) for r in records]
    thirds = [[("early", "middle", "late")[3 * t // len(r.steps)] for t in range(len(r.steps))] for r in records]
    first = [r.first_error for r in records]
    kinds = [[s.kind for s in r.steps] for r in records]
    out = evaluate_steps(scores, labels, kinds, first_errors=first, tau=threshold)
    by_third = evaluate_steps(scores, labels, thirds, first_errors=first, tau=threshold)
    return out | {k: v for k, v in by_third.items() if "/" in k}


def show(name: str, result: Result, settings: Mapping[str, Any], bad: Sequence[Quarantined]) -> None:
    """Print a table of the measures, per group and in all, and what was set aside."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns = list(dict.fromkeys(k for g in result.groups.values() for k in g))[:6]  # the report has them all
    about = ", ".join(f"{k}={v}" for k, v in settings.items())
    console.print(f"[bold]{name}[/]  " + "  ".join(f"{k} {_cell(v)}" for k, v in result.metrics.items()))
    table = Table("group", *(c.replace("_", " ") for c in columns), title=f"{name} ({about})")
    for group, row in result.groups.items():
        table.add_row(group.replace("_", " ") or "all", *(_cell(row.get(c)) for c in columns))
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    for reason, n in count_reasons(bad).items():
        console.print(f"set aside: {n} x {reason}", markup=False)


def _cell(value: float | None) -> str:
    return "" if value is None else "-" if math.isnan(value) else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """Undefined numbers as null, since JSON has none."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
