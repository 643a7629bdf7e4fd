"""The loop every trainer shares: iterations, evaluations, checkpoints, resume, logs, signals, one update.

It knows nothing of rollouts or rewards. A trainer says what an iteration is; what else happens in a run, callbacks do.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from torch import Tensor, nn

from mmrl.config import ConfigError
from mmrl.recipe import TrainingConfig
from mmrl.sharding import full_state, is_sharded
from mmrl.trainers.callback import Callback
from mmrl.trainers.checkpoint import (
    OptimizerNumbers,
    Stateful,
    bare_optimizer,
    load_numbers,
    load_tensors,
    optimizer_tensors,
    save_numbers,
    save_tensors,
    weights,
)
from mmrl.trainers.optimizers import build_optimizer, lr_schedule
from mmrl.trainers.processes import Processes
from mmrl.trainers.progress import progress_bar
from mmrl.trainers.run_folder import RunFolder
from mmrl.trainers.verdicts import is_idle

log = logging.getLogger(__name__)

Loss = Callable[[], Tensor]  # one micro-batch: forward and a scalar, already over its global denominator


class Trainer(ABC):
    """Trains a model: a subclass says what an iteration is, how the model is evaluated and how it is saved."""

    loop: Loop

    def introduction(self) -> str:
        """Lines for the log before the first iteration, written by the main process."""
        return ""

    @abstractmethod
    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration with its updates; metrics by name."""

    @abstractmethod
    def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics under eval/."""

    @abstractmethod
    def save_model(self, folder: Path) -> None:
        """Write the model in its ecosystem's format; all ranks call it."""

    def train(self) -> dict[str, float]:
        """Iterate, evaluate and write checkpoints until the run is done or a signal stops it.

        Returns:
            the last metrics.
        """
        loop, state, run = self.loop, self.loop.state, self.loop.config.run
        if loop.is_main and (text := self.introduction()):
            log.info(text)
        with loop.signals(), loop.owning(loop.folder):
            loop.open()
            for callback in loop.callbacks:
                callback.on_start(self)
            with progress_bar(run.iterations, state.iteration, shown=loop.is_main) as advance:
                metrics = self._evaluated() if state.iteration == 0 else {}
                while not loop.done and not loop.is_interrupted():
                    start, cpu = time.perf_counter(), time.process_time()
                    metrics = self.iterate(state.iteration)
                    state.iteration += 1
                    state.cpu_s += time.process_time() - cpu
                    metrics |= {"time/iteration_s": time.perf_counter() - start, "time/cpu_s": state.cpu_s}
                    metrics |= loop.counts(idle=is_idle(metrics))
                    for callback in loop.callbacks:
                        callback.on_iteration(self, metrics)
                    loop.log(metrics)
                    if loop.done or state.iteration % run.eval_every == 0:
                        metrics |= self._evaluated()
                    if loop.done or state.iteration % run.checkpoint_every == 0:
                        self._save()
                    advance(metrics)
            if not loop.done:
                self._save()
                log.warning("stopped by signal after iteration %d; continue with run.resume=true", state.iteration)
            for callback in loop.callbacks:
                callback.on_end(self, metrics)
            loop.accelerator.end_training()
        return metrics

    def _evaluated(self) -> dict[str, float]:
        with self.loop.evaluating(), torch.no_grad():
            metrics = self.evaluate(self.loop.state.iteration)
            for callback in self.loop.callbacks:
                callback.on_evaluation(self, metrics)
        self.loop.log(metrics)
        return metrics

    def _save(self) -> None:
        folder = self.loop.save()
        for callback in self.loop.callbacks:
            callback.on_checkpoint(self, folder)


@dataclass
class LoopState:
    """What a checkpoint holds besides weights, optimizer and random states. Data order follows from `iteration`."""

    iteration: int = 0  # complete ones
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


