"""Checkpoints: complete or absent, checked before they are loaded, and without a pickle.

Tensors (weights, optimizer, averages) go through torch's distributed checkpoint into safetensors files, so whoever
reads them may shard them otherwise: over another number of processes, or not at all. Numbers are in `state.json`;
random states and the scaler of fp16 are accelerate's, which reads them weights-only. `manifest.json` has size and hash
of every file, so that a damaged checkpoint is told from a sound one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from mmrl.config import ConfigError
from mmrl.sharding import tied_names
from mmrl.workdir import discard, part_of, publish, tidy

log = logging.getLogger(__name__)

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "tensors"
FILE_BYTES = 1 << 30  # a file of tensors is composed in memory before it is written
_NAME = re.compile(r"\d{6,}")


@runtime_checkable
class Stateful(Protocol):
    """Something whose numbers a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Numbers and lists of numbers by name."""

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
        """`write` into a folder beside the target on all ranks, then publish it; keep the newest `keep`.

        All ranks must call it.
        """
        final = self.folder / f"{iteration:06d}"
        try:
            with publish(final) if is_main else nullcontext(part_of(final)) as part:
                if is_main:
                    tidy(self.folder)
                    part.mkdir()
                wait()
                write(part)
                wait()
                if is_main:
                    _seal(part)
            if is_main:
                self._rotate(iteration, keep)
        except OSError as error:
            raise OSError(error.errno, f"the checkpoint {final} was not written: {error}") from error
        wait()

    def _rotate(self, iteration: int, keep: int) -> None:
        """Keep the newest `keep` up to `iteration`: later ones are damaged or foreign, and stand for none of them."""
        own = [p for p in self._found() if int(p.name) <= iteration and (p / MANIFEST).is_file()]
        for old in own[:-keep]:
            discard(old)

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


def save_numbers(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Write `state.json`; the main process alone does."""
    record = {name: owner.state_dict() for name, owner in states.items()}
    (folder / STATE).write_text(json.dumps(record, indent=1) + "\n")


def load_numbers(folder: Path, states: Mapping[str, Stateful]) -> None:
    """Read what `save_numbers` wrote.

    Raises:
        ConfigError: the checkpoint lacks a state.
    """
    record = json.loads((folder / STATE).read_text()) if (folder / STATE).is_file() else {}
    _need(folder, states, record)
    for name, owner in states.items():
        owner.load_state_dict(record[name])


def save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, whole or sharded, as parts of their own from every rank; all ranks must call it.

    Raises:
        OSError: a rank could not write its part.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    writer = HuggingFaceStorageWriter(
        str(folder / TENSORS), fqn_to_index_mapping=_files(tensors), save_distributed=True
    )
    with _own_errors():
        save({name: x.detach().contiguous() for name, x in tensors.items()}, storage_writer=writer)


def load_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read what `save_tensors` wrote into `tensors`, in place, however they are sharded; all ranks must call it.

    Raises:
        ConfigError: the checkpoint has other tensors, or they have other shapes.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, TensorStorageMetadata, load

    reader = HuggingFaceStorageReader(str(folder / TENSORS))
    saved: dict[str, torch.Size] = {}
    if (folder / TENSORS).is_dir():
        for name, about in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata)  # safetensors files hold nothing else
            saved[name] = about.size
    _need(folder, tensors, saved)
    for name, x in tensors.items():
        if saved[name] != x.shape:
            raise ConfigError(f"{folder}: {name} is {tuple(saved[name])}, this model has {tuple(x.shape)}")
    with _own_errors():
        load({name: x.detach() for name, x in tensors.items()}, storage_reader=reader)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, tied ones once: files of tensors refuse shared memory."""
    again = tied_names(model)
    return {name: w for name, w in model.state_dict().items() if isinstance(w, Tensor) and name not in again}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Tensors of an optimizer's state by parameter, shared ones once; made as its first step would make them where
    there were none."""
    tensors: dict[str, Tensor] = {}
    shared: set[int] = set()
    for name, state in _states(model, optimizer):
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            # Tables of 8-bit optimizers are one tensor for all parameters. A sharded tensor has no address of its own.
            place = value.data_ptr() if type(value) is Tensor and value.numel() else id(value)
            if place not in shared:
                tensors[f"{name}/{key}"] = value
                shared.add(place)
    return tensors


class OptimizerNumbers:
    """Numbers of an optimizer's state that are no tensors, by parameter, for checkpoints."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        numbers: dict[str, Any] = {}
        for name, state in _states(self._model, self._optimizer):
            numbers[name] = {key: value for key, value in state.items() if isinstance(value, int | float)}
        return numbers

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name, own in _states(self._model, self._optimizer):
            own.update(state[name])


def bare_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The library's own optimizer, without accelerate's wrapper."""
    if not isinstance(optimizer, AcceleratedOptimizer):
        return optimizer
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """(name, state) of every trained parameter."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = bare_optimizer(optimizer)
    if isinstance(bare, torch.optim.AdamW):
        for _, p in trained:
            if not bare.state[p]:
                bare.state[p].update(
                    step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
    elif not bare.state:
        _begin(bare, [p for _, p in trained])
    return [(name, bare.state[p]) for name, p in trained]


def _begin(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Have an optimizer make its state, by a step of rate 0 on gradients of 0, as if it had made none."""
    held = [p.grad for p in parameters]
    settings = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, grad in zip(parameters, held, strict=True):
        p.grad = grad
        if "step" in optimizer.state[p]:
            optimizer.state[p]["step"] = 0
    for group, (lr, weight_decay) in zip(optimizer.param_groups, settings, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay


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


def _need(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: something that this run keeps is not in the checkpoint.
    """
    missing = sorted(set(wanted) - set(found))
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ConfigError(
            f"{folder} does not hold {', '.join(missing[:3])}{more}; it is of another recipe or version, so use "
            "another run.output"
        )


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of the file, from 1, that a tensor goes into: about FILE_BYTES each, the same on all ranks."""
    files: dict[str, int] = {}
    number, size = 1, 0
    for name, x in tensors.items():
        if size > FILE_BYTES:
            number, size = number + 1, 0
        size += x.numel() * x.element_size()
        files[name] = number
    return files


@contextmanager
def _own_errors() -> Iterator[None]:
    """torch's collective exception, which is no `Exception`, becomes the first error that a rank had."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        # one process alone is what most runs are
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            first, _ = next(iter(error.failures.values()))
            raise first from None


def _seal(folder: Path) -> None:
    """Write the manifest: size and hash of every file."""
    manifest: dict[str, tuple[int, str]] = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        manifest[str(file.relative_to(folder))] = file.stat().st_size, _digest(file)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
