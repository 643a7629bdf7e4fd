"""Foreign code in a process that can be killed: a reward that hangs or dies costs its sample, not the run.

The worker is a fresh interpreter, not a fork and not a re-import of the caller's script. It has the parent's sys.path
and one OpenMP thread, gets pickles and answers in JSON. It imports torch only where its function or its batch does, so
one that checks texts starts in a quarter of a second. It leaves with its parent: an idle one sees the closed socket, a
busy one looks for its parent twice a second, and one that is stuck inside C code is ended by a kernel timer.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from mmrl.registry import ComponentError, build

if TYPE_CHECKING:
    from mmrl.rollout import OutcomeReward, Sample

log = logging.getLogger(__name__)

Target = Callable[[Sequence[Any]], Sequence[Any]]

START_S = 600.0  # importing torch takes seconds, loading a reward model minutes
_MARGIN_S = 10.0  # a stuck worker whose parent is gone outlives its time limit by this much
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmrl.rewards.isolation import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerError(RuntimeError):
    """A call gave no values. kind: `timeout` and `crash` cost the process; after `error`, an exception, it lives."""

    def __init__(self, kind: str, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.kind, self.trace = kind, trace


class WorkerStartError(RuntimeError):
    """The process could not be started, or its function could not be made there."""


class Worker:
    """A persistent process around one function of a batch; started when needed, killed when it does not answer.

    Args:
        factory: picklable; called once in the process, returns the function batch -> sequence of numbers or None.

    Not for several threads at once. A worker that a fork inherited is left to its owner and a new one is started.

    Raises:
        ValueError: the factory cannot be pickled.
    """

    def __init__(self, factory: Callable[[], Target]) -> None:
        try:
            self._factory = _dumps(factory)
        except Exception as error:
            raise ValueError(
                f"{factory} cannot be sent to a worker process ({error}); use an object at the top level of a module, "
                "or its dotted path package.module:object"
            ) from error
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Process id of the running worker."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Make sure that the process runs and holds the function.

        Raises:
            ComponentError: the function's name or options are wrong.
            WorkerStartError: it could not be made, or not within ten minutes.
        """
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.close()
        ours, theirs = socket.socketpair()
        path, me = json.dumps([str(p) for p in sys.path]), os.getpid()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, path, str(theirs.fileno()), str(me)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints must not mix with the output of the command
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is the parent's to handle; a kill reaches the reward's own children
            )
        self._socket, self._owner, self.starts = ours, me, self.starts + 1
        self._end = weakref.finalize(self, _kill, self._process, ours, me)  # runs at exit too
        try:
            self._exchange(self._factory, START_S)
        except WorkerError as error:
            self.close()
            kind, _, text = str(error).partition(": ")
            if kind == "ComponentError":
                raise ComponentError(text) from None
            raise WorkerStartError(f"the reward worker did not start: {error}\n{error.trace}".rstrip()) from None

    def call(self, batch: Sequence[Any], timeout_s: float, cpu_s: float | None = None) -> list[Any]:
        """The function's answer for `batch`: floats, None, and the repr of whatever is no number.

        Args:
            timeout_s: seconds for the answer. Sending the batch, for which the process may import torch, is not
                counted.
            cpu_s: seconds of CPU time for it. Unlike those of the clock they do not depend on what else the machine
                does; a function that waits uses none.

        Raises:
            WorkerError: the function raised or answered with no sequence (`error`), gave no answer within its time
                (`timeout`), or ended its process (`crash`).
            ComponentError, WorkerStartError: see `start`.
        """
        self.load(batch)
        return self.answer(timeout_s, cpu_s)

    def load(self, batch: Sequence[Any]) -> None:
        """First half of `call`: send the batch."""
        self.start()
        self._exchange(_dumps(("batch", list(batch))), START_S)

    def answer(self, timeout_s: float, cpu_s: float | None = None) -> list[Any]:
        """Second half of `call`: the answer for the batch that was sent."""
        return list(self._exchange(_dumps(("limits", (timeout_s, cpu_s))), timeout_s, cpu_s))

    def close(self) -> int | None:
        """Kill the process and what it started; returns its exit status. The next call starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return None
        self._end()
        return process.returncode

    def _exchange(self, request: bytes, timeout_s: float, cpu_s: float | None = None) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            _send(self._socket, request, deadline)
            answer = json.loads(_receive(self._socket, deadline))
        except TimeoutError:
            self.close()
            raise WorkerError("timeout", f"no answer within {timeout_s:g} s") from None
        except (EOFError, OSError):
            status = self.close()
            if cpu_s is not None and status == -signal.SIGPROF:
                raise WorkerError("timeout", f"no answer within {cpu_s:g} s of CPU time") from None
            raise WorkerError("crash", f"the worker process {_ending(status)}") from None
        except BaseException:  # Ctrl-C: an answer is still on its way, the pipe is of no more use
            self.close()
            raise
        if "error" in answer:
            raise WorkerError("error", answer["error"], answer["trace"])
        return answer["values"]


class Isolated:
    """An outcome reward that runs in a worker process.

    A batch has `timeout_s` seconds. When it takes longer, crashes its process or raises, it is halved and each half
    tried again with the same limit, down to single samples: one that still fails is None, the others keep their
    scores. One bad sample among n costs ceil(log2 n) + 1 failed tries (7 time-outs for 64). With many bad samples a
    call begins no further try once it has spent 2 (ceil(log2 n) + 1) limits, restarts aside, where a lost process
    counts as a full limit; what has no score by then is None as well.

    Tensors arrive as CPU copies. A reward with a model on a GPU holds its own CUDA context here: to share the
    trainer's, run it in process.

    Args:
        reward: registered name or dotted path, built from `options` in the worker; or a picklable reward.
        timeout_s: seconds > 0 for one batch. Building the reward is not counted.
        section: where the recipe names it, for messages.

    Attributes:
        failures: samples left without a score so far, by `timeout`, `crash`, `error` and `skipped` (not tried).
        last_error: message of the newest failed try of the last call, None when all went well.

    Raises:
        ComponentError, WorkerStartError: the reward cannot be made.
    """

    def __init__(
        self,
        reward: str | OutcomeReward,
        options: Mapping[str, Any] | None = None,
        timeout_s: float = 60.0,
        *,
        section: str = "rewards",
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"{section}: timeout_s={timeout_s} must be above 0")
        self.name = reward if isinstance(reward, str) else getattr(reward, "__name__", type(reward).__name__)
        self.timeout_s = timeout_s
        self.failures: Counter[str] = Counter()
        self.last_error: str | None = None
        self._worker = Worker(partial(_make_reward, reward, dict(options or {}), section))
        self._worker.start()

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reward failed.

        Raises:
            RewardError: the reward returned another number of values than it got samples.
            WorkerStartError: the process cannot be started again.
        """
        self.last_error = None
        values: list[float | None] = [None] * len(samples)
        failed: dict[int, str] = {}
        parts = [(0, len(samples))] if samples else []
        limits_left: float = 2 * (1 + math.ceil(math.log2(max(len(samples), 1))))
        while parts:
            start, stop = parts.pop()
            if limits_left <= 0:
                failed |= dict.fromkeys(range(start, stop), "skipped")
                continue
            self._worker.start()
            began = time.monotonic()
            try:
                self._worker.load(samples[start:stop])
                began = time.monotonic()
                values[start:stop] = self._answer(stop - start)
                limits_left -= (time.monotonic() - began) / self.timeout_s
            except WorkerError as error:
                limits_left -= (time.monotonic() - began) / self.timeout_s if error.kind == "error" else 1
                self._note(error, stop - start)
                if stop - start == 1:
                    failed[start] = error.kind
                else:
                    middle = (start + stop) // 2
                    parts += [(middle, stop), (start, middle)]
        self._report(samples, failed)
        return values

    def close(self) -> None:
        """End the process; it also ends by itself with this object and with the program."""
        self._worker.close()

    def _answer(self, size: int) -> list[Any]:
        values = self._worker.answer(self.timeout_s)
        if len(values) != size:
            from mmrl.rewards.scoring import RewardError, wrong_count

            raise RewardError(wrong_count(self.name, len(values), size))
        return values

    def _note(self, error: WorkerError, size: int) -> None:
        if error.trace and self.last_error is None:
            log.error("reward %r raised on %d samples:\n%s", self.name, size, error.trace)
        self.last_error = str(error)

    def _report(self, samples: Sequence[Sample], failed: Mapping[int, str]) -> None:
        if not failed:
            return
        self.failures.update(failed.values())
        shown = ", ".join(f"{samples[i].prompt.id!r} ({kind})" for i, kind in list(failed.items())[:5])
        log.warning(
            "reward %r left %d of %d samples unscored: %s%s; last failure: %s",
            self.name, len(failed), len(samples), shown, ", ..." if len(failed) > 5 else "", self.last_error,
        )  # fmt: skip


