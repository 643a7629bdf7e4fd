"""Test sets as records: ProcessBench, PRMBench, VisualProcessBench, PuzzleVQA steps."""

from __future__ import annotations

import re
from typing import Any

from mmrl.jsonl import RowError, parse_object
from mmrl.reasoning.records import SolutionRecord, plain_steps
from mmrl.reasoning.records_io import record_from_json
from mmrl.reasoning.rows import (
    Row,
    first_zero,
    images,
    integer,
    optional_text,
    rest,
    row_id,
    rows,
    same_length,
    text,
    up_to_first_error,
    without_image_marks,
)
from mmrl.registry import register

_VERDICT = {1: 1.0, 0: None, -1: 0.0}
_NUMBER = re.compile(r"\s*+([0-9]{1,9})\.\s++")


@register("formats", "processbench")
def processbench(row: Row, name: str) -> list[SolutionRecord]:
    """ProcessBench: `problem, steps, label` (first error, 0-based, -1 = none). Steps after it are unlabelled."""
    steps, label = rows(row, "steps"), integer(row.get("label"), "label")
    correct = row.get("final_answer_correct")
    record = SolutionRecord(
        row_id(row, name),
        text(row, "problem"),
        plain_steps(steps),
        labels=up_to_first_error(label, len(steps)),
        scope="prefix",
        first_error=label,
        final_correct=correct if isinstance(correct, bool) else None,
        source="processbench",
        meta=rest(row, "id", "problem", "steps", "label", "final_answer_correct"),
    )
    return [record]


@register("exporters", "processbench")
def processbench_row(record: SolutionRecord) -> dict[str, Any]:
    """The row of a record whose first error is known."""
    if record.first_error is None:
        raise RowError(f"no first error: {record.id!r} does not say where it is")
    return {
        "id": record.id,
        "problem": record.question,
        "steps": list(record.texts),
        "final_answer_correct": record.final_correct,
        "label": record.first_error,
    } | dict(record.meta)


@register("formats", "prmbench")
def prmbench(row: Row, name: str) -> list[SolutionRecord]:
    """PRMBench: the modified solution; `error_steps` is 1-based, the record's first error 0-based.

    Some published rows name steps beyond the last one; as in the official evaluation those are ignored, and kept in
    meta. Number prefixes `k. ` of the steps are removed. The id is `classification_idx`.
    """
    kind, index = text(row, "classification"), text(row, "idx")
    steps = numbered(rows(row, "modified_process"))
    errors = rows(row, "error_steps", int)
    labels = tuple(0.0 if i in errors else 1.0 for i in range(1, len(steps) + 1))
    if errors and (first_zero(labels) < 0 or min(errors) < 1):
        raise RowError(f"error_steps outside the steps: {errors} for {len(steps)} steps (1-based)")
    record = SolutionRecord(
        f"{kind}_{index}",
        optional_text(row, "modified_question") or text(row, "question"),
        plain_steps(steps),
        answer=optional_text(row, "ground_truth"),
        labels=labels,
        first_error=first_zero(labels),
        source="prmbench",
        meta={"idx": index, "classification": kind, "error_steps": errors},
    )
    return [record]


def numbered(steps: list[str]) -> list[str]:
    """Steps without their own number `k. ` in front."""
    texts = []
    for i, step in enumerate(steps, start=1):
        number = _NUMBER.match(step)
        if number and number[1] == str(i):
            step = step[number.end() :]
        texts.append(step)
    return texts


@register("formats", "visualprocessbench")
def visualprocessbench(row: Row, name: str) -> list[SolutionRecord]:
    """VisualProcessBench: `response{steps, process_correctness}` with 1, -1 and 0 = neutral, which is unlabelled."""
    response = row.get("response")
    if isinstance(response, str):
        response = parse_object(response.encode())
    if not isinstance(response, dict):
        raise RowError("bad response: no object with steps and process_correctness")
    steps, verdicts = rows(response, "steps"), rows(response, "process_correctness", int)
    same_length(verdicts, steps)
    if not set(verdicts) <= set(_VERDICT):
        raise RowError(f"bad label: process_correctness holds other numbers than 1, 0, -1: {verdicts}")
    labels = tuple(_VERDICT[verdict] for verdict in verdicts)
    record = SolutionRecord(
        row_id(row, name),
        without_image_marks(text(row, "question")),
        plain_steps(steps),
        images=images(row, "image"),
        answer=optional_text(row, "answer"),
        labels=labels,
        first_error=first_zero(labels),
        source="visualprocessbench",
        meta=rest(row, "id", "question", "image", "answer", "response"),
    )
    return [record]


@register("exporters", "visualprocessbench")
def visualprocessbench_row(record: SolutionRecord) -> dict[str, Any]:
    """The row of a record with hard or no labels; an unlabelled step becomes neutral."""
    if record.labels is None or any(label not in (0, 1, None) for label in record.labels):
        raise RowError(f"no hard labels: {record.id!r} needs 0, 1 or null per step")
    verdict_of = {label: verdict for verdict, label in _VERDICT.items()}
    verdicts = [verdict_of[label] for label in record.labels]
    return {
        "id": record.id,
        "image": list(record.images),
        "question": record.question,
        "answer": record.answer,
        "response": {"steps": list(record.texts), "process_correctness": verdicts},
    } | dict(record.meta)


@register("formats", "puzzlevqa_steps")
def puzzlevqa_steps(row: Row, name: str) -> list[SolutionRecord]:
    """Rule-made PuzzleVQA rollouts: `steps, step_kinds, labels`, exactly one value wrong in the bad ones."""
    texts, kinds = rows(row, "steps"), rows(row, "step_kinds")
    same_length(kinds, texts)
    same = ("question", "options", "answer", "labels", "first_error", "final_correct")
    record = {column: row.get(column) for column in same} | {
        "id": row_id(row, name),
        "images": list(images(row, "image")),
        "steps": [{"text": step, "kind": kind} for step, kind in zip(texts, kinds, strict=True)],
        "source": "puzzlevqa_steps",
        "meta": rest(row, "id", "image", "steps", "step_kinds", *same),
    }
    return [record_from_json(record)]
