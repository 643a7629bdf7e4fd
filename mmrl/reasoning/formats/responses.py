"""Whole responses of a model: their steps are read by the layout in which it writes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from mmrl.jsonl import RowError
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.rows import Row, images, optional_text, rest, row_id, text
from mmrl.reasoning.step_texts import Layout, ParsedStep, StepParseError, join, merge, parse
from mmrl.registry import register


@register("formats", "responses")
def responses(
    row: Row, name: str, *, steps: Layout = "double_newline", max_steps: Annotated[int, Field(ge=1)] | None = None
) -> list[SolutionRecord]:
    """Unlabelled solutions: `question`, `response`, optionally `images` or `image`, `answer`, `id`.

    steps: how the response is cut (`mmrl.reasoning.step_texts.parse`): at blank lines, at line ends, by tags or
    headers. max_steps: neighbouring steps are joined until at most so many are left (VisualPRM).
    """
    try:
        parsed = parse(text(row, "response"), steps)
    except StepParseError as error:
        raise RowError(f"bad steps: {error}") from error
    kept = parsed if max_steps is None else merge(parsed, max_steps)
    record = SolutionRecord(
        row_id(row, name),
        text(row, "question"),
        tuple(Step(step.text.strip(), step.kind) for step in kept if step.text.strip()),
        images=images(row, "images", "image"),
        answer=optional_text(row, "answer"),
        source="responses",
        meta=rest(row, "id", "question", "response", "images", "image", "answer"),
    )
    return [record]


@register("exporters", "responses")
def response_row(record: SolutionRecord, *, steps: Layout = "double_newline") -> dict[str, Any]:
    """`question`, `response` and what else the reader takes; labels are not part of the format.

    Raises:
        RowError: a step that this layout cannot hold.
    """
    parts = [ParsedStep(step.text, i, step.kind, (0, 0)) for i, step in enumerate(record.steps)]
    try:
        response = join(parts, steps)
    except ValueError as error:
        raise RowError(f"no {steps} layout: {error}") from error
    row: dict[str, Any] = {"id": record.id, "question": record.question, "response": response}
    if record.images:
        row["images"] = list(record.images)
    if record.answer is not None:
        row["answer"] = record.answer
    return row
