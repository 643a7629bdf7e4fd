"""Frames of video files, decoded in a process of their own and kept while they are asked for again."""

from __future__ import annotations

import logging
import operator
import os
import stat
import threading
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from mmrl.byte_cache import ByteCache
from mmrl.worker import Worker
from video.reading.clip import Frames, ReadLimits, Reason, VideoDecodeError, VideoInfo
from video.reading.worker import ClipShelf, File, decode

__all__ = ["Frames", "ReadLimits", "Reason", "VideoDecodeError", "VideoInfo", "VideoReader"]

log = logging.getLogger(__name__)

# of tables of frames kept: a film of 2 h takes 1.4 MB
_INFO_BYTES = 2**25
_READERS: weakref.WeakSet[VideoReader] = weakref.WeakSet()


class VideoReader:
    """Reads frames by their index, each as it would come in sequence, whatever the file.

    `reader.read("clip.mp4", range(0, reader.info("clip.mp4").frames, 10), size=(252, 448))` is a first view.

    Threads may share a reader, they wait for each other. A forked or unpickled copy starts a process and a cache of
    its own. Nothing runs before the first call.

    Args:
        cache_bytes: most bytes of decoded frames that are kept; 0 keeps none.
        timeout_s: seconds > 0 for one file's table or one read, waits for a free processor aside. Then the process is
            killed; the next call starts one.
        limits: what is refused.
        backend: `auto` is decord, and PyAV where decord fails or would give other frames than a player; `decord`
            refuses such files; `av`; or package.module:function, see `video.reading.backends`.

    Raises (all methods):
        VideoDecodeError: the file cannot be read, or is beyond a limit.
    """

    def __init__(
        self,
        *,
        cache_bytes: int = 2**29,
        timeout_s: float = 60.0,
        limits: ReadLimits = ReadLimits(),  # noqa: B008  # frozen
        backend: str = "auto",
    ) -> None:
        if timeout_s <= 0 or cache_bytes < 0:
            raise ValueError(f"timeout_s={timeout_s} must be above 0 and cache_bytes={cache_bytes} not below")
        if backend not in ("auto", "decord", "av") and ":" not in backend:
            raise ValueError(f"backend={backend!r}: choose auto, decord, av, or give package.module:function")
        # kept for a forked or unpickled copy, which begins anew with them
        self._options: dict[str, Any] = {
            "cache_bytes": cache_bytes,
            "timeout_s": timeout_s,
            "limits": limits,
            "backend": backend,
        }
        self._limits, self._backend = limits, backend
        self._renew()
        _READERS.add(self)

    def info(self, path: str | os.PathLike[str]) -> VideoInfo:
        """The clip's times, size and backend."""
        with self._lock:
            return self._info(_file(path))

    def read(self, path: str | os.PathLike[str], index: Sequence[int], size: tuple[int, int] | None = None) -> Frames:
        """The frames `index`, in that order, repeats included.

        Args:
            index: each in 0 <= i < frames.
            size: (height, width) in pixels, > 0; the frames are scaled to it, whatever their shape. Default: as
                presented.

        Raises:
            ValueError: an index is outside the clip, or a size is not positive.
        """
        with self._lock:
            # with time and size of the file: one that was written anew is another clip
            file = _file(path)
            info = self._info(file)
            numbers = _frame_numbers(index, info)
            height, width = map(operator.index, size or (info.height, info.width))
            self._check_bytes(info.path, len(numbers), height, width)
            frames = self._frames(file, info, sorted(set(numbers)), (height, width))
        pixels = np.empty((len(numbers), height, width, 3), np.uint8)
        for row, number in enumerate(numbers):
            pixels[row] = frames[number]
        int_index = np.array(numbers, np.int64)
        return Frames(pixels, int_index, info.starts[int_index])

    def close(self) -> None:
        """End the process and forget all frames. A later call starts anew."""
        with self._lock:
            self._worker.close()
            self._cache.clear()
            self._infos.clear()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        return partial(VideoReader, **self._options), ()

    def _renew(self) -> None:
        self._lock = threading.Lock()
        self._worker = Worker(ClipShelf)
        self._cache = ByteCache(self._options["cache_bytes"])
        self._infos = ByteCache(_INFO_BYTES)

    def _info(self, file: File) -> VideoInfo:
        info: VideoInfo | None = self._infos.get(file)
        if info is not None:
            return info
        answer, (starts,) = decode(self._worker, file, self._request("info"), self._options["timeout_s"])
        if answer["lost"]:
            log.warning("%s: %s; what is there is read by %s", file[0], answer["lost"], answer["backend"])
        elif answer["why"]:
            log.info("%s: read by PyAV because of %s", file[0], answer["why"])
        # the cached table is handed out, so nobody may write into it
        starts.setflags(write=False)
        info = VideoInfo(
            path=file[0],
            starts=starts,
            duration=answer["duration"],
            width=answer["width"],
            height=answer["height"],
            backend=answer["backend"],
            lost=answer["lost"],
        )
        self._infos.put(file, info, starts.nbytes)
        return info

    def _frames(self, file: File, info: VideoInfo, numbers: list[int], size: tuple[int, int]) -> dict[int, np.ndarray]:
        """Frame number -> (H, W, 3), from the cache or, all that are missing at once, from the worker."""
        frames = {number: self._cache.get((file, number, size)) for number in numbers}
        missing = [number for number, pixels in frames.items() if pixels is None]
        if not missing:
            return frames
        request = self._request("read", index=missing, size=size)
        answer, decoded = decode(self._worker, file, request, self._options["timeout_s"])
        # in the mode `auto` the worker changes to PyAV for good where decord fails on a frame
        if answer["backend"] != info.backend:
            log.warning("%s: read by PyAV from now on, decord failed: %s", info.path, answer["why"])
            self._infos.put(file, replace(info, backend=answer["backend"]), info.starts.nbytes)
        for number, pixels in zip(missing, decoded, strict=True):
            frames[number] = pixels
            self._cache.put((file, number, size), pixels, pixels.nbytes)
        return frames

    def _request(self, do: str, **more: Any) -> dict[str, Any]:
        return {"do": do, "backend": self._backend, "limits": asdict(self._limits)} | more

    def _check_bytes(self, path: str, count: int, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise ValueError(f"{path}: size=({height}, {width}) must be positive")
        num_bytes, limits = max(count, 1) * height * width * 3, self._limits
        if height * width > limits.max_pixels or num_bytes > limits.max_read_bytes:
            detail = f"{count} frames of {height} x {width} are {num_bytes} bytes; max_pixels={limits.max_pixels}, "
            raise VideoDecodeError(path, "too_large", detail + f"max_read_bytes={limits.max_read_bytes}")


def _file(path: str | os.PathLike[str]) -> File:
    """The key of a file in all caches; VideoDecodeError where there is none to read."""
    path = os.path.abspath(os.fspath(path))
    try:
        status = os.stat(path)
    except OSError as error:
        raise VideoDecodeError(path, "missing", error.strerror or str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise VideoDecodeError(path, "missing", f"it is {kind}")
    if not status.st_size:
        raise VideoDecodeError(path, "empty", "it has 0 bytes")
    return path, status.st_mtime_ns, status.st_size


def _frame_numbers(index: Sequence[int], info: VideoInfo) -> list[int]:
    # a float is a TypeError, not a frame nearby
    numbers = list(map(operator.index, index))
    for number in numbers:
        if not 0 <= number < info.frames:
            raise ValueError(f"{info.path}: no frame {number}, valid are 0 to {info.frames - 1}")
    return numbers


def _renew_all() -> None:
    for reader in list(_READERS):
        reader._renew()


# the worker, and perhaps a held lock, belong to the parent
os.register_at_fork(after_in_child=_renew_all)
