"""The records of acting: actions, problems, looks, and the state of one video question.

    state = VideoState.start(starts=[0.0, 0.5, 1.0], duration=1.5, size=(480, 640))
    look = state.still(2, box=(0.0, 0.0, 0.5, 0.5))   # the upper left quarter of the third frame
    look_problem(state, look)                         # None: it may be shown

Everything is a frozen record of plain values: a branch of a search forks a state by keeping it, and states, looks and
actions can be pickled, compared and hashed. Nothing here touches pixels.

Coordinates. A `Look` speaks of the frame *as presented* (native size, rotation applied) in unit floats (x1, y1, x2,
y2), so it does not matter at which size a frame is shown. A policy writes boxes in the units of `VideoState.coords`;
`VideoState.unit_box` is the one place where they are converted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from video.acting.segments import Segment, segment_table
from video.reading.sampling import clip_range

Coords = Literal["norm1000", "unit", "pixels"]
Code = Literal[
    "parse_error", "unknown_action", "out_of_range", "empty_range", "inverted_box", "box_too_small",
    "no_frame_selected", "whole_video", "duplicate_action", "budget_exceeded", "unreadable_frames", "failed_action",
]  # fmt: skip
Box = tuple[float, float, float, float]

# a crop's side is at least this share of the frame's
MIN_SHARE = 0.02
# 0.12 - 0.1 falls short of 0.02
_EPS = 1e-9


@dataclass(frozen=True)
class VideoAction:
    """One call of a manipulation, as the policy wrote it: frames and segments 1-based, boxes in the policy's units.

    phrase: what the policy says it looks for; free text that changes nothing, so it does not count in `==`.
    """

    name: str
    args: Mapping[str, Any]
    phrase: str = field(default="", compare=False)

    def __hash__(self) -> int:
        return hash((self.name, tuple(sorted(self.args))))


@dataclass(frozen=True)
class Problem:
    """The reason of a refusal: `message` for people and policies, `valid` the ranges or names that would have done."""

    code: Code
    message: str
    valid: Mapping[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash((self.code, self.message))


class UnshowableError(ValueError):
    """A look that cannot be shown, by the fault of a manipulation: the turn is refused, the conversation goes on."""


@dataclass(frozen=True)
class Change:
    """A change of pixels, such as a turn by 90 degrees or a drawn line; made by `Look.changed`.

    function: (pixels, *args) -> pixels, both (H, W, 3) uint8 of one frame or crop, of any size. A function of a module
    and arguments with a hash, since looks are compared, pickled and cached; the same arguments give the same pixels.
    """

    function: Callable[..., np.ndarray]
    args: tuple[Any, ...] = ()

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 -> (h, w, 3) uint8.

        Raises:
            UnshowableError: the function raised, or gave something else.
        """
        name = repr(self.function)
        try:
            # a copy, since decoded frames are cached
            changed = self.function(pixels.copy(), *self.args)
        except Exception as error:
            raise UnshowableError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(changed, np.ndarray) or changed.dtype != np.uint8:
            raise UnshowableError(f"{name} gave {type(changed).__name__} in place of an array of uint8")
        if changed.ndim != 3 or changed.shape[2] != 3 or changed.size == 0:
            raise UnshowableError(f"{name} gave pixels of shape {changed.shape} in place of (height, width, 3)")
        return changed


@dataclass(frozen=True)
class Look:
    """Something to show next. `VideoState.segment`, `VideoState.still` and `VideoState.words` make them.

    segment  [start, end) seconds, `frames` of them (None: as many as the agent shows by default);
    frame    source frame `frame` (0-based) whole; start = end = its time;
    crop     `box` of that frame, unit floats of the frame as presented;
    text     `text`, for example what is said in the clip.

    change: of the pixels of each frame or crop, None = as they are.
    """

    kind: Literal["segment", "frame", "crop", "text"]
    start: float
    end: float
    frame: int | None = None
    box: Box | None = None
    frames: int | None = None
    text: str = ""
    change: Change | None = None

    def changed(self, function: Callable[..., np.ndarray], *args: Any) -> Look:
        """The look with its pixels changed by `function(pixels, *args)`; see `Change`."""
        return replace(self, change=Change(function, args))