# ---- in the worker process ------------------------------------------------------------------------------------------


def serve(fd: int, parent: int) -> None:
    """Main function of a worker: the first message makes the function, then come batches, each with its limits."""
    connection = socket.socket(fileno=fd)
    connection.set_inheritable(False)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    target: Any = None
    batch: list[Any] = []

    def make(request: bytes) -> list[Any]:
        nonlocal target
        target = pickle.loads(request)()
        return []

    def work(request: bytes) -> list[Any]:
        nonlocal batch
        kind, content = pickle.loads(request)
        if kind == "batch":
            batch = content
            return []
        limit, cpu_limit = content
        signal.setitimer(signal.ITIMER_REAL, limit + _MARGIN_S)
        signal.setitimer(signal.ITIMER_PROF, cpu_limit or 0)
        try:
            return [_number(v) for v in as_values(target(batch))]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)

    try:
        _send(connection, _answer(make, _receive(connection)))
        while True:
            _send(connection, _answer(work, _receive(connection)))
    except (EOFError, OSError):
        os._exit(0)  # the parent closed; threads that the reward left behind must not keep the process


def _answer(handle: Callable[[bytes], list[Any]], request: bytes) -> bytes:
    try:
        answer: dict[str, Any] = {"values": handle(request)}
    except (Exception, SystemExit) as error:
        answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
    return json.dumps(answer).encode()


