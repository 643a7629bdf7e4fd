"""Frames out of files: decord where its frame counter is right, PyAV everywhere else.

    clip = index_clip("film.mp4", ReadLimits())            # video.reading.clip_index
    read_av("film.mp4", clip, [0, 30, 60], (252, 448))     # (3, 252, 448, 3) uint8

A backend is a function (path, clip, frame numbers, size) -> (n, H, W, 3) uint8; the numbers are sorted without
repeats. Times and the number of frames come from `ClipIndex` whoever decodes, so that a clip has one clock.

decord 0.6 is quick and steady on ordinary files, but it counts packets. Where these are not what a player shows it
gives other frames at random than in sequence: edit lists, open GOPs (the x265 default), intra refresh, containers that
keep no exact places; and it ignores the rotation of Matroska. `decord_problem` asks the packets, and compares pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

import av
import numpy as np

from video.reading.clip import VideoDecodeError
from video.reading.clip_index import ClipIndex, checksum, decoded, in_order, open_stream

Backend = Callable[[str, ClipIndex, list[int], tuple[int, int] | None], np.ndarray]

# mean difference of two decoders on one frame, of 255; 0.0 is usual
_ALIKE = 1.0


def find(name: str) -> Backend:
    """The backend `decord`, `av`, or the one at a dotted path package.module:function."""
    if name in _BACKENDS:
        return _BACKENDS[name]
    module, _, function = name.partition(":")
    backend: Backend = getattr(import_module(module), function)
    return backend


def decord_problem(path: str, clip: ClipIndex) -> VideoDecodeError | None:
    """The reason why decord must not be used for this file, None where it may."""
    if clip.odd or clip.lost:
        return _untrusted(path, clip.odd or clip.lost)
    # past the last key frame decord must seek: a counter that runs ahead or behind shows there
    last_key = int(np.searchsorted(clip.stamps, clip.keys[-1])) if len(clip.keys) else 0
    probes = sorted({0, min(last_key, len(clip.stamps) - 1)})
    try:
        frames = read_decord(path, clip, probes, None)
        expected = read_av(path, clip, probes, None)
    except VideoDecodeError as error:
        return error
    if frames.shape != expected.shape:
        return _untrusted(path, f"it gives frames of {frames.shape[1]} x {frames.shape[2]}")
    # (probes,) mean difference of a frame; int16, since the difference of two uint8 would wrap around
    difference = np.abs(frames.astype(np.int16) - expected).mean(axis=(1, 2, 3))
    if (difference > _ALIKE).any():
        return _untrusted(path, f"it gives another picture at frame {probes[int(difference.argmax())]}")
    return None


def _untrusted(path: str, detail: str) -> VideoDecodeError:
    return VideoDecodeError(path, "untrusted_index", detail, backend="decord")


def read_decord(path: str, clip: ClipIndex, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    """One `get_batch` of one short-lived reader: a reader that is kept decodes on into memory without bound.

    Raises:
        VideoDecodeError: unsupported_codec when it does not open the file, untrusted_index when it counts other frames
            than the clip has, corrupt_frame otherwise.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    height, width = size or (-1, -1)
    failures = (decord.DECORDError, RuntimeError, IndexError, AssertionError)
    try:
        reader = decord.VideoReader(path, width=width, height=height)
    except failures as error:
        raise VideoDecodeError(path, "unsupported_codec", _first_line(error), backend="decord") from None
    if len(reader) != len(clip.stamps):
        raise _untrusted(path, f"it counts {len(reader)} frames, {len(clip.stamps)} are shown")
    try:
        return np.asarray(reader.get_batch(wanted).asnumpy())
    except failures as error:
        raise VideoDecodeError(path, "corrupt_frame", _first_line(error), backend="decord") from None
    finally:
        # ends decoding ahead
        with suppress(*failures):
            reader.seek(0)


def _first_line(error: Exception) -> str:
    """The message of decord, without the time and the place in its source."""
    return re.sub(r"^\[\S+\] \S+:\d+: ", "", str(error).strip().partition("\n")[0])


