"""Decoding in a process that can be killed: a file on which a decoder hangs or dies costs its sample, not the run.

    worker = Worker(ClipShelf)
    answer, (starts,) = decode(worker, file, {"do": "info", "backend": "auto", "limits": {..}}, timeout_s=60)
    answer, frames = decode(worker, file, {"do": "read", "index": [0, 30], "size": (252, 448), ..}, timeout_s=60)

Requests and answers are plain dictionaries, arrays travel beside them. The worker imports numpy, PyAV and decord,
never torch and never the caller's script.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmrl.byte_cache import ByteCache
from mmrl.worker import Worker, WorkerError
from video.reading.clip import ReadLimits, VideoDecodeError

# of tables of frames that a worker keeps: a film of 2 h takes 6 MB
_INDEX_BYTES = 2**26

# absolute path, mtime in ns, bytes: a file that is overwritten is another one
File = tuple[str, int, int]
Answer = tuple[dict[str, Any], list[np.ndarray]]


def decode(worker: Worker, file: File, request: dict[str, Any], timeout_s: float) -> Answer:
    """The answer of a worker's `ClipShelf` to `request` about `file`.

    Args:
        timeout_s: limit of the answer, see `Worker.call`.

    Raises:
        VideoDecodeError: the file cannot be read, took longer than the limit, or ended the process.
        RuntimeError: the process does not start, or fails in a way that is not the file's fault.
    """
    backend = request["backend"]
    try:
        answer, arrays = worker.call(request | {"file": file}, timeout_s)
    except WorkerError as error:
        if error.kind == "error":
            raise RuntimeError(f"{file[0]}: the decoding process failed: {error}") from error
        if error.kind == "timeout":
            raise VideoDecodeError(file[0], "timeout", f"not done after {timeout_s:g} s", backend=backend) from None
        raise VideoDecodeError(file[0], "crash", str(error), backend=backend) from None
    if "reason" in answer:
        raise VideoDecodeError(file[0], answer["reason"], answer["detail"], backend=answer["backend"])
    return answer, arrays


class ClipShelf:
    """The clips of a worker: their tables of frames, and the decoder of each. Open files are never kept."""

    def __init__(self) -> None:
        # imported here, they are not on the clock of the first file
        import av
        import decord  # noqa: F401

        from video.reading import backends, clip_index

        # exceptions that the contents of a file can cause
        self._faults = (av.FFmpegError, ArithmeticError, LookupError, OSError, ValueError)
        self._index_clip, self._backends = clip_index.index_clip, backends
        self._clips = ByteCache(_INDEX_BYTES)

    def __call__(self, request: dict[str, Any]) -> Answer:
        """Information or frames, or the reason why there are none."""
        handle = self._info if request["do"] == "info" else self._read
        try:
            return handle(request)
        except VideoDecodeError as error:
            return {"reason": error.reason, "detail": error.detail, "backend": error.backend}, []
        except self._faults as error:
            detail = f"{type(error).__name__}: {error}"
            return {"reason": "corrupt_frame", "detail": detail, "backend": request["backend"]}, []

    def _info(self, request: dict[str, Any]) -> Answer:
        clip, backend, why = self._clip(request)
        answer = {
            "duration": clip.duration,
            "height": clip.height,
            "width": clip.width,
            "lost": clip.lost,
            "backend": backend,
            "why": why,
        }
        return answer, [clip.starts]

    def _read(self, request: dict[str, Any]) -> Answer:
        clip, backend, why = self._clip(request)
        path, size = request["file"][0], tuple(request["size"])
        try:
            pixels = self._backends.find(backend)(path, clip, request["index"], size)
        except VideoDecodeError as error:
            if request["backend"] != "auto" or backend == "av":
                raise
            # decord failed on these frames alone; PyAV reads the file from now on
            pixels = self._backends.read_av(path, clip, request["index"], size)
            backend, why = "av", error.detail
            self._keep(request, (clip, backend, why))
        return {"backend": backend, "why": why}, list(np.ascontiguousarray(pixels))

    def _clip(self, request: dict[str, Any]) -> tuple[Any, str, str]:
        """The table of a file, its decoder, and the reason why that is not decord."""
        entry: tuple[Any, str, str] | None = self._clips.get(self._key(request))
        if entry is None:
            entry = self._open(request)
            self._keep(request, entry)
        return entry

    def _keep(self, request: dict[str, Any], entry: tuple[Any, str, str]) -> None:
        clip = entry[0]
        num_bytes = clip.stamps.nbytes + clip.keys.nbytes + clip.starts.nbytes
        if clip.checksums is not None:
            num_bytes += clip.checksums.nbytes
        self._clips.put(self._key(request), entry, num_bytes)

    def _key(self, request: dict[str, Any]) -> tuple[Any, ...]:
        return *request["file"], request["backend"]

    def _open(self, request: dict[str, Any]) -> tuple[Any, str, str]:
        path, backend = request["file"][0], request["backend"]
        clip = self._index_clip(path, ReadLimits(**request["limits"]))
        if backend not in ("auto", "decord"):
            return clip, backend, ""
        problem = self._backends.decord_problem(path, clip)
        if problem is None:
            return clip, "decord", ""
        if backend == "decord":
            raise problem
        return clip, "av", problem.detail
