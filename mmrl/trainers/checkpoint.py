"""Checkpoints: complete or absent, checked before they are loaded, and without a pickle of our own.

accelerate writes model, optimizer and random states, which it loads weights-only. What else a run must remember are
numbers and tensors: `state.json` and, per rank, `tensors-RANK.safetensors`. `manifest.json` has size and hash of every
file, so that a damaged checkpoint is told from a sound one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmrl.config import ConfigError

log = logging.getLogger(__name__)

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"\d{6,}")


class Stateful(Protocol):
    """What a checkpoint keeps of an object: a flat mapping of numbers, lists of numbers and tensors."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists of numbers and tensors by name."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same, read back."""


class Checkpoints:
    """The checkpoints of a run, in one folder that all ranks see; iteration i is the folder `00000i`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        iteration: int,
        keep: int,
        is_main: bool,
        write: Callable[[Path], object],
        wait: Callable[[], object],
    ) -> None:
        """`write` into a folder beside the target on all ranks, then flush and rename it; keep the newest `keep`.

        All ranks must call it.
        """
        final = self.folder / f"{iteration:06d}"
        part = self.folder / f".{iteration:06d}.part"
        if is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        wait()
        write(part)
        wait()
        if is_main:
            _seal(part)
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            _flush(self.folder)
            for old in self._found()[:-keep]:
                shutil.rmtree(old)
        wait()

    def newest(self) -> Path | None:
        """The newest sound checkpoint, None when there is none at all; damaged ones are told and passed over.

        Raises:
            ConfigError: there are checkpoints, and every one of them is damaged.
        """
        faults: list[str] = []
        for folder in reversed(self._found()):
            fault = damage(folder)
            if fault is None:
                return folder
            faults.append(f"{folder}: {fault}")
            log.warning("%s is damaged (%s); trying the one before it", folder, fault)
        if faults:
            raise ConfigError(
                f"every checkpoint is damaged: {'; '.join(faults)}. Delete them to begin anew, or name another "
                "run.output"
            )
        return None

    def _found(self) -> list[Path]:
        """Complete checkpoints, the oldest first; half-written ones and foreign folders carry other names."""
        folders = [p for p in self.folder.glob("*") if p.is_dir() and _NAME.fullmatch(p.name)]
        return sorted(folders, key=lambda p: int(p.name))


def save_states(folder: Path, states: Mapping[str, Stateful], rank: int, world: int) -> None:
    """Write the states of this rank; every rank must do so, since sharded tensors are written as local parts."""
    numbers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    sharded = False
    for name, owner in states.items():
        numbers[name] = {}
        for key, value in owner.state_dict().items():
            if isinstance(value, Tensor):
                local = local_part(value)
                sharded |= local is not value
                tensors[f"{name}/{key}"] = local.detach().cpu().contiguous()
            else:
                numbers[name][key] = value
    if rank == 0 or sharded:
        save_file(tensors, folder / f"tensors-{rank:05d}.safetensors")
    if rank == 0:
        record = {"world": world, "sharded": sharded, "states": numbers}
        (folder / STATE).write_text(json.dumps(record, indent=1) + "\n")


def load_states(folder: Path, states: Mapping[str, Stateful], rank: int, world: int) -> None:
    """Read what `save_states` wrote.

    Raises:
        ConfigError: the checkpoint lacks a state, or holds sharded tensors in the parts of another number of ranks.
    """
    if not (folder / STATE).is_file():
        raise ConfigError(f"{folder} has no {STATE}, so an older version wrote it; use another run.output")
    record = json.loads((folder / STATE).read_text())
    sharded, before = record["sharded"], record["world"]
    if sharded and before != world:
        raise ConfigError(
            f"{folder} holds averaged weights in the parts of {before} ranks and {world} were started; start {before}"
        )
    missing = sorted(set(states) - set(record["states"]))
    if missing:
        raise ConfigError(f"{folder} has no state of {', '.join(missing)}; it is of another recipe")
    tensors = load_file(folder / f"tensors-{rank if sharded else 0:05d}.safetensors")
    for name, owner in states.items():
        own = {k.partition("/")[2]: v for k, v in tensors.items() if k.partition("/")[0] == name}
        owner.load_state_dict(record["states"][name] | own)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None for a sound one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, (size, digest) in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _digest(file) != digest:
            return f"{name} has other contents than were written"
    return None


def copy_into(target: Tensor, value: Tensor) -> None:
    """Write a whole tensor, or this rank's part of a sharded one, as `save_states` wrote it."""
    local = local_part(target)
    with torch.no_grad():
        local.copy_(value)


def local_part(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    from torch.distributed.tensor import DTensor

    return x.to_local() if isinstance(x, DTensor) else x


def _seal(folder: Path) -> None:
    """Flush every file to the disk and write the manifest."""
    manifest: dict[str, tuple[int, str]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        _flush(file)
        manifest[str(file.relative_to(folder))] = file.stat().st_size, _digest(file)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _flush(folder / MANIFEST)
    _flush(folder)


def _flush(path: Path) -> None:
    """Have the operating system write a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
