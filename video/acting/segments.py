"""The numbered segments of a clip (Video-CoM's rule) and the frame on the screen at a time, from timestamps alone.

A segment is what `find_segment` can name by its 1-based id. Times are seconds; frames are 0-based source frames.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# seconds: container clocks round, see `video.reading.sampling.clip_range`
SLACK_S = 1e-6


class Segment(NamedTuple):
    """Frames first..last, both included, on the screen during [start, end) seconds."""

    start: float
    end: float
    first: int
    last: int


def segment_count(duration: float) -> int:
    """Video-CoM's number of segments: 10, made fewer while they are shorter than 10 s, more while longer than 30 s.

    5 s -> 1, 20 -> 2, 60 -> 6, 95 -> 9, 100 to 300 -> 10, 301 -> 11, 3600 -> 120.
    """
    count = max(10, math.floor(duration / 30))
    while duration / count > 30:
        count += 1
    while count > 1 and duration / count < 10:
        count -= 1
    return count


def segment_table(starts: Sequence[float], duration: float) -> tuple[Segment, ...]:
    """The segments of a clip, in order: T // count frames each, the last takes the rest.

    They are cut by frames, as published, so those of a clip of variable rate differ in seconds. A clip with fewer
    frames than segments gets one segment per frame.

    Args:
        starts: (T,) seconds at which the frames start, ascending; T >= 1.
        duration: seconds, the end of the last frame.
    """
    total = len(starts)
    count = min(segment_count(duration), total)
    size = total // count
    # segment i holds the frames first_frames[i] .. first_frames[i + 1] - 1
    first_frames = [i * size for i in range(count)] + [total]
    segments = []
    for first, following in pairwise(first_frames):
        end = duration if following == total else float(starts[following])
        segments.append(Segment(float(starts[first]), end, first, following - 1))
    return tuple(segments)


def frame_at(starts: Sequence[float], seconds: float) -> int:
    """The frame on the screen at a time; the first one before the clip, the last one after it."""
    return min(max(bisect_right(starts, seconds + SLACK_S) - 1, 0), len(starts) - 1)
