"""Text-only sets: PRM800K, Math-Shepherd, TRL's stepwise supervision."""

from __future__ import annotations

from typing import Any, Literal

from mmrl.jsonl import RowError
from mmrl.reasoning.records import SolutionRecord, plain_steps
from mmrl.reasoning.rows import (
    Row,
    check_total,
    first_zero,
    images,
    integer,
    number,
    optional_text,
    rest,
    row_id,
    rows,
    same_length,
    text,
)
from mmrl.registry import register

Neutral = Literal["positive", "negative", "drop"]
_MARK = "ки"


@register("formats", "prm800k")
def prm800k(row: Row, name: str, *, neutral: Neutral = "positive") -> list[SolutionRecord]:
    """PRM800K: every completion that was not chosen ends a solution; the chosen or human one goes on.

    neutral: what rating 0 becomes: "positive" as in the paper, "negative" as in TRL's converter (rating == 1), "drop"
    for unlabelled. A human completion is right. Without a rating a step is unlabelled.
    """
    if neutral not in ("positive", "negative", "drop"):
        raise ValueError(f"neutral={neutral!r} is none of positive, negative, drop")
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, dict) or not isinstance(label, dict):
        raise RowError("no PRM800K row: 'question' and 'label' must be objects")
    solutions = _expand(rows(label, "steps", dict), neutral)
    meta = {"finish_reason": label.get("finish_reason")}
    answer = optional_text(question, "ground_truth_answer")
    records = []
    for i, solution in enumerate(solutions):
        labels = [label for _, label in solution]
        record = SolutionRecord(
            f"{name}#{i}",
            text(question, "problem"),
            plain_steps([step for step, _ in solution]),
            answer=answer,
            labels=tuple(labels),
            first_error=_first_known(labels),
            source="prm800k",
            meta=meta,
        )
        records.append(record)
    return records


@register("formats", "math_shepherd")
def math_shepherd(row: Row, name: str) -> list[SolutionRecord]:
    """Math-Shepherd: `input` with ` ки` after each step, `label` the same text with + or - in its place."""
    pieces = text(row, "input").split(_MARK)
    labels = _aligned(pieces, text(row, "label"))
    question, mark, first = pieces[0].rpartition("Step 1:")
    if not mark:
        raise RowError("no first step: 'input' holds no 'Step 1:' after the question")
    steps = [(mark + first).strip(), *(piece.strip() for piece in pieces[1:-1])]
    record = SolutionRecord(
        row_id(row, name),
        question.strip(),
        plain_steps(steps),
        labels=tuple(labels),
        scope="prefix",
        first_error=first_zero(labels),
        source="math_shepherd",
        meta=rest(row, "id", "input", "label"),
    )
    return [record]


@register("formats", "trl")
def trl(row: Row, name: str) -> list[SolutionRecord]:
    """TRL stepwise supervision: `prompt, completions, labels`; labels between 0 and 1 make a soft record."""
    steps = rows(row, "completions")
    values = []
    for value in rows(row, "labels", (bool, int, float)):
        values.append(float(value) if isinstance(value, bool) else number(value, "label"))
    same_length(values, steps)
    hard = all(value in (0, 1) for value in values)
    record = SolutionRecord(
        row_id(row, name),
        text(row, "prompt"),
        plain_steps(steps),
        images=images(row, "images"),
        labels=tuple(values),
        label_kind="hard" if hard else "soft",
        first_error=first_zero(values) if hard else None,
        source="trl",
        meta=rest(row, "id", "prompt", "completions", "labels", "images"),
    )
    return [record]


@register("exporters", "trl")
def trl_row(record: SolutionRecord) -> dict[str, Any]:
    """The row of a record with hard labels for every step; options are not part of the format.

    Raises:
        RowError: an unlabelled step, or soft labels, which TRL's tokeniser cuts to whole numbers (0.9 becomes 0).
    """
    labels = record.labels
    if labels is None or None in labels:
        raise RowError(f"unlabelled steps: {record.id!r} has some; TRL rows need a label per step")
    if any(label not in (0, 1) for label in labels):
        raise RowError(f"soft labels: {record.id!r} has some, which TRL cuts to 0 or 1; make them hard first")
    row: dict[str, Any] = {
        "prompt": record.question,
        "completions": list(record.texts),
        "labels": [label == 1 for label in labels],
    }
    if record.images:
        row["images"] = list(record.images)
    return row


# A step's text and its label, None = unlabelled.
LabelledStep = tuple[str, float | None]


def _expand(steps: list[Any], neutral: Neutral) -> list[list[LabelledStep]]:
    """The solutions of a row: one per completion that was not chosen, and the chosen path where none goes on from it.

    The chosen (or human) completion of each step joins the prefix that the completions of the next step go on from.
    """
    prefix: list[LabelledStep] = []
    solutions: list[list[LabelledStep]] = []
    total = 0
    for step in steps:
        completions = rows(step, "completions", dict) if step.get("completions") is not None else []
        chosen = step.get("chosen_completion")
        total += len(completions) * (len(prefix) + 1)
        check_total(total)
        for i, completion in enumerate(completions):
            if i != chosen:
                solutions.append([*prefix, _labelled_step(completion, neutral)])
        if chosen is not None:
            if not 0 <= integer(chosen, "chosen_completion") < len(completions):
                raise RowError(f"bad chosen_completion: {chosen} of {len(completions)} completions")
            prefix.append(_labelled_step(completions[chosen], neutral))
        elif step.get("human_completion"):
            if not isinstance(step["human_completion"], dict):
                raise RowError(f"bad human_completion: {str(step['human_completion'])[:80]!r} is no object")
            prefix.append((text(step["human_completion"], "text"), 1.0))
        else:
            break
    if not any(solution[: len(prefix)] == prefix for solution in solutions):
        solutions.append(prefix)
    return solutions


def _labelled_step(completion: Row, neutral: Neutral) -> LabelledStep:
    return text(completion, "text"), _rating(completion.get("rating"), neutral)


def _rating(value: Any, neutral: Neutral) -> float | None:
    if value not in (None, -1, 0, 1):
        raise RowError(f"bad rating: {str(value)[:40]!r} is none of -1, 0, 1")
    if value == 0:
        return {"positive": 1.0, "negative": 0.0, "drop": None}[neutral]
    return None if value is None else float(value == 1)


def _first_known(labels: list[float | None]) -> int | None:
    """The first error, None where an unlabelled step may be wrong and no labelled one is."""
    first = first_zero(labels)
    return None if first < 0 and None in labels else first


def _aligned(pieces: list[str], label: str) -> list[float]:
    """Labels of the pieces between the marks, found by walking both texts."""
    labels, at = [], 0
    for i, piece in enumerate(pieces):
        if not label.startswith(piece, at):
            raise RowError(f"input and label differ: at step {i}, character {at} of 'label'")
        at += len(piece)
        if i < len(pieces) - 1:
            if label[at : at + 1] not in ("+", "-"):
                raise RowError(f"bad verdict: {label[at : at + 1]!r} where step {i} is judged, neither + nor -")
            labels.append(float(label[at] == "+"))
            at += 1
    if label[at:].strip():
        raise RowError(f"input and label differ: 'label' goes on with {label[at : at + 20]!r}")
    if not labels:
        raise RowError("no step: 'input' holds no mark")
    if pieces[-1].strip():
        raise RowError(f"text after the last marker: {pieces[-1][:40]!r}")
    return labels
