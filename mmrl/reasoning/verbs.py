"""`mmrl score` and `mmrl bench`: step scores of a file of solutions, and of a public benchmark."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.job import on_device
from mmrl.jsonl import count_reasons
from mmrl.reasoning.bench.run import find_bench, run_bench
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.records import SolutionRecord
from mmrl.reasoning.solutions import score_records
from mmrl.scorers.scoring import load_scorer
from mmrl.workdir import write_lines


def run_score(
    scorer: str | Mapping[str, Any], data: Path, out: Path, format: str | Mapping[str, Any] = "records"
) -> dict[str, Any]:
    """Scores of the solutions in a file, one row each: id, scores (null where a question cannot be taken)."""
    records, bad = read_format(data, format, unlabelled=True)
    # Before anything is scored, so that a folder that cannot be made is an error at once.
    out.parent.mkdir(parents=True, exist_ok=True)
    scores = score_records(on_device(load_scorer(scorer)), records)
    rows = []
    for record, values in zip(records, scores, strict=True):
        # JSON has no NaN: a step without a score is null, and so is a solution without any.
        row = None
        if values is not None:
            row = [None if math.isnan(value) else value for value in values]
        rows.append(json.dumps({"id": record.id, "scores": row}))
    write_lines(out, rows)
    return {
        "records": len(records),
        "unscored": sum(values is None for values in scores),
        "quarantined": len(bad),
        "unreadable_rows": count_reasons(bad),
    }


def run_benchmark(
    name: str, data: Path, scorer: str | Mapping[str, Any], out: Path | None, **options: Any
) -> dict[str, Any]:
    """A scorer, by name, folder or section, on a public benchmark's file; prints the table."""
    # Where a benchmark is lenient, a solution without scores counts against the scorer.
    lenient = find_bench(name).lenient
    model = on_device(load_scorer(scorer))

    def score(records: Sequence[SolutionRecord]) -> list[list[float]]:
        scores = score_records(model, records)
        unscored = [record.id for record, values in zip(records, scores, strict=True) if values is None]
        if unscored and not lenient:
            raise ValueError(f"{len(unscored)} questions cannot be scored (reasons above), the first: {unscored[:3]}")
        return [values or [] for values in scores]

    return run_bench(name, data, score, out=out, **options)
