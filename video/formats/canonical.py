"""The record as a row of JSON lines, one question per line:

    {"id": str, "question": str, "video": path | "images": [path], "options": [str], "answer": str|null,
     "history": [{"role", "content"}], "answer_type": str|null, "segments": [[s, e]], "segment_ids": [int],
     "frames": [[a, b]],
     "boxes": [{"frame": int | "time": s, "box": [x1, y1, x2, y2], "unit": "unit"|"pixels"}], "turns": [str],
     "turn_boxes": "seen"|"pixels", "frame_count": int, "duration": s, "size": [height, width], "meta": object}

Only `question` and `video` or `images` are needed; what the fields mean is at `video.records.VideoSample`. Question,
media and options may have all shapes of `mmrl.reasoning.questions.read_question`, such as `messages` and `videos`.
Keys beside these are kept in `meta`.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.questions import Columns, read_question
from mmrl.reasoning.rows import rest, row_id
from mmrl.registry import register
from video.formats._values import Row, box, pair, pairs, real, typed, whole
from video.records import BoxLabel, VideoSample

_KEYS = [f.name for f in fields(VideoSample)]


@register("video_formats", "canonical")
def canonical(row: Row, name: str) -> list[VideoSample]:
    """The sample of a row; `name` is its id where it has none."""
    count, seconds, size = (row.get(k) for k in ("frame_count", "duration", "size"))
    question = read_question(row, Columns(), films=True)
    if len(question.videos) > 1:
        raise RowError(f"media: {len(question.videos)} films in one row; a policy here looks at one")
    sample = VideoSample(
        id=row_id(row, name),
        question=question.text,
        video=question.videos[0] if question.videos else None,
        images=question.images,
        history=question.history,
        options=question.options,
        answer=None if question.answer is None else str(question.answer),
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
        meta=typed(row, "meta", dict, {}) | rest(question.others, *_KEYS),
    )
    return [sample]


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
