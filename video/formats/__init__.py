"""Published formats of video questions: readers `(row, name) -> samples`, and one function that reads a file.

samples, set_aside = read_format("train.jsonl", "video_r1", media_root="videos")
prompt = to_prompt(samples[0])          # video.records
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from mmrl.jsonl import (
    Quarantined,
    RowError,
    as_object,
    as_row_errors,
    check_share,
    read_rows,
    set_aside,
    split_entries,
)
from mmrl.reasoning.pictures import check_image
from mmrl.registry import find
from video.formats import canonical, video_r1, videochat_r1, videocom  # noqa: F401 - enter their rows
from video.formats._values import media_file
from video.records import VideoSample, as_share, check_sample

Finish = Callable[[VideoSample], VideoSample]


def read_format(
    path: str | Path,
    name: str,
    *,
    media_root: str | Path | None = None,
    max_bad: float = 0.05,
    limit: int | None = None,
    finish: Finish | None = None,
) -> tuple[list[VideoSample], list[Quarantined]]:
    """Samples of a file (JSON lines, or `.json` with one list) in a format, checked, and the rows set aside.

    Args:
        media_root: folder that videos and pictures are relative to and may not leave; None: the file's folder. Paths
            in the samples are absolute; pictures are looked into (and give `size`), videos only have to be there.
        max_bad: share of bad rows, in [0, 1], above which reading fails.
        limit: samples to take from the start, None for all.
        finish: applied to every checked sample, may raise RowError: what needs the clip (`records.with_info`).
    Raises:
        ValueError: unknown format, no file, no usable row, or too many bad rows (the first ones are named by line and
            field).
    """
    format = find("video_formats", name)
    root = Path(path).parent if media_root is None else Path(media_root)
    sizes: dict[str, tuple[int, int]] = {}

    def read_row(row: Mapping[str, Any], default_id: str) -> list[VideoSample]:
        samples = []
        for sample in format.target(row, default_id):
            checked = with_media(check_sample(sample), root, sizes)
            samples.append(checked if finish is None else finish(checked))
        return samples

    # one object with an entry per video, in place of a list of rows
    if "keyed" in format.facts:
        return _read_keyed(Path(path), format.facts["keyed"], read_row, max_bad, limit)
    return read_rows(path, read_row, max_bad=max_bad, key=attrgetter("id"), limit=limit)


def with_media(sample: VideoSample, root: Path, sizes: dict[str, tuple[int, int]]) -> VideoSample:
    """The sample with absolute paths below `root`; of a single picture the size is read and boxes become shares of it.

    `sizes` remembers pictures that were looked into.

    Raises:
        RowError: a file is missing, outside of `root`, or no picture.
    """
    if sample.video is not None:
        return replace(sample, video=media_file(sample.video, root, "video"))
    paths = tuple(media_file(path, root, "image") for path in sample.images)
    for path in paths:
        if path not in sizes:
            width, height = check_image(path)
            sizes[path] = (height, width)
    if len(paths) != 1:
        return replace(sample, images=paths)
    # of several pictures it is not known which one a box lies in, so only those of one become shares
    size = sizes[paths[0]]
    boxes = tuple(as_share(label, f"boxes[{i}]", size) for i, label in enumerate(sample.boxes))
    return replace(sample, images=paths, size=size, boxes=boxes)


def _read_keyed(
    path: Path,
    key: str,
    read_row: Callable[[Mapping[str, Any], str], Iterable[VideoSample]],
    max_bad: float,
    limit: int | None,
) -> tuple[list[VideoSample], list[Quarantined]]:
    """As `mmrl.jsonl.read_rows`, of a file that is one object of rows; a row's number is its place in it.

    key: the field of a row under which its own key in the object is put.
    """
    try:
        entries = [_key_and_value(entry) for entry in split_entries(path.read_text("utf-8-sig"), "{")]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no JSON object with an entry per video ({error})") from error
    samples: list[VideoSample] = []
    bad: list[Quarantined] = []
    names: set[str] = set()
    num_good = 0
    for number, (name, row) in enumerate(entries, start=1):
        if limit is not None and len(samples) >= limit:
            break
        try:
            if name in names:
                raise RowError("entry used twice: the same key has an entry before")
            # JSON itself would silently keep the last of two entries with one key
            names.add(name)
            with as_row_errors():
                samples += read_row(as_object(row) | {key: name}, f"{path.name}:{number}")
            num_good += 1
        except RowError as error:
            bad.append(set_aside(path, number, f"{error} (entry {name[:80]!r})"))
    check_share(path, bad, num_good, max_bad)
    if not samples:
        raise ValueError(f"{path} has no usable entry; {bad[0].reason if bad else 'it is empty'}")
    # the last row may have given more samples than were left to take
    return samples[:limit], bad


def _key_and_value(entry: str) -> tuple[str, bytes]:
    """The key of the text `"key": value`, and the text of the value, not yet parsed: a bad one costs its row alone."""
    key, end = json.JSONDecoder().raw_decode(entry)
    rest = entry[end:].lstrip()
    if not isinstance(key, str) or not rest.startswith(":"):
        raise ValueError(f"no key: {entry[:60]!r}")
    return key, rest[1:].encode()
