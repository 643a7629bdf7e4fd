"""The processes of a run: their devices, sums over them, and the one that writes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, gather_object, set_seed
from torch import Tensor

from mmrl.config import ConfigError
from mmrl.recipe import RunConfig
from mmrl.registry import hint
from mmrl.sharding import keep_float32, sharding_asked
from mmrl.workdir import WorkDir

log = logging.getLogger(__name__)

T = TypeVar("T")


class Processes:
    """The processes that a launcher started for a run, seeded alike.

    Raises:
        ConfigError: another number of them than `run.processes` asks for, or more than prompts of an iteration.
    """

    def __init__(self, run: RunConfig) -> None:
        check_trackers(run.trackers)
        if run.cpu or not torch.cuda.is_available():
            torch.set_num_threads(run.threads)
        self.accelerator = Accelerator(
            cpu=run.cpu,
            mixed_precision=run.mixed_precision,
            log_with=list(run.trackers) or None,
            project_dir=run.output,
            # ranks call the bare model unequally often between updates, so buffers must not be broadcast in forward
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self._check_world(run)
        if self.accelerator.is_fsdp2:
            keep_float32(self.accelerator.state.fsdp_plugin)
        elif sharding_asked():
            log.warning("FSDP was asked for and is not in force: every process has all weights (%s)", self.world)
        set_seed(run.seed)

    def _check_world(self, run: RunConfig) -> None:
        if run.processes is not None and run.processes != self.count:
            raise ConfigError(
                f"run.processes={run.processes} but {self.count} started ({self.world}); `accelerate launch --cpu` "
                "starts one process only: use tools/launch.sh"
            )
        if run.prompts_per_iteration < self.count:
            raise ConfigError(
                f"run.prompts_per_iteration={run.prompts_per_iteration} is below the {self.count} processes; every "
                "process needs at least one prompt"
            )

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """True on the one process that writes."""
        return self.accelerator.is_main_process

    @property
    def world(self) -> str:
        """World size and sharding actually in force."""
        a = self.accelerator
        return (
            f"{a.num_processes} process(es), {a.distributed_type.value}, device {a.device}, "
            f"precision {a.mixed_precision}, {torch.get_num_threads()} thread(s)"
        )

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of what all ranks have."""
        return list(items)[self.accelerator.process_index :: self.count]

    def all_sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        t = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return list(self.accelerator.reduce(t, "sum").tolist())

    def all_sum_tensor(self, x: Tensor) -> Tensor:
        """Sum a small CPU tensor over all processes."""
        return self.accelerator.reduce(x.to(self.accelerator.device), "sum").cpu()

    def all_max(self, *values: float) -> list[float]:
        """Maximum of each value over all processes."""
        t = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return list(self.accelerator.gather(t[None]).amax(0).tolist())

    def gather(self, rows: list[T]) -> list[T]:
        """The rows of all processes, rank after rank."""
        return gather_object(rows) if self.count > 1 else rows

    def from_main(self, value: T) -> T:
        """The main process's value, on all of them."""
        values = [value]
        if self.count > 1:
            broadcast_object_list(values)
        return values[0]

    def on_main(self, action: Callable[[], str]) -> str:
        """What `action` returns on the main process, on all of them. Its error ends all: none waits for the others.

        Raises:
            ConfigError: as `action` does; other processes refer to it.
        """
        result, error = "", ""
        if self.is_main:
            try:
                result = action()
            except ConfigError as refusal:
                error = str(refusal)
        result, error = self.from_main((result, error))
        if error:
            raise ConfigError(error if self.is_main else "the first process ended with an error")
        return result

    @contextmanager
    def owning(self, folder: WorkDir) -> Iterator[None]:
        """A folder belongs to this run alone inside the block, and all ranks see the same folder.

        Raises:
            ConfigError: another process writes into it, or a rank does not see what the first one wrote.
        """
        token = self.on_main(folder.claim)
        try:
            if self.all_max(float(not folder.shows(token)))[0]:
                raise ConfigError(f"{folder.root} is not the same folder on every node; name one on a shared disk")
            yield
        finally:
            if self.is_main:
                folder.release()


def check_trackers(trackers: Sequence[str]) -> None:
    """Refuse trackers that accelerate does not have, or whose package is not installed: it would only skip them.

    Raises:
        ConfigError: the first such tracker.
    """
    known, installed = sorted(map(str, LOGGER_TYPE_TO_CLASS)), set(map(str, get_available_trackers()))
    for name in trackers:
        if name not in known:
            raise ConfigError(f"run.trackers: unknown tracker {name!r}{hint(name, known)}; known: {', '.join(known)}")
        if name not in installed:
            raise ConfigError(
                f"run.trackers: the package of {name} is not installed, so nothing would be logged there; pip install "
                f"{name}, or take it out. Installed here: {', '.join(sorted(installed)) or 'none'}"
            )
