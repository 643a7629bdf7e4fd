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
from video.formats._values import Row, box, optional, pair, pairs, real, typed, whole
from video.records import BoxLabel, VideoSample

_FIELD_NAMES = [field.name for field in fields(VideoSample)]


@register("video_formats", "canonical")
def canonical(row: Row, name: str) -> list[VideoSample]:
    """The sample of a row; `name` is its id where it has none."""
    # all shapes of questions and media that other tasks read too
    question = read_question(row, Columns(), films=True)
    if len(question.videos) > 1:
        raise RowError(f"media: {len(question.videos)} films in one row; a policy here looks at one")
    labels = typed(row, "boxes", list, [])
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
        segment_ids=tuple(whole(segment, "segment_ids") for segment in typed(row, "segment_ids", list, [])),
        frames=pairs(row, "frames", whole),
        boxes=tuple(_label(label, f"boxes[{i}]") for i, label in enumerate(labels)),
        turns=tuple(typed(row, "turns", list, [])),
        turn_boxes=typed(row, "turn_boxes", str, "seen"),
        frame_count=optional(row.get("frame_count"), "frame_count", whole),
        duration=optional(row.get("duration"), "duration", real),
        size=optional(row.get("size"), "size", _size),
        meta=typed(row, "meta", dict, {}) | rest(question.others, *_FIELD_NAMES),
    )
    return [sample]


def _size(value: Any, what: str) -> tuple[int, int]:
    return pair(value, what, whole)


def _label(value: Any, what: str) -> BoxLabel:
    if not isinstance(value, dict):
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no object with 'box' and 'frame' or 'time'")
    return BoxLabel(
        box(value.get("box"), f"{what}.box"),
        optional(value.get("frame"), f"{what}.frame", whole),
        optional(value.get("time"), f"{what}.time", real),
        value.get("unit", "unit"),
    )