@dataclass(frozen=True)
class VideoState:
    """A clip and the turns so far, for manipulations to refer to. `video.acting.actions.act` returns the next state;
    make the first with `start`.

    starts, duration: (T,) seconds at which the frames start, and the end of the last; size: (height, width) native.
    segments: the table whose 1-based ids `find_segment` takes.
    coords, seen: units of the policy's boxes; `seen` = (height, width) at which a single frame is shown to it.
    min_side, pad: least side of a crop in native pixels; share of the frame added on each side of a crop.
    turns_left: turns the policy may still write, the answering one included; tokens_left: of observations, None: any.
    frame: 0-based frame last looked at, which zooms refer to; done: (name, looks) of every action carried out.
    """

    starts: tuple[float, ...] = field(repr=False)
    duration: float
    size: tuple[int, int]
    segments: tuple[Segment, ...] = field(repr=False)
    coords: Coords = "norm1000"
    seen: tuple[int, int] | None = None
    min_side: int = 28
    pad: float = 0.0
    turns_left: int = 5
    tokens_left: int | None = None
    frame: int | None = None
    done: tuple[tuple[str, tuple[Look, ...]], ...] = ()

    @classmethod
    def start(
        cls,
        starts: Sequence[float] | np.ndarray,
        duration: float,
        size: tuple[int, int],
        *,
        coords: Coords = "norm1000",
        seen: tuple[int, int] | None = None,
        turns: int = 5,
        tokens: int | None = None,
        min_side: int = 28,
        pad: float = 0.0,
    ) -> VideoState:
        """The state before the first turn; arguments as the fields, `seen` only needed for coords="pixels".

        Raises:
            ValueError: timestamps that are no ascending finite seconds from 0 on, a duration that ends before the
                last frame starts, an empty size, unknown coords, pixels without `seen`, or a limit below 1.
        """
        times = tuple(float(t) for t in starts)
        _check_clip(times, duration, size)
        if coords not in get_args(Coords):
            raise ValueError(f"coords={coords!r}: one of {', '.join(get_args(Coords))}")
        if coords == "pixels" and (seen is None or min(seen) < 1):
            raise ValueError(f"coords='pixels' needs seen=(height, width), the size the policy saw, got {seen}")
        has_tokens = tokens is None or tokens >= 0
        if turns < 1 or min_side < 1 or not 0 <= pad < 1 or not has_tokens:
            raise ValueError(
                f"turns={turns}, min_side={min_side}, pad={pad}, tokens={tokens}: turns and min_side are at least 1, "
                "pad is in [0, 1), tokens is at least 0 or None"
            )
        # cut once: every state of the conversation shares the table
        table = segment_table(times, duration)
        return cls(times, float(duration), size, table, coords, seen, min_side, pad, turns, tokens)

    def segment(self, start: float, end: float, *, frames: int | None = None) -> Look:
        """A look at [start, end) seconds."""
        return Look("segment", float(start), float(end), frames=frames)

    def still(self, frame: int, box: Box | None = None) -> Look:
        """A look at one source frame (0-based) or, with a box in unit floats, at a part of it."""
        # a frame outside the clip is refused later, by `look_problem`
        time = self.starts[frame] if 0 <= frame < len(self.starts) else 0.0
        return Look("frame" if box is None else "crop", time, time, frame, box)

    def words(self, text: str) -> Look:
        """A text to show, such as a transcript."""
        return Look("text", 0.0, 0.0, text=text)

    def unit_box(self, box: Sequence[float]) -> Box:
        """A box in the policy's units -> unit floats of the frame."""
        across, down = self.scale
        return (box[0] / across, box[1] / down, box[2] / across, box[3] / down)

    @property
    def scale(self) -> tuple[int, int]:
        """Width and height of a whole frame in the policy's units."""
        if self.coords == "pixels" and self.seen is not None:
            return self.seen[1], self.seen[0]
        return (1000, 1000) if self.coords == "norm1000" else (1, 1)


