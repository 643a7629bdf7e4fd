"""Learning from whole samples, without densities of steps: sample, reward, then a loss that the policy itself knows.

For methods that compare with step-level ones: Diffusion-DPO, ReFL, DiffusionNFT. The policy turns a rewarded rollout
into terms; this trainer samples, sums them over micro-batches and processes, and steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mmrl.config import Component
from mmrl.credit import estimate
from mmrl.credit.budget import informative_groups
from mmrl.fields import Stage
from mmrl.recipe import PolicyConfig
from mmrl.registry import find, register
from mmrl.rollout import OutcomeReward, Rollout
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.ema import Ema
from mmrl.trainers.idle import idle_loss
from mmrl.trainers.run import Demands
from mmrl.trainers.stored import fields_given

Rewards = Mapping[str, tuple[OutcomeReward, float]]


class SampleLossConfig(PolicyConfig):
    """A recipe of a loss on whole samples."""

    trainer: Literal["sample_loss"] = "sample_loss"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 8})  # of the rollouts
    loss: Component  # a row of `sample_losses`
    old_decay: float = Field(0.0, ge=0, lt=1)  # samples are drawn by an average of the weights; 0 = the newest ones


class Term(NamedTuple):
    """One micro-batch: its number of rows, and the loss of each of them (rows,), differentiable."""

    rows: int
    loss: Callable[[], Tensor]


class SampleLoss(Protocol):
    """A row of `sample_losses`: the terms of a loss on a rewarded rollout.

    Called with the weights that drew the samples; the terms are evaluated with those of the update. Random numbers
    depend on (key, prompt id) alone; key is (run.seed, iteration).
    """

    def __call__(self, policy: Any, rollout: Rollout, rewards: Rewards, key: tuple[int, int]) -> list[Term]: ...


@register("trainers", "sample_loss", config=SampleLossConfig)
class SampleLossTrainer(PolicyTrainer):
    """The trainer behind `trainer: sample_loss`."""

    config: SampleLossConfig

    def demands(self) -> Demands:
        """
        Raises:
            ComponentError: an unknown loss or option.
        """
        loss = self.config.loss
        row = find("sample_losses", loss.name)
        self._loss: SampleLoss = row.build(loss.options, "loss")
        reader = Stage("loss", f"sample loss {row.name!r}", row.reads(loss.options), ())
        self._compares = "forks" in reader.reads  # the rollouts of a prompt with each other
        policy, reward = ({reader.who: row.facts[role]} if role in row.facts else {} for role in ("policy", "reward"))
        given = fields_given(self.config.plan, None)
        return Demands(reference=True, readers=[reader], given=given, policy=policy, reward=reward)

    def prepare(self) -> None:
        """Begin the average of the weights that sample."""
        self.policy.forecast(self.run.plan)  # a plan that does not fit is refused here
        decay = self.config.old_decay
        self.old = Ema(self.loop.parameters, decay) if decay else None
        if self.old:
            self.loop.remember_tensors("old_policy", self.old.tensors)

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, reward, update."""
        self.run.begin()
        with self._old_weights():
            rollout = self.run.rollout(iteration)
            with self.run.meter.timed("update"):
                terms = self.terms(rollout, iteration)
        total = self.loop.all_sum(sum(t.rows for t in terms))[0]
        metrics: dict[str, float] = {"sample_loss/rows": total}
        if self._compares:
            differing = float(informative_groups(rollout.tree).sum())
            metrics["sample_loss/differing_prompts"] = self.loop.all_sum(differing)[0]
        for _ in range(self.config.optim.updates_per_rollout):
            with self.run.meter.timed("update"):
                metrics |= self.update(rollout, terms, total)
        if self.old:
            self.old.update()
        self.learned_from(rollout, estimate(rollout.tree, "grpo").adv)
        return metrics | self.run.metrics()

    def terms(self, rollout: Rollout, iteration: int) -> list[Term]:
        """This rank's part of the loss; none where nothing differs."""
        return self._loss(self.policy, rollout, self.run.rewarder.rewards, (self.config.run.seed, iteration))

    def update(self, rollout: Rollout, terms: list[Term], total: float) -> dict[str, float]:
        """One optimizer step on the mean over the rows of all ranks."""
        sums: list[Tensor] = []
        losses = [partial(_share, t, total, sums) for t in terms]
        norm = self.loop.update(losses, partial(idle_loss, self.policy, rollout))
        loss = self.loop.all_sum(float(torch.stack(sums).sum()) if sums else 0.0)[0]
        return {"sample_loss/loss": loss, "policy/grad_norm": norm}

    @contextmanager
    def _old_weights(self) -> Iterator[None]:
        """The weights that sample."""
        with self.old.applied() if self.old else nullcontext():
            yield


def _share(term: Term, total: float, sums: list[Tensor]) -> Tensor:
    loss = term.loss().sum() / total
    sums.append(loss.detach().cpu())
    return loss
