"""Decoding in a process that can be killed: a file on which a decoder hangs or dies costs its sample, not the run.

The worker is a fresh interpreter that imports numpy, PyAV and decord, never torch and never the caller's script.
Requests and answers are JSON, arrays follow as raw bytes. It leaves with its parent: an idle one sees the closed
socket or, where a fork holds a copy of it, misses its parent within half a second; one that is stuck inside C code is
ended by a kernel timer.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from mmrl.byte_cache import ByteCache
from video.clip import ReadLimits, VideoDecodeError

_START_S = 120.0
_MARGIN_S = 10.0  # a stuck worker whose parent is gone outlives its time limit by this much
_INDEX_BYTES = 2**26  # tables of frames that a worker remembers: a film of 2 h takes 6 MB
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from video.worker import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)

File = tuple[str, int, int]  # absolute path, mtime in ns, bytes: a file that is overwritten is another one
Answer = tuple[dict[str, Any], list[np.ndarray]]


class DecodeWorker:
    """The decoding process, started when needed and killed when it does not answer within `timeout_s` seconds.

    Not for several threads at once, nor for a fork of the process that made it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the running worker."""
        return self._process.pid if self._process is not None else None

    def call(self, file: File, request: dict[str, Any]) -> Answer:
        """What `_Shelf` answers to `request` about `file`.

        Raises:
            VideoDecodeError: the file cannot be read, took longer than the limit, or ended the process.
            RuntimeError: the process does not start, or fails in a way that is not the file's fault.
        """
        self._start()
        message = json.dumps(request | {"file": file, "timeout_s": self._timeout_s}).encode()
        backend = request["backend"]
        try:
            answer, arrays = self._exchange(message, self._timeout_s)
        except TimeoutError:
            self.close()
            detail = f"not done after {self._timeout_s:g} s"
            raise VideoDecodeError(file[0], "timeout", detail, backend=backend) from None
        except (EOFError, OSError):
            detail = f"the decoding process {_ending(self.close())}"
            raise VideoDecodeError(file[0], "crash", detail, backend=backend) from None
        if "reason" in answer:
            raise VideoDecodeError(file[0], answer["reason"], answer["detail"], backend=answer["backend"])
        if "failure" in answer:
            raise RuntimeError(f"{file[0]}: the decoding process failed: {answer['failure']}")
        return answer, arrays

    def close(self) -> int | None:
        """Kill the process; returns its exit status. The next call starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._end()
        return process.returncode

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        path, me = json.dumps([str(p) for p in sys.path]), os.getpid()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, path, str(theirs.fileno()), str(me)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a decoder prints must not mix with the output of the command
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
        self._socket, self.starts = ours, self.starts + 1
        self._end = weakref.finalize(self, _kill, self._process, ours, me)  # runs at exit too
        try:
            self._exchange(None, _START_S)
        except (TimeoutError, EOFError, OSError):
            raise RuntimeError(f"the decoding process {_ending(self.close())} before it was ready") from None

    def _exchange(self, message: bytes | None, timeout_s: float) -> Answer:
        deadline = time.monotonic() + timeout_s
        try:
            if message is not None:
                _send(self._socket, message, deadline)
            header = json.loads(_receive(self._socket, deadline))
            shapes = header.pop("arrays", [])
            return header, [_receive_array(self._socket, deadline, dtype, shape) for dtype, shape in shapes]
        except (EOFError, OSError):  # a TimeoutError too
            raise
        except BaseException:  # Ctrl-C, no memory: an answer is still on its way, the socket is of no more use
            self.close()
            raise


# ---- in the worker process ------------------------------------------------------------------------------------------


def serve(fd: int, parent: int) -> None:
    """Main function of a worker: answer requests until the socket closes."""
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    shelf = _Shelf()
    try:
        _send(connection, b"{}")
        while True:
            request = json.loads(_receive(connection))
            signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + _MARGIN_S)
            header, arrays = _answered(shelf, request)
            header["arrays"] = [(a.dtype.str, a.shape) for a in arrays]
            _send(connection, json.dumps(header).encode())
            for array in arrays:
                connection.sendall(array.data.cast("B"))
            del arrays  # or the pixels stay until the next request
            signal.setitimer(signal.ITIMER_REAL, 0)
    except (EOFError, OSError):
        os._exit(0)  # threads that a decoder left behind must not keep the process


