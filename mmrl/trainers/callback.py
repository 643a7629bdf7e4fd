"""The protocol of callbacks: what watches a run, writes something of its own, or ends it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor

from mmrl.rollout import Rollout

if TYPE_CHECKING:
    from mmrl.trainers.base import PolicyTrainer
    from mmrl.trainers.loop import Loop, Trainer


@runtime_checkable
class Callback(Protocol):
    """Watches a run: a subclass fills the hooks that it needs, the others do nothing.

    All ranks call every hook, in the order of the callbacks, so a hook may sum over ranks (`trainer.loop.all_sum`);
    what it writes it writes where `trainer.loop.is_main`. A callback that has `state_dict` and `load_state_dict`
    (numbers and lists of numbers by name) keeps its state in every checkpoint and gets it back before `on_start`.
    """

    def setup(self, loop: Loop) -> None:
        """Model and optimizer are prepared, no checkpoint is read: `loop.remember_tensors` adds to what they keep."""
        return

    def on_start(self, trainer: Trainer) -> None:
        """The run begins, or goes on from a checkpoint that has been read."""
        return

    def on_update(self) -> None:
        """The optimizer has changed the trained weights."""
        return

    def on_rollout(self, trainer: PolicyTrainer, rollout: Rollout, mark: Tensor) -> None:
        """A rollout was learned from. mark: (N,) what each of its steps was worth: its advantage, weight or pairs."""
        return

    def on_iteration(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """An iteration is complete; what is added to its metrics is logged. `trainer.loop.state` counts it."""
        return

    def on_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Metrics under eval/ were measured, and the model still has the weights that they were measured with."""
        return

    def on_checkpoint(self, trainer: Trainer, folder: Path) -> None:
        """A checkpoint lies in `folder`, whole and on the disk."""
        return

    def on_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The run has ended: `trainer.loop.done`, or it was stopped by a signal and can be resumed."""
        return

    def evaluating(self) -> AbstractContextManager[None]:
        """Around every evaluation and the export of the model: puts other weights in place of the trained ones."""
        return nullcontext()
