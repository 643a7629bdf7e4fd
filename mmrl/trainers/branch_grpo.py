"""Branch GRPO: sample a forest, reward its leaves, credit its steps, update on the steps that were decided.

The same for any modality: independent rollouts are the plan {0: G}.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl.capabilities import Increments, OutputWriter, ReferenceMover, require
from mmrl.config import ConfigError
from mmrl.credit import StepAdvantage, compose, validate
from mmrl.credit.estimate import CreditConfig
from mmrl.credit.select import PruneConfig, prune_depths, prune_width
from mmrl.credit.table import estimator_of, transform_of
from mmrl.fields import Stage
from mmrl.losses.policy import LossConfig, loss_rules
from mmrl.recipe import PolicyConfig
from mmrl.registry import find, register
from mmrl.rollout import BranchPlan, Prompt, Rollout, StepReward, StepScorer
from mmrl.sharding import sharding_asked
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.history import OutcomeHistory
from mmrl.trainers.idle import idle_loss
from mmrl.trainers.online import OnlineConfig
from mmrl.trainers.policy_update import Batch, Sums, build_batch, most_uncertain, policy_loss, recompute_old_logp
from mmrl.trainers.references import ReferenceConfig, cut_references, imitation_losses, references, unsolved
from mmrl.trainers.refill import refill
from mmrl.trainers.run import Demands
from mmrl.trainers.stored import fields_given

log = logging.getLogger(__name__)


class BranchGrpoConfig(PolicyConfig):
    """A recipe of branch GRPO."""

    trainer: Literal["branch_grpo"] = "branch_grpo"
    rollouts: Path | None = None  # stored ones (`mmrl rollouts`) in place of sampled ones
    online: OnlineConfig | None = None  # one of them learns along
    credit: CreditConfig = CreditConfig()
    prune: PruneConfig = PruneConfig()
    loss: LossConfig = LossConfig()
    imitation: ReferenceConfig = ReferenceConfig()


@register("trainers", "branch_grpo", config=BranchGrpoConfig)
class BranchGrpo(PolicyTrainer):
    """The trainer behind `trainer: branch_grpo`."""

    config: BranchGrpoConfig

    def demands(self) -> Demands:
        """Fields for its credit, initial weights for its KL."""
        config = self.config
        self._credit_how: dict[str, Any] = {
            "kind": config.credit.step_reward_kind, "whiten": config.credit.whiten,
            "allow_double_norm": config.credit.allow_double_norm, "counting": config.credit.counting,
        }  # fmt: skip
        self._estimators = [e.spec for e in config.credit.estimators]
        self._rules = loss_rules(config.loss)
        readers = _readers(config)  # checks every option, with its place in the recipe
        validate(self._estimators, config.credit.transforms or [], **self._credit_how)
        _check_group(config)
        asked: dict[str, Any] = {}  # of the policy
        if config.imitation.weight > 0:
            asked["imitation (off with imitation.weight=0)"] = OutputWriter
        if config.loss.reference_every is not None:
            asked["loss.reference_every"] = ReferenceMover
            if config.loss.kl == 0:
                raise ConfigError("loss.reference_every moves the reference of the KL, which is off; set loss.kl")
            if sharding_asked():
                raise ConfigError("loss.reference_every does not know weights in parts (FSDP); take it out")
        if config.optim.minibatches > config.run.prompts_per_iteration:
            raise ConfigError(
                f"optim.minibatches={config.optim.minibatches}: an update needs a prompt, and "
                f"run.prompts_per_iteration={config.run.prompts_per_iteration}"
            )
        return Demands(
            reference=config.loss.kl > 0,
            readers=readers,
            given=fields_given(config.plan, config.rollouts),
            policy=asked,
            learns="" if config.online is None else config.online.scorer,
        )

    def prepare(self) -> None:
        """
        Raises:
            ConfigError: stored rollouts are to be refilled, or the scorer that is to learn along cannot.
        """
        config, run = self.config, self.run
        self.forecast = self.policy.forecast(run.plan)
        run.read_from(config.rollouts, run.plan)
        if run.stored is not None and config.run.refill:
            raise ConfigError("run.refill samples further prompts, which stored rollouts cannot; set run.refill=0")
        # with those that a trained scorer brings by default
        self._transforms = _transforms(config, run.rewarder.step_rewards)
        validate(self._estimators, self._transforms, **self._credit_how)
        if config.online is not None:
            run.rewarder.learn(config.online, self.loop)
        self._history = OutcomeHistory.of(self._estimators)
        if self._history is not None:
            self.loop.remember("outcomes", self._history)
        self._cut = 0.0  # share of the references that sampling could not write
        if config.imitation.weight > 0:
            self._cut = cut_references(self.policy, run.task.prompts)
        if config.loss.reference_every is not None:
            self._mover: ReferenceMover = require("loss.reference_every", ReferenceMover, self.policy, "policies")
            self._mover.reference_tensors()  # refuses LoRA
            self.loop.remember_tensors("reference", self._mover.reference_tensors)
        self._mismatch: dict[str, float] = {}  # of the engine that sampled against the trainer
        self._refills = 0

    def introduction(self) -> str:
        """The plan and what it costs, or where the rollouts come from."""
        source = f"rollouts of {self.config.rollouts}" if self.run.stored else self.forecast
        return f"plan {dict(self.run.plan.factors)}: {source}"

    # ---- one iteration ----------------------------------------------------------------------------------------

    def iterate(self, iteration: int) -> dict[str, float]:
        """Sample, reward, credit, select, update."""
        self._refills = 0
        self.run.begin()
        rollout = self.sample(iteration)
        credit = self.credit(rollout)
        if self._history is not None:
            self._history.add(rollout.prompts, rollout.tree, credit)
        batches = self.select(rollout, credit, iteration)
        metrics: dict[str, float] = {}
        for epoch in range(self.config.optim.updates_per_rollout):
            for part, batch in enumerate(batches):
                with self.run.meter.timed("update"):
                    metrics |= self.update(batch, first=epoch == part == 0)
        if self.config.imitation.weight > 0:
            with self.run.meter.timed("imitation"):
                metrics |= self.imitate(rollout)
        metrics |= self.run.rewarder.update(rollout)
        every = self.config.loss.reference_every
        if every is not None and (iteration + 1) % every == 0:
            self._mover.move_reference(self.config.loss.reference_share)
        self.learned_from(rollout, credit.adv)
        return metrics | self.run.metrics() | self._rollout_metrics(rollout, credit, batches)

    def sample(self, iteration: int) -> Rollout:
        """This rank's share of the iteration's prompts, rolled out, rewarded and refilled; or read from disk."""
        rollout = self.run.rollout(iteration)
        if rounds := self.config.run.refill:
            rollout, self._refills = refill(
                rollout, self.run.sampler.others(), partial(self._again, iteration), rounds
            )
        return rollout

    def _again(self, iteration: int, prompts: Sequence[Prompt], attempt: int) -> Rollout | None:
        good = self.run.sampler.admission.good(prompts)
        return self.run.rewarded(good, iteration, attempt) if good else None

    def credit(self, rollout: Rollout) -> StepAdvantage:
        """Advantages per step by the configured estimators."""
        past = [] if self._history is None else self._history.past(rollout.prompts)
        all_sum = self.loop.all_sum_tensor
        return compose(
            rollout.tree, self._estimators, self._transforms, all_sum=all_sum, past=past, **self._credit_how
        )

    def select(self, rollout: Rollout, credit: StepAdvantage, iteration: int) -> list[Batch]:
        """Which steps get a gradient, with what weight: a batch for every update that the rollout gets.

        Each of them is normalised as if its prompts were all; their ratios are those before the first update.
        """
        c, unpruned, count = self.config, self._unpruned(rollout, iteration), self.config.optim.minibatches
        batches = []
        self._mismatch = {}
        for part in range(count):
            batch = build_batch(
                rollout, credit, unpruned & (rollout.tree.group % count == part), c.loss, c.credit.clip
            )
            batch = batch.with_total(self.loop.all_sum(batch.denominator)[0])
            if c.loss.recompute_old_logp:
                batch, apart = recompute_old_logp(self.policy, batch, c.loss.importance_cap, self.loop.rounds)
                self._mismatch = {k: max(v, self._mismatch.get(k, v)) for k, v in apart.items()} or self._mismatch
            if c.loss.top_entropy is not None:
                batch = most_uncertain(self.policy, batch, c.loss.top_entropy, self.loop.rounds, self.loop.gather)
            batches.append(batch)
        return batches

    def update(self, batch: Batch, *, first: bool) -> dict[str, float]:
        """One optimizer step over the whole batch in micro-batches."""
        whole = self.config.loss.ratio == "trajectory"
        parts = self.policy.micro_batches(batch.rollout, batch.steps, whole_prompts=whole) if len(batch.steps) else []
        sums = Sums()
        losses = [
            partial(policy_loss, self.policy, batch, self.config.loss, steps, sums, self._rules) for steps in parts
        ]
        norm = self.loop.update(losses, partial(idle_loss, self.policy, batch.rollout))
        total = self.loop.all_sum(*sums.values.values())
        metrics = {f"policy/{k}": v / batch.denominator for k, v in zip(sums.values, total, strict=True)}
        if metrics["policy/entropy"] == 0:  # a policy that gives none
            del metrics["policy/entropy"]
        metrics["policy/grad_norm"] = norm
        if first:
            metrics["policy/ratio_dev_max"] = self._check_ratio(sums.ratio_dev)
            if self.run.stored is not None and self.loop.state.iteration == 0:
                self._check_stored(*self.loop.all_sum(sums.values["clip_frac"], float(batch.weight.sum())))
        return metrics

    def imitate(self, rollout: Rollout) -> dict[str, float]:
        """One optimizer step on the reference solutions of prompts whose tree found no right answer."""
        c = self.config.imitation
        failed = unsolved(rollout, c.solved_at)
        written = references(self.policy, failed)
        count = 0 if written is None else written.actions.logp.numel()
        total, prompts, asked = self.loop.all_sum(count, len(failed), len(rollout.prompts))
        losses = [] if written is None else imitation_losses(self.policy, written, total / c.weight)
        norm = self.loop.update(losses, partial(idle_loss, self.policy, rollout))
        return {
            "imitation/unsolved_frac": prompts / asked,
            "imitation/grad_norm": norm,
            "imitation/cut_frac": self._cut,
        }

    def _unpruned(self, rollout: Rollout, iteration: int) -> Tensor:
        p, tree = self.config.prune, rollout.tree
        keep = torch.ones(len(tree), dtype=torch.bool)
        if iteration >= p.until * self.config.run.iterations:
            return keep
        if p.depth_first is not None:
            keep &= prune_depths(tree, p.depth_first, p.depth_stop, p.depth_every, iteration)
        if p.width != "none":
            keep &= prune_width(tree, p.width, self.run.plan.splits[-1] if self.run.plan.splits else 0, p.keep)
        return keep

    def _check_ratio(self, deviation: float) -> float:
        """Before the first update of a rollout every ratio must be 1; of stored ones, before the first of the run."""
        worst = self.loop.all_max(deviation)[0]
        limit = min(self.config.loss.clip_low, self.config.loss.clip_high) / 2
        moved = self.run.stored is not None and self.loop.state.iteration > 0  # away from the policy that sampled
        if not worst <= limit and not moved and self.loop.is_main:  # NaN too
            log.warning(
                "ratio deviates from 1 by %.2e before the first update (half the clip range is %.2e): rollout and "
                "update disagree; try loss.recompute_old_logp=true",
                worst, limit,
            )  # fmt: skip
        return worst

    def _check_stored(self, clipped: float, weight: float) -> None:
        """Raises ValueError when this policy would clip most of the stored actions before it has learned anything."""
        if clipped > 0.5 * weight:
            raise ValueError(
                f"{self.config.rollouts}: {clipped / weight:.0%} of the stored actions lie outside the clip range "
                "before the first update, so this policy is not the one that sampled them. Start from that model "
                "(policy.model), store rollouts anew, or, for engines that round differently, set "
                "loss.recompute_old_logp=true"
            )

    # ---- records ----------------------------------------------------------------------------------------------

    def _rollout_metrics(self, rollout: Rollout, credit: StepAdvantage, batches: Sequence[Batch]) -> dict[str, float]:
        sums = {"flat": float(credit.info["zero_spread_groups"]), "groups": float(credit.info["groups"])}
        sums["trained"] = float(torch.unique(rollout.tree.sibling_set[torch.cat([b.steps for b in batches])]).numel())
        sums["leaves"] = float(self.run.meter.cost["leaves"] or rollout.tree.is_finished.sum())  # sampled, or read
        sums = dict(zip(sums, self.loop.all_sum(*sums.values()), strict=True))
        metrics = {
            "reward/zero_spread_frac": sums["flat"] / sums["groups"],
            "rollout/trained_states_per_leaf": sums["trained"] / sums["leaves"],
            "credit/adv_abs_max": self.loop.all_max(float(credit.info["adv_abs_max"]))[0],
        }
        if self.config.run.refill:
            metrics["rollout/refills"] = self.loop.all_max(float(self._refills))[0]
        if self.config.loss.recompute_old_logp:
            worst = self.loop.all_max(*(self._mismatch.get(k, 0.0) for k in ("mean", "max", "k3")))
            metrics |= dict(zip(("mismatch/mean", "mismatch/max", "mismatch/k3"), worst, strict=True))
        return metrics


def _check_group(config: BranchGrpoConfig) -> None:
    """Raises ConfigError when every estimator compares rollouts of a prompt and the plan makes one."""
    alone = config.rollouts is None and BranchPlan(config.plan).leaves == 1
    if alone and all(estimator_of(e.spec)[0].facts.get("relative") for e in config.credit.estimators):
        names = ", ".join(e.name for e in config.credit.estimators)
        raise ConfigError(
            f"plan {dict(config.plan)} makes one rollout of each prompt, and {names} compares the rollouts of a "
            "prompt: every advantage is 0. Sample a group, such as plan: {0: 8}"
        )


def _readers(config: BranchGrpoConfig) -> list[Stage]:
    """Transforms, estimators and loss rules of a recipe, with what they read and write."""
    stages = []
    for i, spec in enumerate(config.credit.transforms or []):
        row, options = transform_of({"name": spec} if isinstance(spec, str) else spec)
        row.check(options, where := f"credit.transforms.{i}")
        stages.append(Stage(where, f"transform {row.name!r}", row.reads(options), row.writes(options)))
    for i, estimator in enumerate(config.credit.estimators):
        row, options = estimator_of(estimator.spec)
        row.check(options, where := f"credit.estimators.{i}")
        stages.append(Stage(where, f"estimator {row.name!r}", row.reads(options), ()))
    for i, rule in enumerate(config.loss.rules):
        row = find("loss_rules", rule.name)
        stages.append(Stage(f"loss.rules.{i}", f"loss rule {row.name!r}", row.reads(rule.options), ()))
    if config.loss.mask_truncated:
        stages.append(Stage("loss.mask_truncated", "the mask of cut completions", ("tags.truncated",), ()))
    return stages


def _transforms(config: BranchGrpoConfig, step_rewards: Mapping[str, tuple[StepReward, float]]) -> list[Any]:
    """The recipe's transforms; when it names none and a trained scorer rewards steps, clip and delta."""
    if config.credit.transforms is not None:
        return config.credit.transforms
    rewards = [reward for reward, _ in step_rewards.values()]
    scores = [r for r in rewards if isinstance(r, StepScorer) and not (isinstance(r, Increments) and r.increments)]
    return [{"name": "clip", "eta": 0.5}, "delta"] if scores else []
