"""Video-CoM: conversations with manipulations, for imitation, and the same with ground truth for its step reward."""

from __future__ import annotations

import re
import string
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.rows import rest, row_id, rows, text
from mmrl.registry import register
from video.formats._values import Row, box, pairs, typed, whole, without_media_marks
from video.records import BoxLabel, VideoSample

_FINAL = re.compile(r"FINAL_ANSWER\s*:\s*(.+)", re.DOTALL)
_OPTIONS = re.compile(r"\bOptions:\s*+((?:[ \t]*+\(?[A-Z][.)][ \t].*(?:\n|\Z))+)")
_USED = ("id", "video", "image", "conversations", "valid_segments", "valid_frames", "valid_bounding_box")


@register("video_formats", "videocom")
def videocom(row: Row, name: str) -> list[VideoSample]:
    """One conversation: the assistant's texts are the turns of a solution, its FINAL_ANSWER the answer.

    `valid_segments`, `valid_frames` and `valid_bounding_box` become segment numbers, frames (which are painted from 1
    on, so one is taken off) and boxes in pixels. Boxes in the turns are pixels too.
    """
    turns = rows(row, "conversations", dict)
    roles = ["assistant" if t.get("from") == "gpt" else t.get("from") for t in turns]
    if len(turns) < 2 or roles != ["human", "assistant"] * (len(turns) // 2):
        raise RowError(f"bad conversations: turns of {roles} are not human, assistant, human, assistant ..")
    said = [text(t, "value") for t in turns]
    question, options = split_options(without_media_marks(said[0]))
    final = _FINAL.search(said[-1])
    if final is None:
        raise RowError("no answer: the last text of 'conversations' holds no FINAL_ANSWER")
    # media of later turns too: what they show is worked out anew from the assistant's calls
    kept = {str(i): fields for i, t in enumerate(turns) if (fields := rest(t, "from", "value"))}
    ranges, labels = pairs(row, "valid_frames", whole), typed(row, "valid_bounding_box", list, [])
    sample = VideoSample(
        id=row_id(row, name),
        question=question,
        video=_path(row, "video"),
        images=() if row.get("image") is None else (str(_path(row, "image")),),
        options=options,
        answer=final.group(1).strip(),
        answer_type="multiple choice" if options else "free-form",
        segment_ids=tuple(whole(v, "valid_segments") for v in typed(row, "valid_segments", list, [])),
        frames=tuple((_frame(a, "valid_frames"), _frame(b, "valid_frames")) for a, b in ranges),
        boxes=tuple(_label(v, f"valid_bounding_box[{i}]") for i, v in enumerate(labels)),
        turns=tuple(said[1::2]),
        turn_boxes="pixels",
        meta=rest(row, *_USED) | ({"turn_fields": kept} if kept else {}),
    )  # fmt: skip
    return [sample]


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
    """(question, options) of a text with `Options: A. red, B. blue` on one line, or with an option per line.

    Raises:
        RowError: `Options:` is there and no options A, B, .. follow.
    """
    head, mark, tail = question.partition("Options:")
    if not mark:
        return question, ()
    found = _OPTIONS.search(question)
    options = _lettered(found.group(1)) if found else ()
    if found is None or len(options) < 2 or not all(options):
        raise RowError(f"bad options: {tail[:60]!r} is no list A. .., B. ..")
    return "\n".join(t for t in (head.strip(), question[found.end() :].strip()) if t), options


def _lettered(listed: str) -> tuple[str, ...]:
    """The texts after A., B., .. in this order; a later letter inside a text (a name's initial) starts none."""
    starts: list[int] = []
    ends: list[int] = []
    for letter in string.ascii_uppercase:
        mark = re.compile(rf"(?<!\w)\(?{letter}[.)]\s+").search(listed, starts[-1] if starts else 0)
        if mark is None:
            break
        starts.append(mark.end())
        ends.append(mark.start())
    return tuple(listed[a:b].strip().rstrip(",;.") for a, b in zip(starts, [*ends[1:], None], strict=True))


def _path(row: Row, key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise RowError(f"bad {key}: {str(value)[:60]!r} is not one path")
    return value


def _frame(painted: int, what: str) -> int:
    if painted < 1:
        raise RowError(f"bad {what}: frame {painted}; frames are numbered from 1")
    return painted - 1


def _label(value: Any, what: str) -> BoxLabel:
    if not isinstance(value, list) or len(value) != 2:
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no [frame, [x1, y1, x2, y2]]")
    return BoxLabel(box(value[1], what), _frame(whole(value[0], what), what), unit="pixels")
