"""Imitation: the policy learns written solutions, or the best of its own samples, by weighted log-likelihood.

`source: reference` is supervised fine-tuning on the task's own solutions, the start that reinforcement learning of a
new format needs. `source: samples` is rejection sampling: sample, keep what is above a threshold, learn it (RAFT, RFT,
the self-training of STaR).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mmrl.capabilities import Needs, OutputWriter
from mmrl.recipe import PolicyConfig
from mmrl.registry import register
from mmrl.rollout import BranchPlan, OutcomeReward, Policy, Rollout, reference_solution
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.idle import idle_loss
from mmrl.trainers.references import best_leaves, cut_references, imitation_losses, references
from mmrl.trainers.rollouts import Rollouts
from mmrl.trainers.task import Task

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

    def __init__(
        self,
        config: ImitationConfig,
        policy: Policy | None = None,
        task: Task | None = None,
        rewards: Mapping[str, tuple[OutcomeReward, float]] | None = None,
    ) -> None:
        """
        Raises:
            ValueError: references are asked for but no prompt has one, or the policy cannot write them.
        """
        self.config = config
        needs: Needs = {}
        if config.source == "reference":
            needs = {"source: reference (not source: samples)": OutputWriter}
        rollouts = Rollouts(config, policy, task, rewards, policy_needs=needs)
        super().__init__(rollouts)
        self.plan = BranchPlan(config.plan)
        self.prompts = list(self.rollouts.task.prompts)
        if config.source == "reference" and config.rollouts is not None:
            raise ValueError("stored rollouts are samples; with rollouts, set source=samples")
        self.stored = self.rollouts.open_stored(config.rollouts)
        self._cut = 0.0  # share of the references that sampling could not write
        if config.source == "reference":
            self._keep_solved()
            self._cut = cut_references(self.policy, self.prompts)
        elif self.stored is None:
            self.policy.forecast(self.plan)  # a plan that does not fit is refused here

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
        self.rollouts.clear()
        rollout, weight = self.solutions(iteration)
        metrics: dict[str, float] = {}
        with self.rollouts.timed("update"):
            for _ in range(self.config.optim.updates_per_rollout):
                metrics = self.update(rollout, weight)
        self.rollouts.keep_tree(rollout, weight, iteration)
        if not self.config.samples:
            metrics["imitation/cut_frac"] = self._cut
        return metrics | self.rollouts.metrics()

    def solutions(self, iteration: int) -> tuple[Rollout, Tensor]:
        """What this rank learns from: a rollout and (N,) how many chosen solutions go through each step."""
        if self.config.samples:
            rollout = self._samples(iteration)
            leaves = best_leaves(rollout.tree, self.config.keep_above, self.config.per_prompt)
            chosen = torch.zeros(len(rollout.tree), dtype=torch.float64).index_fill(0, leaves, 1.0)
            return rollout, rollout.tree.accumulate(chosen)
        written = references(self.policy, self.rollouts.prompts(iteration, self.prompts))
        assert written is not None  # prompts without a solution were taken out
        return written, torch.ones(len(written.tree), dtype=torch.float64)

    def _samples(self, iteration: int) -> Rollout:
        """This rank's rewarded rollout of the iteration, sampled or read."""
        if self.stored is not None:
            return self.rollouts.read(self.stored, iteration)
        return self.rollouts.rewarded(self.rollouts.prompts(iteration, self.prompts), self.plan, iteration)

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
