"""Branch GRPO: sample a forest, reward its leaves, credit its steps, update on the steps that were decided.

The same for any modality: independent rollouts are the plan {0: G}.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import Tensor

from mmrl.components import build
from mmrl.config import Config
from mmrl.credit import StepAdvantage, compose
from mmrl.credit.budget import informative_groups
from mmrl.credit.select import prune_depths, prune_width
from mmrl.losses.policy import action_weights, clipped_surrogate, kl_estimate, pooled_log_ratio
from mmrl.report.artifacts import save_samples, save_tree
from mmrl.rewards import score
from mmrl.rewards.scoring import Scored, write_outcomes
from mmrl.rollout import ActionLogProbs, BranchPlan, OutcomeReward, Policy, Rollout, check_prompts
from mmrl.trainers.data import prompt_batch
from mmrl.trainers.loop import Loop
from mmrl.trainers.task import Task, build_rewards
from mmrl.tree_ops import path_pairs

log = logging.getLogger(__name__)

EVAL_SEED = 20_000_003  # evaluation noise is the same in every run, whatever run.seed


@dataclass(frozen=True)
class Batch:
    """One rollout ready for the update. Per action (T,): adv, weight, old_logp, owner. steps: (S,) to run."""

    rollout: Rollout
    steps: Tensor
    adv: Tensor
    weight: Tensor
    old_logp: Tensor
    owner: Tensor
    denominator: float  # over all processes


@dataclass
class Sums:
    """Weighted sums over the micro-batches of one update, for the log."""

    values: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "clip_frac", "kl", "log_ratio"), 0.0)
    )
    ratio_dev: float = 0.0

    def add(self, weight: Tensor, **terms: Tensor) -> None:
        """Add sum(weight * term) of each term."""
        for name, x in terms.items():
            self.values[name] += float((weight * x.detach()).sum())


class BranchGrpo:
    """The trainer behind `trainer: branch_grpo`."""

    def __init__(
        self,
        config: Config,
        policy: Policy | None = None,
        task: Task | None = None,
        rewards: Mapping[str, tuple[OutcomeReward, float]] | None = None,
    ) -> None:
        self.config = config
        self.task: Task = task or build("mmrl.tasks", "task", config.task.name, config.task.options)
        self.policy: Policy = policy or build("mmrl.policies", "policy", config.policy.name, config.policy.options)
        self.rewards = dict(rewards) if rewards is not None else build_rewards(config, self.task)
        self.plan = BranchPlan(config.plan)
        self.forecast = self.policy.forecast(self.plan)
        check_prompts(self.task.prompts)
        check_prompts(self.task.eval_prompts)
        if config.loss.kl > 0:
            self.policy.freeze_reference()
        self.loop = Loop(config, self.policy.model)
        self.policy.model = self.loop.model
        self._seconds: dict[str, float] = {}

    def train(self) -> dict[str, float]:
        """Run to the end; returns the last metrics."""
        if self.loop.is_main:
            log.info("plan %s: %s", dict(self.plan.factors), self.forecast)
        return self.loop.run(self)

    # ---- one iteration ----------------------------------------------------------------------------------------

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, reward, credit, select, update."""
        self._seconds = {}
        rollout, scored = self.sample(iteration)
        credit = self.credit(rollout)
        batch = self.select(rollout, credit, iteration)
        metrics: dict[str, float] = {}
        for update in range(self.config.optim.updates_per_rollout):
            with self._timed("update"):
                metrics |= self.update(batch, first=update == 0)
        if iteration == 0:
            self._keep_tree(rollout, credit, "first")
        elif iteration == self.config.run.iterations - 1:
            self._keep_tree(rollout, credit, "last")
        return metrics | self._rollout_metrics(rollout, scored, credit, batch) | self._seconds_metrics()

    def sample(self, iteration: int) -> tuple[Rollout, Scored]:
        """This rank's share of the iteration's prompts, rolled out and rewarded."""
        run, acc = self.config.run, self.loop.accelerator
        prompts = prompt_batch(self.task.prompts, run.prompts_per_iteration, iteration, run.seed)
        mine = prompts[acc.process_index :: acc.num_processes]
        with self._timed("rollout"):
            rollout = self.policy.rollout(mine, self.plan, seed=run.seed, iteration=iteration)
            samples = self.policy.samples(rollout)
        with self._timed("reward"):
            scored = score(samples, self.rewards, run.max_unscored)
        return write_outcomes(rollout, samples, scored.total), scored

    def credit(self, rollout: Rollout) -> StepAdvantage:
        """Advantages per step by the configured estimators."""
        c = self.config.credit
        return compose(
            rollout.tree, [e.spec for e in c.estimators], c.transforms, counting=c.counting, kind=c.step_reward_kind,
            whiten=c.whiten, allow_double_norm=c.allow_double_norm, all_sum=self.loop.all_sum_tensor,
        )  # fmt: skip

    def select(self, rollout: Rollout, credit: StepAdvantage, iteration: int) -> Batch:
        """Which steps get a gradient, with what weight. Rollout, rewards and advantages stay as they are."""
        c, tree = self.config, rollout.tree
        owner = tree.step_of_action(rollout.actions.logp.numel())
        keep = credit.valid & self._unpruned(rollout, iteration)
        if c.loss.drop_zero_spread:
            keep &= informative_groups(tree)[tree.group]
        mask = rollout.actions.trainable & (owner >= 0) & keep[owner.clamp(min=0)]
        weight, denominator = action_weights(tree, owner, mask, c.loss.aggregation, credit.weight, c.loss.max_len)
        adv = credit.adv if c.credit.clip is None else credit.adv.clamp(-c.credit.clip, c.credit.clip)
        adv = adv[owner.clamp(min=0)].float()
        # a zero advantage has no gradient unless the KL acts on it; it stays in the denominator either way
        run = mask & (weight > 0) & ((adv != 0) | (c.loss.kl > 0))
        steps = torch.unique(owner[run])
        total = self.loop.all_sum(denominator)[0]
        old = rollout.actions.logp
        batch = Batch(rollout, steps, adv, torch.where(run, weight, 0.0).float(), old, owner, max(total, 1e-12))
        return self._with_recomputed(batch) if c.loss.recompute_old_logp else batch

    def update(self, batch: Batch, *, first: bool) -> dict[str, float]:
        """One optimizer step over the whole batch in micro-batches."""
        whole = self.config.loss.ratio == "trajectory"
        parts = self.policy.micro_batches(batch.rollout, batch.steps, whole_prompts=whole) if len(batch.steps) else []
        sums = Sums()
        norm = self.loop.update(
            [partial(self._loss, batch, steps, sums) for steps in parts], partial(self._idle_loss, batch)
        )
        total = self.loop.all_sum(*sums.values.values())
        metrics = {f"policy/{k}": v / batch.denominator for k, v in zip(sums.values, total, strict=True)}
        metrics["policy/grad_norm"] = norm
        if first:
            metrics["policy/ratio_dev_max"] = self._check_ratio(sums.ratio_dev)
        return metrics

    def _loss(self, batch: Batch, steps: Tensor, sums: Sums) -> Tensor:
        """The share of one micro-batch in the global loss."""
        c = self.config.loss
        new = self.policy.log_probs(batch.rollout, steps, reference=c.kl > 0)
        device = new.logp.device
        weight = batch.weight[new.index].to(device)
        log_ratio = new.logp - batch.old_logp[new.index].to(device)
        rows, log_rho, share = self._ratio_rows(batch, new, log_ratio)
        adv, w = batch.adv[new.index[rows]].to(device), weight[rows.to(device)] * share.to(device)
        surrogate = clipped_surrogate(log_rho, adv, c.clip_low, c.clip_high, c.dual_clip)
        clipped = (log_rho.exp() - 1 > c.clip_high) | (log_rho.exp() - 1 < -c.clip_low)
        loss = (w * surrogate).sum()
        sums.add(w, clip_frac=clipped.float())
        sums.add(weight, log_ratio=log_ratio)
        sums.ratio_dev = max(sums.ratio_dev, float((log_ratio.detach().exp() - 1).abs().max()))
        if c.kl > 0:
            kl = self._kl(new)
            sums.add(weight, kl=kl)
            loss = loss + c.kl * (weight * kl).sum()
        sums.values["loss"] += float(loss.detach())
        return loss / batch.denominator

    def _ratio_rows(self, batch: Batch, new: ActionLogProbs, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the surrogate: position in `new`, pooled log-ratio, share of the action's weight.

        Per action and per step there is one entry an action. Per trajectory an action has one entry for every
        finished leaf below it, each with that path's ratio, sharing its weight equally.
        """
        every = torch.arange(len(new.index))
        ratio = self.config.loss.ratio
        if ratio == "action":
            return every, log_ratio, torch.ones(len(every))
        if ratio == "step":
            return every, pooled_log_ratio(log_ratio, batch.owner[new.index]), torch.ones(len(every))
        tree = batch.rollout.tree
        leaf, node = path_pairs(tree)
        owner = batch.owner[new.index]
        count = tree.m[owner]
        rows = torch.repeat_interleave(every, count)  # each action once per leaf below its step
        order = torch.argsort(node, stable=True)
        start = tree.m.cumsum(0) - tree.m  # a step is on the path of m leaves
        offset = torch.arange(len(rows)) - torch.repeat_interleave(count.cumsum(0) - count, count)
        trajectory = leaf[order][start[owner[rows]] + offset]
        return rows, pooled_log_ratio(log_ratio[rows], trajectory), 1 / count[rows].float()

    def _kl(self, new: ActionLogProbs) -> Tensor:
        form = self.config.loss.kl_form
        if form == "exact":
            if new.kl is None:
                raise ValueError("loss.kl_form='exact': this policy has no closed form; use k3")
            return new.kl
        if new.ref_logp is None:
            raise ValueError(f"loss.kl_form={form!r}: this policy gives no reference log-probs; use exact")
        return kl_estimate(new.logp, new.ref_logp, form)

    def _idle_loss(self, batch: Batch) -> Tensor:
        """A forward through every trained weight; the loop multiplies it by 0."""
        trainable = batch.owner[batch.rollout.actions.trainable]
        part = self.policy.micro_batches(batch.rollout, torch.unique(trainable))[0]
        return self.policy.log_probs(batch.rollout, part).logp.sum()

    def _with_recomputed(self, batch: Batch) -> Batch:
        """Old log-probs from the training code path, for rollouts made by another engine or dtype."""
        old = batch.old_logp.clone()
        with torch.no_grad():
            for part in self.policy.micro_batches(batch.rollout, batch.steps) if len(batch.steps) else []:
                new = self.policy.log_probs(batch.rollout, part)
                old[new.index] = new.logp.cpu()
        return Batch(batch.rollout, batch.steps, batch.adv, batch.weight, old, batch.owner, batch.denominator)

    def _unpruned(self, rollout: Rollout, iteration: int) -> Tensor:
        p, tree = self.config.prune, rollout.tree
        keep = torch.ones(len(tree), dtype=torch.bool)
        if iteration >= p.until * self.config.run.iterations:
            return keep
        if p.depth_first is not None:
            keep &= prune_depths(tree, p.depth_first, p.depth_stop, p.depth_every, iteration)
        if p.width != "none":
            keep &= prune_width(tree, p.width, self.plan.splits[-1] if self.plan.splits else 0, p.keep)
        return keep

    def _check_ratio(self, deviation: float) -> float:
        """Before the first update of a rollout every ratio must be 1."""
        worst = self.loop.all_max(deviation)[0]
        limit = min(self.config.loss.clip_low, self.config.loss.clip_high) / 2
        if worst > limit and self.loop.is_main:
            log.warning(
                "ratio deviates from 1 by %.2e before the first update (half the clip range is %.2e): rollout and "
                "update disagree; try loss.recompute_old_logp=true",
                worst, limit,
            )  # fmt: skip
        return worst

    # ---- evaluation and records -------------------------------------------------------------------------------

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward, judges and diversity on the evaluation prompts, side by side; pictures go to the run folder."""
        acc = self.loop.accelerator
        prompts = list(self.task.eval_prompts)
        mine = self.policy.generate(prompts[acc.process_index :: acc.num_processes], seed=EVAL_SEED)
        samples = gather_object(mine) if acc.num_processes > 1 else mine
        place = {p.id: i for i, p in enumerate(prompts)}
        samples.sort(key=lambda s: place[s.prompt.id])  # the order of one process, whatever the number of ranks
        scored = score(samples, self.rewards, max_unscored=1.0)
        metrics = {"eval/reward": float(scored.total.nanmean())}
        if len(scored.parts) > 1:
            metrics |= {f"eval/reward/{k}": float(v.nanmean()) for k, v in scored.parts.items()}
        metrics |= {f"eval/{k}": v for k, v in self.task.judges(samples).items()}
        if self.loop.is_main:
            save_samples(samples, scored.total.tolist(), self.loop.folder.root / "samples" / f"{iteration:06d}")
        return metrics

    def save_model(self) -> None:
        """The trained model in its ecosystem's format, under model/."""
        if self.loop.is_main:
            self.policy.save(self.loop.folder.root / "model")

    def _keep_tree(self, rollout: Rollout, credit: StepAdvantage, name: str) -> None:
        if self.loop.is_main:
            save_tree(rollout, credit.adv, self.policy.describe, self.loop.folder.root / "trees" / name)

    def _rollout_metrics(
        self, rollout: Rollout, scored: Scored, credit: StepAdvantage, batch: Batch
    ) -> dict[str, float]:
        total = scored.total[~scored.total.isnan()]
        states = float(torch.unique(rollout.tree.sib[batch.steps]).numel())
        names = list(self.rewards)
        parts = [scored.parts[n] for n in names]
        sums = self.loop.all_sum(
            float(total.sum()), float((total**2).sum()), float(total.numel()), float(rollout.counts["leaves"]),
            float(rollout.counts["calls"]), states, float(credit.info["zero_spread_groups"]),
            float(credit.info["groups"]), *(float(p.nansum()) for p in parts),
            *(float((~p.isnan()).sum()) for p in parts),
        )  # fmt: skip
        r, r2, n, leaves, calls, trained, flat, groups, *rest = sums
        mean = r / max(n, 1)
        metrics = {
            "reward/mean": mean,
            "reward/std": max(r2 / max(n, 1) - mean**2, 0.0) ** 0.5,
            "reward/unscored_frac": 1 - n / leaves,
            "reward/zero_spread_frac": flat / groups,
            "rollout/calls_per_leaf": calls / leaves,
            "rollout/trained_states_per_leaf": trained / leaves,
            "credit/adv_abs_max": self.loop.all_max(float(credit.info["adv_abs_max"]))[0],
        }
        half = len(names)
        if half > 1:
            metrics |= {f"reward/{k}": rest[i] / max(rest[half + i], 1) for i, k in enumerate(names)}
        return metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - start

    def _seconds_metrics(self) -> dict[str, float]:
        return {f"time/{k}_s": v for k, v in self._seconds.items()}


def train(config: Config) -> dict[str, float]:
    """Build everything a recipe names and run it."""
    return BranchGrpo(config).train()
