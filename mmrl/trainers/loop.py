"""The loop every trainer shares: devices, optimizer, accumulation, checkpoints, resume, logs, signals.

It knows nothing of rollouts or rewards. A trainer gives it an `iterate` and an `evaluate` function.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, set_seed
from torch import Tensor, nn

from mmrl.config import ConfigError
from mmrl.recipe import OptimConfig, TrainingConfig
from mmrl.registry import hint
from mmrl.sharding import full_state, is_sharded, keep_float32, sharding_asked
from mmrl.trainers.checkpoint import (
    Stateful,
    adam_moments,
    load_numbers,
    load_tensors,
    save_numbers,
    save_tensors,
    weights,
)
from mmrl.trainers.ema import Ema
from mmrl.trainers.run_folder import RunFolder
from mmrl.trainers.verdicts import Watch, is_idle
from mmrl.workdir import WorkDir

log = logging.getLogger(__name__)

Loss = Callable[[], Tensor]  # one micro-batch: forward and a scalar, already over its global denominator


class Trainer(Protocol):
    """What the loop drives."""

    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration with its updates; metrics by name."""

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics under eval/."""

    def save_model(self) -> None:
        """Write the final model."""


@dataclass
class LoopState:
    """What a checkpoint holds besides weights, optimizer and random states. Data order follows from `iteration`."""

    iteration: int = 0
    skipped_updates: int = 0
    idle_iterations: int = 0  # in which there was nothing to learn from
    cpu_s: float = 0.0  # process time spent in iterations, evaluation excluded

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From the checkpoint."""
        for k, v in state.items():
            setattr(self, k, v)


