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
    steps, given = rows(row, "model_response_by_step"), rows(row, "human_labels", (int, bool))
    same_length(given, steps)
    if not set(given) <= {0, 1}:
        raise RowError(f"bad label: human_labels holds other values than 0 and 1: {given}")
    labels = carried_forward([float(y) for y in given])
    own = str(row.get("unique_id") or row.get("id") or name)
    first = first_zero(labels)
    record = SolutionRecord(
        own, text(row, "question"), plain_steps(steps), labels=tuple(labels), scope="prefix", first_error=first,
        final_correct=first == -1, source="hard2verify",
    )  # fmt: skip
    return [Item((record,), "", first)]


def carried_forward(labels: Sequence[float]) -> list[float]:
    """Local to prefix labels: right iff this and all earlier steps are right."""
    return list(accumulate(labels, min))


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """Levels step, response (right iff all steps are) and first error (exact index), each with `balanced`.

    A step is called right iff its score is at least the threshold. A solution without scores is wrong everywhere.
    """
    steps, responses, firsts = [], [], []
    for s in scored:
        labels, p = s.item.records[0].labels or (), s.scores[0]
        called = [None] * len(labels) if p is None else [x >= threshold for x in p]
        steps += [(c is not None and c == (y == 1), y == 1) for c, y in zip(called, labels, strict=True)]
        right = s.item.truth == -1
        responses.append((p is not None and all(called) == right, right))
        firsts.append((p is not None and first_error(p, tau=threshold) == s.item.truth, right))
    levels = {"step": balanced(steps), "response": balanced(responses), "first_error": balanced(firsts)}
    return Result({f"{name}_{k}": v for name, g in levels.items() for k, v in g.items()}, levels)


def balanced(hits: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """From (judged correctly, truly right): TPR on right ones, TNR on wrong ones, their mean and harmonic mean."""
    tpr = mean([hit for hit, right in hits if right])
    tnr = mean([hit for hit, right in hits if not right])
    f1 = 0.0 if tpr + tnr == 0 else 2 * tpr * tnr / (tpr + tnr)
    return {"balanced_f1": f1, "balanced_acc": (tpr + tnr) / 2, "tpr": tpr, "tnr": tnr}


BENCH = register("benchmarks", "hard2verify")(Benchmark(read_row, measure, "step_balanced_f1", lenient=True))
