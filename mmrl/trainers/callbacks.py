"""The callbacks that a recipe can name, and those that every run has."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor

from mmrl.capabilities import build_with, require
from mmrl.config import ConfigError
from mmrl.recipe import TrainingConfig
from mmrl.registry import hint, register
from mmrl.report.artifacts import save_tree
from mmrl.rollout import Rollout
from mmrl.trainers.callback import Callback
from mmrl.trainers.checkpoint import Checkpoints
from mmrl.trainers.ema import AverageWeights
from mmrl.trainers.loop import Trainer
from mmrl.trainers.verdicts import Watch
from mmrl.workdir import publish

if TYPE_CHECKING:
    from mmrl.trainers.base import PolicyTrainer
    from mmrl.trainers.loop import Loop

log = logging.getLogger(__name__)


def callbacks_of(config: TrainingConfig, own: Sequence[Callback] = ()) -> list[Callback]:
    """The callbacks of a run: those that every run has, those of its recipe, and those given in Python.

    `optim.ema` and `run.report` stand for callbacks too. One that is named takes the place of the same one that every
    run has.

    Raises:
        ComponentError: naming its place, one that does not exist, refuses an option or lacks a hook.
    """
    named: list[Callback] = []
    for i, section in enumerate(config.callbacks):
        where = f"callbacks.{i}"
        named.append(build_with({where: Callback}, "callbacks", where, section.name, section.options))
    for callback in own:
        named.append(require("callbacks", Callback, callback))
    usual: list[Callback] = [KeepTrees(), WarnOfVerdicts(), ExportModel()]
    if config.optim.ema is not None:
        usual.insert(0, AverageWeights(config.optim.ema))
    if config.run.report:
        usual.append(WriteReport())
    replaced = {type(callback) for callback in named}
    return [*(callback for callback in usual if type(callback) not in replaced), *named]


@register("callbacks", "warn_of_verdicts")
class WarnOfVerdicts(Callback):
    """Warns when metrics show that nothing, or nearly nothing, can be learned; every run has it."""

    def __init__(self) -> None:
        self._watch = Watch()

    def on_iteration(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Look at the metrics of one iteration."""
        for verdict in self._watch.look(metrics, last=trainer.loop.done):
            if trainer.loop.is_main:
                log.warning("iteration %d: %s", trainer.loop.state.iteration, verdict.text)


@register("callbacks", "keep_trees")
class KeepTrees(Callback):
    """Keeps the tree of the first prompt, with a number per step, of the first and the last iteration, for the report.

    Every run has it.
    """

    def on_rollout(self, trainer: PolicyTrainer, rollout: Rollout, mark: Tensor) -> None:
        """Write below trees/ of the run folder."""
        loop = trainer.loop
        names = {loop.config.run.iterations - 1: "last", 0: "first"}
        if loop.is_main and loop.state.iteration in names:
            save_tree(rollout, mark, trainer.policy.describe, loop.folder.root / "trees" / names[loop.state.iteration])


@register("callbacks", "export_model")
class ExportModel(Callback):
    """Writes the trained model in its ecosystem's format, below model/ of the run folder; every run has it."""

    def on_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write it when the run is complete."""
        loop = trainer.loop
        model = loop.folder.root / "model"
        if loop.done:
            with loop.evaluating(), publish(model) if loop.is_main else nullcontext(model) as part:
                trainer.save_model(part)


@register("callbacks", "report")
class WriteReport(Callback):
    """Writes report.html, the page of the run (`run.report`)."""

    def on_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write it, also of a run that was stopped."""
        if trainer.loop.is_main:
            from mmrl.report.page import write_report

            write_report(trainer.loop.folder.root)


