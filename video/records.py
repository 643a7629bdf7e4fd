"""One question about a clip or pictures, with the labels of its answer: the record that all formats are read into.

    sample = check_sample(VideoSample("q1", "What colour is the car?", video="car.mp4", options=("red", "blue"),
                                      answer="B", segments=((2.0, 6.5),)))
    sample = with_info(sample, reader.info(sample.video))   # frame count, duration, size; boxes become shares
    prompt = to_prompt(sample)                              # what policies and rewards take

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
# boxes may stick out of the frame by this share, since annotation tools round; they are cut there
_EDGE = 0.01
# logarithm by which the aspect of a declared size may differ from the clip's
_SHAPE_TOLERANCE = 0.05
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
    """A question, its media (a video or pictures), and its labels, any of which may be missing.

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
        """True when every box is a share of a numbered frame, in labels and turns, as prompts need it."""
        if any(label.unit != "unit" or label.frame is None for label in self.boxes):
            return False
        return self.turn_boxes == "seen" or not any(_zooms(turn) for turn in self.turns)


def check_sample(sample: VideoSample) -> VideoSample:
    """The sample itself when it is sound.

    Raises:
        RowError: no question, no medium or two kinds, a placeholder of a model in the text, an unknown answer type or
            an answer that is none of its type, empty or inverted ranges and boxes, numbers below where they start.
    """
    if not sample.question.strip():
        raise RowError("no text in 'question'")
    texts = [turn["content"] for turn in sample.history]
    texts.append(sample.question)
    check_marks(texts, len(sample.images))
    without_pictures = [text.replace(IMAGE_MARK, "") for text in texts]
    check_text("\n".join([*without_pictures, *sample.options]))
    if bool(sample.images) == (sample.video is not None):
        raise RowError(f"media: 'video' is {sample.video!r} and 'images' {list(sample.images)}; give one of the two")
    paths = list(sample.images) if sample.video is None else [sample.video]
    if not all(isinstance(path, str) and path for path in paths):
        raise RowError(f"bad path: {paths} must be texts that are not empty")
    if not all(isinstance(turn, str) and turn.strip() for turn in sample.turns):
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
    x1, y1 = label.box[0] / width, label.box[1] / height
    x2, y2 = label.box[2] / width, label.box[3] / height
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
    clip_size = (info.height, info.width)
    drawn_size = sample.size or clip_size
    # boxes keep their place when a clip was only scaled; a turned or cropped one moves them
    drawn_aspect_over_clip = drawn_size[1] * clip_size[0] / (drawn_size[0] * clip_size[1])
    if abs(math.log(drawn_aspect_over_clip)) > _SHAPE_TOLERANCE:
        raise RowError(f"other size: 'size' is {list(drawn_size)} (height, width), the video is {list(clip_size)}")
    segments = segment_count(info.duration)
    for i, segment in enumerate(sample.segment_ids):
        if segment > segments:
            raise RowError(f"segment outside the clip: segment_ids[{i}] is {segment}, the clip has {segments}")
    for i, (start, _) in enumerate(sample.segments):
        if start >= info.duration:
            raise RowError(f"segment outside the clip: segments[{i}] starts at {start} s of {info.duration:.2f} s")
    boxes = tuple(_located(label, f"boxes[{i}]", drawn_size, info) for i, label in enumerate(sample.boxes))
    turns = sample.turns
    if sample.turn_boxes == "pixels":
        turns = _with_scaled_boxes(turns, drawn_size, clip_size)
    located = replace(
        sample, boxes=boxes, turns=turns, frame_count=info.frames, duration=info.duration, size=clip_size
    )
    # checked anew, since frames can now be held against the length of the clip
    return check_sample(located)


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
    return replace(sample, turns=_with_scaled_boxes(sample.turns, sample.size, seen), turn_boxes="seen")


def to_prompt(sample: VideoSample) -> Prompt:
    """The prompt of a sample, for policies and rewards.

    inputs: question (with lettered options and what an answer looks like), `videos` or `images`, options if any.
    reference: those of answer, answer_type, segments, segment_ids, frames, boxes, frame_count, duration and size that
    the sample has, and every key of `meta`. A written solution gives `turns` and `solution`, for a video one line per
    turn.

    Raises:
        RowError: a box that is not a share of a numbered frame.
    """
    if not sample.is_located:
        raise RowError("boxes not located: some are in pixels or at a time; use with_info, and with_seen for turns")
    answer_type = sample.answer_type or ("multiple choice" if sample.options else None)
    return Prompt(sample.id, _inputs(sample, answer_type), _reference(sample, answer_type))


def _inputs(sample: VideoSample, answer_type: str | None) -> dict[str, Any]:
    question = with_options(sample.question, sample.options)
    if answer_type in HINTS:
        question = f"{question}\n{HINTS[answer_type]}"
    inputs: dict[str, Any] = {"question": question}
    if sample.video is None:
        inputs["images"] = list(sample.images)
    else:
        inputs["videos"] = [sample.video]
    if sample.options:
        inputs["options"] = list(sample.options)
    if sample.history:
        inputs["history"] = [dict(turn) for turn in sample.history]
    return inputs


