"""The table of presented frames of a file, from its packets; of its pixels only the first few frames are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from video.clip import ReadLimits, VideoDecodeError

_HEAD = 4  # frames decoded to see whether the packets' stamps come out as the frames' stamps
_SIGNATURES = {4: (b"ftyp", b"moov", b"mdat", b"wide", b"free"), 0: (b"\x1a\x45\xdf\xa3", b"RIFF", b"FLV", b"OggS")}
_NO_VIDEO = ("hls", "concat", "dash", "image2", "tty")  # lists of other files, a still picture, text


@dataclass(frozen=True, eq=False)
class ClipIndex:
    """Where the presented frames of a file are.

    stamps: (T,) int64, ascending, in ticks of the stream: frame i is the picture stamped `stamps[i]`. Where `counted`
        is set they do not tell pictures apart: frame i is the i-th that the decoder gives.
    keys: (K,) int64, ascending: stamps of the pictures where decoding can begin, hidden ones included.
    starts, duration, height, width, lost: see `VideoInfo`.
    turns: quarter turns anticlockwise that present the stored picture.
    odd: why counting packets may give other frames than a player shows, empty when it does not.
    """

    stamps: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    duration: float
    height: int
    width: int
    turns: int = 0
    counted: bool = False
    odd: str = ""
    lost: str = ""


@dataclass(frozen=True)
class _Stream:
    """What the container says about itself. tick, rate: seconds, frames per second. origin, promised: seconds."""

    tick: Fraction
    rate: Fraction
    origin: float
    promised: float
    bits: int


@dataclass
class _Packets:
    """The packets of a stream in the order of the file: stamps and end of the shown ones, ticks; stamps of key
    pictures; how many are leading (shown before the key picture that they follow), hidden or broken."""

    stamps: list[int | None]
    keys: list[int]
    end: int = 0
    leading: int = 0
    hidden: int = 0
    broken: int = 0


def index_clip(path: str, limits: ReadLimits) -> ClipIndex:
    """Read the packets of `path` and decide what its frames are.

    Raises:
        VideoDecodeError: no video in there, nothing decodes, or beyond a limit.
    """
    with open_stream(path) as (container, stream):
        _check_size(path, stream, limits)
        said = _described(container, stream)
        packets = _packets(path, container, stream, limits)
    head = _head(path, len(packets.stamps))
    stamps: Any = sorted(s for s in packets.stamps if s is not None)
    tick, origin, end = said.tick, said.origin, packets.end
    counted = not _tell_apart(stamps, packets.stamps) or [f.pts for f in head] != stamps[: len(head)]
    if counted:
        given = _decode_all(path)
        stamps = sorted(s for s in given if s is not None)  # some containers put right times on the wrong frames
        if not _tell_apart(stamps, given):
            stamps, tick, origin, end = range(len(given)), 1 / said.rate, 0.0, len(given)
    starts = np.array(stamps, np.int64) * float(tick)
    starts -= min(max(origin, 0.0), starts[0])
    duration = _end(starts, (end - stamps[-1]) * float(tick), said.rate)
    if duration > limits.max_seconds:
        detail = f"{duration:.0f} s exceed max_seconds={limits.max_seconds:g}"
        raise VideoDecodeError(path, "too_long", detail)
    first, turns = head[0], round(head[0].rotation / 90) % 4
    return ClipIndex(
        stamps=np.array(stamps, np.int64), keys=np.unique(np.array(packets.keys, np.int64)),
        starts=starts, duration=duration, turns=turns, counted=counted,
        height=first.width if turns % 2 else first.height, width=first.height if turns % 2 else first.width,
        odd=_odd(packets, said.bits, counted), lost=_lost(packets, duration + max(origin, 0.0), said.promised),
    )  # fmt: skip


@contextmanager
def open_stream(path: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, for PyAV.

    Raises:
        VideoDecodeError: it does not open, or holds no video that can be decoded.
    """
    try:
        # nothing but the file itself: a playlist must not make the reader fetch addresses
        container = av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _unopened(path, error) from None
    with container:
        stream: Any = container.streams.best("video")
        name = container.format.name
        if name.startswith(_NO_VIDEO) or name.endswith("_pipe"):
            raise VideoDecodeError(path, "no_video_stream", f"FFmpeg takes it for {name!r}, which is no video file")
        if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
            kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
            raise VideoDecodeError(path, "no_video_stream", f"it holds {', '.join(kinds)} and no video")
        if stream.codec_context is None:
            raise VideoDecodeError(path, "unsupported_codec", "FFmpeg has no decoder for its video stream")
        # threads per frame at times lose the mark of a damaged frame (8 of 1500 decodes), threads per slice never did
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 2
        yield container, stream


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands, in the order of presentation, up to the first error, which is raised.
    Packets that were cut short are left out: some decoders make half a picture of them."""
    for packet in container.demux(stream):
        if not packet.is_corrupt:
            yield from packet.decode()


def _unopened(path: str, error: Exception) -> VideoDecodeError:
    with Path(path).open("rb") as file:
        start = file.read(8)
    if any(start[at:].startswith(signs) for at, signs in _SIGNATURES.items()):
        return VideoDecodeError(path, "truncated", "it begins as a video file, but has no usable table of frames")
    return VideoDecodeError(path, "no_video_stream", f"it is no video file ({type(error).__name__})")


def _check_size(path: str, stream: Any, limits: ReadLimits) -> None:
    height, width = stream.codec_context.height, stream.codec_context.width
    if height * width > limits.max_pixels:
        detail = f"frames of {height} x {width} exceed max_pixels={limits.max_pixels}"
        raise VideoDecodeError(path, "too_large", detail)


def _described(container: Any, stream: Any) -> _Stream:
    layout = stream.codec_context.format
    return _Stream(
        tick=stream.time_base,
        rate=stream.guessed_rate or stream.average_rate or Fraction(25),
        origin=(container.start_time or 0) / av.time_base,
        promised=float((stream.duration or 0) * stream.time_base) or (container.duration or 0) / av.time_base,
        bits=max((c.bits for c in layout.components), default=8) if layout else 8,
    )


def _packets(path: str, container: Any, stream: Any, limits: ReadLimits) -> _Packets:
    found, key = _Packets([], []), None
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt or not packet.size:
                found.broken += packet.is_corrupt
                continue
            if packet.is_keyframe and packet.pts is not None:
                key = packet.pts
                found.keys.append(key)
            if packet.is_discard:
                found.hidden += 1
                continue
            found.stamps.append(packet.pts)
            if packet.pts is not None:
                found.end = max(found.end, packet.pts + (packet.duration or 0))
                found.leading += key is not None and packet.pts < key
            if len(found.stamps) > limits.max_frames:
                raise VideoDecodeError(path, "too_long", f"more frames than max_frames={limits.max_frames}")
    except av.FFmpegError:
        found.broken += 1
    if not found.stamps:
        raise VideoDecodeError(path, "truncated" if found.broken else "too_short", "it holds not one whole frame")
    return found


def _head(path: str, count: int) -> list[Any]:
    """The first frames, fewer where an error comes before."""
    frames: list[Any] = []
    problem = "the decoder gives no frame"
    with open_stream(path) as (container, stream):
        try:
            frames.extend(islice(decoded(container, stream), min(_HEAD, count)))
        except av.FFmpegError as error:
            problem = f"the first frames do not decode ({error.strerror})"
    if not frames:
        raise VideoDecodeError(path, "corrupt_frame", problem, backend="av")
    return frames


def _decode_all(path: str) -> list[int | None]:
    """Stamps of all frames up to the first error, in the order of presentation."""
    stamps: list[int | None] = []
    with open_stream(path) as (container, stream), suppress(av.FFmpegError):
        stamps.extend(frame.pts for frame in decoded(container, stream))
    return stamps


def _tell_apart(stamps: list[int], given: list[int | None]) -> bool:
    return len(set(stamps)) == len(given)


def _end(starts: np.ndarray, last: float, rate: Fraction) -> float:
    """Where the last frame ends: it is shown for `last` seconds, or as long as the mean of the others if unknown."""
    if last <= 0:
        last = float(np.diff(starts).mean()) if len(starts) > 1 else float(1 / rate)
    return float(starts[-1]) + last


def _odd(packets: _Packets, bits: int, counted: bool) -> str:
    reasons = {
        "edit list": packets.hidden > 0,
        "open GOP": packets.leading > 0,
        "damaged packets": packets.broken > 0,
        "times that do not tell its frames apart": counted,
        f"{bits} bits a channel": bits > 8,
    }
    return ", ".join(name for name, found in reasons.items() if found)


def _lost(packets: _Packets, end: float, promised: float) -> str:
    found = [f"damaged packets: {packets.broken}"] if packets.broken else []
    if end < 0.95 * promised - 0.1:
        found.append(f"frames up to {end:.2f} s, but the container says {promised:.2f} s")
    return " and ".join(found)