class Loop:
    """Prepared model and optimizer of one run.

    Raises:
        ConfigError: the launcher started another number of processes than `run.processes` asks for, or the run
            folder cannot be used.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module) -> None:
        run = config.run
        check_trackers(run.trackers)
        on_cpu = run.cpu or not torch.cuda.is_available()
        if on_cpu:
            torch.set_num_threads(run.threads)
        self.config, self.folder = config, RunFolder(run.output)
        self.accelerator = Accelerator(
            cpu=run.cpu,
            mixed_precision=run.mixed_precision,
            log_with=list(run.trackers) or None,
            project_dir=run.output,
            # ranks call the bare model unequally often between updates, so buffers must not be broadcast in forward
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self._check_world()
        if self.accelerator.is_fsdp2:
            keep_float32(self.accelerator.state.fsdp_plugin)
        elif sharding_asked():
            log.warning("FSDP was asked for and is not in force: every process has all weights (%s)", self.world)
        set_seed(run.seed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the policy has no trainable parameter")
        o = config.optim
        optimizer = torch.optim.AdamW(self.parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)
        self._numbers: dict[str, Stateful] = {}
        self._tensors: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        self.model, self.optimizer = self.prepare("model", model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]  # sharding replaces them
        self.sharded = is_sharded(self.model)
        self.ema = Ema(self.parameters, o.ema) if o.ema else None
        self.state = LoopState()
        self.remember("loop", self.state)
        if self.ema:
            self.remember_tensors("ema", self.ema.tensors)
        self._stop = False

    def prepare(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as accelerate prepares them for the processes at hand; every checkpoint holds them, under `name`."""
        model, optimizer = self.accelerator.prepare(model, optimizer)
        bare = self.accelerator.unwrap_model(model)
        self.remember_tensors(name, partial(weights, bare))
        self.remember_tensors(f"{name}_optimizer", partial(adam_moments, bare, optimizer))
        return model, optimizer

    def remember(self, name: str, owner: Stateful) -> None:
        """Keep an object's numbers in every checkpoint, under `name`."""
        self._numbers[name] = owner

    def remember_tensors(self, name: str, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep what `tensors` returns in every checkpoint, under `name`; a resumed run reads it in place."""
        self._tensors[name] = tensors

    # ---- processes --------------------------------------------------------------------------------------------

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

    def _check_world(self) -> None:
        asked, got = self.config.run.processes, self.accelerator.num_processes
        if asked is not None and asked != got:
            raise ConfigError(
                f"run.processes={asked} but {got} started ({self.world}); `accelerate launch --cpu` starts one "
                "process only: use tools/launch.sh"
            )
        if self.config.run.prompts_per_iteration < got:
            raise ConfigError(
                f"run.prompts_per_iteration={self.config.run.prompts_per_iteration} is below the {got} processes; "
                "every process needs at least one prompt"
            )

    def all_sum(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        t = torch.tensor(values, dtype=torch.float64, device=self._metric_device)
        return list(self.accelerator.reduce(t, "sum").tolist())

    def all_sum_tensor(self, x: Tensor) -> Tensor:
        """Sum a small CPU tensor over all processes."""
        return self.accelerator.reduce(x.to(self._metric_device), "sum").cpu()

    def all_max(self, *values: float) -> list[float]:
        """Maximum of each value over all processes."""
        t = torch.tensor(values, dtype=torch.float64, device=self._metric_device)
        return list(self.accelerator.gather(t[None]).amax(0).tolist())

    def rounds(self, calls: int) -> int:
        """Forward calls to make outside `update`: where weights are sharded, as many as the busiest rank."""
        return int(self.all_max(calls)[0]) if self.sharded else calls

    def full_state(self) -> dict[str, Tensor] | None:
        """Where weights are sharded, all of them on the main process (empty elsewhere), else None.

        All ranks must call it.
        """
        return full_state(self.model) if self.sharded else None

    @property
    def _metric_device(self) -> torch.device:
        return self.accelerator.device

    # ---- one update -------------------------------------------------------------------------------------------

    def update(self, losses: Sequence[Loss], idle: Loss) -> float:
        """Backward over all micro-batches, one optimizer step; returns the gradient norm, 0 with nothing to train.

        A non-finite norm skips the step on all ranks and is counted.
        """
        rounds = self.busiest(losses)
        if rounds == 0:
            return 0.0
        self._set_lr()
        norm = self.descend(self.model, self.optimizer, losses, idle, rounds)
        if not math.isfinite(norm):
            self.state.skipped_updates += 1
            log.warning("iteration %d: gradient norm is %s, update skipped", self.state.iteration, norm)
        elif self.ema:
            self.ema.update()
        return norm

    def busiest(self, losses: Sequence[Loss]) -> int:
        """Micro-batches of the rank that has most of them."""
        return int(self.all_max(len(losses))[0])

    def descend(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Sequence[Loss], idle: Loss, rounds: int
    ) -> float:
        """One optimizer step of any prepared model on the sum of `losses`; returns the gradient norm before clipping.

        Every rank makes `rounds` backwards, as many as the busiest one; `idle` is a forward whose gradient is
        multiplied by 0, so that collectives stay in step even where a rank has nothing to train. A non-finite norm
        skips the step on all ranks: they see the same reduced gradient.
        """
        sharded = is_sharded(model)
        for j in range(rounds):
            # sharded gradients are reduced every time: held back, they would take a whole model's memory on each rank
            last = j == rounds - 1 or sharded
            with nullcontext() if last else self.accelerator.no_sync(model):
                loss = losses[j]() if j < len(losses) else idle() * 0.0
                # DDP and FSDP average over ranks; the losses are shares of one global sum
                self.accelerator.backward(loss * self.accelerator.num_processes)
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = float(self.accelerator.clip_grad_norm_(trained, self.config.optim.max_grad_norm))
        # the fp16 scaler must see overflows; it skips the step itself
        if math.isfinite(norm) or self.config.run.mixed_precision == "fp16":
            optimizer.step()
        optimizer.zero_grad()
        return norm

    def _set_lr(self) -> None:
        scale = lr_scale(self.config.optim, self.state.iteration, self.config.run.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * scale

    # ---- the run ----------------------------------------------------------------------------------------------

    def run(self, trainer: Trainer) -> dict[str, float]:
        """Iterate, evaluate, checkpoint until done or asked to stop; returns the last metrics."""
        with self._signals(), self.owning(self.folder):
            self._open()
            with self._progress() as advance:
                metrics = self._iterate(trainer, advance)
            if self.state.iteration < self.config.run.iterations:
                self.save()
                log.warning(
                    "stopped by signal after iteration %d; continue with run.resume=true", self.state.iteration
                )
            else:
                with self.averaged():
                    trainer.save_model()
            self.accelerator.end_training()
        return metrics

    def _iterate(self, trainer: Trainer, advance: Callable[[dict[str, float]], None]) -> dict[str, float]:
        """All iterations that are left, until a signal; returns the last metrics."""
        run, state, watch = self.config.run, self.state, Watch()
        metrics = self._evaluate(trainer) if state.iteration == 0 else {}
        while state.iteration < run.iterations and not self._stop_asked():
            start, cpu = time.perf_counter(), time.process_time()
            metrics = trainer.iterate(state.iteration)
            state.cpu_s += time.process_time() - cpu
            metrics |= {"time/iteration_s": time.perf_counter() - start, "time/cpu_s": state.cpu_s}
            metrics["policy/skipped_updates"] = float(state.skipped_updates)
            metrics["policy/lr"] = float(self.optimizer.param_groups[0]["lr"])
            state.idle_iterations += is_idle(metrics)
            metrics["policy/idle_iterations"] = float(state.idle_iterations)
            state.iteration += 1
            done = state.iteration == run.iterations
            for verdict in watch.look(metrics, last=done):
                if self.is_main:
                    log.warning("iteration %d: %s", state.iteration, verdict.text)
            self._log(state.iteration, metrics)
            if done or state.iteration % run.eval_every == 0:
                metrics |= self._evaluate(trainer)
            if done or state.iteration % run.checkpoint_every == 0:
                self.save()
            advance(metrics)
        return metrics

    @contextmanager
    def owning(self, folder: WorkDir) -> Iterator[None]:
        """A folder belongs to this run alone inside the block, and all ranks see the same folder.

        Raises:
            ConfigError: another process writes into it, or a rank does not see what the first one wrote.
        """
        token = self._on_main(folder.claim)
        try:
            if self.all_max(float(not folder.shows(token)))[0]:
                raise ConfigError(f"{folder.root} is not the same folder on every node; name one on a shared disk")
            yield
        finally:
            if self.is_main:
                folder.release()

    def _on_main(self, action: Callable[[], str]) -> str:
        """What `action` returns on the main process, on all of them. Its error ends all: none waits for the others.

        Raises:
            ConfigError: as `action` does; other processes refer to it.
        """
        outcome = ["", ""]
        if self.is_main:
            try:
                outcome[0] = action()
            except ConfigError as error:
                outcome[1] = str(error)
        if self.accelerator.num_processes > 1:
            broadcast_object_list(outcome)
        if outcome[1]:
            raise ConfigError(outcome[1] if self.is_main else "the first process ended with an error")
        return outcome[0]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The EMA weights inside the block, when there is an EMA."""
        with self.ema.applied() if self.ema else nullcontext():
            yield

    def _open(self) -> None:
        found = self._on_main(self._begin)
        if found:
            self._read_checkpoint(Path(found))
        if self.is_main:
            # the evaluation before the first iteration is repeated, so its row is written again
            self.folder.truncate_metrics(self.state.iteration or -1)
        self.accelerator.init_trackers("logs")
        if self.is_main:
            log.info("%s; %s", self.world, f"resumed from {found}" if found else "new run")

    def _begin(self) -> str:
        """Open the folder; returns the checkpoint to go on from, "" to begin anew."""
        self.folder.open(self.config)
        return str(self.folder.checkpoints.newest() or "") if self.config.run.resume else ""

    def _evaluate(self, trainer: Trainer) -> dict[str, float]:
        with self.averaged(), torch.no_grad():
            metrics = trainer.evaluate(self.state.iteration)
        self._log(self.state.iteration, metrics)
        return metrics

    def _log(self, iteration: int, metrics: dict[str, float]) -> None:
        if self.is_main:
            self.folder.log(iteration, metrics)
        self.accelerator.log(metrics, step=iteration)

    def save(self) -> None:
        """Write a checkpoint on all ranks; complete or absent, never half."""
        self.folder.checkpoints.write(
            self.state.iteration,
            self.config.run.keep_checkpoints,
            self.is_main,
            self._write_checkpoint,
            self.accelerator.wait_for_everyone,
        )

    def _write_checkpoint(self, folder: Path) -> None:
        if self.is_main:
            save_numbers(folder, self._numbers)
        save_tensors(folder, self._kept_tensors())
        a = self.accelerator
        save_accelerator_state(str(folder), [], [], [], [], a.process_index, a.step, a.scaler)

    def _read_checkpoint(self, folder: Path) -> None:
        load_numbers(folder, self._numbers)
        load_tensors(folder, self._kept_tensors())
        load_accelerator_state(str(folder), [], [], [], [], self.accelerator.process_index, self.accelerator.scaler)

    def _kept_tensors(self) -> dict[str, Tensor]:
        return {f"{owner}/{name}": x for owner, tensors in self._tensors.items() for name, x in tensors().items()}

    def _stop_asked(self) -> bool:
        return self.all_max(float(self._stop))[0] > 0

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the iteration in hand, with a checkpoint."""

        def ask(signum: int, frame: Any) -> None:
            self._stop = True

        old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[dict[str, float]], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, disable=not self.is_main) as bar:
            task = bar.add_task("", total=self.config.run.iterations, completed=self.state.iteration)

            def advance(metrics: dict[str, float]) -> None:
                shown = {k: metrics[k] for k in ("reward/mean", "eval/reward", "eval/judge") if k in metrics}
                bar.update(task, advance=1, description="  ".join(f"{k} {v:.3f}" for k, v in shown.items()))

            yield advance


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


def lr_scale(optim: OptimConfig, iteration: int, total: int) -> float:
    """Factor on the learning rate, a pure function of the iteration so that resuming needs no state."""
    if iteration < optim.warmup:
        return (iteration + 1) / optim.warmup
    done = (iteration - optim.warmup) / max(total - optim.warmup, 1)
    if optim.schedule == "linear":
        return 1 - done
    if optim.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
