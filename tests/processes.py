"""Commands in processes of their own, forked from a server that has imported the libraries once.

A fresh interpreter spends seconds on importing torch, transformers and diffusers before a command does anything. What
is forked from the server has the rest of what a user's process has: memory, environment and working folder of its own,
signals, an exit status, standard output and standard error. The first command of a test session starts the server.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["preloaded"])


class Command:
    """A running `mmrl ARGUMENTS`, or `SCRIPT ARGUMENTS` where the first one ends in .py.

    Args:
        environment: variables on top of those of the tests.
    """

    def __init__(self, *arguments: object, environment: dict[str, str] | None = None) -> None:
        variables = os.environ | (environment or {})
        # a developer's setting, which turns messages into tracebacks
        variables.pop("MMRL_DEBUG", None)
        self._folder = tempfile.TemporaryDirectory()
        self._stdout, self._stderr = (Path(self._folder.name) / name for name in ("stdout", "stderr"))
        with pytest.MonkeyPatch.context() as patch:
            # for the server alone, which starts here unless it runs; a command has the path of its caller
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS.parent))))
            forkserver.ensure_running()
        streams = (str(self._stdout), str(self._stderr))
        self.process = _processes.Process(target=_run, args=([str(a) for a in arguments], dict(variables), *streams))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """Its exit status, the negative number of the signal that ended it, None while it runs."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        """What it wrote to standard output so far."""
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        """What it wrote to standard error so far."""
        return self._stderr.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def is_running(self) -> bool:
        return self.process.is_alive()

    def wait(self, timeout: float = 240.0) -> int:
        """`returncode` after its end.

        Raises:
            TimeoutError: it still runs; it is killed.
        """
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"no end after {timeout:g} s; standard error ends with\n{self.stderr[-3000:]}")
        return self.process.exitcode


def run_command(*arguments: object, environment: dict[str, str] | None = None) -> Command:
    """The command after its end, whatever its exit status."""
    command = Command(*arguments, environment=environment)
    command.wait()
    return command


def start_ranks(world: int, *arguments: object) -> list[Command]:
    """The command on `world` ranks of one gloo group, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(world):
        variables = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(Command(*arguments, environment=variables))
    return ranks


def run_ranks(world: int, *arguments: object, timeout: float = 240.0) -> list[Command]:
    """`start_ranks` to their end; every rank must succeed."""
    ranks = start_ranks(world, *arguments)
    deadline = time.monotonic() + timeout
    # a rank that waits for one that failed would wait for its whole time limit
    while any(r.is_running() for r in ranks) and not any(r.returncode for r in ranks):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    unsuccessful = [r for r in ranks if r.returncode != 0]
    for r in unsuccessful:
        r.process.kill()
        r.process.join()
    assert not unsuccessful, "\n".join(f"exit status {r.returncode}: {r.stderr[-3000:]}" for r in unsuccessful)
    return ranks


def _run(arguments: list[str], variables: dict[str, str], stdout: str, stderr: str) -> None:
    """What the forked process does."""
    os.environ.clear()
    os.environ.update(variables)
    for stream, file in ((1, stdout), (2, stderr)):
        target = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(target, stream)
        os.close(target)
    try:
        if arguments[0].endswith(".py"):
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            sys.argv = ["mmrl", *arguments]
            runpy.run_module("mmrl", run_name="__main__")
    finally:
        # multiprocessing leaves these out
        atexit._run_exitfuncs()