def read_av(path: str, clip: ClipIndex, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    """Frames by their presentation times: one seek per group of pictures that holds any, then decoding up to the last.

    Where the packets do not prove that a seek gives what decoding in order gives, each frame is taken by its checksum,
    and the file is decoded from its start when one does not come out.

    Raises:
        VideoDecodeError: corrupt_frame, naming the frames that do not come out.
    """
    page = _Page(clip, wanted, size)
    if not clip.counted:
        with open_stream(path) as (container, stream):
            for start, rows in _runs(clip, wanted):
                is_complete = _take(container, stream, start, rows, page)
                # such a file is decoded from its start in any case, which also gives the frames of later runs
                if page.checked and not is_complete:
                    break
    if page.left:
        _take_in_order(path, page)
    return page.done(path)


def read_sequence(path: str, clip: ClipIndex, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    """Frames by decoding the file from its start: the slow way that the others must agree with.

    Raises:
        VideoDecodeError: corrupt_frame, naming the frames that do not come out.
    """
    page = _Page(clip, wanted, size)
    _take_in_order(path, page)
    return page.done(path)


_BACKENDS: dict[str, Backend] = {"decord": read_decord, "av": read_av}


class _Page:
    """The frames of one read as they come in, turned as presented. Bilinear, as decord scales.

    rows: frame -> its row of `wanted`. left: rows that are still missing. checked: frames are told apart by their
    checksums. ahead: see `ClipIndex`. first: the stamp of the clip's first frame.
    """

    def __init__(self, clip: ClipIndex, wanted: list[int], size: tuple[int, int] | None) -> None:
        height, width = size or (clip.height, clip.width)
        self.rows = {frame: row for row, frame in enumerate(wanted)}
        self.left = set(range(len(wanted)))
        self.ahead, self.first, self.checked = clip.ahead, int(clip.stamps[0]), clip.checksums is not None
        self._clip, self._wanted = clip, wanted
        self._pixels = np.empty((len(wanted), height, width, 3), np.uint8)
        self._unturned = clip.orientation.size(height, width)
        self._scale = av.video.reformatter.VideoReformatter()

    def put(self, row: int, frame: Any) -> None:
        """Take a frame for a row, unless it is another picture than decoding in order gives there."""
        if frame.is_corrupt:
            return
        if self._clip.checksums is not None:
            expected = int(self._clip.checksums[self._wanted[row]])
            if checksum(frame, self._clip.stored, self._scale) != expected:
                return
        # scaled as stored, then turned: turning is a view of the array
        height, width = self._unturned
        scaled = self._scale.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
        self._pixels[row] = self._clip.orientation.apply(scaled.to_ndarray())
        self.left.discard(row)

    def done(self, path: str) -> np.ndarray:
        """(n, H, W, 3) uint8, once all frames are there; VideoDecodeError otherwise."""
        if not self.left:
            return self._pixels
        missing = [str(self._wanted[row]) for row in sorted(self.left)]
        listed = ", ".join(missing[:5])
        if len(missing) > 5:
            listed += ", ..."
        detail = f"{len(missing)} of {len(self._wanted)} frames do not decode: {listed}"
        raise VideoDecodeError(path, "corrupt_frame", detail, backend="av")


def _runs(clip: ClipIndex, wanted: list[int]) -> Iterator[tuple[int, dict[int, int]]]:
    """(stamp of a key frame, {stamp: row} of the wanted frames up to the next key frame), both in order of time."""
    runs: dict[int, dict[int, int]] = {}
    for row, frame in enumerate(wanted):
        stamp = int(clip.stamps[frame])
        position = int(np.searchsorted(clip.keys, stamp, side="right")) - 1
        # a frame before all keys is sought by its own stamp
        key = int(clip.keys[position]) if position >= 0 else stamp
        runs.setdefault(key, {})[stamp] = row
    yield from runs.items()


def _take(container: Any, stream: Any, start: int, rows: dict[int, int], page: _Page) -> bool:
    """Put the frames whose stamps are in `rows` (stamp -> row), decoding from `start` to the last or the first error.

    A frame that the decoder patched up is an error, what follows may be drawn from it; not so before `start`, where
    the leading pictures of an open GOP lack what they refer to.

    Returns:
        True when all of them came out and the seek did not lead to the start of the file.
    """
    last_stamp = max(rows)
    is_from_start = False
    with suppress(av.FFmpegError):
        container.seek(start - page.ahead, stream=stream)
        for frame in decoded(container, stream):
            if frame.pts is None or frame.pts < start:
                is_from_start |= frame.pts == page.first
                continue
            if frame.is_corrupt:
                break
            if frame.pts in rows:
                page.put(rows[frame.pts], frame)
            if frame.pts >= last_stamp:
                break
    return not is_from_start and page.left.isdisjoint(rows.values())


def _take_in_order(path: str, page: _Page) -> None:
    """Put what is left, decoding from the start of the file.

    Damaged packets are passed over where checksums tell which of the frames behind them are sound.
    """
    failed: set[int] = set()
    with open_stream(path) as (container, stream):
        for i, (_, frame) in enumerate(in_order(container, stream, failed)):
            if not page.checked and (failed or frame.is_corrupt):
                return
            if page.rows.get(i) in page.left:
                page.put(page.rows[i], frame)
            if not page.left:
                return
