"""Helpers of the readers of published files: typed columns of a row, and labels that a first error implies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.embedded import media_paths

Row = Mapping[str, Any]

# A picture's place in a text, as in the data of LLaVA and others.
IMAGE_MARK = "<image>"
# Columns in which public data sets keep the answer.
LIKE_ANSWERS = ("solution", "answers", "final_answer", "gold", "gold_answer", "ground_truth", "label", "target", "gt")
_LARGEST = 2**53
_MOST_STEPS = 100_000


def text(row: Row, key: str) -> str:
    """A text that is there and not empty."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no text in column {key!r}: columns are {sorted(row)}")
    return value


def optional_text(row: Row, *keys: str) -> str | None:
    """The first of the columns that is there, as text: a text, a number or a truth value."""
    for key in keys:
        if row.get(key) is not None:
            return plain_text(row[key], key)
    return None


def plain_text(value: Any, what: str) -> str:
    """A text, or a number or truth value as one; RowError for lists and objects."""
    if not isinstance(value, str | int | float):
        raise RowError(f"bad {what}: {str(value)[:80]!r} is neither a text nor a number")
    return str(value)


def rows(row: Row, key: str, kind: type | tuple[type, ...] = (str,)) -> list[Any]:
    """A list whose entries are all of `kind`."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise RowError(f"bad {key}: column {key!r} is no list of the expected entries: {str(value)[:80]!r}")
    return value


def images(row: Row, *keys: str) -> tuple[str, ...]:
    """Picture paths of the first of the columns that is not empty; embedded pictures become files."""
    column = next((key for key in keys if row.get(key)), keys[0])
    return media_paths(row.get(column), column)


def row_id(row: Row, name: str, key: str = "id") -> str:
    """The row's own id, else `file:row`."""
    return optional_text(row, key) or name


def rest(row: Row, *used: str) -> dict[str, Any]:
    """The columns that were not used, for `meta`."""
    return {column: value for column, value in row.items() if column not in used}


def is_number(value: Any) -> bool:
    """A number up to 2^53, from where on whole numbers of JSON are not exact in every reader; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def number(value: Any, what: str) -> float:
    """A number; see `is_number`."""
    if not is_number(value):
        raise RowError(f"bad {what}: {str(value)[:40]!r} is no number, or too large a one")
    return float(value)


def integer(value: Any, what: str) -> int:
    """A whole number; see `is_number`."""
    if type(value) is not int or not is_number(value):
        raise RowError(f"bad {what}: {str(value)[:40]!r} is no whole number, or too large a one")
    return value


def without_marks(question: str, *marks: str) -> str:
    """The question without marks of media and blanks at its ends."""
    start, end = 0, len(question)
    while start < end:
        before = start, end
        if question[start].isspace():
            start += 1
        if end > start and question[end - 1].isspace():
            end -= 1
        for mark in marks:
            start += len(mark) * question.startswith(mark, start, end)
            end -= len(mark) * question.endswith(mark, start, end)
        if before == (start, end):
            break
    return question[start:end]


def without_image_marks(question: str) -> str:
    """The question without `<image>` at its ends, since pictures are given by their column."""
    return without_marks(question, IMAGE_MARK) if IMAGE_MARK in question else question


def check_total(steps: int) -> None:
    """RowError when the solutions of one row, which share their beginnings there, would hold very many steps."""
    if steps > _MOST_STEPS:
        raise RowError(f"too many steps: the solutions of one row have more than {_MOST_STEPS} in all")


def same_length(labels: Sequence[Any], steps: Sequence[Any]) -> None:
    """RowError when there is not one label per step."""
    if len(labels) != len(steps):
        raise RowError(f"labels and steps differ: {len(labels)} labels for {len(steps)} steps")


def up_to_first_error(first_error: int, n: int) -> tuple[float | None, ...]:
    """Labels that a first error implies: 1 before it, 0 at it, unknown after it; all 1 for -1."""
    if first_error == -1:
        return (1.0,) * n
    if not 0 <= first_error < n:
        raise RowError(f"first_error outside the steps: {first_error} for {n} steps (0-based, -1 = none)")
    return (1.0,) * first_error + (0.0,) + (None,) * (n - first_error - 1)


def first_zero(labels: Sequence[float | None]) -> int:
    """Index of the first label 0, -1 without one."""
    return next((i for i, label in enumerate(labels) if label == 0), -1)
