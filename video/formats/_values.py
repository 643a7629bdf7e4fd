"""Parts shared by the readers: numbers, pairs and boxes of a row, and media below a root folder.

    whole("57", "frame")                          # 57
    pairs({"frames": [[0, 8]]}, "frames", whole)  # ((0, 8),)
    box([0, 0, 1], "boxes[2]")                    # RowError: bad boxes[2]: '[0, 0, 1]' is no [x1, y1, x2, y2]

`what` is the name of a value in the message of a RowError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mmrl.jsonl import RowError
from mmrl.reasoning.embedded import is_embedded
from mmrl.reasoning.rows import is_number, without_marks
from mmrl.registry import Kind, add_kind
from video.records import Box

# (row, where it stands) -> samples
add_kind(Kind("video_formats", "video format", arguments=2))

Row = Mapping[str, Any]
Number = TypeVar("Number", int, float)
Value = TypeVar("Value")
# tried in this order behind a video's name without suffix
_SUFFIXES = ("", ".mp4", ".mkv", ".webm", ".avi", ".mov")


def typed(row: Row, key: str, kind: type, default: Any) -> Any:
    """The value of a field, `default` where it is missing or null. RowError when it is of another kind."""
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise RowError(f"bad {key}: {str(value)[:80]!r} is {type(value).__name__}, not {kind.__name__}")
    return value


def without_media_marks(question: str) -> str:
    """The question without `<video>` and `<image>` at its ends, since media are given by their own field."""
    return without_marks(question, "<video>", "<image>")


def whole(value: Any, what: str) -> int:
    """A whole number; 57.0 and "57" are some too."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        number = float(value)
    if not is_number(number) or number % 1:
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no whole number, or too large a one")
    return int(number)


def real(value: Any, what: str) -> float:
    """A finite number."""
    if not is_number(value):
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no number, or too large a one")
    return float(value)


def optional(value: Any, what: str, kind: Callable[[Any, str], Value]) -> Value | None:
    """`kind(value, what)`, None where there is no value."""
    return None if value is None else kind(value, what)


def pair(value: Any, what: str, kind: Callable[[Any, str], Number]) -> tuple[Number, Number]:
    """Two numbers."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no pair of numbers")
    return kind(value[0], what), kind(value[1], what)


def pairs(row: Row, key: str, kind: Callable[[Any, str], Number]) -> tuple[tuple[Number, Number], ...]:
    """A field with a list of pairs, empty where it is missing."""
    values = typed(row, key, list, [])
    return tuple(pair(value, f"{key}[{i}]", kind) for i, value in enumerate(values))


def box(value: Any, what: str) -> Box:
    """Four numbers x1, y1, x2, y2."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no [x1, y1, x2, y2]")
    x1, y1, x2, y2 = (real(coordinate, what) for coordinate in value)
    return x1, y1, x2, y2


def media_file(name: str, root: Path, what: str) -> str:
    """The absolute path of a file below `root`. A path that starts with `/` and lies elsewhere is taken below it too.

    A video without suffix may be named by its id alone.

    Raises:
        RowError: no such file, or it leads out of the root.
    """
    try:
        # links are followed first, so that none can lead out of the root
        base = root.resolve()
        if what == "video" and not Path(name).suffix:
            name = _with_suffix(name, base)
        path = (base / name).resolve()
        is_inside = is_embedded(name) or path.is_relative_to(base)
        if not is_inside and name.startswith("/"):
            path = (base / name.lstrip("/")).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise RowError(f"bad path: {what} {name[:80]!r} ({error})") from error
    if not is_embedded(name) and not path.is_relative_to(base):
        raise RowError(f"outside the media root: {what} {name!r} leads to {path}, not below {base}")
    if not is_file:
        raise RowError(f"{what} missing: {path} is no file; check the path and media_root (now {base})")
    return str(path)


def _with_suffix(name: str, folder: Path) -> str:
    """The first of `name`, `name.mp4`, .. that is a file in the folder, else the name as it is."""
    for suffix in _SUFFIXES:
        if (folder / (name + suffix)).is_file():
            return name + suffix
    return name
