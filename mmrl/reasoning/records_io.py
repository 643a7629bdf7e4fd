"""Solution records on disk: JSON lines, one solution per line, checked when read.

    {"id": str, "question": str, "steps": [{"text": str, "kind": str}], "images": [path], "videos": [path],
     "history": [{"role": "system" | "user" | "assistant", "content": str}], "options": [str],
     "answer": str|null, "labels": [float|null]|null, "label_kind": "hard"|"soft", "scope": "local"|"prefix",
     "first_error": int|null, "final_correct": bool|null, "mc": [{"value", "correct", "total"}]|null,
     "judge": [object], "source": str, "meta": object}

Only `id`, `question` and `steps` are needed; `kind` is "unknown" when missing and a bare string is a step too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from mmrl.jsonl import Quarantined, RowError, broken_text, read_rows
from mmrl.reasoning.embedded import is_embedded, media_paths
from mmrl.reasoning.pictures import ImageError, check_image
from mmrl.reasoning.records import Counts, Kind, SolutionRecord, Step
from mmrl.reasoning.rows import images, integer, is_number, optional_text, plain_text
from mmrl.workdir import write_lines

_KINDS = get_args(Kind)
_KEYS = frozenset(SolutionRecord.__dataclass_fields__)


def read_records(
    path: str | Path,
    media_root: str | Path | None = None,
    markers: Sequence[str] = (),
    max_bad: float = 0.05,
    *,
    unlabelled: bool = False,
) -> tuple[list[SolutionRecord], list[Quarantined]]:
    """Records of a file, and the rows set aside (`mmrl.jsonl.count_reasons` says how many and why).

    Args:
        media_root: folder that pictures are relative to and may not leave; None: relative to the file's folder,
            absolute paths as they are. Paths in the records are absolute.
        markers: texts that carry scores in the training text and so may not occur in a question, option or step.
        max_bad: share of bad rows, in [0, 1], above which reading fails.
        unlabelled: take records without any label too.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """
    sizes: dict[Path, None] = {}

    def make(row: Mapping[str, Any], name: str) -> list[SolutionRecord]:
        record = record_from_json(row, unlabelled=unlabelled)
        check_markers(record, markers)
        return [with_media(record, Path(path).parent, media_root, sizes)]

    return read_rows(path, make, max_bad=max_bad, key=lambda record: record.id)


def write_records(path: str | Path, records: Iterable[SolutionRecord], media_root: str | Path | None = None) -> int:
    """Write records and return how many; pictures below `media_root` are written relative to it.

    The file appears when it is complete. Raises RowError with the record's id if one is not valid.
    """

    def line(record: SolutionRecord) -> str:
        row = record_to_json(check_record(record, unlabelled=True))
        if media_root is not None:
            for kind in ("images", "videos"):
                row[kind] = [_relative(path, Path(media_root)) for path in row[kind]]
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    return write_lines(path, map(line, records))


def record_to_json(record: SolutionRecord) -> dict[str, Any]:
    """The row of a record; `record_from_json` gives the record back."""
    mc = record.mc
    return {
        "id": record.id,
        "question": record.question,
        "steps": [{"text": step.text, "kind": step.kind} for step in record.steps],
        "images": list(record.images),
        "videos": list(record.videos),
        "history": [dict(turn) for turn in record.history],
        "options": list(record.options),
        "answer": record.answer,
        "labels": None if record.labels is None else list(record.labels),
        "label_kind": record.label_kind,
        "scope": record.scope,
        "first_error": record.first_error,
        "final_correct": record.final_correct,
        "mc": None if mc is None else [_counts_row(counts) for counts in mc],
        "judge": [dict(judgement) for judgement in record.judge],
        "source": record.source,
        "meta": dict(record.meta),
    }


def record_from_json(row: Mapping[str, Any], *, unlabelled: bool = False) -> SolutionRecord:
    """The record of a row.

    Raises:
        RowError: what is wrong: an unknown key, a wrong type, and all that `check_record` refuses.
    """
    unknown = sorted(set(row) - _KEYS)
    if unknown:
        raise RowError(f"unknown keys: {unknown}; put what is your own below 'meta'")
    steps = _typed(row, "steps", list, None)
    options = _typed(row, "options", list, [])
    labels = _typed(row, "labels", list, None)
    mc = _typed(row, "mc", list, None)
    judge = _typed(row, "judge", list, [])
    if not all(isinstance(judgement, Mapping) for judgement in judge):
        raise RowError(f"bad judge: {str(judge)[:80]!r} is no list of objects")
    record = SolutionRecord(
        id=optional_text(row, "id") or "",
        question=_typed(row, "question", str, ""),
        steps=tuple(_step(step, i) for i, step in enumerate(steps or ())),
        images=images(row, "images"),
        videos=media_paths(row.get("videos"), "videos", "video"),
        history=tuple(_turn(turn, i) for i, turn in enumerate(_typed(row, "history", list, []))),
        options=tuple(plain_text(option, f"options[{i}]") for i, option in enumerate(options)),
        answer=optional_text(row, "answer"),
        labels=None if labels is None else tuple(_label(label, i) for i, label in enumerate(labels)),
        label_kind=row.get("label_kind", "hard"),
        scope=row.get("scope", "local"),
        first_error=_typed(row, "first_error", int, None),
        final_correct=_typed(row, "final_correct", bool, None),
        mc=None if mc is None else tuple(_counts(counts, i) for i, counts in enumerate(mc)),
        judge=tuple(judge),
        source=_typed(row, "source", str, ""),
        meta=_typed(row, "meta", dict, {}),
    )
    return check_record(record, unlabelled=unlabelled)


def check_record(record: SolutionRecord, *, unlabelled: bool = False) -> SolutionRecord:
    """The record itself when it is sound.

    Raises:
        RowError: no id, question or step, an empty step, half of a character in a text, another number of labels or
            counts than steps, a label outside [0, 1], no label at all (unless `unlabelled`), hard labels between 0
            and 1, a first error beyond the steps, more correct completions than completions.
    """
    n = len(record.steps)
    if not record.id:
        raise RowError("no id: every solution needs an 'id' of its own")
    if not record.question.strip():
        raise RowError("no question")
    if not n:
        raise RowError("no step: a solution needs at least one")
    for i, step in enumerate(record.steps):
        if not step.text.strip():
            raise RowError(f"empty step: step {i} of {n} has no text")
    for text in (record.id, record.question, record.answer or "", *record.options, *record.texts):
        fault = broken_text(text)
        if fault:
            raise RowError(f"broken text: a text {fault}")
    _check_labels(record, unlabelled)
    if record.scope not in ("local", "prefix"):
        raise RowError(f"bad scope: {record.scope!r} is neither 'local' nor 'prefix'")
    if record.first_error is not None and not -1 <= record.first_error < n:
        raise RowError(f"first_error outside the steps: {record.first_error} for {n} steps (0-based, -1 = none)")
    if record.mc is not None and len(record.mc) != n:
        raise RowError(f"counts and steps differ: {len(record.mc)} counts for {n} steps")
    for i, counts in enumerate(record.mc or ()):
        if not 0 <= counts.correct <= counts.total:
            raise RowError(f"impossible counts: step {i} has {counts.correct} correct of {counts.total}")
    return record


def _check_labels(record: SolutionRecord, unlabelled: bool) -> None:
    n, labels = len(record.steps), record.labels
    if record.label_kind not in ("hard", "soft"):
        raise RowError(f"bad label_kind: {record.label_kind!r} is neither 'hard' nor 'soft'")
    if labels is not None and len(labels) != n:
        raise RowError(f"labels and steps differ: {len(labels)} labels for {n} steps")
    for i, label in enumerate(labels or ()):
        if label is None:
            continue
        # The comparison is False for NaN too.
        if not 0 <= label <= 1:
            raise RowError(f"label outside [0, 1]: step {i} has {label}")
        if record.label_kind == "hard" and label not in (0, 1):
            raise RowError(f"soft label in a hard record: step {i} has {label}; set label_kind to 'soft'")
    if not unlabelled and all(label is None for label in labels or ()):
        raise RowError("all labels null: nothing is labelled; give labels, or read with unlabelled=True")


def check_markers(record: SolutionRecord, markers: Sequence[str]) -> None:
    """RowError when a marker stands in a text of the record, where it would be scored like a real one."""
    texts = [("the question", record.question)]
    texts += [(f"option {i}", option) for i, option in enumerate(record.options)]
    texts += [(f"step {i}", step) for i, step in enumerate(record.texts)]
    for where, text in texts:
        for marker in markers:
            if marker in text:
                raise RowError(f"marker in the text: {marker!r} in {where}; remove it or use another marker")


def with_media(
    record: SolutionRecord, folder: Path, media_root: str | Path | None, pictures: dict[Path, None]
) -> SolutionRecord:
    """The record with absolute paths; `pictures` holds pictures already looked into. Films only have to be there.

    Raises:
        RowError: a picture or film is missing or outside of `media_root`, or policies refuse the picture
            (`mmrl.reasoning.pictures`).
    """
    paths = []
    for name in record.images:
        path = _locate(name, folder, media_root, "image")
        if path not in pictures:
            try:
                check_image(path, verify=True)
            except ImageError as error:
                raise RowError(f"bad image: {error}") from error
            pictures[path] = None
        paths.append(str(path))
    films = tuple(str(_locate(name, folder, media_root, "video")) for name in record.videos)
    return replace(record, images=tuple(paths), videos=films)


def _locate(name: str, folder: Path, media_root: str | Path | None, kind: str) -> Path:
    try:
        base = Path(folder if media_root is None else media_root).resolve()
        path = (base / name).resolve()
        is_file = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise RowError(f"bad {kind} path: {name[:80]!r} ({error})") from error
    if media_root is not None and not path.is_relative_to(base) and not is_embedded(name):
        raise RowError(f"{kind} outside the media root: {name} leads to {path}, not below {base}")
    if not is_file:
        raise RowError(f"{kind} missing: {path} is no file; check the path and media_root (now {base})")
    return path


def _relative(name: str, root: Path) -> str:
    path, root = Path(name).resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else name


def _typed(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], default: Any) -> Any:
    value = row.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise RowError(f"bad {key}: {str(value)[:80]!r} is {type(value).__name__}")
    return value


def _turn(value: Any, i: int) -> Mapping[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(k), str) for k in ("role", "content")):
        raise RowError(f"bad history: turn {i} is no object with the texts 'role' and 'content'")
    return {"role": value["role"], "content": value["content"]}


def _step(value: Any, i: int) -> Step:
    if isinstance(value, str):
        return Step(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("text"), str):
        raise RowError(f"bad step: step {i} is no text and no object with 'text'")
    kind = value.get("kind", "unknown")
    if kind not in _KINDS:
        raise RowError(f"bad step kind: step {i} has {kind!r}; one of {', '.join(_KINDS)}")
    return Step(value["text"], kind)


def _label(value: Any, i: int) -> float | None:
    if value is None:
        return None
    # True and False are labels too.
    if not isinstance(value, bool) and not is_number(value):
        raise RowError(f"bad label: step {i} has {str(value)[:40]!r}, no number")
    return float(value)


def _counts(value: Any, i: int) -> Counts:
    if not isinstance(value, Mapping):
        raise RowError(f"bad counts: step {i} of 'mc' needs whole numbers 'correct' and 'total'")
    correct = integer(value.get("correct"), f"counts: step {i}, 'correct'")
    total = integer(value.get("total"), f"counts: step {i}, 'total'")
    return Counts(correct, total)


def _counts_row(counts: Counts) -> dict[str, Any]:
    value = counts.correct / counts.total if counts.total else None
    return {"value": value, "correct": counts.correct, "total": counts.total}
