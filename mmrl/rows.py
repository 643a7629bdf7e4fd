"""What readers of published files share: typed columns of a row, and labels from the position of the first error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.embedded import media_paths
from mmrl.jsonl import RowError

Row = Mapping[str, Any]

# A picture's place in a text, as in the data of LLaVA and others.
IMAGE_MARK = "<image>"
# Columns in which public data sets keep the answer.
LIKE_ANSWERS = ("solution", "answers", "final_answer", "gold", "gold_answer", "ground_truth", "label", "target", "gt")


def text(row: Row, key: str) -> str:
    """A text that is there and not empty."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"no text in column {key!r}: columns are {sorted(row)}")
    return value


def optional_text(row: Row, *keys: str) -> str | None:
    """The first of the columns that is there, as text."""
    value = next((row[k] for k in keys if row.get(k) is not None), None)
    return None if value is None else str(value)


def rows(row: Row, key: str, kind: type | tuple[type, ...] = (str,)) -> list[Any]:
    """A list whose entries are all of `kind`."""
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(v, kind) for v in value):
        raise RowError(f"bad {key}: column {key!r} is no list of the expected entries: {str(value)[:80]!r}")
    return value


def images(row: Row, *keys: str) -> tuple[str, ...]:
    """Picture paths of the first of the columns that is not empty; embedded pictures become files."""
    column = next((k for k in keys if row.get(k)), keys[0])
    return media_paths(row.get(column), column)


def row_id(row: Row, name: str, key: str = "id") -> str:
    """The row's own id, else `file:row`."""
    value = row.get(key)
    return name if value is None or value == "" else str(value)


def rest(row: Row, *used: str) -> dict[str, Any]:
    """The columns that were not used, for `meta`."""
    return {k: v for k, v in row.items() if k not in used}


def number(value: Any, what: str) -> float:
    """A finite number; booleans are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise RowError(f"bad {what}: {str(value)[:40]!r} is no number")
    return float(value)


def without_image_marks(question: str) -> str:
    """The question without `<image>` at its ends, since pictures are given by their column."""
    first, last = question, None
    # by hand: a pattern that ends in blanks takes quadratic time on a text full of them
    while last != first:
        last = first
        bare = first.strip()
        if bare.startswith(IMAGE_MARK):
            first = bare.removeprefix(IMAGE_MARK).lstrip()
        elif bare.endswith(IMAGE_MARK):
            first = bare.removesuffix(IMAGE_MARK).rstrip()
    return first


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
    return next((i for i, y in enumerate(labels) if y == 0), -1)
