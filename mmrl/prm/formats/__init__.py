"""Published formats of step-labelled solutions: readers `(row, name) -> records`, and writers where there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, read_rows
from mmrl.prm.formats import benches, chat, text, trees
from mmrl.prm.formats.rollouts import read_rollouts
from mmrl.prm.records import SolutionRecord
from mmrl.prm.records_io import check_markers, check_record, record_from_json, record_to_json, with_images
from mmrl.registry import hint

Reader = Callable[..., list[SolutionRecord]]


def _own(row: Mapping[str, Any], name: str) -> list[SolutionRecord]:
    return [record_from_json(row, unlabelled=True)]


FORMATS: dict[str, Reader] = {
    "records": _own,
    "visualprm": chat.visualprm,
    "visualprm_raw": chat.visualprm_raw,
    "vlprm": chat.vlprm,
    "rlhflow": chat.rlhflow,
    "mm_prm": trees.mm_prm,
    "mm_prm_tree": trees.mm_prm_tree,
    "math_aps_tree": trees.math_aps_tree,
    "math_aps_flat": trees.math_aps_flat,
    "prm800k": text.prm800k,
    "math_shepherd": text.math_shepherd,
    "trl": text.trl,
    "processbench": benches.processbench,
    "prmbench": benches.prmbench,
    "visualprocessbench": benches.visualprocessbench,
    "puzzlevqa_steps": benches.puzzlevqa_steps,
}

EXPORTERS: dict[str, Callable[[SolutionRecord], dict[str, Any]]] = {
    "records": record_to_json,
    "mm_prm": trees.mm_prm_row,
    "trl": text.trl_row,
    "processbench": benches.processbench_row,
    "visualprocessbench": benches.visualprocessbench_row,
}


def read_format(
    path: str | Path,
    name: str,
    *,
    media_root: str | Path | None = None,
    markers: Sequence[str] = (),
    max_bad: float = 0.05,
    unlabelled: bool = False,
    **options: Any,
) -> tuple[list[SolutionRecord], list[Quarantined]]:
    """Records of a file in a published format, checked, and the rows set aside. Arguments as `read_records`.

    `rollouts` is a folder of stored rollouts, whose paths are the solutions.


    options: the format's own, e.g. `neutral` of prm800k.
    Raises:
        ValueError: unknown format, no file, no usable row, or too many bad rows.
    """
    if name == "rollouts":
        return read_rollouts(path, markers=markers, max_bad=max_bad, unlabelled=unlabelled)
    if name not in FORMATS:
        known = [*FORMATS, "rollouts"]
        raise ValueError(f"format {name!r} is none of {', '.join(known)}{hint(name, known)}")
    seen: dict[Path, None] = {}

    def make(row: Mapping[str, Any], at: str) -> list[SolutionRecord]:
        records = FORMATS[name](row, at, **options)
        for record in records:
            check_markers(check_record(record, unlabelled=unlabelled), markers)
        return [with_images(r, Path(path).parent, media_root, seen) for r in records]

    return read_rows(path, make, max_bad=max_bad, key=lambda r: r.id)