def _check_clip(starts: tuple[float, ...], duration: float, size: tuple[int, int]) -> None:
    # equal times are allowed, since damaged files have them
    ascending = all(a <= b for a, b in pairwise(starts))
    if not starts or not all(map(math.isfinite, starts)) or starts[0] < 0 or not ascending:
        raise ValueError(
            f"starts={starts[:5]}.. ({len(starts)} frames): ascending finite seconds from 0 on are needed"
        )
    if not (math.isfinite(duration) and duration > starts[-1]):
        raise ValueError(f"duration={duration}: it is the end of the last frame, which starts at {starts[-1]} s")
    if min(size) < 1:
        raise ValueError(f"size={size}: (height, width) in pixels, both at least 1")


# ---- may it be shown? -----------------------------------------------------------------------------------------------


def look_problem(state: VideoState, look: Look) -> Problem | None:
    """The problem with a look, if any: the one check that every manipulation's looks go through."""
    if look.kind == "text":
        return None
    if look.kind == "segment":
        return _segment_problem(state, look)
    if look.frame is None or not 0 <= look.frame < len(state.starts):
        frame = "no frame" if look.frame is None else f"frame {number(look.frame + 1)}"
        return Problem("out_of_range", f"{frame} is not in the video.", {"frame": (1, len(state.starts))})
    if look.kind == "frame":
        return None
    return _box_problem(state, look.box)


def frame_range(state: VideoState, look: Look) -> tuple[int, int]:
    """(first, last) frame of a look, both included, 0-based."""
    if look.frame is not None:
        return look.frame, look.frame
    return clip_range(np.asarray(state.starts), look.start, look.end)


def _segment_problem(state: VideoState, look: Look) -> Problem | None:
    start, end = look.start, look.end
    span = f"{number(start)} to {number(end)} s"
    valid = {"seconds": (0.0, state.duration)}
    # chained comparisons, so that NaN is refused as well
    if not (0 <= start <= state.duration and 0 <= end <= state.duration):
        return Problem("out_of_range", f"{span} is not inside the video.", valid)
    if start >= end:
        return Problem("empty_range", f"{span} holds nothing: the end must come after the start.", valid)
    first, last = frame_range(state, look)
    num_frames = last - first + 1
    if look.frames is not None and not 1 <= look.frames <= num_frames:
        message = f"{number(look.frames)} frames of {span} cannot be shown."
        return Problem("out_of_range", message, {"frames": (1, num_frames)})
    return None


def _box_problem(state: VideoState, box: Box | None) -> Problem | None:
    across, down = state.scale
    valid: dict[str, Any] = {"x": (0, across), "y": (0, down)}
    # `not all`, so that NaN is refused as well
    if box is None or not all(0 <= side <= 1 for side in box):
        return Problem("out_of_range", "the box is not inside the frame.", valid)
    x1, y1, x2, y2 = box
    if x1 >= x2 or y1 >= y2:
        return Problem("inverted_box", "a box is x1, y1, x2, y2 with x1 < x2 and y1 < y2.", valid)
    height, width = state.size
    least_width = min(1.0, max(state.min_side / width, MIN_SHARE))
    least_height = min(1.0, max(state.min_side / height, MIN_SHARE))
    if x2 - x1 < least_width - _EPS or y2 - y1 < least_height - _EPS:
        least = {"least width": _round_up(least_width * across), "least height": _round_up(least_height * down)}
        return Problem("box_too_small", "the box is too small to show anything.", least)
    return None


def _round_up(value: float) -> float:
    """Rounded up to three decimals, so that a box of exactly this size is accepted."""
    return math.ceil(value * 1000 - _EPS) / 1000


def number(value: float) -> str:
    """A number in few characters, whatever its size."""
    if isinstance(value, int) and abs(value) >= 10**15:
        return "a huge number"
    return f"{value:.10g}"


def pixel_box(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(x1, y1, x2, y2) whole pixels of a frame of `size` = (height, width), by round(u * side), at least one pixel.

    Halves go up: `round` would send both ends of (0.5, 1.5) pixels to an even number, which may leave nothing.
    """
    height, width = size
    x1 = min(math.floor(box[0] * width + 0.5), width - 1)
    y1 = min(math.floor(box[1] * height + 0.5), height - 1)
    x2 = math.floor(box[2] * width + 0.5)
    y2 = math.floor(box[3] * height + 0.5)
    return x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)
