"""Work folders: whose one is, and what is left in it when the process that writes is killed.

A folder belongs to one process at a time, and to one set of settings for good (`WorkDir`). A file or folder in it is
replaced as a whole (`publish`), a file of lines grows by whole lines (`append`), and what several processes write at
once goes into an SQLite database (`open_database`).
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mmrl.config import ConfigError

log = logging.getLogger(__name__)

# NFS clients look for new files only every few seconds.
PATIENCE_S = 30.0
# Suffixes of what is being written, moved aside for a new one, being removed.
_PART, _OLD, _GONE = ".part", ".old", ".gone"


# ---- whose folder ---------------------------------------------------------------------------------------------------


class WorkDir:
    """A folder that a process takes before it writes into it, and gives free afterwards.

    Args:
        root: the folder, made when it is claimed.
        rank: of several processes that share the folder by agreement, each holds a lock of its own.
    """

    def __init__(self, root: str | Path, rank: int = 0) -> None:
        self.root = Path(root)
        # One lock per path: a process that holds it may claim the folder again in an inner block
        self._lock = FileLock(self.root / (f".lock-{rank}" if rank else ".lock"), is_singleton=True)

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
            raise self.unwritable(error) from error
        return token

    def unwritable(self, error: OSError) -> ConfigError:
        """The error for a folder that the operating system refuses."""
        reason = "it is a file" if self.root.is_file() else error.strerror
        return ConfigError(f"nothing can be written into {self.root}: {reason}; name another folder")

    def shows(self, token: str) -> bool:
        """True once this process reads the token that the first one wrote; network disks may take a while."""
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
    def owned(self) -> Iterator[WorkDir]:
        """The folder belongs to this process alone inside the block; see `claim`."""
        self.claim()
        try:
            yield self
        finally:
            self.release()

    def identify(self, name: str, settings: Mapping[str, Any], what: str, free: Collection[str] = ()) -> None:
        """Note in the file `name` what decides the contents of the folder, or check that it is what was noted before.

        Args:
            name: ends in .json or .yaml. settings: JSON values, sections as mappings.
            what: said of a folder of other settings: "holds another search".
            free: settings, as dotted paths, that may change.

        Raises:
            ConfigError: the folder was made with other settings, each of which is named, or the file is damaged.
        """
        self.check_identity(name, settings, what, free)
        file = self.root / name
        if file.suffix == ".yaml":
            write_text(file, yaml.safe_dump(settings, sort_keys=False))
        else:
            write_json(file, settings)

    def check_identity(self, name: str, settings: Mapping[str, Any], what: str, free: Collection[str] = ()) -> None:
        """The check of `identify`, which writes nothing."""
        file = self.root / name
        if file.exists():
            changed = _differences(_read_settings(file), json.loads(json.dumps(settings)), free)
            if changed:
                raise ConfigError(f"{self.root} {what}: {'; '.join(changed)}. Use another folder")


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text()
        settings = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} is damaged ({error}); use another folder") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"{file} is damaged (it holds no sections); use another folder")
    # Through JSON keys become texts, as in the settings that are compared with these.
    return json.loads(json.dumps(settings, default=str))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str], within: str = "") -> list[str]:
    """`path: old -> new` of every setting that differs; one that is not there counts as null."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        path, before, after = f"{within}{key}", old.get(key), new.get(key)
        if path in free or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _differences(before, after, free, f"{path}.")
        else:
            changed.append(f"{path}: {before} -> {after}")
    return changed


# ---- what is replaced -----------------------------------------------------------------------------------------------


@contextmanager
def publish(path: str | Path, *, shared: bool = False) -> Iterator[Path]:
    """Gives a place beside `path`, where the block writes a file or makes a folder; then it takes the name `path`.

    It is flushed to the disk before. A process that is killed, or an error in the block, leaves what was at `path`.

    Args:
        path: devices and pipes (/dev/stdout) are written to as they are, links stay links.
        shared: several processes may write it at once, of whom the last one wins.
    """
    path = Path(os.path.realpath(path)) if Path(path).is_symlink() else Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path, f".{secrets.token_hex(4)}" if shared else "")
    if part.is_dir():
        shutil.rmtree(part)
    try:
        yield part
        _flush(part)
    except BaseException:
        _remove(part)
        raise
    # A folder cannot take the place of another one in one step. After a kill between the two, `tidy` moves it back.
    if part.is_dir() and path.exists():
        old = _beside(path, _OLD)
        _remove(old)
        path.rename(old)
        part.rename(path)
        _remove(old)
    else:
        os.replace(part, path)
    _flush_entry(path.parent)


def part_of(path: Path, suffix: str = "") -> Path:
    """The place beside `path` where `publish` has it written, for ranks that write parts of one folder."""
    return _beside(path, suffix + _PART)


