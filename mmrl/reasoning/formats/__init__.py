"""Published formats of step-labelled solutions: readers `(row, name) -> records`, and writers where there are any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, RowError, check_share, read_rows
from mmrl.reasoning.formats import benches, chat, responses, rollouts, text, trees  # noqa: F401 - enter their rows
from mmrl.reasoning.questions import check_unread
from mmrl.reasoning.records import SolutionRecord
from mmrl.reasoning.records_io import check_markers, check_record, record_from_json, record_to_json, with_media
from mmrl.registry import build_section, check_section, register
from mmrl.workdir import write_lines


@register("formats", "records")
def records_row(row: Mapping[str, Any], name: str) -> list[SolutionRecord]:
    """A row as `mmrl annotate` writes it (`mmrl.reasoning.records`)."""
    return [record_from_json(row, unlabelled=True)]


register("exporters", "records")(record_to_json)


def read_format(
    path: str | Path,
    format: str | Mapping[str, Any],
    *,
    media_root: str | Path | None = None,
    markers: Sequence[str] = (),
    max_bad: float = 0.05,
    unlabelled: bool = False,
) -> tuple[list[SolutionRecord], list[Quarantined]]:
    """Records of a file in a published format, checked, and the rows set aside. Arguments as `read_records`.

    `rollouts` is a folder of stored rollouts, whose paths are the solutions.

    format: its name or dotted path, or a mapping that has options beside `name`, e.g. `neutral` of prm800k.
    Raises:
        ValueError: unknown format or option, no file, no usable row, or too many bad rows.
    """
    row = check_section("formats", "format", format)
    if "read" in row.facts:
        # A format that is no file of rows has a reader of its own.
        result: tuple[list[SolutionRecord], list[Quarantined]] = row.facts["read"](
            path, markers=markers, max_bad=max_bad, unlabelled=unlabelled
        )
        return result
    reader = build_section("formats", "format", format)
    pictures: dict[Path, None] = {}
    remedy_films = "this format knows none; take format: records with `videos`, or remove it"
    remedy_images = "this format reads others; rename or remove it"

    def make(row: Mapping[str, Any], at: str) -> list[SolutionRecord]:
        records = reader(row, at)
        for record in records:
            check_markers(check_record(record, unlabelled=unlabelled), markers)
            check_unread(record.meta, remedy_films, remedy_images)
        return [with_media(record, Path(path).parent, media_root, pictures) for record in records]

    return read_rows(path, make, max_bad=max_bad, key=lambda record: record.id)


def convert(
    path: str | Path,
    out: str | Path,
    format: str | Mapping[str, Any],
    to: str | Mapping[str, Any],
    *,
    media_root: str | Path | None = None,
    max_bad: float = 0.05,
) -> tuple[int, list[Quarantined]]:
    """Write the records of a file in another format, a row of `exporters`; how many, and the rows set aside.

    format, to: a name or dotted path, or a mapping that has options beside `name`.

    A record that the other format cannot hold is set aside like a row that cannot be read.
    """
    export = build_section("exporters", "to", to)
    records, bad = read_format(path, format, media_root=media_root, max_bad=max_bad, unlabelled=True)
    lines = []
    for number, record in enumerate(records, start=1):
        try:
            if export is not record_to_json and (record.videos or record.history):
                raise RowError("films and earlier turns: this format holds none")
            lines.append(json.dumps(export(record), ensure_ascii=False, allow_nan=False))
        except RowError as error:
            bad.append(Quarantined(str(path), number, f"{error} ({record.id})"))
    check_share(Path(path), bad, len(lines), max_bad)
    return write_lines(out, lines), bad
