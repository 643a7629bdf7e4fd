"""One question about a clip or pictures, and what is known of its answer: the record that all formats are read into.

Frames count from 0 and segments from 1; ranges of frames include both ends. Boxes of a prompt are shares of the frame
as presented (rotation applied). Formats that give pixels, or a time in place of a frame, are read as they are;
`with_info` converts them when the clip has been looked at, and `to_prompt` refuses what has not been converted.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from mmrl.jsonl import RowError, broken_text
from mmrl.reasoning.questions import Turn, check_marks, check_text, with_options
from mmrl.reasoning.rows import IMAGE_MARK
from mmrl.rollout import Prompt
from video.acting.segments import segment_count
from video.rewards.answers import answer_score, answer_type_of, number, option_letter

if TYPE_CHECKING:
    from video.reading.clip import VideoInfo

Unit = Literal["unit", "pixels"]
TurnBoxes = Literal["seen", "pixels"]
Box = tuple[float, float, float, float]

HINTS = {
    "multiple choice": "Answer with the letter of one option.",
    "numerical": "Answer with one number.",
    "regression": "Answer with one number.",
    "OCR": "Answer with the text as it is written there.",
    "free-form": "Answer in a sentence.",
    "interval": "Answer with the start and the end in seconds, such as 2.5 to 7.",
}
_REFERENCE = ("segments", "segment_ids", "frames", "turns", "frame_count", "duration", "size")
_EDGE = 0.01  # boxes may stick out of the frame by this share (annotation tools round); they are cut there
_ZOOM = re.compile(r"SPATIAL_ZOOM\(", re.IGNORECASE)
_BOX = re.compile(r"\)\s*+=\s*+[\[(]?\s*+(\d{1,9}(?:\s*+,\s*+\d{1,9}){3})(?!\d)\s*+[\])]?")


@dataclass(frozen=True)
class BoxLabel:
    """A box (x1, y1, x2, y2) on one frame, named by its 0-based number or by the seconds at which it is shown.

    unit: "unit", shares of the frame as presented, or "pixels" of the size in which the clip was annotated.
    """

    box: Box
    frame: int | None = None
    time: float | None = None
    unit: Unit = "unit"


@dataclass(frozen=True)
class VideoSample:
    """A question, its media (a video or pictures), and what is known: any of the rest may be missing.

    history: turns before the question, as in `mmrl.reasoning.questions.Question`; a film stands in front of them.
    segments: [start, end] seconds that hold the answer; segment_ids: the same by 1-based number.
    frames: 0-based ranges, both ends included. turns: a written solution, one text per turn; `turn_boxes` says whether
    boxes in it are pixels of the frame as the model sees it ("seen") or of the annotated size ("pixels").
    frame_count, duration (seconds), size (height, width) of the clip or picture; of boxes in pixels the size in which
    they were annotated.
    """

    id: str
    question: str
    video: str | None = None
    images: tuple[str, ...] = ()
    history: tuple[Turn, ...] = ()
    options: tuple[str, ...] = ()
    answer: str | None = None
    answer_type: str | None = None
    segments: tuple[tuple[float, float], ...] = ()
    segment_ids: tuple[int, ...] = ()
    frames: tuple[tuple[int, int], ...] = ()
    boxes: tuple[BoxLabel, ...] = ()
    turns: tuple[str, ...] = ()
    turn_boxes: TurnBoxes = "seen"
    frame_count: int | None = None
    duration: float | None = None
    size: tuple[int, int] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_located(self) -> bool:
        """Whether every box is a share of a numbered frame, in labels and turns, as prompts need it."""
        labels = all(b.unit == "unit" and b.frame is not None for b in self.boxes)
        return labels and (self.turn_boxes == "seen" or not any(_zooms(t) for t in self.turns))


def check_sample(sample: VideoSample) -> VideoSample:
    """The sample itself when it is sound.

    Raises:
        RowError: no question, no medium or two kinds, a placeholder of a model in the text, an unknown answer type or
            an answer that is none of its type, empty or inverted ranges and boxes, numbers below where they start.
    """
    if not sample.question.strip():
        raise RowError("no text in 'question'")
    texts = [*(turn["content"] for turn in sample.history), sample.question]
    check_marks(texts, len(sample.images))
    check_text("\n".join([*(text.replace(IMAGE_MARK, "") for text in texts), *sample.options]))
    paths = [*sample.images, *([] if sample.video is None else [sample.video])]
    if not paths or (sample.video is not None and sample.images):
        raise RowError(f"media: 'video' is {sample.video!r} and 'images' {list(sample.images)}; give one of the two")
    if not all(isinstance(p, str) and p for p in paths):
        raise RowError(f"bad path: {paths} must be texts that are not empty")
    if not all(isinstance(t, str) and t.strip() for t in sample.turns):
        raise RowError("bad turns: 'turns' must be texts that are not empty")
    if sample.turn_boxes not in get_args(TurnBoxes):
        raise RowError(f"bad turn_boxes: {sample.turn_boxes!r} is neither 'seen' nor 'pixels'")
    _check_unicode(sample)
    _check_answer(sample)
    _check_ranges(sample)
    for i, label in enumerate(sample.boxes):
        _check_label(label, f"boxes[{i}]", sample.frame_count)
        if sample.images and label.time is not None:
            raise RowError(f"bad box: boxes[{i}] is at {label.time} s of a picture; give frame 0, 1, .. of 'images'")
    return sample


# ---- the media have been looked at ----------------------------------------------------------------------------------


def as_share(label: BoxLabel, what: str, size: tuple[int, int]) -> BoxLabel:
    """A box in pixels of a frame of `size` (height, width) as shares of it; others as they are.

    Raises:
        RowError: it sticks out of the frame by more than a hundredth; less is cut off.
    """
    if label.unit == "unit":
        return label
    height, width = size
    x1, y1, x2, y2 = (v / side for v, side in zip(label.box, (width, height) * 2, strict=True))
    if min(x1, y1) < -_EDGE or max(x2, y2) > 1 + _EDGE:
        raise RowError(f"box outside the frame: {what}.box is {list(label.box)} pixels of {width} x {height}")
    return replace(label, box=(max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)), unit="unit")


def with_info(sample: VideoSample, info: VideoInfo) -> VideoSample:
    """The sample of a video with its frame count, duration and size; boxes as shares of numbered frames.

    Boxes in pixels refer to the declared `size`, else to the video's; those in turns become pixels of the video.

    Raises:
        RowError: frames, boxes, segments or segment numbers outside the clip; a declared size of another shape (boxes
            drawn before the video was turned upright).
    """
    found = (info.height, info.width)
    drawn = sample.size or found
    if abs(math.log(drawn[1] * found[0] / (drawn[0] * found[1]))) > 0.05:
        raise RowError(f"other size: 'size' is {list(drawn)} (height, width), the video is {list(found)}")
    segments = segment_count(info.duration)
    for i, segment in enumerate(sample.segment_ids):
        if segment > segments:
            raise RowError(f"segment outside the clip: segment_ids[{i}] is {segment}, the clip has {segments}")
    for i, (start, _) in enumerate(sample.segments):
        if start >= info.duration:
            raise RowError(f"segment outside the clip: segments[{i}] starts at {start} s of {info.duration:.2f} s")
    known = replace(
        sample,
        boxes=tuple(_located(b, f"boxes[{i}]", drawn, info) for i, b in enumerate(sample.boxes)),
        turns=sample.turns if sample.turn_boxes == "seen" else _scaled(sample.turns, drawn, found),
        frame_count=info.frames, duration=info.duration, size=found,
    )  # fmt: skip
    return check_sample(known)


def with_seen(sample: VideoSample, seen: tuple[int, int]) -> VideoSample:
    """The sample with boxes in its turns as pixels of a frame shown in the size `seen` (height, width).

    Only `SPATIAL_ZOOM(..) = [x1, y1, x2, y2]` is rewritten, as Video-CoM does before training.

    Raises:
        RowError: the size they were drawn in is not known.
    """
    if sample.turn_boxes == "seen":
        return sample
    if sample.size is None:
        raise RowError("no size: boxes in 'turns' are pixels; give 'size', or look into the clip with with_info")
    return replace(sample, turns=_scaled(sample.turns, sample.size, seen), turn_boxes="seen")


def to_prompt(sample: VideoSample) -> Prompt:
    """What policies and rewards take.

    inputs: question (with lettered options and what an answer looks like), `videos` or `images`, options if any.
    reference: the known ones of answer, answer_type, segments, segment_ids, frames, boxes, frame_count, duration and
    size, and every key of `meta`. A written solution gives `turns` and `solution`, for a video one line per turn.

    Raises:
        RowError: a box that is not a share of a numbered frame.
    """
    if not sample.is_located:
        raise RowError("boxes not located: some are in pixels or at a time; use with_info, and with_seen for turns")
    kind = sample.answer_type or ("multiple choice" if sample.options else None)
    question = with_options(sample.question, sample.options)
    inputs: dict[str, Any] = {"question": f"{question}\n{HINTS[kind]}" if kind in HINTS else question}
    inputs |= {"images": list(sample.images)} if sample.video is None else {"videos": [sample.video]}
    if sample.options:
        inputs["options"] = list(sample.options)
    if sample.history:
        inputs["history"] = [dict(turn) for turn in sample.history]
    known = {"answer": sample.answer, "answer_type": kind} | {n: _plain(getattr(sample, n)) for n in _REFERENCE}
    reference = dict(sample.meta) | {k: v for k, v in known.items() if v is not None and v != []}
    if sample.boxes:
        reference["boxes"] = [{"frame": b.frame, "box": list(b.box)} for b in sample.boxes]
    if sample.turns:
        lines = sample.turns if sample.video is None else [" ".join(t.split()) for t in sample.turns]
        reference["solution"] = "\n".join(lines)
    return Prompt(sample.id, inputs, reference)


# ---- checks and conversions -----------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _check_answer(sample: VideoSample) -> None:
    kind = sample.answer_type or ("multiple choice" if sample.options else "text")
    try:
        answer_type_of(kind)
    except ValueError as error:
        raise RowError(f"unknown answer_type: {error}") from None
    if sample.answer is None:
        return
    try:
        # what is asked of an answer that can be right; scored against nothing, since some scores take quadratic time
        answer_score("", sample.answer, kind)
    except ValueError as error:
        raise RowError(f"bad answer: {error}") from None
    if kind in ("numerical", "regression") and not math.isfinite(number(sample.answer) or 0):
        raise RowError(f"bad answer: {sample.answer[:60]!r} is too large a number")
    letter = option_letter(sample.answer)
    if (
        kind == "multiple choice"
        and sample.options
        and str(letter) not in string.ascii_uppercase[: len(sample.options)]
    ):
        raise RowError(f"bad answer: {sample.answer!r} is none of the {len(sample.options)} options")


def _check_unicode(sample: VideoSample) -> None:
    """Raises RowError for half of a surrogate pair, which no tokenizer takes and no log can store."""
    texts = [sample.id, sample.question, sample.answer or "", *sample.options, *sample.turns, *sample.images]
    fault = broken_text("".join([*texts, sample.video or ""]))
    if fault:
        raise RowError(f"broken text: a text {fault}")


def _check_ranges(sample: VideoSample) -> None:
    for i, (start, end) in enumerate(sample.segments):
        if not 0 <= start < end:
            raise RowError(f"bad segments: segments[{i}] is [{start}, {end}]; needs 0 <= start < end in seconds")
    for i, (a, b) in enumerate(sample.frames):
        if not 0 <= a <= b:
            raise RowError(f"bad frames: frames[{i}] is [{a}, {b}]; needs 0 <= first <= last")
        if sample.frame_count is not None and b >= sample.frame_count:
            raise RowError(f"frame outside the clip: frames[{i}] is [{a}, {b}] of {sample.frame_count} frames")
    if any(k < 1 for k in sample.segment_ids):
        raise RowError(f"bad segment_ids: {list(sample.segment_ids)} must count from 1")
    numbers = (sample.frame_count, sample.duration, *(sample.size or ()))
    if not all(n is None or n > 0 for n in numbers):
        raise RowError(f"bad size: frame_count, duration and size must be above 0, not {list(numbers)}")


def _check_label(label: BoxLabel, what: str, frames: int | None) -> None:
    x1, y1, x2, y2 = label.box
    if label.unit not in get_args(Unit):
        raise RowError(f"bad unit: {what}.unit is {label.unit!r}, neither 'unit' nor 'pixels'")
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 < x2 and y1 < y2):
        raise RowError(f"bad box: {what}.box is {list(label.box)}; needs x1 < x2 and y1 < y2")
    if label.unit == "unit" and not 0 <= min(label.box) <= max(label.box) <= 1:
        raise RowError(f"bad box: {what}.box is {list(label.box)}; shares of the frame lie in [0, 1]")
    if (label.frame is None) == (label.time is None):
        raise RowError(f"bad box: {what} has frame {label.frame} and time {label.time}; give one of them")
    if min(label.frame or 0, label.time or 0) < 0 or (frames is not None and (label.frame or 0) >= frames):
        at = f"frame {label.frame}" if label.time is None else f"{label.time} s"
        raise RowError(f"box outside the clip: {what} is at {at}" + (f" of {frames} frames" if frames else ""))


def _located(label: BoxLabel, what: str, drawn: tuple[int, int], info: VideoInfo) -> BoxLabel:
    frame = label.frame
    if label.time is not None:
        if label.time > info.duration + _EDGE:
            raise RowError(f"box outside the clip: {what} is at {label.time} s of {info.duration:.2f} s")
        frame = info.index_at(label.time)
    return replace(as_share(label, what, drawn), frame=frame, time=None)


def _scaled(turns: Sequence[str], drawn: tuple[int, int], size: tuple[int, int]) -> tuple[str, ...]:
    y, x = size[0] / drawn[0], size[1] / drawn[1]

    def scaled(turn: str) -> str:
        parts, end = [], 0
        for found in _zooms(turn):
            values = [int(v) for v in found[1].split(",")]
            new = [round(v * s) for v, s in zip(values, (x, y, x, y), strict=True)]
            parts += [turn[end : found.start(1)], ", ".join(map(str, new))]
            end = found.end(1)
        return "".join([*parts, turn[end:]])

    return tuple(map(scaled, turns))


def _zooms(turn: str) -> list[re.Match[str]]:
    """The values `) = [x1, y1, x2, y2]` that follow `SPATIAL_ZOOM(` on its line, the box in group 1. Linear: each part
    of the text is searched for the name once."""
    found, end = [], 0
    for value in _BOX.finditer(turn):
        line = turn.rfind("\n", end, value.start()) + 1 or end
        if _ZOOM.search(turn, line, value.start()):
            found.append(value)
        end = value.end()
    return found
