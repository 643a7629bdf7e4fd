"""Files of rows, JSON lines above all: a bad row is set aside with file, line and reason, never dropped unseen."""

from __future__ import annotations

import csv
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

log = logging.getLogger(__name__)

# a text, which may go on to the end, or a mark outside of one
_JSON_MARK = re.compile(r'"(?:[^"\\]|\\.|\\\Z)*+(?:"|\Z)|[\[\]{},]', re.DOTALL)
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_REASON = 1000  # characters
T = TypeVar("T")
Make = Callable[[Mapping[str, Any], str], Iterable[T]]


class Quarantined(NamedTuple):
    """A row that was set aside; `row` counts from 1: lines of JSON lines, else entries."""

    file: str
    row: int
    reason: str


class RowError(ValueError):
    """Why one row cannot be used. `kind: details` groups well in a report."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl. Other lines are left out and told, but for a last one cut by a kill."""
    rows: list[dict[str, Any]] = []
    damaged = 0
    lines = file.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("iteration"), int):
            rows.append(row)
        elif number < len(lines):
            damaged += 1
    if damaged:
        log.warning("%s: %d lines could not be read and are left out", file, damaged)
    return rows


def read_rows(
    file: str | Path,
    make: Make[T],
    *,
    max_bad: float,
    key: Callable[[T], str] | None = None,
    limit: int | None = None,
    text_as: str = "",
) -> tuple[list[T], list[Quarantined]]:
    """What `make(row, "file:row")` returns for every row, and the rows for which it raised a RowError.

    Files: JSON lines; `.json` with one array of objects; `.csv` and `.tsv` with a line of names; `.parquet` where
    pyarrow is installed.
    key: name that must be unique among the results; limit: stop after this many results, None for all.
    text_as: column that a bare text becomes, a line of a `.txt` file or a text in a JSON array; "" = it is a bad row.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {path}; give a JSON-lines file, one object per line")
    found: list[T] = []
    seen: set[str] = set()
    bad: list[Quarantined] = []
    good_rows = 0
    for number, row in entries(path):
        if limit is not None and len(found) >= limit:
            break
        try:
            with as_row_errors():
                values = _from_text(row, path, text_as) if text_as else as_object(row)
                made = list(make(values, f"{path.name}:{number}"))
            if not made:
                raise RowError("no content: nothing could be made of it")
            if key is not None:
                _add_keys(seen, [key(m) for m in made])
            found += made
            good_rows += 1
        except RowError as error:
            bad.append(set_aside(path, number, error))
    check_share(path, bad, good_rows, max_bad)
    if not found:
        first = "; ".join(f"line {b.row}: {b.reason}" for b in bad[:3])
        raise ValueError(f"{path} has no usable row; {first or 'it is empty'}")
    return found if limit is None else found[:limit], bad


@contextmanager
def as_row_errors() -> Iterator[None]:
    """Numbers, nesting and texts beyond what Python can handle are faults of the row."""
    try:
        yield
    except (ArithmeticError, RecursionError, UnicodeError) as error:
        raise RowError(f"beyond what can be read: {type(error).__name__}: {error}") from error


def set_aside(path: Path, row: int, reason: object) -> Quarantined:
    """The entry for a row that cannot be used; what a reason quotes of the row is cut."""
    text = str(reason)
    return Quarantined(str(path), row, text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..")


def check_share(path: Path, bad: list[Quarantined], good_rows: int, max_bad: float) -> None:
    """Log the rows set aside; ValueError when their share of all rows is above `max_bad`."""
    for b in bad[:5]:
        log.warning("%s line %d set aside: %s", b.file, b.row, b.reason)
    total = good_rows + len(bad)
    if bad:
        log.warning("%s: %d of %d rows set aside", path, len(bad), total)
    if len(bad) > max_bad * total:
        first = "; ".join(f"line {b.row}: {b.reason}" for b in bad[:3])
        raise ValueError(f"{path}: {len(bad)} of {total} rows are bad, more than max_bad={max_bad}; {first}")


def count_reasons(bad: Iterable[Quarantined]) -> dict[str, int]:
    """How many rows were set aside for what, most frequent first; details after `: ` and numbers do not count."""
    kinds = Counter(re.sub(r"\d+", "N", b.reason.partition(": ")[0]) for b in bad)
    return dict(kinds.most_common())


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their number from 1."""
    with path.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if line.strip():
                yield number, line


def entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a file with their number from 1: bytes of a line, or values of a JSON array or a table."""
    if path.suffix == ".parquet":
        return enumerate(_parquet(path), start=1)
    if path.suffix in (".csv", ".tsv"):
        return enumerate(_table(path), start=1)
    if path.suffix == ".json":
        return _json_entries(path)
    return lines(path)


def _json_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Values of the array in a file; where one of them cannot be read, their texts, to be told one by one."""
    try:
        text = path.read_text("utf-8-sig")
        whole = _loads(text)
        if _HALF_CHARACTER.search(text):
            raise ValueError("perhaps half of a character, as a cut emoji")
    except (ValueError, RecursionError):
        try:
            return enumerate((entry.encode() for entry in split_entries(path.read_text("utf-8-sig"), "[")), start=1)
        except ValueError:
            return lines(path)  # JSON lines by another name
    return enumerate(whole if isinstance(whole, list) else [whole], start=1)


def split_entries(text: str, opening: str) -> list[str]:
    """The texts of the entries of one JSON array (`[`) or object (`{`, then `"key": value`), which are not read.

    Raises:
        ValueError: it begins with something else, does not end, or goes on behind its end.
    """
    entries: list[str] = []
    start, depth, end = 0, 0, -1
    for found in _JSON_MARK.finditer(text):
        mark = found[0]
        if depth == 0 and (mark != opening or end >= 0 or text[: found.start()].strip()):
            break
        depth += (mark in "[{") - (mark in "]}")
        if depth == 1 and mark in "[{":
            start = found.end()
        elif depth == 0 or (depth == 1 and mark == ","):
            entries.append(text[start : found.start()].strip())
            start = end = found.end()
    if depth or end < 0 or text[end:].strip():
        raise ValueError(f"no JSON value from {opening!r} to its end")
    return entries if entries != [""] else []


def as_object(row: Any) -> dict[str, Any]:
    """The object of one entry; RowError when it is none."""
    if isinstance(row, bytes):
        return parse_object(row)
    if isinstance(row, _Unreadable):
        raise RowError(row.reason)
    if not isinstance(row, dict):
        raise RowError(f"no JSON object but {type(row).__name__}")
    return row


def _from_text(row: Any, path: Path, column: str) -> dict[str, Any]:
    """The object of one entry, of a bare text that with one column."""
    if path.suffix == ".txt":
        try:
            return {column: row.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise RowError(f"no UTF-8: {error}") from error
    return {column: row} if isinstance(row, str) else as_object(row)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; RowError for bad JSON or UTF-8, NaN, numbers beyond a float's range,
    a key given twice, half a surrogate pair."""
    try:
        row = _loads(line.decode("utf-8-sig"))
        fault = broken_text(json.dumps(row, ensure_ascii=False)) if b"\\u" in line else None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, NaN, too deep
        raise RowError(f"no JSON: {error}") from error
    if fault:
        raise RowError(f"broken text: a text {fault}")
    return as_object(row)


def _loads(text: str) -> Any:
    return json.loads(text, parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_object)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def broken_text(text: str) -> str | None:
    """Why a text cannot be written or tokenised, None if it can: half of a surrogate pair, as of a cut emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds {text[error.start]!a}, half of a character cut in two; remove it"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        out[key] = value
    return out


def _add_keys(seen: set[str], keys: list[str]) -> None:
    new: set[str] = set()
    for key in keys:
        if key in seen or key in new:
            raise RowError(f"id used twice: id {key!r} occurs before")
        new.add(key)
    seen |= new


class _Unreadable(NamedTuple):
    """A row of a table, with why it is none."""

    reason: str


def _table(path: Path) -> Iterator[dict[str, str] | _Unreadable]:
    """Rows of a table of texts, whose first line names the columns."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # a tab-separated file has no quotes: a prompt may begin with one that never ends
        if path.suffix == ".tsv":
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        for row in rows:
            if None in row or None in row.values():
                yield _Unreadable("another number of cells than the table has columns")
            elif any("\udc80" <= character <= "\udcff" for cell in row.values() for character in cell):
                yield _Unreadable("no UTF-8")
            else:
                yield row


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{path}: reading parquet needs pyarrow (pip install pyarrow), or convert it once: "
            "datasets.Dataset.from_parquet(file).to_json(file.jsonl)"
        ) from error
    for batch in ParquetFile(path).iter_batches(batch_size=256):
        yield from batch.to_pylist()


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON value")
