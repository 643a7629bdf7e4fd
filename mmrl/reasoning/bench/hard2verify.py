"""Hard2Verify: is a step right, is a response right, where is the first error; errors are carried forward.

The files are published encrypted; decrypt them with the script that comes with them and give the plain rows. Assumed
columns, which are not documented publicly: `question`, `model_response_by_step` (texts), `human_labels` (1 or true =
right) and, where there is one, `unique_id` or `id`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, mean
from mmrl.reasoning.records import SolutionRecord, plain_steps
from mmrl.reasoning.rows import first_zero, rows, same_length, text
from mmrl.registry import register
from mmrl.scorers.metrics import first_error


def read_row(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """Labels become prefix labels: a step built on a wrong step is wrong."""
    steps, human = rows(row, "model_response_by_step"), rows(row, "human_labels", (int, bool))
    same_length(human, steps)
    if not set(human) <= {0, 1}:
        raise RowError(f"bad label: human_labels holds other values than 0 and 1: {human}")
    labels = carried_forward([float(label) for label in human])
    first = first_zero(labels)
    record = SolutionRecord(
        str(row.get("unique_id") or row.get("id") or name),
        text(row, "question"),
        plain_steps(steps),
        labels=tuple(labels),
        scope="prefix",
        first_error=first,
        final_correct=first == -1,
        source="hard2verify",
    )
    return [Item((record,), "", first)]


def carried_forward(labels: Sequence[float]) -> list[float]:
    """Local to prefix labels: right iff this and all earlier steps are right."""
    return list(accumulate(labels, min))


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """Levels step, response (right iff all steps are) and first error (exact index), each with `balanced`.

    A step is called right iff its score is at least the threshold. A solution without scores is wrong everywhere.
    """
    steps: list[tuple[bool, bool]] = []
    responses: list[tuple[bool, bool]] = []
    first_errors: list[tuple[bool, bool]] = []
    for entry in scored:
        labels, scores = entry.item.records[0].labels or (), entry.scores[0]
        response_right = entry.item.truth == -1
        if scores is None:
            steps += [(False, label == 1) for label in labels]
            responses.append((False, response_right))
            first_errors.append((False, response_right))
            continue
        called_right = [score >= threshold for score in scores]
        for called, label in zip(called_right, labels, strict=True):
            steps.append((called == (label == 1), label == 1))
        responses.append((all(called_right) == response_right, response_right))
        first_errors.append((first_error(scores, tau=threshold) == entry.item.truth, response_right))
    levels = {"step": balanced(steps), "response": balanced(responses), "first_error": balanced(first_errors)}
    metrics = {}
    for level, measures in levels.items():
        for name, value in measures.items():
            metrics[f"{level}_{name}"] = value
    return Result(metrics, levels)


def balanced(hits: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """From (judged correctly, truly right): TPR on right ones, TNR on wrong ones, their mean and harmonic mean."""
    tpr = mean([hit for hit, right in hits if right])
    tnr = mean([hit for hit, right in hits if not right])
    f1 = 0.0 if tpr + tnr == 0 else 2 * tpr * tnr / (tpr + tnr)
    return {"balanced_f1": f1, "balanced_acc": (tpr + tnr) / 2, "tpr": tpr, "tnr": tnr}


BENCH = register("benchmarks", "hard2verify")(Benchmark(read_row, measure, "step_balanced_f1", lenient=True))
