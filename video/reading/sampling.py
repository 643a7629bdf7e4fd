"""The frames of a clip that a model sees, their size and their times: pure arithmetic, no pixels.

    frame_index(100, 4)                                # [0, 25, 50, 75]
    frame_size(1080, 1920, 32, factor=28)              # (560, 1008): 32 frames share a sequence
    second_marks([0.0, 1.0, 2.0, 3.0])                 # ["<0.5 seconds>", "<2.5 seconds>"]

Sizes are (height, width). A *factor* is the side of one language-model token in pixels, patch x merge: 28 for Qwen2-VL
and Qwen2.5-VL, 32 for Qwen3-VL. Sizes are those of `qwen_vl_utils` (0.0.14).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Size = tuple[int, int]

# tokens of the longest sequence that the families' budgets are made for
SEQUENCE = 128_000
# frames per temporal patch
_PAIR = 2
# per frame
_MIN_TOKENS, _MAX_TOKENS = 128, 768


# ---- which frames ---------------------------------------------------------------------------------------------------


def frame_index(total: int, n: int, *, first: int = 0) -> np.ndarray:
    """(n,) int64, ascending: frames of the `total` ones that start at frame `first` of the video.

    floor(i * total / n), as the video processor of Qwen2-VL takes them; the last frame is in only where n is total.

    Raises:
        ValueError: not 1 <= n <= total.
    """
    if not 1 <= n <= total:
        raise ValueError(f"{n} frames of a clip of {total}: take 1 to {total}")
    # transformers cuts a float32 arange; whole numbers are exact where that is off by one
    return first + np.arange(n, dtype=np.int64) * total // n


def clip_range(starts: np.ndarray, start: float, end: float) -> tuple[int, int]:
    """(first, last) frame, both included, of the seconds [start, end).

    first = the first frame that starts at or after `start`, last = the last that starts before `end`: neighbouring
    ranges share no frame. Times outside the video are moved to its ends. A range in which no frame starts gives the
    frame that is on the screen at `start`, once.

    Args:
        starts: (T,) seconds at which the frames start, ascending; the clock, not a rate, decides.
    Raises:
        ValueError: no frame, or not start < end.
    """
    if len(starts) == 0 or not start < end:
        raise ValueError(f"range [{start}, {end}) s of {len(starts)} frames: needs a frame and start < end")
    # container clocks round: frame 30 of a 29.97 clip may start a fraction of a microsecond late
    slack = 1e-6
    first = int(np.searchsorted(starts, start - slack, side="left"))
    last = int(np.searchsorted(starts, end - slack, side="left")) - 1
    if first > last:
        on_screen = int(np.searchsorted(starts, start + slack, side="right")) - 1
        first = last = min(max(on_screen, 0), len(starts) - 1)
    return first, last


# ---- how large ------------------------------------------------------------------------------------------------------


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> Size:
    """(height, width) in multiples of the factor F, inside the budget, aspect nearly kept (Qwen's rule).

    h = max(F, round(H / F) F), halves to even. Above max: b = sqrt(HW / max), h = max(F, floor(H / b / F) F); else
    below min: b = sqrt(min / (HW)), h = ceil(H b / F) F. Rounding may leave the budget by part of a factor, as in the
    original; a result of 0, which the original can give for long pictures, cannot happen.

    Raises:
        ValueError: a side below 1, longer than 200:1, or min_pixels > max_pixels.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"frame of {height}x{width}: sides must be at least 1 and at most 200:1; crop it")
    if min_pixels > max_pixels:
        raise ValueError(f"min_pixels={min_pixels} is above max_pixels={max_pixels}")
    new_height = max(factor, round(height / factor) * factor)
    new_width = max(factor, round(width / factor) * factor)
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def frame_cap(n: int, factor: int, *, min_pixels: int | None = None, sequence: int = SEQUENCE) -> float:
    """Most pixels per frame when n frames share a sequence (qwen_vl_utils; `cap_pixels_per_frame` of transformers).

    cap = max(min(768 F^2, 0.9 sequence F^2 / n * 2), int(1.05 min_pixels)), min_pixels 128 F^2 by default.
    """
    if n < 1:
        raise ValueError(f"{n} frames: a clip has at least 1")
    least = _MIN_TOKENS * factor**2 if min_pixels is None else min_pixels
    share = sequence * factor**2 * 0.9 / n * _PAIR
    return max(min(_MAX_TOKENS * factor**2, share), int(least * 1.05))


def frame_size(
    height: int,
    width: int,
    n: int,
    *,
    factor: int,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    sequence: int = SEQUENCE,
) -> Size:
    """(height, width) that every frame of a clip of n frames is resized to.

    `smart_resize` between min_pixels (128 F^2) and min(max_pixels, `frame_cap`): a higher max_pixels has no effect.
    """
    least = _MIN_TOKENS * factor**2 if min_pixels is None else min_pixels
    cap = frame_cap(n, factor, min_pixels=least, sequence=sequence)
    most = cap if max_pixels is None else min(max_pixels, cap)
    return smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=math.floor(most))


# ---- when -----------------------------------------------------------------------------------------------------------


def patch_seconds(times: Sequence[float] | np.ndarray) -> np.ndarray:
    """(ceil(n / 2),) seconds of the temporal patches: the mean of their two frames' `times`, an odd last one alone.

    Qwen3-VL computes frame / rate; real timestamps agree where the rate is constant and stay right where it is not.
    """
    frame_times = np.asarray(times, dtype=np.float64)
    if len(frame_times) % _PAIR:
        frame_times = np.concatenate([frame_times, frame_times[-1:]])
    return frame_times.reshape(-1, _PAIR).mean(axis=1)


def second_marks(times: Sequence[float] | np.ndarray) -> list[str]:
    """Qwen3-VL's text before each temporal patch of frames shown at `times`, such as `<1.5 seconds>`."""
    return [f"<{seconds:.1f} seconds>" for seconds in patch_seconds(times).tolist()]


def seconds_per_grid(n: int, seconds: float) -> float:
    """Qwen2.5-VL's `second_per_grid_ts` of n frames taken from a stretch of `seconds`: 2 seconds / n.

    With a constant rate this is the families' 2 / sample_fps, sample_fps = n / total * fps.
    """
    if n < 1 or not seconds > 0:
        raise ValueError(f"{n} frames over {seconds} s: both must be above 0")
    return _PAIR * seconds / n
