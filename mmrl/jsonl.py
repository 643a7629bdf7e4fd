"""Reading files of rows (JSON lines, JSON, CSV, TSV, parquet) so that one bad row does not cost the others.

A row that cannot be used is set aside: `Quarantined` names its file, line and reason, and it is logged and counted.
"""

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

# A JSON string, which may be cut by the end of the file, or a bracket or comma outside of strings.
_JSON_MARK = re.compile(r'"(?:[^"\\]|\\.|\\\Z)*+(?:"|\Z)|[\[\]{},]', re.DOTALL)
# An escaped surrogate, which stands for half of a character.
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")
_MAX_REASON_LETTERS = 1000
T = TypeVar("T")
# (row, "file:row") -> results made of the row.
Make = Callable[[Mapping[str, Any], str], Iterable[T]]


class Quarantined(NamedTuple):
    """A row that was set aside; `row` counts from 1: lines of JSON lines, else entries."""

    file: str
    row: int
    reason: str


class RowError(ValueError):
    """A row cannot be used. Messages of the form `kind: details` are counted together by `count_reasons`."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl. Damaged lines are left out with a warning.

    A damaged last line is left out silently: it was being written when the run was killed.
    """
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
    """The results of `make` for every row, and the rows for which it raised a RowError.

    Files: JSON lines; `.json` with one array of objects; `.csv` and `.tsv` with a line of names; `.parquet` where
    pyarrow is installed.

    Args:
        make: (row, "file:row") -> results. max_bad: largest share of rows that may be set aside.
        key: result -> a name that must be unique among the results.
        limit: stop after this many results, None for all.
        text_as: column that a bare text becomes, a line of a `.txt` file or a text in a JSON array; "" = a bad row.

    Raises:
        ValueError: the file is missing, has no usable row, or its share of bad rows is above `max_bad`.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"no file {path}; give a JSON-lines file, one object per line")
    results: list[T] = []
    keys: set[str] = set()
    bad: list[Quarantined] = []
    good_rows = 0
    for number, row in entries(path):
        if limit is not None and len(results) >= limit:
            break
        try:
            with as_row_errors():
                values = _from_text(row, path, text_as) if text_as else as_object(row)
                new = list(make(values, f"{path.name}:{number}"))
            if not new:
                raise RowError("no content: nothing could be made of it")
            if key is not None:
                _add_keys(keys, [key(result) for result in new])
            results += new
            good_rows += 1
        except RowError as error:
            bad.append(set_aside(path, number, error))
    check_share(path, bad, good_rows, max_bad)
    if not results:
        raise ValueError(f"{path} has no usable row; {_first_reasons(bad) or 'it is empty'}")
    return results if limit is None else results[:limit], bad


@contextmanager
def as_row_errors() -> Iterator[None]:
    """Raise a RowError for numbers, nesting and texts beyond what Python can handle."""
    try:
        yield
    except (ArithmeticError, RecursionError, UnicodeError) as error:
        raise RowError(f"beyond what can be read: {type(error).__name__}: {error}") from error


def set_aside(path: Path, row: int, reason: object) -> Quarantined:
    """The entry for a row that cannot be used; a long reason, which may quote the row, is cut."""
    text = str(reason)
    if len(text) > _MAX_REASON_LETTERS:
        text = f"{text[:_MAX_REASON_LETTERS]} .."
    return Quarantined(str(path), row, text)


def check_share(path: Path, bad: list[Quarantined], good_rows: int, max_bad: float) -> None:
    """Log the rows set aside; ValueError when their share of all rows is above `max_bad`."""
    for entry in bad[:5]:
        log.warning("%s line %d set aside: %s", entry.file, entry.row, entry.reason)
    total = good_rows + len(bad)
    if bad:
        log.warning("%s: %d of %d rows set aside", path, len(bad), total)
    if len(bad) > max_bad * total:
        raise ValueError(
            f"{path}: {len(bad)} of {total} rows are bad, more than max_bad={max_bad}; {_first_reasons(bad)}"
        )


def _first_reasons(bad: list[Quarantined]) -> str:
    return "; ".join(f"line {entry.row}: {entry.reason}" for entry in bad[:3])


def count_reasons(bad: Iterable[Quarantined]) -> dict[str, int]:
    """Reason -> number of rows set aside for it, most frequent first; details after `: ` and numbers are ignored."""
    kinds = Counter(re.sub(r"\d+", "N", entry.reason.partition(": ")[0]) for entry in bad)
    return dict(kinds.most_common())


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their number from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
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
    """Values of the array in a file; where one cannot be read, the text of each, so that a fault costs one row."""
    try:
        text = path.read_text("utf-8-sig")
        whole = _loads(text)
        if _HALF_CHARACTER.search(text):
            raise ValueError("perhaps half of a character, as a cut emoji")
    except (ValueError, RecursionError):
        try:
            texts = split_entries(path.read_text("utf-8-sig"), "[")
        except ValueError:
            # Not one array: JSON lines under another name.
            return lines(path)
        return enumerate((text.encode() for text in texts), start=1)
    return enumerate(whole if isinstance(whole, list) else [whole], start=1)


def split_entries(text: str, opening: str) -> list[str]:
    """The texts of the entries of one JSON array (`[`) or object (`{`, then `"key": value`), which are not parsed.

    Raises:
        ValueError: it begins with something else, does not end, or goes on behind its end.
    """
    entries: list[str] = []
    # Where the current entry starts, how many brackets are open, and where the last entry ended.
    start, depth, end = 0, 0, -1
    for match in _JSON_MARK.finditer(text):
        mark = match[0]
        if depth == 0 and (mark != opening or end >= 0 or text[: match.start()].strip()):
            break
        depth += (mark in "[{") - (mark in "]}")
        if depth == 1 and mark in "[{":
            start = match.end()
        elif depth == 0 or (depth == 1 and mark == ","):
            entries.append(text[start : match.start()].strip())
            start = end = match.end()
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
    """The object of one entry; a bare text becomes an object with one column."""
    if path.suffix == ".txt":
        try:
            return {column: row.decode("utf-8-sig").strip()}
        except UnicodeDecodeError as error:
            raise RowError(f"no UTF-8: {error}") from error
    return {column: row} if isinstance(row, str) else as_object(row)


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        RowError: bad JSON or UTF-8, NaN, a number beyond a float's range, a key given twice, half a surrogate pair.
    """
    try:
        row = _loads(line.decode("utf-8-sig"))
        # Only an escape can stand for half of a character; UTF-8 itself has none.
        fault = broken_text(json.dumps(row, ensure_ascii=False)) if b"\\u" in line else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"no JSON: {error}") from error
    if fault:
        raise RowError(f"broken text: a text {fault}")
    return as_object(row)


