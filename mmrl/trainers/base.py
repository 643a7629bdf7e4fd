"""What the trainers of a policy share: the run they drive, its evaluation and its model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrl.rollout import OutcomeReward, Policy, Rollout
from mmrl.task import Task
from mmrl.trainers.callback import Callback
from mmrl.trainers.loop import Trainer
from mmrl.trainers.run import Demands, Run


class PolicyTrainer(Trainer):
    """A trainer that learns from rollouts of a policy; what it learns from them is its `iterate`.

    Args:
        policy, task, rewards: in place of those the recipe names. rewards: name -> (reward, weight).
        callbacks: beside those the recipe names.
    """

    def __init__(
        self,
        config: Any,
        policy: Policy | None = None,
        task: Task | None = None,
        rewards: Mapping[str, tuple[OutcomeReward, float]] | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.run = Run(config, policy, task, rewards, self.demands(), callbacks)
        self.policy, self.loop = self.run.policy, self.run.loop
        self.prepare()

    def demands(self) -> Demands:
        """What it asks of the rest of the recipe; its own options are checked here, before anything is loaded."""
        return Demands()

    def prepare(self) -> None:
        """The rest of what an iteration needs, once the run is put together."""

    def learned_from(self, rollout: Rollout, mark: Tensor) -> None:
        """Show a rollout, with a number (N,) per step, to the callbacks."""
        for callback in self.loop.callbacks:
            callback.on_rollout(self, rollout, mark)

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward and judges on the evaluation prompts, side by side; samples go to the run folder."""
        return self.run.evaluate(iteration)

    def save_model(self, folder: Path) -> None:
        """The policy in its ecosystem's format; all ranks call it."""
        self.run.save_model(folder)