def _answered(shelf: _Shelf, request: dict[str, Any]) -> Answer:
    handle = shelf.info if request["do"] == "info" else shelf.read
    try:
        return handle(request)
    except VideoDecodeError as error:
        return {"reason": error.reason, "detail": error.detail, "backend": error.backend}, []
    except shelf.faults as error:
        detail = f"{type(error).__name__}: {error}"
        return {"reason": "corrupt_frame", "detail": detail, "backend": request["backend"]}, []
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}"}, []


class _Shelf:
    """The clips that a worker knows: their tables of frames, and who decodes them. Readers are never kept.

    faults: exceptions that the contents of a file can cause.
    """

    def __init__(self) -> None:
        import av
        import decord  # noqa: F401  # imported here, it is not on the clock of the first file

        from video import backends, clip_index

        self.faults = (av.FFmpegError, ArithmeticError, LookupError, OSError, ValueError)
        self._index_clip, self._backends = clip_index.index_clip, backends
        self._clips = ByteCache(_INDEX_BYTES)

    def info(self, request: dict[str, Any]) -> Answer:
        clip, backend, why = self._clip(request)
        shown = {k: getattr(clip, k) for k in ("duration", "height", "width", "lost")}
        return shown | {"backend": backend, "why": why}, [clip.starts]

    def read(self, request: dict[str, Any]) -> Answer:
        clip, backend, why = self._clip(request)
        path, size = request["file"][0], tuple(request["size"])
        try:
            pixels = self._backends.find(backend)(path, clip, request["index"], size)
        except VideoDecodeError as error:
            if request["backend"] != "auto" or backend == "av":
                raise
            pixels, backend, why = self._backends.read_av(path, clip, request["index"], size), "av", error.detail
            self._remember(request, (clip, backend, why))
        return {"backend": backend, "why": why}, list(np.ascontiguousarray(pixels))

    def _clip(self, request: dict[str, Any]) -> tuple[Any, str, str]:
        known: tuple[Any, str, str] | None = self._clips.get(self._key(request))
        if known is None:
            known = self._opened(request)
            self._remember(request, known)
        return known

    def _remember(self, request: dict[str, Any], opened: tuple[Any, str, str]) -> None:
        clip = opened[0]
        tables = (clip.stamps, clip.keys, clip.starts, clip.checksums)
        self._clips.put(self._key(request), opened, sum(t.nbytes for t in tables if t is not None))

    def _key(self, request: dict[str, Any]) -> tuple[Any, ...]:
        return *request["file"], request["backend"]

    def _opened(self, request: dict[str, Any]) -> tuple[Any, str, str]:
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


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ---- messages -------------------------------------------------------------------------------------------------------


def _send(connection: socket.socket, message: bytes, deadline: float | None = None) -> None:
    connection.settimeout(_left(deadline))
    connection.sendall(struct.pack("!Q", len(message)) + message)


def _receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    (size,) = struct.unpack("!Q", _fill(connection, bytearray(8), deadline))
    return bytes(_fill(connection, bytearray(size), deadline))


def _receive_array(connection: socket.socket, deadline: float, dtype: str, shape: Sequence[int]) -> np.ndarray:
    array = np.empty(tuple(shape), dtype)
    _fill(connection, array.data.cast("B"), deadline)
    return array


def _fill(connection: socket.socket, buffer: Any, deadline: float | None) -> Any:
    view, done = memoryview(buffer), 0
    while done < len(view):
        connection.settimeout(_left(deadline))
        part = connection.recv_into(view[done:])
        if not part:
            raise EOFError
        done += part
    return buffer


def _left(deadline: float | None) -> float | None:
    if deadline is None:
        return None
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _kill(process: subprocess.Popen[bytes], connection: socket.socket, owner: int) -> None:
    connection.close()
    if os.getpid() != owner:  # a forked copy of the owner must not end the owner's worker
        return
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"
