"""Conversations with one verdict per turn: VisualPRM400K, VL-PRM300K, RLHFlow."""

from __future__ import annotations

import re
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.records import SECTIONS, Counts, Kind, SolutionRecord, Step, plain_steps
from mmrl.reasoning.rows import (
    Row,
    first_zero,
    images,
    integer,
    number,
    optional_text,
    rest,
    row_id,
    rows,
    text,
    up_to_first_error,
    without_image_marks,
)
from mmrl.registry import register

_QUESTION = re.compile(r"\A\s*### Question:\n(.*?)\n\n### Solution Process:\n(.*)\Z", re.DOTALL)
_SECTION = re.compile(rf"\A\[({'|'.join(SECTIONS)})\]\s*")
_TAGGED = re.compile(r"\A\s*<step_(\d+)>(.*)</step_\1>\s*\Z", re.DOTALL)
_VERDICT = {"+": 1.0, "-": 0.0}
# A list or tuple of a section and a step as Python or JSON writes it.
_PLACE = re.compile(r"""\s*+[\[(]\s*+(["'])([^"']{0,40}+)\1\s*+,\s*+(-?[0-9]{1,9})\s*+[\])]\s*+""")


@register("formats", "visualprm")
def visualprm(row: Row, name: str) -> list[SolutionRecord]:
    """VisualPRM400K: `id, image, conversations` with + or - after each step (hard Monte-Carlo labels, mc > 0)."""
    question, steps, labels = _turns(row)
    record = SolutionRecord(
        row_id(row, name),
        question,
        plain_steps(steps),
        images=images(row, "image"),
        labels=tuple(labels),
        scope="prefix",
        first_error=first_zero(labels),
        source="visualprm",
        meta=rest(row, "id", "image", "conversations"),
    )
    return [record]


@register("formats", "visualprm_raw")
def visualprm_raw(row: Row, name: str) -> list[SolutionRecord]:
    """VisualPRM400K raw: `steps_with_score` with counts. Steps after an early stop (total 0) are unlabelled, not 0."""
    scored = rows(row, "steps_with_score", dict)
    counts = tuple(_counts(step, i) for i, step in enumerate(scored))
    question = optional_text(row, "question_orig") or text(row, "question")
    record = SolutionRecord(
        row_id(row, name),
        without_image_marks(question),
        plain_steps([text(step, "step") for step in scored]),
        images=images(row, "image"),
        answer=optional_text(row, "answer"),
        labels=tuple(count.correct / count.total if count.total else None for count in counts),
        label_kind="soft",
        scope="prefix",
        mc=counts,
        source="visualprm_raw",
        meta=rest(row, "id", "question", "question_orig", "image", "answer", "steps_with_score"),
    )
    return [record]


@register("formats", "vlprm")
def vlprm(row: Row, name: str) -> list[SolutionRecord]:
    """VL-PRM300K: sections of perception and reasoning steps; `first_incorrect_step` counts within its section.

    Turns end at the first error in the released set; the field, often a list stored as text, must agree with them.
    """
    question, turns, labels = _turns(row)
    steps = _sectioned(turns)
    first = _first_incorrect(row.get("first_incorrect_step"), sum(step.kind == "perception" for step in steps))
    if first != first_zero(labels):
        raise RowError(f"first errors differ: the turns say {first_zero(labels)}, first_incorrect_step says {first}")
    record = SolutionRecord(
        row_id(row, name),
        question,
        steps,
        images=images(row, "image", "image_url"),
        answer=optional_text(row, "rollout_ground_truth_answer"),
        labels=up_to_first_error(first, len(steps)),
        scope="prefix",
        first_error=first,
        source="vlprm",
        meta=rest(row, "id", "conversations", "image", "image_url", "question", "rollout_ground_truth_answer"),
    )
    return [record]


