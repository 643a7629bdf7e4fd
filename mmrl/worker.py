"""Foreign code in a process that can be killed: what hangs, dies or leaks there costs one call, not the run.

Three processes stand behind a `Worker`, each the parent of the next:

- the keeper, a bare interpreter that runs nothing foreign. Orphans below it become its children (a subreaper,
  prctl(2)), so it can end all that a worker started, daemons included. It does so when it is told to, and when the
  program is gone.
- the builder imports what the function needs and builds it, once.
- the worker, a fork of the builder, answers. When it is lost the next one is forked within milliseconds.

A builder that holds threads, children or open descriptors of its own (a GPU's context has them) cannot be forked
soundly: it answers itself, and is built anew once it is lost.

The keeper is neither a fork of the program nor a re-import of its script. It has the program's sys.path and one OpenMP
thread. Requests are pickles of the program's own, answers are JSON and raw arrays. When memory runs out the kernel
ends a worker before the program (oom_score_adj), unless the machine or container ends all its processes at once. Out
of reach are children that changed their user, and what other services started (containers, systemd, batch jobs).

Linux only; no module outside the standard library is imported before the function is built.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import io
import json
import logging
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

# A request -> a JSON value and arrays.
Target = Callable[[Any], "tuple[Any, Sequence[np.ndarray]]"]

# Limit of starting a worker: importing torch takes seconds, loading a reward model minutes.
START_S = 600.0
# However busy the machine is, a call ends after this many times its limit on the clock.
_CLOCK_FACTOR = 20.0
# Limit of ending processes, which takes milliseconds unless a device holds one.
_END_S = 10.0
# Time between two checks that the other process is alive.
_POLL_S = 0.5
# Share of the machine's memory by which a worker may grow.
_GROWTH = 1 / 8
# Constants of linux/prctl.h.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The program of the keeper; its arguments are sys.path, the descriptor of its socket, and the parent's process id.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from mmrl.worker import keep; keep(int(sys.argv[2]), int(sys.argv[3]))"
)


class WorkerError(RuntimeError):
    """A call gave no answer.

    kind: `timeout` and `crash` cost the process; after `error`, an exception of the class named `type`, it lives on.
    """

    def __init__(self, kind: str, message: str, trace: str = "", type: str = "") -> None:
        super().__init__(message)
        self.kind, self.trace, self.type = kind, trace, type


class WorkerStartError(RuntimeError):
    """The process could not be started, or its function could not be built there."""


class Worker:
    """A persistent process around one function; started when needed, replaced when it does not answer.

    Args:
        factory: picklable; called once in the process, returns a function: request -> (JSON value, arrays).
        max_growth: bytes by which the worker may have grown since its first answer; one that leaks more is replaced
            between two calls. Default an eighth of the machine's memory.

    Not for several threads at once. A worker that a fork inherited is left to its owner and a new one is started.

    Attributes:
        pid: process id of the running worker, else None.
        starts: workers started so far.
        builds: number of times that the function was built; all other workers were forked from one that held it.
        seconds: time of the last answer, see `call`.

    Raises:
        ValueError: the factory cannot be pickled.
    """

    def __init__(self, factory: Callable[[], Target], max_growth: float | None = None) -> None:
        try:
            self._factory = dumps(factory)
        except Exception as error:
            raise ValueError(
                f"{factory} cannot be sent to a worker process ({error}); use an object at the top level of a module, "
                "or its dotted path package.module:object"
            ) from error
        self._max_growth = max_growth or _GROWTH * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._keeper: subprocess.Popen[bytes] | None = None
        # The socket to the worker, which is set while there is a pid.
        self._data: socket.socket
        self._owner = 0
        self._is_fork = False
        self._first_size: int | None = None
        # Modules that workers imported, in order. A builder imports them before the next fork, so that torch is loaded
        # once rather than in every worker.
        self._modules: dict[str, None] = {}
        self.pid: int | None = None
        self.starts = self.builds = 0
        self.seconds = 0.0

    def start(self) -> None:
        """Make sure that a worker runs and holds the function.

        Raises:
            WorkerStartError: it could not be built, or not within ten minutes. Its cause is the `WorkerError`.
        """
        if self._owner != os.getpid():
            self.close()
        if self.pid is not None:
            if not _is_readable(self._data, 0):
                return
            # An idle worker sends nothing, so a readable socket is one that was closed.
            self._end_worker()
        if self._keeper is None or self._keeper.poll() is not None:
            self.close()
            self._start_keeper()
        self._data, theirs = socket.socketpair()
        limit = _Limit(START_S)
        try:
            with theirs:
                _tell(self._control, "start", fd=theirs.fileno())
            _send(self._data, self._factory, limit)
            _send(self._data, json.dumps(list(self._modules)).encode(), limit)
            ready, _ = self._receive(limit)
            _tell(self._control, "watch", pid=ready["pid"])
        except (OSError, WorkerError) as error:
            self.close()
            trace = error.trace if isinstance(error, WorkerError) else ""
            raise WorkerStartError(f"the worker process did not start: {error}\n{trace}".rstrip()) from error
        self.pid, self._is_fork, self._first_size = ready["pid"], ready["is_fork"], None
        self.starts += 1
        self.builds += ready["built"]

    def call(self, request: Any, seconds: float) -> tuple[Any, list[np.ndarray]]:
        """The function's answer to `request`.

        Args:
            seconds: limit of the answer. Sending the request, for which the process may import torch, does not count,
                nor does the time in which the worker waits for a free processor: what else the machine does decides
                nothing, unless the answer takes twenty times the limit on the clock.

        Raises:
            WorkerError: the function raised (`error`), gave no answer in time (`timeout`), or ended its process
                (`crash`).
            WorkerStartError: see `start`.
        """
        self.start()
        limit = _Limit(START_S)
        try:
            _send(self._data, dumps(request), limit)
        except OSError as error:
            self._raise_lost(limit, error)
        # The worker tells when it has the request and begins; only from here on the limit counts.
        self._receive(limit)
        limit = _Limit(seconds, self.pid)
        header: dict[str, Any] = {}
        try:
            header, arrays = self._receive(limit)
        finally:
            self.seconds = limit.spent()
        self._first_size = self._first_size or header["size"]
        if header["size"] > self._first_size + self._max_growth:
            log.warning("a worker grew to %d MiB and is replaced", header["size"] >> 20)
            self._end_worker()
        return header["value"], arrays

    def close(self) -> None:
        """End the processes, with all processes that they started. The next call starts new ones."""
        if self._keeper is not None:
            self._end()
        self._keeper = self.pid = None

    def _start_keeper(self) -> None:
        # Packets: a message arrives whole, with its descriptor.
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        me = os.getpid()
        with theirs:
            self._keeper = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps([str(p) for p in sys.path]), str(theirs.fileno()), str(me)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Foreign code prints to stderr, so that it does not mix with the output of the command.
                stdout=2,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                # In a session of its own Ctrl-C does not reach it: the program handles that.
                start_new_session=True,
            )
        self._owner = me
        # Called when this object is collected, and at exit.
        self._end = weakref.finalize(self, _end_keeper, self._keeper, self._control, me)

    def _receive(self, limit: _Limit) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            header = json.loads(_receive(self._data, limit))
            arrays = [_receive_array(self._data, limit, *shape) for shape in header.get("arrays", ())]
        except (EOFError, OSError) as error:
            self._raise_lost(limit, error)
        except BaseException:
            # Ctrl-C: the answer is still on its way, and the next one could not be told from it.
            self.close()
            raise
        self._modules |= dict.fromkeys(header.get("modules", ()))
        if "error" in header:
            raise WorkerError("error", header["error"], header["trace"], header["type"])
        return header, arrays

    def _raise_lost(self, limit: _Limit, error: Exception) -> NoReturn:
        status = self._end_worker()
        if isinstance(error, TimeoutError):
            raise WorkerError("timeout", f"no answer within {limit.seconds:g} s") from None
        raise WorkerError("crash", f"the worker process {_ending(status)}") from None

    def _end_worker(self) -> int | None:
        """End the worker with all that it started, keep its builder; returns its exit status where it is known."""
        self._data.close()
        try:
            _tell(self._control, "end", keep_builder=self.pid is not None and self._is_fork)
            self._control.settimeout(_END_S + 1)
            status = json.loads(self._control.recv(1 << 10))["status"]
        except (OSError, ValueError):
            # The keeper is gone.
            self.close()
            return None
        self.pid = None
        return status


class _Limit:
    """Seconds that may pass; those in which process `pid` waits for a processor are granted once more."""

    def __init__(self, seconds: float, pid: int | None = None) -> None:
        self.seconds = seconds
        self._pid = pid
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._queued = _queued_s(pid)

    def left(self) -> float:
        """Seconds until it is worth asking again.

        Raises:
            TimeoutError: they are over.
        """
        left = self._end - time.monotonic()
        if left <= 0 and self._pid is not None:
            granted = min(self._waited(), (_CLOCK_FACTOR - 1) * self.seconds)
            self._end = self._began + self.seconds + granted
            left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return max(left, 0.005)

    def has_ended(self) -> bool:
        """True when the process is gone."""
        return self._pid is not None and not os.path.exists(f"/proc/{self._pid}")

    def spent(self) -> float:
        """Seconds since the beginning, without those of waiting for a processor."""
        return time.monotonic() - self._began - self._waited()

    def _waited(self) -> float:
        return max(_queued_s(self._pid) - self._queued, 0.0)


def _queued_s(pid: int | None) -> float:
    """Seconds for which a process could have run and did not get a processor; the most of its threads."""
    most = 0
    if pid is not None:
        with suppress(OSError, ValueError, IndexError):
            for thread in os.listdir(f"/proc/{pid}/task"):
                most = max(most, int(_read_file(f"/proc/{pid}/task/{thread}/schedstat").split()[1]))
    return most / 1e9


def _end_keeper(keeper: subprocess.Popen[bytes], control: socket.socket, owner: int) -> None:
    """End a keeper, and with it all that it started; by force when it does not leave in time."""
    # A forked copy of the owner must not end the owner's worker.
    is_owner = os.getpid() == owner
    if is_owner:
        with suppress(OSError):
            _tell(control, "leave")
    control.close()
    if is_owner:
        try:
            keeper.wait(_END_S + 1)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()


def _ending(status: int | None) -> str:
    """The words of a message for an exit status."""
    if status is None:
        return "was lost"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


# ---- the keeper -----------------------------------------------------------------------------------------------------


def keep(fd: int, parent: int) -> None:
    """Main function of the keeper; see the head of this module."""
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)
    # These signals are sent to all processes of a job; the program decides when to leave.
    for stop in _STOPS:
        signal.signal(stop, signal.SIG_IGN)
    keeper = _Keeper(control)
    while os.getppid() == parent:
        keeper.reap()
        if not _is_readable(control, _POLL_S):
            continue
        packet, descriptors, _, _ = socket.recv_fds(control, 1 << 10, 1)
        if not packet or not keeper.handle(json.loads(packet), descriptors):
            break
    keeper.end()
    os._exit(0)


class _Keeper:
    """Children of the keeper: a builder, its forks, and what they left behind."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._adopts = _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # Process id of the builder while it lives, and the socket to it.
        self._builder: int | None = None
        self._requests: socket.socket | None = None
        # The process whose exit status the program may ask for.
        self._watched: int | None = None
        self._statuses: dict[int, int] = {}

    def handle(self, message: dict[str, Any], descriptors: list[int]) -> bool:
        """Do what the program asks for; False: leave."""
        match message["do"]:
            case "start":
                self._watched = None
                self._statuses.clear()
                self._start(descriptors)
            case "watch":
                self._watched = message["pid"]
            case "end":
                self.end(keep_builder=message["keep_builder"])
                # A builder that died before a worker was watched.
                first = next(iter(self._statuses), None)
                status = self._statuses.get(self._watched or first or 0)
                self._control.send(json.dumps({"status": status}).encode())
            case _:
                return False
        return True

    def _start(self, descriptors: list[int]) -> None:
        if self._builder is None:
            if self._requests is not None:
                self._requests.close()
            self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            keeper = os.getpid()
            self._builder = os.fork()
            if not self._builder:
                self._control.close()
                self._requests.close()
                for descriptor in descriptors:
                    os.close(descriptor)
                for stop in _STOPS:
                    signal.signal(stop, signal.SIG_DFL)
                _in_child(lambda: _build(theirs, keeper, self._adopts))
            theirs.close()
        assert self._requests is not None
        # When the builder died meanwhile, the program sees its socket close.
        with suppress(OSError):
            socket.send_fds(self._requests, [b"."], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def reap(self) -> None:
        """Take note of children that have ended."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                if self._watched in (None, pid):
                    self._statuses[pid] = os.waitstatus_to_exitcode(status)
                if pid == self._builder:
                    self._builder = None

    def end(self, keep_builder: bool = False) -> None:
        """Kill all processes below this one. When one dies its children come here and are next."""
        end = time.monotonic() + _END_S
        while time.monotonic() < end:
            self.reap()
            children = [pid for pid in _children(os.getpid()) if not (keep_builder and pid == self._builder)]
            if not children:
                return
            for pid in children:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)


def _children(pid: int) -> list[int]:
    """Child processes of a process with one thread; none when it is gone."""
    try:
        return [int(child) for child in _read_file(f"/proc/{pid}/task/{pid}/children").split()]
    except OSError:
        return []


# ---- the builder ----------------------------------------------------------------------------------------------------


def _build(requests: socket.socket, keeper: int, adopts: bool) -> None:
    """Build the function at the first request, then fork a worker for each."""
    _die_with(keeper)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    before = _descriptors()
    target: Target | None = None
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, 1, 1)
        if not packet:
            return
        connection = socket.socket(fileno=descriptors[0])
        factory, modules = _receive(connection), json.loads(_receive(connection))
        is_first = target is None
        if target is None:
            try:
                target = pickle.loads(factory)()
            except (Exception, SystemExit) as error:
                _send(connection, _failure(error))
                return
        for module in modules:
            # A module that fails here fails again in the worker, where the error is reported.
            with suppress(Exception):
                importlib.import_module(module)
        sys.stdout.flush()
        sys.stderr.flush()
        is_alone = _children(keeper) == [os.getpid()] and not _children(os.getpid())
        opened = _descriptors() - before - {connection.fileno()}
        can_fork = adopts and is_alone and not opened and len(os.listdir("/proc/self/task")) == 1
        serve = partial(_serve, connection, target, is_fork=can_fork, built=is_first)
        if not can_fork:
            serve()
        _fork_to(keeper, serve)
        connection.close()


def _fork_to(keeper: int, work: Callable[[], object]) -> None:
    """Run `work` in a process that is a child of the keeper: the parent in between leaves at once."""
    # Garbage collection in the worker would write to, and so copy, the memory that it shares with its builder.
    gc.freeze()
    middle = os.fork()
    if middle:
        os.waitpid(middle, 0)
        return

    def begin() -> None:
        middle = os.getpid()
        if os.fork():
            return
        while os.getppid() == middle:
            time.sleep(0.0005)
        _die_with(keeper)
        # A signal that it sends to its process group reaches neither builder nor keeper.
        os.setsid()
        work()

    _in_child(begin)


def _in_child(work: Callable[[], object]) -> NoReturn:
    """End this process after `work`, whatever it raises: the parent's code must not go on in a fork."""
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _descriptors() -> set[int]:
    return {int(fd) for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


def _prctl(option: int, value: int) -> bool:
    """Set an attribute of this process; False when the kernel refuses."""
    return ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


# ---- the worker -----------------------------------------------------------------------------------------------------


def _serve(connection: socket.socket, target: Target, *, is_fork: bool, built: bool) -> NoReturn:
    """Answer requests until the program closes the socket. For each: a note that it has arrived, then the answer."""
    reported = set(sys.modules)

    def new_modules() -> list[str]:
        """Names of the modules that were imported since the last call."""
        if len(sys.modules) == len(reported):
            return []
        new = [name for name in list(sys.modules) if name not in reported]
        reported.update(new)
        return new

    def answer(request: bytes) -> tuple[bytes, Sequence[np.ndarray]]:
        """The header and the arrays of the answer to a request; a failure is a header too."""
        try:
            content = pickle.loads(request)
        except Exception as error:
            return _failure(error), ()
        _send(connection, json.dumps({"modules": new_modules()}).encode())
        try:
            value, arrays = target(content)
            shapes = [(array.dtype.str, array.shape) for array in arrays]
            header = {"value": value, "arrays": shapes, "modules": new_modules(), "size": _resident_bytes()}
            return json.dumps(header).encode(), arrays
        except (Exception, SystemExit) as error:
            return _failure(error), ()

    try:
        _send(connection, json.dumps({"pid": os.getpid(), "is_fork": is_fork, "built": built}).encode())
        while True:
            header, arrays = answer(_receive(connection))
            _send(connection, header)
            for array in arrays:
                connection.sendall(array.data.cast("B"))
            # Otherwise they would stay in memory until the next request.
            del arrays
    except (EOFError, OSError):
        # Not sys.exit: threads that foreign code left behind must not keep the process.
        os._exit(0)


def _failure(error: BaseException) -> bytes:
    """The header that reports an exception."""
    name = type(error).__name__
    return json.dumps({"error": f"{name}: {error}", "trace": traceback.format_exc(), "type": name}).encode()


def _resident_bytes() -> int:
    return int(_read_file("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- messages -------------------------------------------------------------------------------------------------------


class _Pickler(pickle.Pickler):
    """A pickler that sends tensors as CPU copies.

    A slice of a batch would take its whole storage along, a GPU tensor its device.
    """

    def reducer_override(self, value: Any) -> Any:
        torch = sys.modules.get("torch")
        if torch is None or type(value) is not torch.Tensor:
            return NotImplemented
        whole = value.untyped_storage().nbytes() == value.nbytes
        if whole and value.device.type == "cpu" and not value.requires_grad:
            return NotImplemented
        return value.detach().cpu().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)


def dumps(value: Any) -> bytes:
    """A pickle in which every tensor is a CPU tensor of its own."""
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _tell(control: socket.socket, do: str, fd: int | None = None, **more: Any) -> None:
    packet = json.dumps({"do": do} | more).encode()
    socket.send_fds(control, [packet], [] if fd is None else [fd])


def _send(connection: socket.socket, message: bytes, limit: _Limit | None = None) -> None:
    connection.settimeout(limit.left() if limit else None)
    connection.sendall(struct.pack("!Q", len(message)) + message)
    connection.settimeout(None)


def _receive(connection: socket.socket, limit: _Limit | None = None) -> bytes:
    (size,) = struct.unpack("!Q", _fill(connection, bytearray(8), limit))
    return bytes(_fill(connection, bytearray(size), limit))


def _receive_array(connection: socket.socket, limit: _Limit, dtype: str, shape: Sequence[int]) -> np.ndarray:
    import numpy as np

    array = np.empty(tuple(shape), dtype)
    _fill(connection, array.data.cast("B"), limit)
    return array


def _fill(connection: socket.socket, buffer: Any, limit: _Limit | None) -> Any:
    view, done = memoryview(buffer), 0
    while done < len(view):
        if limit is not None and not _is_readable(connection, min(limit.left(), _POLL_S)):
            if limit.has_ended() and not _is_readable(connection, 0):
                raise EOFError  # a fork of the worker holds its end of the socket open
            continue
        part = connection.recv_into(view[done:])
        if not part:
            raise EOFError
        done += part
    return buffer


def _is_readable(connection: socket.socket, seconds: float) -> bool:
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(1000 * seconds))


def _read_file(path: str) -> str:
    with open(path) as file:
        return file.read()