def write_text(path: str | Path, text: str) -> None:
    """`publish` a text."""
    with publish(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """`publish` a JSON value, indented for readers."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: str | Path, lines: Iterable[str]) -> int:
    """`publish` a text of lines; returns how many there were."""
    count = 0
    with publish_lines(path) as add:
        for line in lines:
            add(line)
            count += 1
    return count


@contextmanager
def publish_lines(path: str | Path) -> Iterator[Callable[[str], None]]:
    """`publish` a text of lines; gives a function that adds one."""
    with publish(path) as part, part.open("w", encoding="utf-8") as file:

        def add(line: str) -> None:
            file.write(line + "\n")

        yield add


def discard(path: Path) -> None:
    """Remove a folder as a whole: a process that is killed leaves all of it, or nothing under its name."""
    gone = _beside(path, _GONE)
    _remove(gone)
    path.rename(gone)
    _remove(gone)


def recover(path: Path) -> None:
    """Bring back a folder that a process was killed over while it put a new one in its place."""
    old = _beside(path, _OLD)
    if old.exists() and not path.exists():
        old.rename(path)


def tidy(folder: Path) -> None:
    """Finish what a killed process left in a folder: what it was writing or removing goes, what it had moved aside for
    a new one that is not there comes back."""
    for left_over in folder.glob(".*"):
        if left_over.suffix == _OLD:
            recover(folder / left_over.stem[1:])
        if left_over.exists() and left_over.suffix in (_PART, _OLD, _GONE):
            _remove(left_over)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}{suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the operating system write a file, or a folder with all that is in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
    _flush_entry(path)


def _flush_entry(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- what grows -----------------------------------------------------------------------------------------------------


def append(file: Path, rows: Iterable[Any]) -> None:
    """Add JSON values as lines to a file; half a line of a killed process at its end is cut off before."""
    cut_half_line(file)
    with file.open("a", encoding="utf-8") as out:
        out.write("".join(json.dumps(row) + "\n" for row in rows))


def cut_half_line(file: Path) -> None:
    """Cut off what follows the last end of a line, of a process that was killed while it wrote."""
    if not file.exists() or file.stat().st_size == 0:
        return
    with file.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        if f.read(1) != b"\n":
            f.seek(0)
            whole = f.read().rfind(b"\n") + 1
            log.warning("%s: the last line was cut by a kill; %d bytes removed", file, f.tell() - whole)
            f.truncate(whole)


# ---- what several processes write at once ---------------------------------------------------------------------------

# Here SQLite cannot be shared: its write-ahead log needs memory that all its processes share, machines do not.
_NETWORK_DISKS = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "orangefs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.juicefs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse",
}  # fmt: skip
_DATABASE_FORMAT = 1


def open_database(
    file: Path, schema: str, rank: int = 0, *, fill: Callable[[sqlite3.Connection], object] | None = None
) -> sqlite3.Connection:
    """A connection to an SQLite database that several processes may write at once.

    What was committed is there when the process is killed; after a power failure the last of it may be missing.
    On a network disk, where SQLite cannot be shared, every rank has a database of its own, `NAME-RANK.sqlite` from
    rank 1 on; rank 0 takes in those of ranks that have ended when it opens its own.

    Args:
        schema: SQL that makes the tables. fill: puts the first rows into a new database.

    Raises:
        ConfigError: it is no database, of a later version, or another process has it for itself.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    alone = filesystem(file.parent) in _NETWORK_DISKS
    if alone and rank:
        file = file.with_name(f"{file.stem}-{rank}{file.suffix}")
        log.warning("%s is on a network disk: this rank keeps what it writes in a file of its own", file)
    # One process makes the database, the others wait.
    with FileLock(f"{file}.lock"):
        database = sqlite3.connect(file, timeout=1.0 if alone else 60.0)
        try:
            if alone:
                database.execute("PRAGMA locking_mode = EXCLUSIVE")
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            # 0 until the tables and the first rows are there.
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version > _DATABASE_FORMAT:
                raise sqlite3.DatabaseError("a later version of mmrl wrote it")
            if not version:
                database.executescript(schema)
                with database:
                    if fill is not None:
                        fill(database)
                    database.execute(f"PRAGMA user_version = {_DATABASE_FORMAT}")
        except sqlite3.DatabaseError as error:
            database.close()
            raise ConfigError(f"{file} cannot be used: {error}; name another folder") from error
        except BaseException:
            database.close()
            raise
    if alone and not rank:
        for other in sorted(file.parent.glob(f"{file.stem}-*{file.suffix}")):
            _take_in(database, other)
    return database


def _take_in(database: sqlite3.Connection, other: Path) -> None:
    """Move the rows of another rank's database, unless it still writes them."""
    try:
        database.execute("ATTACH ? AS other", (str(other),))
        for (table,) in database.execute("SELECT name FROM other.sqlite_master WHERE type = 'table'").fetchall():
            with database:
                database.execute(f"INSERT OR IGNORE INTO main.{table} SELECT * FROM other.{table}")
        database.execute("DETACH other")
    except sqlite3.OperationalError as error:
        log.warning("%s is left for later: %s", other, error)
        return
    other.unlink()


def filesystem(folder: Path) -> str:
    """The kind of file system that a folder lies on, such as ext4 or nfs4; empty where the system does not tell."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return ""
    real, longest, kind = Path(os.path.realpath(folder)), -1, ""
    for line in mounts.read_text().splitlines():
        _, point, kind_of_mount, *_ = line.split(" ")
        # A space in a path is written as an octal number.
        point = point.replace("\\040", " ")
        # Of two mounts at one place the later one covers the earlier.
        if real.is_relative_to(point) and len(point) >= longest:
            longest, kind = len(point), kind_of_mount
    return kind