def as_values(answer: Any) -> list[Any]:
    """The values of a reward's answer, which is a list, a tuple, an array or a tensor.

    Raises:
        TypeError: anything else; a dict would be read by its keys, a text by its characters.
    """
    if isinstance(answer, (list, tuple)) or hasattr(answer, "tolist"):
        return list(answer)
    raise TypeError(
        f"it returned a {type(answer).__name__}, {str(answer)[:80]}; return a list, tuple, array or tensor with one "
        "value per sample"
    )


def _number(value: Any) -> float | str | None:
    if value is None:
        return None
    try:
        return repr(value)[:200] if isinstance(value, (str, bytes)) else float(value)
    except Exception:
        return repr(value)[:200]  # the caller names the sample


def _make_reward(reward: Any, options: Mapping[str, Any], section: str) -> Any:
    return build("rewards", section, reward, options) if isinstance(reward, str) else reward


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


# ---- messages -------------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """A slice of a batch would take its whole storage along, a GPU tensor its device: both travel as CPU copies."""

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(value) is not torch.Tensor:
            return NotImplemented
        whole = value.untyped_storage().nbytes() == value.nbytes
        if whole and value.device.type == "cpu" and not value.requires_grad:
            return NotImplemented
        return value.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _send(connection: socket.socket, message: bytes, deadline: float | None = None) -> None:
    connection.settimeout(_left(deadline))
    connection.sendall(struct.pack("!Q", len(message)) + message)


def _receive(connection: socket.socket, deadline: float | None = None) -> bytes:
    (size,) = struct.unpack("!Q", _read(connection, 8, deadline))
    return _read(connection, size, deadline)


def _read(connection: socket.socket, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        connection.settimeout(_left(deadline))
        part = connection.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


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
