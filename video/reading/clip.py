"""The records of reading: a clip's clock and size, its frames, the limits of reading, and the one error.

info = reader.info("film.mp4")    # VideoInfo: starts (T,) seconds, duration, height, width
info.index_at(12.5)               # the frame on screen at 12.5 s
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

Reason = Literal[
    "missing",
    "empty",
    "no_video_stream",
    "unsupported_codec",
    "truncated",
    "corrupt_frame",
    "too_short",
    "too_long",
    "too_large",
    "timeout",
    "crash",
    "untrusted_index",
]

# the advice at the end of an error's message
_ADVICE: dict[Reason, str] = {
    "missing": "Give the path of a video file",
    "empty": "Copy or download it again",
    "no_video_stream": "Leave it out",
    "unsupported_codec": "Re-encode it: ffmpeg -i IN -c:v libx264 -pix_fmt yuv420p OUT.mp4",
    "truncated": "Copy or download it again",
    "corrupt_frame": "Copy or download it again, or leave it out",
    "too_short": "Leave it out",
    "too_long": "Cut it, or raise the limit in ReadLimits",
    "too_large": "Ask for fewer or smaller frames, or raise the limit in ReadLimits",
    "timeout": "Raise timeout_s of the reader, copy it into MP4 (ffmpeg -i IN -c copy OUT.mp4), or re-encode with "
    "closer key frames: ffmpeg -i IN -g 30 OUT.mp4",
    "crash": "Leave it out, or try backend='av'",
    "untrusted_index": "Use backend='auto' or 'av', or re-encode: ffmpeg -i IN -flags +cgop OUT.mp4",
}


class VideoDecodeError(ValueError):
    """A video that cannot be read. The message says which file, why, and what to do.

    Attributes:
        path: the file.
        reason: one of `Reason`, for counting.
        detail: the part of the message that only this file has.
        backend: the one that failed, empty when none was called.
    """

    def __init__(self, path: str, reason: Reason, detail: str, *, backend: str = "") -> None:
        by_backend = f" ({backend})" if backend else ""
        super().__init__(f"{path}: {reason}{by_backend}: {detail}. {_ADVICE[reason]}.")
        self.path, self.reason, self.detail, self.backend = path, reason, detail, backend

    def __reduce__(self) -> Any:
        # an exception with several arguments is not pickled by itself, and this one comes from a worker
        return _error, (self.path, self.reason, self.detail, self.backend)


def _error(path: str, reason: Reason, detail: str, backend: str) -> VideoDecodeError:
    return VideoDecodeError(path, reason, detail, backend=backend)


@dataclass(frozen=True)
class ReadLimits:
    """Limits of a reader, so that one file or one request cannot take the machine. All > 0.

    max_frames, max_seconds: of a file. max_pixels: height x width of a frame, as stored and as asked for.
    max_read_bytes: of the pixels that one read returns.
    """

    max_frames: int = 1_000_000
    max_seconds: float = 6 * 3600.0
    # 8K is 33.2 million
    max_pixels: int = 2**25
    max_read_bytes: int = 2**30

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"ReadLimits.{field.name}={getattr(self, field.name)} must be above 0")


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """A clip as it is presented: rotated, edit list applied, frames in the order of their times.

    Attributes:
        path: absolute.
        starts: (T,) float64 seconds, ascending, read-only. 0 is where a player starts, which may lie before the
            first frame.
        duration: end of the last frame, seconds on the same clock.
        height, width: pixels as presented.
        backend: the decoder: `decord`, `av`, or the dotted path of one of your own.
        lost: the parts that a damaged file promises and does not hold, empty for a sound one.
        order: of a shuffled clip the frame shown in the place of each, None = itself. Times belong to places.
    """

    path: str
    starts: np.ndarray
    duration: float
    width: int
    height: int
    backend: str
    lost: str = ""
    order: tuple[int, ...] | None = None

    @property
    def frames(self) -> int:
        """T, the number of presented frames."""
        return len(self.starts)

    @property
    def fps(self) -> float:
        """Mean frames per second over the time in which frames are shown."""
        return self.frames / (self.duration - float(self.starts[0]))

    def index_at(self, seconds: float) -> int:
        """The frame on screen at `seconds`; before the first one 0, after the end the last."""
        return int(np.clip(np.searchsorted(self.starts, seconds, side="right") - 1, 0, self.frames - 1))


@dataclass(frozen=True, eq=False)
class Frames:
    """pixels: (n, H, W, 3) uint8 RGB. index: (n,) int64 as asked for. times: (n,) float64 seconds of each start."""

    pixels: np.ndarray
    index: np.ndarray
    times: np.ndarray