class Monitor(Callback):
    """Remembers the best value of a metric; a subclass says what follows.

    The value is the main process's on all ranks, and the best one is part of every checkpoint.

    Args:
        metric: such as eval/reward, of every evaluation, or reward/mean, of every iteration.
        mode: which values are better.
        min_delta: a value that is better by no more than this is no improvement.
    """

    def __init__(self, metric: str, mode: Literal["max", "min"] = "max", min_delta: NonNegativeFloat = 0.0) -> None:
        self.metric, self.mode, self.min_delta = metric, mode, min_delta
        self.best: float | None = None
        self.last = -1  # iteration of the last value

    def on_value(self, trainer: Trainer, value: float, better: bool) -> None:
        """The metric was measured; better: it improved on the best value before."""
        raise NotImplementedError

    def on_iteration(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Look at a metric of iterations."""
        if not self.metric.startswith("eval/"):
            self._look(trainer, metrics)

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Look at a metric of evaluations."""
        if self.metric.startswith("eval/"):
            self._look(trainer, metrics)

    def _look(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self.metric not in metrics:
            raise ConfigError(
                f"callbacks: {self.metric!r} is not measured{hint(self.metric, metrics)}; measured here: "
                f"{', '.join(metrics)}"
            )
        # a run that was stopped in its first evaluation repeats it
        if trainer.loop.state.iteration == self.last:
            return
        value = trainer.loop.from_main(metrics[self.metric])
        better = value == value and (self.best is None or self._gain(value) > self.min_delta)
        self.last = trainer.loop.state.iteration
        if better:
            self.best = value
        self.on_value(trainer, value, better)

    def _gain(self, value: float) -> float:
        assert self.best is not None
        return value - self.best if self.mode == "max" else self.best - value

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, and when the last one was measured."""
        return {"best": self.best, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same, read back."""
        self.best, self.last = state["best"], state["last"]


@register("callbacks", "early_stop")
class EarlyStop(Monitor):
    """Ends the run when a metric has not improved for so many measurements in a row; the model is exported as ever.

    Args:
        metric: such as eval/reward, of every evaluation, or reward/mean, of every iteration.
        patience: measurements without improvement after which the run ends.
        mode: which values are better.
        min_delta: a value that is better by no more than this is no improvement.
    """

    def __init__(
        self,
        metric: str,
        patience: PositiveInt = 3,
        mode: Literal["max", "min"] = "max",
        min_delta: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(metric, mode, min_delta)
        self.patience, self.waited = patience, 0

    def on_start(self, trainer: Trainer) -> None:
        """A run that has ended does not go on when it is resumed."""
        self._stop_if_due(trainer)

    def on_value(self, trainer: Trainer, value: float, better: bool) -> None:
        """Count."""
        self.waited = 0 if better else self.waited + 1
        self._stop_if_due(trainer)

    def _stop_if_due(self, trainer: Trainer) -> None:
        if self.waited >= self.patience:
            best = "no number" if self.best is None else f"{self.best:.4g}"
            trainer.loop.stop(f"{self.metric} has not improved on {best} in {self.waited} measurements")

    def state_dict(self) -> dict[str, Any]:
        """Also how many measurements brought no improvement."""
        return super().state_dict() | {"waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same, read back."""
        super().load_state_dict(state)
        self.waited = state["waited"]


@register("callbacks", "best_model")
class BestModel(Monitor):
    """Keeps the model of the best measurement: best/ITERATION/model of the run folder, and best.json beside it.

    Args:
        metric: such as eval/reward, of every evaluation, or reward/mean, of every iteration.
        mode: which values are better.
        min_delta: a value that is better by no more than this is no improvement.
    """

    def setup(self, loop: Loop) -> None:
        """Refuse a second one, whose models would take the place of the first one's."""
        metrics = [callback.metric for callback in loop.callbacks if isinstance(callback, BestModel)]
        if len(metrics) > 1:
            raise ConfigError(f"callbacks: best_model is there for {' and '.join(metrics)}; a run keeps one")

    def on_value(self, trainer: Trainer, value: float, better: bool) -> None:
        """Export the model, in the place of the one before."""
        if not better:
            return
        loop = trainer.loop
        record = {"metric": self.metric, "value": value, "iteration": loop.state.iteration}

        def write(folder: Path) -> None:
            trainer.save_model(folder / "model")
            if loop.is_main:
                (folder / "best.json").write_text(json.dumps(record) + "\n")

        wait = loop.accelerator.wait_for_everyone
        Checkpoints(loop.folder.root / "best").write(loop.state.iteration, 1, loop.is_main, write, wait)


@runtime_checkable
class HubApi(Protocol):
    """The calls of `huggingface_hub.HfApi` that a push needs."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Make the repository where there is none."""

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> Any:
        """Upload a folder as one commit."""


@register("callbacks", "push_to_hub")
class PushToHub(Callback):
    """Uploads the exported model to the Hugging Face Hub when the run is complete.

    The repository is made, and the token tried, before the first iteration.

    Args:
        repo: such as user/name.
        private: of a repository that is made.
        api: in place of `huggingface_hub.HfApi()`.
    """

    def __init__(self, repo: str, private: bool = True, *, api: HubApi | None = None) -> None:
        self.repo, self.private, self._api = repo, private, api

    def on_start(self, trainer: Trainer) -> None:
        """Make the repository."""
        trainer.loop.on_main(self._create)

    def on_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Upload model/ of the run folder."""
        if trainer.loop.done:
            trainer.loop.on_main(lambda: self._upload(trainer))

    def _create(self) -> str:
        try:
            self._hub().create_repo(self.repo, private=self.private, exist_ok=True)
        # of the network, of rights, of a name that cannot be: the client has an exception for each
        except Exception as error:
            raise ConfigError(
                f"callbacks: nothing can be pushed to {self.repo}: {error}; see `hf auth login`"
            ) from error
        return self.repo

    def _upload(self, trainer: Trainer) -> str:
        model = trainer.loop.folder.root / "model"
        message = f"Model after {trainer.loop.state.iteration} iterations of {trainer.loop.config.trainer}"
        try:
            self._hub().upload_folder(repo_id=self.repo, folder_path=str(model), commit_message=message)
        except Exception as error:
            raise ConfigError(
                f"{model} is complete, but it was not pushed: {error}; try `hf upload {self.repo} {model}`"
            ) from error
        log.info("pushed %s to %s", model, self.repo)
        return self.repo

    def _hub(self) -> HubApi:
        if self._api is None:
            from huggingface_hub import HfApi

            self._api = HfApi()
        return self._api