@register("formats", "rlhflow")
def rlhflow(row: Row, name: str) -> list[SolutionRecord]:
    """RLHFlow PRM data: `conversations` of `role, content`; the first user turn is the question, then `Step 1: ..`."""
    turns = [(turn.get("role"), turn.get("content")) for turn in rows(row, "conversations", dict)]
    steps, labels = _pairs(turns, "user", "assistant")
    question, mark, first = steps[0].rpartition("Step 1:")
    if not mark:
        raise RowError("no first step: the first user turn holds no 'Step 1:' after the question")
    texts = [mark + first, *steps[1:]]
    record = SolutionRecord(
        row_id(row, name),
        question.strip(),
        plain_steps([step.strip() for step in texts]),
        labels=tuple(labels),
        scope="prefix",
        first_error=first_zero(labels),
        source="rlhflow",
        meta=rest(row, "id", "conversations"),
    )
    return [record]


def _turns(row: Row) -> tuple[str, list[str], list[float]]:
    """Question, steps and labels of a conversation whose first human turn has both the question and the first step."""
    turns = []
    for turn in rows(row, "conversations", dict):
        if turn.get("from") != "system":
            turns.append((turn.get("from"), turn.get("value")))
    steps, labels = _pairs(turns, "human", "gpt")
    parts = _QUESTION.match(steps[0])
    if not parts:
        raise RowError("no question: the first human turn lacks '### Question:' or '### Solution Process:'")
    return without_image_marks(parts[1]).strip(), [parts[2], *steps[1:]], labels


def _pairs(turns: list[tuple[Any, Any]], asks: str, answers: str) -> tuple[list[str], list[float]]:
    """Texts of the asking side and the verdicts that answer them."""
    if not turns or len(turns) % 2:
        raise RowError(f"labels and steps differ: {len(turns)} turns, which are no pairs of step and verdict")
    steps, labels = [], []
    for i in range(0, len(turns), 2):
        (first, step), (second, verdict) = turns[i : i + 2]
        if (first, second) != (asks, answers) or not isinstance(step, str):
            raise RowError(
                f"bad turns: turns {i} and {i + 1} are from {first!r} and {second!r}, not {asks}, {answers}"
            )
        if not isinstance(verdict, str) or verdict.strip() not in _VERDICT:
            raise RowError(f"bad verdict: turn {i + 1} says {str(verdict)[:40]!r}, neither + nor -")
        steps.append(step)
        labels.append(_VERDICT[verdict.strip()])
    return steps, labels


def _counts(scored: Row, i: int) -> Counts:
    score = number(scored.get("score"), f"score of step {i}")
    correct = integer(scored.get("num_mc_correct"), f"counts: step {i}")
    total = integer(scored.get("num_mc_total"), f"counts: step {i}")
    if total and abs(score - correct / total) > 1e-3:
        raise RowError(f"score and counts differ: step {i} has score {score} and {correct} of {total}")
    return Counts(correct, total)


def _sectioned(turns: list[str]) -> tuple[Step, ...]:
    """Steps without section heads and <step_k> tags, which restart at 1 in every section."""
    steps: list[Step] = []
    kind: Kind = "unknown"
    for turn in turns:
        head = _SECTION.match(turn)
        if head:
            kind, turn = SECTIONS[head[1]], turn[head.end() :]
        tagged = _TAGGED.match(turn)
        steps.append(Step(tagged[2].strip() if tagged else turn, kind))
    return tuple(steps)


def _first_incorrect(value: Any, n_visual: int) -> int:
    """Absolute index from ("Visual Elements" | "Reasoning", k); -1 for None."""
    if isinstance(value, str):
        place = _PLACE.fullmatch(value)
        value = (place[2], int(place[3])) if place else None if value.strip() in ("None", "[]") else value
    if value is None or value == []:
        return -1
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise RowError(f"bad first_incorrect_step: {str(value)[:40]!r} is no [section, step]")
    section, step = value[0], integer(value[1], "first_incorrect_step")
    if section not in tuple(SECTIONS) or step < 0:
        raise RowError(f"bad first_incorrect_step: unknown section or step {str(value)[:80]!r}")
    return step + (n_visual if section == "Reasoning" else 0)