def _loads(text: str) -> Any:
    """The value of a JSON text; ValueError also for NaN, infinite numbers and keys that stand twice."""
    return json.loads(text, parse_float=_finite, parse_constant=_refuse, object_pairs_hook=_object)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def broken_text(text: str) -> str | None:
    """The reason why a text cannot be written or tokenised, None if it can: half of a surrogate pair, as of a cut
    emoji."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds {text[error.start]!a}, half of a character cut in two; remove it"
    return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key[:80]!r} stands twice in one object")
        values[key] = value
    return values


def _add_keys(keys: set[str], row_keys: list[str]) -> None:
    """Add the keys of one row to `keys`, all or none; RowError when one is there already."""
    new: set[str] = set()
    for key in row_keys:
        if key in keys or key in new:
            raise RowError(f"id used twice: id {key!r} occurs before")
        new.add(key)
    keys |= new


class _Unreadable(NamedTuple):
    """In place of a row of a table that cannot be read, the reason."""

    reason: str


def _table(path: Path) -> Iterator[dict[str, str] | _Unreadable]:
    """Rows of a table of texts, whose first line names the columns."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # A tab-separated file has no quoting: a prompt may begin with a quotation mark that never ends.
        if path.suffix == ".tsv":
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:
            rows = csv.DictReader(file)
        for row in rows:
            if None in row or None in row.values():
                yield _Unreadable("another number of cells than the table has columns")
            elif any("\udc80" <= character <= "\udcff" for character in "".join(row.values())):
                # `surrogateescape` has put these characters in place of bytes that are no UTF-8.
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
