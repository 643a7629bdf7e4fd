"""Trains a StepScorer on labelled steps: a process reward model, or any other model that gives steps a logit.

The same loop as branch GRPO, with labelled solutions in place of sampled ones. It knows prompts, steps and labels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmrl.capabilities import Illustrator, begin_iteration, build_with, refuse_row
from mmrl.config import Component
from mmrl.losses.reward import RewardLossConfig, StepLoss, last_labels, smooth, step_loss
from mmrl.recipe import TrainingConfig
from mmrl.registry import find, register
from mmrl.rollout import Prompt, StepScorer, check_prompts
from mmrl.scorers.labelled import Labelled, LabelledTask, StepMeasurer, solution_forest
from mmrl.scorers.metrics import evaluate_steps
from mmrl.scorers.scoring import probabilities
from mmrl.sharding import check_launcher
from mmrl.trainers.callback import Callback
from mmrl.trainers.callbacks import callbacks_of
from mmrl.trainers.data import Admission, prompt_batch
from mmrl.trainers.loop import Loop, Trainer
from mmrl.trainers.preflight import preflight

log = logging.getLogger(__name__)

# what an evaluation logs, and the AUC of every kind of step; mmrl.scorers.metrics.evaluate_steps has the others
MEASURES = ("macro_f1", "f1_right", "f1_wrong", "first_error_f1", "ece")


class RewardModelConfig(TrainingConfig):
    """A recipe of the step-reward trainer. `run.prompts_per_iteration` counts questions, with all their solutions."""

    trainer: Literal["step_reward"] = "step_reward"
    scorer: Component
    rollouts: Path | None = None  # stored ones to learn from: the option `train` of tasks that read them
    loss: RewardLossConfig = RewardLossConfig()


@dataclass(frozen=True)
class Batch:
    """Labelled steps of `prompts` with targets (M,) and weights (M,), and the sum of the weights over all ranks."""

    prompts: Sequence[Prompt]
    data: Labelled
    target: Tensor
    weight: Tensor
    total: float

    def part(self, steps: Tensor) -> Tensor:
        """The rows whose step is one of `steps`."""
        return torch.isin(self.data.node, steps).nonzero().flatten()


@register("trainers", "step_reward", config=RewardModelConfig)
class StepRewardTrainer(Trainer):
    """The trainer behind `trainer: step_reward`."""

    def __init__(
        self,
        config: RewardModelConfig,
        scorer: StepScorer | None = None,
        task: LabelledTask | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        check_launcher("scorers", "scorer", config.scorer.name)
        self._loss: StepLoss = step_loss(config.loss.name, **config.loss.options)
        read = {} if config.rollouts is None else {"train": str(config.rollouts)}
        who, named, options = "trainer: step_reward", config.scorer, config.task.options | read
        if scorer is None:
            refuse_row(who, StepScorer, find("scorers", named.name))  # before the task is made
        chosen = callbacks_of(config, callbacks)
        made: list[tuple[str, str, Component]] = []  # from the recipe
        if scorer is None:
            made.append(("scorers", "scorer", named))
        if task is None:
            made.append(("tasks", "task", config.task.model_copy(update=read)))
        preflight(config, made)
        self.task: LabelledTask = task or build_with({who: LabelledTask}, "tasks", "task", config.task.name, options)
        config.run.count_epochs(len(self.task.prompts))
        self.scorer: StepScorer = scorer or build_with(
            {who: StepScorer}, "scorers", "scorer", named.name, named.options
        )
        check_prompts([*self.task.prompts, *self.task.eval_prompts])
        self.loop = Loop(config, self.scorer.model, chosen)
        self.scorer.model = self.loop.model
        self._admission = Admission(self.scorer.admit, config.run.max_unusable)

    def introduction(self) -> str:
        """What the data look like: most mistakes of layout and labels can be seen in one solution."""
        data = self.task.labelled(self.scorer.admit(list(self.task.prompts)[:64]))
        known = data.label[~data.label.isnan()]
        text = (
            f"{len(self.task.prompts)} questions; of the first 64: {len(data.paths)} solutions, {len(known)} labelled "
            f"steps of {len(data.label)}, mean label {float(known.mean()):.2f}"
        )
        readable = self.scorer.readable(data.rollout)[data.node]
        rows = next((p for p in data.paths if bool(readable[p].all())), None)
        if isinstance(self.scorer, Illustrator) and rows is not None:
            tree = data.rollout.tree
            texts = [data.rollout.texts[v] for v in data.node[rows].tolist()]
            labels = [None if y != y else y for y in data.label[rows].tolist()]
            prompt = data.rollout.prompts[int(tree.group[data.node[rows[0]]])]
            text += f"\none solution as it is read:\n  {self.scorer.illustrate(prompt, texts, labels)}"
        return text

    def iterate(self, iteration: int) -> dict[str, float]:
        """One optimizer step on this iteration's questions with all their solutions."""
        run, loop = self.config.run, self.loop
        start = time.perf_counter()
        begin_iteration(self.scorer)
        prompts = prompt_batch(self.task.prompts, run.prompts_per_iteration, iteration, run.seed)
        mine = self._admission.fill(loop.share(prompts), loop.share(self.task.prompts))
        batch, unread = self.batch(mine)
        sums: list[Tensor] = []
        wanted = torch.unique(batch.data.node[batch.weight > 0])
        scorer, rollout = self.scorer, batch.data.rollout
        parts = scorer.micro_batches(rollout, wanted, whole_prompts=self._loss.needs_path) if len(wanted) else []
        losses = [partial(self.loss, batch, steps, sums) for steps in parts]
        norm = self.loop.update(losses, partial(self.idle, batch))
        mean = float(torch.stack(sums).sum()) if sums else 0.0
        loss, bad, labels, unusable = self.loop.all_sum(
            mean, unread, int((batch.weight > 0).sum()), len(self._admission.bad)
        )
        return {
            "loss/mean": loss, "policy/grad_norm": norm, "data/labelled_steps": labels,
            "data/unreadable_steps": bad, "data/unusable_prompts": unusable,
            "time/update_s": time.perf_counter() - start,
        }  # fmt: skip

    def batch(self, prompts: Sequence[Prompt]) -> tuple[Batch, int]:
        """Targets and weights of everything known about these prompts, and how many labelled steps cannot be read."""
        c, data = self.config.loss, self.task.labelled(prompts)
        readable = self.scorer.readable(data.rollout)[data.node]
        label = data.label.where(readable, torch.nan)
        unread = int((~data.label.isnan() & ~readable).sum())
        if c.last_step_only:
            label = last_labels(label, data.solution)
        weight = self._weights(label, data.solution)
        total = self.loop.all_sum(float(weight.sum()))[0]
        return Batch(prompts, data, smooth(label, c.smoothing), weight, total), unread

    def _weights(self, label: Tensor, solution: Tensor) -> Tensor:
        """(M,) 1 where labelled; balanced, every class (label >= 1/2 or below) or solution adds up to 1, over all
        processes: with sizes of this process alone, what a step counts would depend on its company."""
        known, balance = (~label.isnan()).float(), self.config.loss.balance
        if balance == "class":
            right = (label >= 0.5).float()
            good, bad = self.loop.all_sum(float((known * right).sum()), float((known * (1 - right)).sum()))
            return known / (good * right + bad * (1 - right)).clamp(min=1)
        if balance == "solution":
            return known / torch.bincount(solution, weights=known)[solution].clamp(min=1).float()
        return known

    def loss(self, batch: Batch, steps: Tensor, sums: list[Tensor]) -> Tensor:
        """This micro-batch's share of the mean loss over all labelled steps; `sums` collects what it was.

        Every step goes through the scorer once, however many solutions label it.
        """
        rows = batch.part(steps)
        steps = torch.unique(batch.data.node[rows])
        logits = self.scorer.logits(batch.data.rollout, steps)
        device = logits.device
        logits = logits[torch.searchsorted(steps, batch.data.node[rows]).to(device)]
        tree, node = batch.data.rollout.tree, batch.data.node
        compared = tree.group[node] if self.config.loss.among == "prompt" else batch.data.solution
        target, weight, path = (x[rows].to(device) for x in (batch.target, batch.weight, compared))
        total = self._loss(logits, target, weight, path).sum() / batch.total
        sums.append(total.detach().cpu())
        return total

    def idle(self, batch: Batch) -> Tensor:
        """A forward of one step, for a rank that has nothing left to train; of a made-up one if none can be read."""
        rollout = batch.data.rollout
        first = self.scorer.readable(rollout).nonzero().flatten()[:1]
        if not len(first):
            rollout, first = solution_forest(batch.prompts[:1], [[["1"]]])[0], torch.tensor([0])
        return self.scorer.logits(rollout, first).sum()

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Measures on the evaluation questions; every process computes them all, they are few."""
        begin_iteration(self.scorer)
        data = self.task.labelled(self._admission.good(self.task.eval_prompts))
        scores = probabilities(self.scorer, data.rollout)[data.node]
        rows = [(p, p[~scores[p].isnan()]) for p in data.paths]
        good = [kept.tolist() for p, kept in rows if len(kept) == len(p)]  # a solution is measured whole
        labels = [[None if y != y else y for y in data.label[r].tolist()] for r in good]
        measures = evaluate_steps(
            [scores[r].tolist() for r in good], labels, [[data.kinds[i] for i in r] for r in good]
        )
        kept = {k: v for k, v in measures.items() if k.split("/")[-1] == "auc" or k in MEASURES}
        if isinstance(self.task, StepMeasurer):
            kept |= self.task.measures(data, scores)
        return {f"eval/{k}": v for k, v in kept.items() if v == v} | {
            "eval/unread_solutions": float(len(rows) - len(good))
        }

    def save_model(self, folder: Path) -> None:
        """The scorer in its own format; all ranks call it."""
        state = self.loop.full_state()
        if self.loop.is_main:
            self.scorer.save(folder, state)
