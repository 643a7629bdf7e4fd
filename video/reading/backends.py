"""Frames out of files: decord where its frame counter is right, PyAV everywhere else.

A backend is a function (path, clip, wanted, size) -> (n, H, W, 3) uint8; `wanted` is sorted without repeats. Times and
the number of frames come from `ClipIndex` whoever decodes, so that a clip has one clock.

decord 0.6 is quick and steady on ordinary files, but it counts packets. Where these are not what a player shows it
gives other frames at random than in sequence: edit lists, open GOPs (the x265 default), intra refresh, containers that
keep no exact places; and it ignores the rotation of Matroska. `decord_problem` asks the packets, and compares pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from itertools import groupby
from typing import Any

import av
import numpy as np

from video.reading.clip import VideoDecodeError
from video.reading.clip_index import ClipIndex, checksum, decoded, in_order, open_stream

Backend = Callable[[str, ClipIndex, list[int], tuple[int, int] | None], np.ndarray]

_ALIKE = 1.0  # mean difference of two decoders on one frame, of 255; 0.0 is usual


def find(name: str) -> Backend:
    """The backend `decord`, `av`, or the one at a dotted path package.module:function."""
    if name in _KNOWN:
        return _KNOWN[name]
    module, _, function = name.partition(":")
    backend: Backend = getattr(import_module(module), function)
    return backend


def decord_problem(path: str, clip: ClipIndex) -> VideoDecodeError | None:
    """Why decord must not be used for this file, or nothing."""
    if clip.odd or clip.lost:
        return _untrusted(path, clip.odd or clip.lost)
    # past the last key frame decord must seek: a counter that runs ahead or behind shows there
    key = int(np.searchsorted(clip.stamps, clip.keys[-1])) if len(clip.keys) else 0
    probes = sorted({0, min(key, len(clip.stamps) - 1)})
    try:
        seen, expected = read_decord(path, clip, probes, None), read_av(path, clip, probes, None)
    except VideoDecodeError as error:
        return error
    if seen.shape != expected.shape:
        return _untrusted(path, f"it gives frames of {seen.shape[1]} x {seen.shape[2]}")
    gap = np.abs(seen.astype(np.int16) - expected).mean(axis=(1, 2, 3))
    if (gap > _ALIKE).any():
        return _untrusted(path, f"it gives another picture at frame {probes[int(gap.argmax())]}")
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
        with suppress(*failures):
            reader.seek(0)  # ends decoding ahead


def _first_line(error: Exception) -> str:
    """What decord says, without the time and the place in its source."""
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
                if not _take(container, stream, start, rows, page) and page.checked:
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


_KNOWN: dict[str, Backend] = {"decord": read_decord, "av": read_av}


class _Page:
    """The frames of one read as they come in, turned as presented. Bilinear, as decord scales.

    rows: frame -> its row of `wanted`. left: rows that are still missing. checked: whether frames are told apart by
    their checksums. first: the stamp of the clip's first frame.
    """

    def __init__(self, clip: ClipIndex, wanted: list[int], size: tuple[int, int] | None) -> None:
        height, width = size or (clip.height, clip.width)
        self.rows = {i: row for row, i in enumerate(wanted)}
        self.left = set(range(len(wanted)))
        self.ahead, self.first, self.checked = clip.ahead, int(clip.stamps[0]), clip.checksums is not None
        self._clip, self._wanted = clip, wanted
        self._pixels = np.empty((len(wanted), height, width, 3), np.uint8)
        self._unturned = clip.orientation.size(height, width)
        self._scale = av.video.reformatter.VideoReformatter()

    def put(self, row: int, frame: Any) -> None:
        """Take a frame for a row, unless it is another picture than decoding in order gives there."""
        due = None if self._clip.checksums is None else int(self._clip.checksums[self._wanted[row]])
        if frame.is_corrupt or due not in (None, checksum(frame, self._clip.stored, self._scale)):
            return
        height, width = self._unturned
        scaled = self._scale.reformat(frame, width, height, "rgb24", interpolation="BILINEAR")
        self._pixels[row] = self._clip.orientation.apply(scaled.to_ndarray())
        self.left.discard(row)

    def done(self, path: str) -> np.ndarray:
        if self.left:
            missing = [self._wanted[row] for row in sorted(self.left)]
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            detail = f"{len(missing)} of {len(self._wanted)} frames do not decode: {shown}"
            raise VideoDecodeError(path, "corrupt_frame", detail, backend="av")
        return self._pixels


def _runs(clip: ClipIndex, wanted: list[int]) -> Iterator[tuple[int, dict[int, int]]]:
    """(key frame, {stamp: row} of what is wanted from there on up to the next key frame), both in order of time."""
    rows = {int(clip.stamps[i]): row for row, i in enumerate(wanted)}

    def key_of(stamp: int) -> int:
        before = int(np.searchsorted(clip.keys, stamp, side="right")) - 1
        return int(clip.keys[before]) if before >= 0 else stamp

    for key, stamps in groupby(rows, key_of):
        yield key, {stamp: rows[stamp] for stamp in stamps}


def _take(container: Any, stream: Any, start: int, rows: dict[int, int], page: _Page) -> bool:
    """Put the frames whose stamps are in `rows` (stamp -> row), decoding from `start` to the last or the first error.

    A frame that the decoder patched up is an error, what follows may be drawn from it; not so before `start`, where
    the leading pictures of an open GOP lack what they refer to.

    Returns:
        Whether all of them came out, and the seek did not lead to the start of the file.
    """
    last, is_from_start = max(rows), False
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
            if frame.pts >= last:
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
