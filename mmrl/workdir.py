"""Whose folder: one process at a time writes what a verb can go on with, and all ranks see the same folder."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from mmrl.config import ConfigError

PATIENCE_S = 30.0  # NFS clients look for new files every so many seconds


class WorkDir:
    """A folder that a process takes before it writes into it, and gives free afterwards."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = FileLock(root / ".lock")

    def claim(self) -> str:
        """Take the folder for this process; returns a token that other ranks must find.

        Raises:
            ConfigError: another process has it, or it cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            token = secrets.token_hex(8)
            (self.root / ".token").write_text(token)
        except Timeout:
            raise ConfigError(
                f"another process writes into {self.root}; wait until it has ended, or name another folder"
            ) from None
        except OSError as error:
            why = "it is a file" if self.root.is_file() else error.strerror
            raise ConfigError(f"nothing can be written into {self.root}: {why}; name another folder") from error
        return token

    def shows(self, token: str) -> bool:
        """Whether this process sees the token that the first one wrote; network disks may take a while."""
        file = self.root / ".token"
        deadline = time.monotonic() + PATIENCE_S
        while not (file.is_file() and file.read_text() == token):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def release(self) -> None:
        """Give the folder free."""
        (self.root / ".token").unlink(missing_ok=True)
        self._lock.release()

    @contextmanager
    def owned(self) -> Iterator[None]:
        """The folder belongs to this process alone inside the block; see `claim`."""
        self.claim()
        try:
            yield
        finally:
            self.release()
