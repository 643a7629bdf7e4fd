"""What the trainers of a policy share: the run they drive, its evaluation and its model."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

from mmrl.trainers.rollouts import Rollouts

log = logging.getLogger(__name__)


class PolicyTrainer(ABC):
    """A trainer that learns from rollouts of a policy; what it learns from them is its `iterate`."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts, self.policy, self.loop = rollouts, rollouts.policy, rollouts.loop

    def introduction(self) -> str:
        """What the log says before the first iteration."""
        return ""

    def train(self) -> dict[str, float]:
        """Run to the end; returns the last metrics."""
        if self.loop.is_main and (text := self.introduction()):
            log.info(text)
        return self.loop.run(self)

    @abstractmethod
    def iterate(self, iteration: int) -> dict[str, float]:
        """One iteration with its updates; metrics by name."""

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward and judges on the evaluation prompts, side by side; samples go to the run folder."""
        return self.rollouts.evaluate(iteration)

    def save_model(self) -> None:
        """The trained model in its ecosystem's format, under model/."""
        self.rollouts.save_model()
