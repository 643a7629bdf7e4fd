"""Imitation: the policy learns written solutions, or the best of its own samples, by weighted log-likelihood.

`source: reference` is supervised fine-tuning on the task's own solutions, the start that reinforcement learning of a
new format needs. `source: samples` is rejection sampling: sample, keep what is above a threshold, learn it (RAFT, RFT,
the self-training of STaR).
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mmrl.capabilities import OutputWriter
from mmrl.recipe import PolicyConfig
from mmrl.registry import register
from mmrl.rollout import Rollout, reference_solution
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.idle import idle_loss
from mmrl.trainers.references import best_leaves, cut_references, imitation_losses, references
from mmrl.trainers.run import Demands

log = logging.getLogger(__name__)


class ImitationConfig(PolicyConfig):
    """A recipe of imitation: the policy learns written solutions, or the best of its own samples."""

    trainer: Literal["imitation"] = "imitation"
    source: Literal["reference", "samples"] = "reference"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 4})  # of the samples
    rollouts: Path | None = None  # stored ones in place of samples (`mmrl rollouts`, search, annotate)
    keep_above: float = 0.0  # outcome above which a sample is learned
    per_prompt: PositiveInt = 1  # at most so many samples of a prompt, the best ones

    @property
    def samples(self) -> bool:
        """Learns from rollouts, not from references."""
        return self.source == "samples"


@register("trainers", "imitation", config=ImitationConfig, recipe={"optim.lr": 2e-5})
class ImitationTrainer(PolicyTrainer):
    """The trainer behind `trainer: imitation`."""

    config: ImitationConfig

    def demands(self) -> Demands:
        """A policy that writes, for references."""
        return Demands(policy={} if self.config.samples else {"source: reference (not source: samples)": OutputWriter})

    def prepare(self) -> None:
        """
        Raises:
            ValueError: references are asked for but no prompt has one, or the policy cannot write them.
        """
        self.prompts = list(self.run.task.prompts)
        if not self.config.samples and self.config.rollouts is not None:
            raise ValueError("stored rollouts are samples; with rollouts, set source=samples")
        self.run.read_from(self.config.rollouts)
        self._cut = 0.0  # share of the references that sampling could not write
        if not self.config.samples:
            self._keep_solved()
            self._cut = cut_references(self.policy, self.prompts)
        elif self.run.stored is None:
            self.policy.forecast(self.run.plan)  # a plan that does not fit is refused here

    def _keep_solved(self) -> None:
        asked = len(self.prompts)
        self.prompts = [p for p in self.prompts if reference_solution(p) is not None]
        if not self.prompts:
            raise ValueError(
                f"none of {asked} prompts has a reference solution (reference.solution or reference.steps); take "
                "source: samples, or another task"
            )
        if len(self.prompts) < asked:
            log.warning(
                "%d of %d prompts have no reference solution and are not used", asked - len(self.prompts), asked
            )

    def iterate(self, iteration: int) -> dict[str, float]:
        """One optimizer step on the solutions of this iteration's prompts."""
        self.run.begin()
        rollout, weight = self.solutions(iteration)
        metrics: dict[str, float] = {}
        with self.run.meter.timed("update"):
            for _ in range(self.config.optim.updates_per_rollout):
                metrics = self.update(rollout, weight)
        self.learned_from(rollout, weight)
        if not self.config.samples:
            metrics["imitation/cut_frac"] = self._cut
        return metrics | self.run.metrics()

    def solutions(self, iteration: int) -> tuple[Rollout, Tensor]:
        """What this rank learns from: a rollout and (N,) how many chosen solutions go through each step."""
        if self.config.samples:
            rollout = self.run.rollout(iteration)
            leaves = best_leaves(rollout.tree, self.config.keep_above, self.config.per_prompt)
            chosen = torch.zeros(len(rollout.tree), dtype=torch.float64).index_fill(0, leaves, 1.0)
            return rollout, rollout.tree.accumulate(chosen)
        written = references(self.policy, self.run.sampler.prompts(iteration, self.prompts))
        assert written is not None  # prompts without a solution were taken out
        return written, torch.ones(len(written.tree), dtype=torch.float64)

    def update(self, rollout: Rollout, weight: Tensor) -> dict[str, float]:
        """The mean negative log-likelihood per action over all ranks, and one optimizer step on it."""
        tree, trainable = rollout.tree, rollout.actions.trainable
        owner = tree.step_of_action(trainable.numel())
        actions = float(weight[owner[trainable & (owner >= 0)]].sum())
        learned = float((weight[tree.is_leaf]).sum())
        total, learned, asked = self.loop.all_sum(actions, learned, len(rollout.prompts))
        sums: list[Tensor] = []
        losses = imitation_losses(self.policy, rollout, max(total, 1.0), weight=weight, sums=sums)
        norm = self.loop.update(losses, partial(idle_loss, self.policy, rollout))
        loss = self.loop.all_sum(float(torch.stack(sums).sum()) if sums else 0.0)[0]
        return {
            "imitation/nll": loss, "policy/grad_norm": norm, "imitation/actions": total,
            "imitation/solutions_per_prompt": learned / asked,
        }  # fmt: skip
