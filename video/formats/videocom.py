"""Video-CoM: conversations with manipulations, for imitation, and the same with ground truth for its step reward.

{"id": .., "video": path, "conversations": [{"from": "human", "value": "Which .. Options: A. red, B. blue"},
 {"from": "gpt", "value": "FIND_FRAME(car) = 57"}, {"from": "human", ..}, {"from": "gpt",
 "value": "FINAL_ANSWER: B"}], "valid_segments": [3], "valid_frames": [[50, 60]],
 "valid_bounding_box": [[57, [10, 20, 90, 80]]]}
"""

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
# `A. red, B. blue` or one option a line: lines that open with a letter and a stop
_OPTIONS = re.compile(r"\bOptions:\s*+((?:[ \t]*+\(?[A-Z][.)][ \t].*(?:\n|\Z))+)")
_COLUMNS = ("id", "video", "image", "conversations", "valid_segments", "valid_frames", "valid_bounding_box")


@register("video_formats", "videocom")
def videocom(row: Row, name: str) -> list[VideoSample]:
    """One conversation: the assistant's texts are the turns of a solution, its FINAL_ANSWER the answer.

    `valid_segments`, `valid_frames` and `valid_bounding_box` become segment numbers, frames (which are painted from 1
    on, so one is taken off) and boxes in pixels. Boxes in the turns are pixels too.
    """
    texts, turn_fields = _conversation(row)
    question, options = split_options(without_media_marks(texts[0]))
    final = _FINAL.search(texts[-1])
    if final is None:
        raise RowError("no answer: the last text of 'conversations' holds no FINAL_ANSWER")
    meta = rest(row, *_COLUMNS)
    if turn_fields:
        meta["turn_fields"] = turn_fields
    image = _path(row, "image")
    segments = typed(row, "valid_segments", list, [])
    ranges = pairs(row, "valid_frames", whole)
    labels = typed(row, "valid_bounding_box", list, [])
    sample = VideoSample(
        id=row_id(row, name),
        question=question,
        video=_path(row, "video"),
        images=() if image is None else (image,),
        options=options,
        answer=final.group(1).strip(),
        answer_type="multiple choice" if options else "free-form",
        segment_ids=tuple(whole(segment, "valid_segments") for segment in segments),
        frames=tuple((_frame(first, "valid_frames"), _frame(last, "valid_frames")) for first, last in ranges),
        boxes=tuple(_label(label, f"valid_bounding_box[{i}]") for i, label in enumerate(labels)),
        turns=tuple(texts[1::2]),
        turn_boxes="pixels",
        meta=meta,
    )
    return [sample]


def _conversation(row: Row) -> tuple[list[str], dict[str, Any]]:
    """The texts of the turns, human and assistant by turns, and by a turn's number its fields beside the text.

    Media of later turns are such fields too: the pictures they show are made anew from the assistant's calls.
    """
    turns = rows(row, "conversations", dict)
    roles = ["assistant" if turn.get("from") == "gpt" else turn.get("from") for turn in turns]
    if len(turns) < 2 or roles != ["human", "assistant"] * (len(turns) // 2):
        raise RowError(f"bad conversations: turns of {roles} are not human, assistant, human, assistant ..")
    texts = []
    turn_fields = {}
    for i, turn in enumerate(turns):
        texts.append(text(turn, "value"))
        fields = rest(turn, "from", "value")
        if fields:
            turn_fields[str(i)] = fields
    return texts, turn_fields


def split_options(question: str) -> tuple[str, tuple[str, ...]]:
    """(question, options) of a text with `Options: A. red, B. blue` on one line, or with an option per line.

    Raises:
        RowError: `Options:` is there and no options A, B, .. follow.
    """
    head, mark, tail = question.partition("Options:")
    if not mark:
        return question, ()
    match = _OPTIONS.search(question)
    options = _lettered(match.group(1)) if match else ()
    if match is None or len(options) < 2 or not all(options):
        raise RowError(f"bad options: {tail[:60]!r} is no list A. .., B. ..")
    around = (head.strip(), question[match.end() :].strip())
    return "\n".join(filter(None, around)), options


def _lettered(listed: str) -> tuple[str, ...]:
    """The texts after A., B., .. in this order; a later letter inside a text (a name's initial) starts none."""
    marks: list[re.Match[str]] = []
    for letter in string.ascii_uppercase:
        # looked for behind the mark before, so that letters count in their order alone
        mark = re.compile(rf"(?<!\w)\(?{letter}[.)]\s+").search(listed, marks[-1].end() if marks else 0)
        if mark is None:
            break
        marks.append(mark)
    # a text goes from its mark to the next one, the last to the end
    ends = [mark.start() for mark in marks[1:]] + [len(listed)]
    return tuple(listed[mark.end() : end].strip().rstrip(",;.") for mark, end in zip(marks, ends, strict=True))


def _path(row: Row, key: str) -> str | None:
    value = row.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is not None and not isinstance(value, str):
        raise RowError(f"bad {key}: {str(value)[:60]!r} is not one path")
    return value


def _frame(painted: int, what: str) -> int:
    """A 0-based frame of the number painted on it, which counts from 1."""
    if painted < 1:
        raise RowError(f"bad {what}: frame {painted}; frames are numbered from 1")
    return painted - 1


def _label(value: Any, what: str) -> BoxLabel:
    if not isinstance(value, list) or len(value) != 2:
        raise RowError(f"bad {what}: {str(value)[:60]!r} is no [frame, [x1, y1, x2, y2]]")
    return BoxLabel(box(value[1], what), _frame(whole(value[0], what), what), unit="pixels")