def _reference(sample: VideoSample, answer_type: str | None) -> dict[str, Any]:
    # labels come last, so that no other column of a row can replace one
    reference = dict(sample.meta)
    labels: dict[str, Any] = {"answer": sample.answer, "answer_type": answer_type}
    labels |= {name: _as_lists(getattr(sample, name)) for name in _REFERENCE}
    for name, value in labels.items():
        if value is not None and value != []:
            reference[name] = value
    if sample.boxes:
        reference["boxes"] = [{"frame": label.frame, "box": list(label.box)} for label in sample.boxes]
    if sample.turns:
        lines = list(sample.turns)
        if sample.video is not None:
            # a conversation about a clip is read line by line, a turn a line
            lines = [" ".join(turn.split()) for turn in lines]
        reference["solution"] = "\n".join(lines)
    return reference


# ---- checks and conversions -----------------------------------------------------------------------------------------


def _as_lists(value: Any) -> Any:
    """Tuples, nested ones too, as the lists of JSON."""
    return [_as_lists(item) for item in value] if isinstance(value, tuple) else value


def _check_answer(sample: VideoSample) -> None:
    answer_type = sample.answer_type or ("multiple choice" if sample.options else "text")
    try:
        answer_type_of(answer_type)
    except ValueError as error:
        raise RowError(f"unknown answer_type: {error}") from None
    if sample.answer is None:
        return
    try:
        # a score refuses a reference that is none of its type; against an empty answer, since some take quadratic time
        answer_score("", sample.answer, answer_type)
    except ValueError as error:
        raise RowError(f"bad answer: {error}") from None
    if answer_type in ("numerical", "regression") and not math.isfinite(number(sample.answer) or 0):
        raise RowError(f"bad answer: {sample.answer[:60]!r} is too large a number")
    if answer_type == "multiple choice" and sample.options:
        letters = string.ascii_uppercase[: len(sample.options)]
        if str(option_letter(sample.answer)) not in letters:
            raise RowError(f"bad answer: {sample.answer!r} is none of the {len(sample.options)} options")


def _check_unicode(sample: VideoSample) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes and no log can store."""
    texts = [sample.id, sample.question, sample.answer or "", sample.video or ""]
    fault = broken_text("".join([*texts, *sample.options, *sample.turns, *sample.images]))
    if fault:
        raise RowError(f"broken text: a text {fault}")


def _check_ranges(sample: VideoSample) -> None:
    for i, (start, end) in enumerate(sample.segments):
        if not 0 <= start < end:
            raise RowError(f"bad segments: segments[{i}] is [{start}, {end}]; needs 0 <= start < end in seconds")
    for i, (first, last) in enumerate(sample.frames):
        if not 0 <= first <= last:
            raise RowError(f"bad frames: frames[{i}] is [{first}, {last}]; needs 0 <= first <= last")
        if sample.frame_count is not None and last >= sample.frame_count:
            raise RowError(f"frame outside the clip: frames[{i}] is [{first}, {last}] of {sample.frame_count} frames")
    if sample.segment_ids and min(sample.segment_ids) < 1:
        raise RowError(f"bad segment_ids: {list(sample.segment_ids)} must count from 1")
    measures = (sample.frame_count, sample.duration, *(sample.size or ()))
    if not all(measure is None or measure > 0 for measure in measures):
        raise RowError(f"bad size: frame_count, duration and size must be above 0, not {list(measures)}")


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
    is_before = min(label.frame or 0, label.time or 0) < 0
    is_behind = frames is not None and (label.frame or 0) >= frames
    if is_before or is_behind:
        place = f"frame {label.frame}" if label.time is None else f"{label.time} s"
        length = f" of {frames} frames" if frames else ""
        raise RowError(f"box outside the clip: {what} is at {place}{length}")


def _located(label: BoxLabel, what: str, drawn_size: tuple[int, int], info: VideoInfo) -> BoxLabel:
    """The label as a share of a numbered frame; pixels are those of a frame of `drawn_size`."""
    frame = label.frame
    if label.time is not None:
        if label.time > info.duration + _EDGE:
            raise RowError(f"box outside the clip: {what} is at {label.time} s of {info.duration:.2f} s")
        frame = info.index_at(label.time)
    return replace(as_share(label, what, drawn_size), frame=frame, time=None)


def _with_scaled_boxes(turns: Sequence[str], drawn_size: tuple[int, int], size: tuple[int, int]) -> tuple[str, ...]:
    """The turns with the boxes of their zooms, pixels of `drawn_size`, as whole pixels of `size` (height, width)."""
    down, across = size[0] / drawn_size[0], size[1] / drawn_size[1]
    scaled_turns = []
    for turn in turns:
        parts = []
        end = 0
        for zoom in _zooms(turn):
            x1, y1, x2, y2 = (int(digits) for digits in zoom[1].split(","))
            box = [round(x1 * across), round(y1 * down), round(x2 * across), round(y2 * down)]
            parts += [turn[end : zoom.start(1)], ", ".join(map(str, box))]
            end = zoom.end(1)
        parts.append(turn[end:])
        scaled_turns.append("".join(parts))
    return tuple(scaled_turns)


def _zooms(turn: str) -> list[re.Match[str]]:
    """The values `) = [x1, y1, x2, y2]` that follow `SPATIAL_ZOOM(` on its line, the box in group 1."""
    zooms = []
    end = 0
    for value in _BOX.finditer(turn):
        # the name is looked for between the value before and this one: every part of the text is searched once, so
        # that the time stays linear in its length
        line_start = turn.rfind("\n", end, value.start()) + 1 or end
        if _ZOOM.search(turn, line_start, value.start()):
            zooms.append(value)
        end = value.end()
    return zooms
