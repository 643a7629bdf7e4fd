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
    # Where the tuning split is one of the files of `data`, its solutions are scored once.
    score = remembered(score)
    threshold_source = "given"
    if tune_on is not None:
        threshold = _tuned(bench, data, tune_on, score, aggregate, media_root, max_bad)
        threshold_source = f"tuned on {tune_on}"
    items, bad = bench.read(data, media_root=media_root, max_bad=max_bad)
    scored = score_items(items, score, lenient=bench.lenient)
    result = bench.measure(scored, threshold, aggregate)
    if tune_on is not None and tune_on.resolve() in [file.resolve() for file in data_files(data)]:
        note = f"{tune_on}, where the threshold was tuned, is part of the data"
        result = replace(result, notes=(*result.notes, note))
    settings: dict[str, Any] = {"aggregate": aggregate, **bench.settings}
    if bench.thresholded:
        settings |= {"threshold": threshold, "threshold_source": threshold_source}
    report = {
        "benchmark": name,
        "data": str(data),
        "items": len(items),
        "headline": bench.headline,
        "metrics": dict(result.metrics),
        "interval": interval(bench, scored, threshold, aggregate, resamples),
        "groups": {group: dict(measures) for group, measures in result.groups.items()},
        "steps": step_measures(scored, threshold) if bench.stepwise else {},
        "settings": settings,
        "notes": list(result.notes),
        "quarantined": [row._asdict() for row in bad],
        "reasons": count_reasons(bad),
    }
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
    problems = []
    for entry in scored:
        record = entry.item.records[0]
        problems.append((record.question, record.images))

    def headline(index: NDArray[np.intp]) -> float:
        return bench.measure([scored[i] for i in index], threshold, aggregate).metrics[bench.headline]

    statistic = headline if bench.quick is None else bench.quick(scored, threshold)
    bounds = bootstrap(statistic, problems, resamples=resamples)
    return {"low": bounds.low, "high": bounds.high, "resamples": resamples, "undefined": bounds.undefined}


def step_measures(scored: Sequence[Scored], threshold: float) -> dict[str, float]:
    """AUC, calibration and the like over labelled steps, by step kind and by third of the solution.

    Empty when scores are no probabilities; solutions without scores are left out.
    """
    scores: list[list[float]] = []
    records = []
    for entry in scored:
        row = entry.scores[0]
        if row is None:
            continue
        if any(not 0 <= score <= 1 for score in row):
            return {}
        scores.append(list(row))
        records.append(entry.item.records[0])
    if not records:
        return {}
    labels = [record.labels or (None,) * len(record.steps) for record in records]
    first_errors = [record.first_error for record in records]
    kinds = [[step.kind for step in record.steps] for record in records]
    thirds = [_thirds(len(record.steps)) for record in records]
    by_kind = evaluate_steps(scores, labels, kinds, first_errors=first_errors, tau=threshold)
    by_third = evaluate_steps(scores, labels, thirds, first_errors=first_errors, tau=threshold)
    # Names with a slash are measures of one third; the others are those of all steps again.
    return by_kind | {name: value for name, value in by_third.items() if "/" in name}


def _thirds(num_steps: int) -> list[str]:
    """The third of a solution that each of its steps lies in."""
    names = ("early", "middle", "late")
    return [names[3 * step // num_steps] for step in range(num_steps)]


def show(name: str, result: Result, settings: Mapping[str, Any], bad: Sequence[Quarantined]) -> None:
    """Print a table of the measures, per group and in all, and what was set aside."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    columns: dict[str, None] = {}
    for measures in result.groups.values():
        columns |= dict.fromkeys(measures)
    # More would not fit a terminal; the report has them all.
    first_columns = list(columns)[:6]
    about = ", ".join(f"{key}={value}" for key, value in settings.items())
    headlines = "  ".join(f"{measure} {_cell(value)}" for measure, value in result.metrics.items())
    console.print(f"[bold]{name}[/]  {headlines}")
    table = Table("group", *(column.replace("_", " ") for column in first_columns), title=f"{name} ({about})")
    for group, row in result.groups.items():
        table.add_row(group.replace("_", " ") or "all", *(_cell(row.get(column)) for column in first_columns))
    console.print(table)
    for note in result.notes:
        console.print(f"note: {note}", markup=False)
    for reason, count in count_reasons(bad).items():
        console.print(f"set aside: {count} x {reason}", markup=False)


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:.4g}"


def _finite(value: Any) -> Any:
    """Undefined numbers as null, since JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
