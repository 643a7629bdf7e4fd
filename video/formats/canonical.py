"""The record as a row of JSON lines, one question per line:

    {"id": str, "question": str, "video": path | "images": [path], "options": [str], "answer": str|null,
     "answer_type": str|null, "segments": [[s, e]], "segment_ids": [int], "frames": [[a, b]],
     "boxes": [{"frame": int | "time": s, "box": [x1, y1, x2, y2], "unit": "unit"|"pixels"}], "turns": [str],
     "turn_boxes": "seen"|"pixels", "frame_count": int, "duration": s, "size": [height, width], "meta": object}

Only `question` and `video` or `images` are needed; what the fields mean is at `video.records.VideoSample`. Keys beside
these are kept in `meta`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mmrl.jsonl import RowError
from mmrl.rows import optional_text, rest, row_id, text
from video.formats._values import Row, box, pair, pairs, real, typed, whole
from video.records import BoxLabel, VideoSample, check_sample, plain_options

_KEYS = [f.name for f in fields(VideoSample)]


def canonical(row: Row, name: str) -> list[VideoSample]:
    """The sample of a row; `name` is its id where it has none."""
    count, seconds, size = (row.get(k) for k in ("frame_count", "duration", "size"))
    sample = VideoSample(
        id=row_id(row, name),
        question=text(row, "question"),
        video=typed(row, "video", str, None),
        images=tuple(typed(row, "images", list, [])),
        options=plain_options([str(o) for o in typed(row, "options", list, [])]),
        answer=optional_text(row, "answer"),
        answer_type=typed(row, "answer_type", str, None),
        segments=pairs(row, "segments", real),
        segment_ids=tuple(whole(v, "segment_ids") for v in typed(row, "segment_ids", list, [])),
        frames=pairs(row, "frames", whole),
        boxes=tuple(_label(b, f"boxes[{i}]") for i, b in enumerate(typed(row, "boxes", list, []))),
        turns=tuple(typed(row, "turns", list, [])),
        turn_boxes=typed(row, "turn_boxes", str, "seen"),
        frame_count=None if count is None else whole(count, "frame_count"),
        duration=None if seconds is None else real(seconds, "duration"),
        size=None if size is None else pair(size, "size", whole),
        meta=typed(row, "meta", dict, {}) | rest(row, *_KEYS),
    )
    return [sample]


def canonical_row(sample: VideoSample) -> dict[str, Any]:
    """The row of a sample, without what it does not have; `canonical` gives the sample back."""
    row = {k: getattr(sample, k) for k in _KEYS}
    row["boxes"] = [{k: v for k, v in vars(b).items() if v is not None} for b in sample.boxes]
    row["turn_boxes"] = None if sample.turn_boxes == "seen" else sample.turn_boxes
    return {k: v for k, v in row.items() if v is not None and v not in ((), [], {})}


def write_samples(path: str | Path, samples: Iterable[VideoSample], media_root: str | Path | None = None) -> int:
    """Write canonical rows and return how many; media below `media_root` are written relative to it.

    The file appears when it is complete. Raises RowError when a sample is not sound.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    with part.open("w", encoding="utf-8") as f:
        for sample in samples:
            row = canonical_row(check_sample(sample))
            if media_root is not None and "video" in row:
                row["video"] = _relative(row["video"], Path(media_root))
            elif media_root is not None:
                row["images"] = [_relative(p, Path(media_root)) for p in row["images"]]
            f.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    os.replace(part, path)
    return count


def _label(value: Any, what: str) -> BoxLabel:
    if not isinstance(value, dict):
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no object with 'box' and 'frame' or 'time'")
    frame, time = value.get("frame"), value.get("time")
    return BoxLabel(
        box(value.get("box"), f"{what}.box"),
        None if frame is None else whole(frame, f"{what}.frame"),
        None if time is None else real(time, f"{what}.time"),
        value.get("unit", "unit"),
    )


def _relative(name: str, root: Path) -> str:
    path, base = Path(name).resolve(), root.resolve()
    return path.relative_to(base).as_posix() if path.is_relative_to(base) else name