class Loop(Processes):
    """Model and optimizer of one run as its processes need them, its folder, checkpoints and callbacks.

    Raises:
        ConfigError: the launcher started another number of processes than `run.processes` asks for, or the run
            folder cannot be used.
    """

    def __init__(self, config: TrainingConfig, model: nn.Module, callbacks: Sequence[Callback] = ()) -> None:
        super().__init__(config.run)
        self.config, self.folder = config, RunFolder(config.run.output)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ConfigError("the policy has no trainable parameter")
        self._schedule = lr_schedule(config.optim, config.run.iterations)
        optimizer = build_optimizer(config.optim, self.parameters)
        self._numbers: dict[str, Stateful] = {}
        self._tensors: dict[str, Callable[[], Mapping[str, Tensor]]] = {}
        self.model, self.optimizer = self.prepare("model", model, optimizer)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]  # sharding replaces them
        self.sharded = is_sharded(self.model)
        self.state = LoopState()
        self.remember("loop", self.state)
        self._interrupted = self._stopped = False
        self.callbacks = list(callbacks)
        for callback in self.callbacks:
            callback.setup(self)
            if isinstance(callback, Stateful):
                name = f"callbacks/{type(callback).__name__}"
                again = sum(known.startswith(name) for known in self._numbers)
                self.remember(f"{name}.{again}" if again else name, callback)

    def prepare(
        self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Both as accelerate prepares them for the processes at hand; every checkpoint holds them, under `name`."""
        model, optimizer = self.accelerator.prepare(model, optimizer)
        bare = self.accelerator.unwrap_model(model)
        self.remember_tensors(name, partial(weights, bare))
        self.remember_tensors(f"{name}_optimizer", partial(optimizer_tensors, bare, optimizer))
        if not isinstance(bare_optimizer(optimizer), torch.optim.AdamW):  # whose state is tensors alone
            self.remember(f"{name}_optimizer", OptimizerNumbers(bare, optimizer))
        return model, optimizer

    def remember(self, name: str, owner: Stateful) -> None:
        """Keep an object's numbers in every checkpoint, under `name`."""
        self._numbers[name] = owner

    def remember_tensors(self, name: str, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Keep what `tensors` returns in every checkpoint, under `name`; a resumed run reads it in place."""
        self._tensors[name] = tensors

    def rounds(self, calls: int) -> int:
        """Forward calls to make outside `update`: where weights are sharded, as many as the busiest rank."""
        return int(self.all_max(calls)[0]) if self.sharded else calls

    def full_state(self) -> dict[str, Tensor] | None:
        """Where weights are sharded, all of them on the main process (empty elsewhere), else None.

        All ranks must call it.
        """
        return full_state(self.model) if self.sharded else None

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
        else:
            for callback in self.callbacks:
                callback.on_update()
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
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optim.lr * self._schedule(self.state.iteration)

    # ---- the run ----------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """All iterations are complete, or a callback has ended the run."""
        return self._stopped or self.state.iteration >= self.config.run.iterations

    def stop(self, reason: str) -> None:
        """End the run after the iteration in hand, as complete; all ranks must call it."""
        if self.is_main and not self._stopped:
            log.info("ended after iteration %d: %s", self.state.iteration, reason)
        self._stopped = True

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The weights that are evaluated and exported inside the block: the trained ones, or what callbacks say."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.enter_context(callback.evaluating())
            yield

    def open(self) -> None:
        """Open the run folder, and go on from its newest checkpoint where the recipe asks for it."""
        found = self.on_main(self._begin)
        if found:
            self.load(Path(found))
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

    def counts(self, *, idle: bool) -> dict[str, float]:
        """Metrics of the updates so far. idle: in the last iteration there was nothing to learn from."""
        self.state.idle_iterations += idle
        return {
            "policy/skipped_updates": float(self.state.skipped_updates),
            "policy/lr": float(self.optimizer.param_groups[0]["lr"]),
            "policy/idle_iterations": float(self.state.idle_iterations),
        }

    def log(self, metrics: dict[str, float]) -> None:
        """Into metrics.jsonl and the trackers."""
        if self.is_main:
            self.folder.log(self.state.iteration, metrics)
        self.accelerator.log(metrics, step=self.state.iteration)

    def save(self) -> Path:
        """Write a checkpoint on all ranks; complete or absent, never half. Returns its folder."""
        self.folder.checkpoints.write(
            self.state.iteration,
            self.config.run.keep_checkpoints,
            self.is_main,
            self._write_checkpoint,
            self.accelerator.wait_for_everyone,
        )
        return self.folder.checkpoints.folder / f"{self.state.iteration:06d}"

    def _write_checkpoint(self, folder: Path) -> None:
        if self.is_main:
            save_numbers(folder, self._numbers)
        save_tensors(folder, self._kept_tensors())
        a = self.accelerator
        save_accelerator_state(str(folder), [], [], [], [], a.process_index, a.step, a.scaler)

    def load(self, folder: Path) -> None:
        """Take weights, optimizer and counts from a checkpoint."""
        load_numbers(folder, self._numbers)
        load_tensors(folder, self._kept_tensors())
        load_accelerator_state(str(folder), [], [], [], [], self.accelerator.process_index, self.accelerator.scaler)

    def _kept_tensors(self) -> dict[str, Tensor]:
        return {f"{owner}/{name}": x for owner, tensors in self._tensors.items() for name, x in tensors().items()}

    def is_interrupted(self) -> bool:
        """A signal has asked one of the processes to stop."""
        return self.all_max(float(self._interrupted))[0] > 0

    @contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run after the iteration in hand, with a checkpoint."""

        def ask(signum: int, frame: Any) -> None:
            self._interrupted = True

        old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)
