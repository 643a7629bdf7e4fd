"""Step-level preference optimisation: rollouts become pairs of steps with a common parent, and the better one gains.

Rollouts are sampled and rewarded as in branch GRPO, or read from disk. Which steps are compared is a builder of
`mmrl.preference`, what is optimised a preset of `mmrl.losses.preference`; neither knows tokens from latents.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.capabilities import begin_iteration, build_with
from mmrl.config import Component
from mmrl.fields import Stage
from mmrl.losses.preference import (
    PairLoss,
    Side,
    guide_weights,
    preference_loss,
    preset,
    reward_weights,
    visit_smoothing,
)
from mmrl.preference import Pairs
from mmrl.recipe import PolicyConfig
from mmrl.registry import build, find, register
from mmrl.rollout import ActionLogProbs, Policy, Rollout
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.idle import idle_loss
from mmrl.trainers.run import Demands
from mmrl.trainers.stored import fields_given

log = logging.getLogger(__name__)


class StepPreferenceConfig(PolicyConfig):
    """A recipe of step-level preference optimisation."""

    trainer: Literal["step_preference"] = "step_preference"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 4})  # of the rollouts
    rollouts: Path | None = None  # stored ones (`mmrl rollouts`) in place of sampled ones
    loss: Component = Component(name="dpo")  # a row of `preferences`; other keys change its settings
    pairs: Component | None = None  # a row of `pairs`; null = the builder that belongs to the loss
    guide: Component | None = None  # a policy trained by DPO whose log-ratios weight the actions (TGDPO)


@dataclass(frozen=True)
class Segment:
    """One side of all pairs: step (M,), pair (M,) and step weight (M,), pair after pair."""

    step: Tensor
    pair: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Batch:
    """Pairs of one rollout ready for the update. smoothing: (P,), None = the settings'. total: weight of all ranks."""

    rollout: Rollout
    pairs: Pairs
    chosen: Segment
    rejected: Segment
    smoothing: Tensor | None
    total: float

    def parts(self, policy: Policy) -> list[Tensor]:
        """Micro-batches of steps such that no pair is torn: whole prompts where smaller parts would tear one."""
        steps = torch.unique(torch.cat([self.chosen.step, self.rejected.step]))
        steps = steps[self._has_actions(steps)]
        if not len(steps):
            return []
        parts = policy.micro_batches(self.rollout, steps)
        return parts if self._together(parts) else policy.micro_batches(self.rollout, steps, whole_prompts=True)

    def _has_actions(self, steps: Tensor) -> Tensor:
        """(S,) bool: the step has a trainable action."""
        trainable = self.rollout.actions.trainable
        owner = self.rollout.tree.step_of_action(trainable.numel())
        return torch.isin(steps, owner[trainable])

    def _together(self, parts: Sequence[Tensor]) -> bool:
        place = torch.full((len(self.rollout.tree),), -1)
        for i, part in enumerate(parts):
            place[part] = i
        both = torch.cat([self.chosen.step, self.rejected.step]), torch.cat([self.chosen.pair, self.rejected.pair])
        at, pair = place[both[0]], both[1]
        at, pair = at[at >= 0], pair[at >= 0]
        first = torch.full((len(self.pairs),), len(parts)).scatter_reduce(0, pair, at, "amin")
        last = torch.full((len(self.pairs),), -1).scatter_reduce(0, pair, at, "amax")
        return bool((last <= first).all())

    def pairs_in(self, steps: Tensor) -> Tensor:
        """(P',) int, the pairs of a part of `parts`."""
        rows = torch.isin(self.chosen.step, steps)
        return torch.unique(self.chosen.pair[rows])


@register("trainers", "step_preference", config=StepPreferenceConfig)
class StepPreferenceTrainer(PolicyTrainer):
    """The trainer behind `trainer: step_preference`."""

    config: StepPreferenceConfig

    def demands(self) -> Demands:
        """
        Raises:
            ValueError: an unknown preset, builder or option, or a loss whose parts the recipe does not give.
        """
        config = self.config
        self.settings = preset(config.loss.name, **config.loss.options)
        self._pairs = _pairs_of(config)
        self._build_pairs = build("pairs", "pairs", self._pairs.name, self._pairs.options)
        self._check_guide()
        protocol = find("preferences", config.loss.name).facts.get("policy")
        return Demands(
            reference=not self.settings.reference_free,
            readers=_readers(config, self._pairs),
            given=fields_given(config.plan, config.rollouts),
            policy={} if protocol is None else {f"loss: preference loss {config.loss.name!r}": protocol},
        )

    def prepare(self) -> None:
        """
        Raises:
            ValueError: stored rollouts cannot be read.
        """
        config = self.config
        self.guide: Policy | None = None
        if config.guide is not None:
            self.guide = guide = build_with(
                {"guide": Policy}, "policies", "guide", config.guide.name, config.guide.options
            )
            guide.model.to(self.loop.accelerator.device).requires_grad_(False)
        self.run.read_from(config.rollouts)
        self._empty = 0  # iterations without a pair in a row
        if self.run.stored is None:
            self.policy.forecast(self.run.plan)  # a plan that does not fit is refused here

    def _check_guide(self) -> None:
        if self.settings.guide and self.config.guide is None:
            raise ValueError(
                f"loss {self.config.loss.name!r} weights actions by a policy trained by DPO: name it as `guide`, a "
                "section like `policy`, or set loss.guide=0"
            )
        if self.config.guide is not None and not self.settings.guide:
            raise ValueError("the recipe has a `guide` but its loss uses none; set loss.guide, or take it out")

    def introduction(self) -> str:
        """Where rollouts and pairs come from, and the loss."""
        source = f"rollouts of {self.config.rollouts}" if self.run.stored else f"plan {dict(self.run.plan.factors)}"
        return f"{source}; pairs {self._pairs.model_dump()}; {self.settings}"

    # ---- one iteration ----------------------------------------------------------------------------------------

    def iterate(self, iteration: int) -> dict[str, float]:
        """Rollouts, pairs, update."""
        self.run.begin()
        begin_iteration(self.guide)
        batch = self.batch(self.run.rollout(iteration))
        metrics: dict[str, float] = {}
        for update in range(self.config.optim.updates_per_rollout):
            with self.run.meter.timed("update"):
                new = self.update(batch)
            metrics |= new if update == 0 else {"preference/loss_last": new["preference/loss"]}
        self.learned_from(batch.rollout, _marks(batch))
        return metrics | self._counts(batch) | self.run.metrics()

    def batch(self, rollout: Rollout) -> Batch:
        """The pairs of a rollout with their weights; warns when no rank has one."""
        tree, s = rollout.tree, self.settings
        pairs: Pairs = self._build_pairs(tree).check(tree)
        chosen, rejected = (self._segment(rollout, pairs, side) for side in ("chosen", "rejected"))
        _need_density(rollout, pairs, chosen, rejected)
        smoothing = None
        if s.smooth_by_visits:
            visits = tree.tags["visits"]
            smoothing = visit_smoothing(visits[pairs.chosen], visits[pairs.rejected])
        total = self.loop.all_sum(float(pairs.weight.sum()))[0]
        self._note_empty(total == 0, pairs)
        return Batch(rollout, pairs, chosen, rejected, smoothing, max(total, 1e-12))

    def _note_empty(self, empty: bool, pairs: Pairs) -> None:
        """Warns of the first iteration without pairs; stored rollouts that gave none in a whole epoch never will."""
        self._empty = self._empty + 1 if empty else 0
        if self._empty == 1 and self.loop.is_main:
            log.warning("nothing to learn in this iteration: %s", pairs.left_out())
        if self.run.stored is not None and self._empty >= len(self.run.stored):
            raise ValueError(
                f"none of the stored rollouts in {self.config.rollouts} gives a pair; the last: {pairs.left_out()}. "
                "Lower pairs.threshold, choose another pairs.by, or store rollouts whose rewards differ"
            )

    def _segment(self, rollout: Rollout, pairs: Pairs, side: str) -> Segment:
        step, pair = pairs.segments(rollout.tree, side)
        gamma = self.settings.gamma if side == "chosen" else -self.settings.gamma
        return Segment(step, pair, reward_weights(rollout.tree.step_reward[step], pair, gamma))

    def update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step over all pairs in micro-batches."""
        sums: dict[str, float] = {}
        losses = [partial(self.loss, batch, steps, sums) for steps in batch.parts(self.policy)]
        idle = partial(idle_loss, self.policy, batch.rollout, reference=not self.settings.reference_free)
        norm = self.loop.update(losses, idle)
        names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
        total = self.loop.all_sum(*(sums.get(k, 0.0) for k in names))
        told = {f"preference/{k}": v / batch.total for k, v in zip(names, total, strict=True)}
        return told | {"policy/grad_norm": norm}

    def loss(self, batch: Batch, steps: Tensor, sums: dict[str, float]) -> Tensor:
        """This micro-batch's share of the mean loss over the pairs of all ranks; adds to `sums`."""
        each, rows = self.pair_losses(batch, steps)
        weight = batch.pairs.weight[rows].to(each.loss.device)
        for name, x in each.metrics().items():
            sums[name] = sums.get(name, 0.0) + float((weight * x).sum())
        return (weight * each.loss).sum() / batch.total

    def pair_losses(self, batch: Batch, steps: Tensor) -> tuple[PairLoss, Tensor]:
        """The loss of every pair whose segments lie in `steps`, and which pairs these are (P',)."""
        rows = batch.pairs_in(steps)
        new = self.policy.log_probs(batch.rollout, steps, reference=not self.settings.reference_free)
        if new.ref_logp is None and not self.settings.reference_free:
            raise ValueError("this policy gives no reference log-probs (ref_logp); set loss.reference_free=true")
        guide = self._per_action(batch.rollout, steps, new)
        chosen = self._side(batch, batch.chosen, rows, new, guide, chosen=True)
        rejected = self._side(batch, batch.rejected, rows, new, guide, chosen=False)
        smoothing = None if batch.smoothing is None else batch.smoothing[rows]
        gap = batch.pairs.gap[rows]
        return preference_loss(chosen, rejected, len(rows), self.settings, gap=gap, smoothing=smoothing), rows

    def _side(
        self, batch: Batch, segment: Segment, rows: Tensor, new: ActionLogProbs, extra: Tensor | None, *, chosen: bool
    ) -> Side:
        """The trainable actions of one side of the pairs `rows`, log-probs looked up in `new`."""
        tree, s = batch.rollout.tree, self.settings
        mine = torch.isin(segment.pair, rows)
        step, weight = segment.step[mine], segment.weight[mine]
        pair = torch.searchsorted(rows, segment.pair[mine])
        place = torch.full((batch.rollout.actions.logp.numel(),), -1)
        place[new.index.cpu()] = torch.arange(len(new.index))
        at, span = place[tree.actions_of(step)], tree.span[step]
        keep = at >= 0  # an action without a density takes no part
        at, pair, weight = at[keep], pair.repeat_interleave(span)[keep], weight.repeat_interleave(span)[keep]
        at = at.to(new.logp.device)
        mine_extra = None if extra is None else extra[at]
        return Side(
            new.logp[at],
            None if new.ref_logp is None else new.ref_logp[at],
            pair,
            weight,
            None if mine_extra is None or not s.guide else guide_weights(mine_extra, s.guide, s.beta, chosen=chosen),
            mine_extra if s.regulariser else None,
        )

    def _per_action(self, rollout: Rollout, steps: Tensor, new: ActionLogProbs) -> Tensor | None:
        """What the loss reads of every action of `new` besides its log-probs."""
        wanted = self.settings.needs_actions
        if wanted == "guide":
            assert self.guide is not None and new.ref_logp is not None
            with torch.no_grad():
                told = self.guide.log_probs(rollout, steps)
            if not torch.equal(told.index, new.index):
                raise ValueError("the guide sees other actions than the policy; give a policy of the same kind")
            return told.logp.to(new.ref_logp) - new.ref_logp
        if wanted == "token_reward":
            return rollout.actions.payload["token_reward"][new.index.cpu()].to(new.logp)
        return None

    def _counts(self, batch: Batch) -> dict[str, float]:
        """Pairs of all ranks, and what was left out, per prompt."""
        counts = {"pairs": float(len(batch.pairs)), **{k: float(v) for k, v in batch.pairs.counts.items()}}
        sums = self.loop.all_sum(float(len(batch.rollout.prompts)), *counts.values())
        per = {k: v / sums[0] for k, v in zip(counts, sums[1:], strict=True) if k != "prompts"}
        return {"preference/pairs": sums[1]} | {f"pairs/{k}_per_prompt": v for k, v in per.items()}


def _pairs_of(config: StepPreferenceConfig) -> Component:
    """The recipe's pair builder, or the one that belongs to its loss."""
    if config.pairs is not None:
        return config.pairs
    pairs = find("preferences", config.loss.name).facts.get("pairs")
    if pairs is None:
        raise ValueError(f"loss {config.loss.name!r} names no pair builder of its own; set pairs.name")
    return Component(**pairs)


def _readers(config: StepPreferenceConfig, pairs: Component) -> list[Stage]:
    """The pair builder and the loss of a recipe, with what they read."""
    stages = []
    for section, kind, component in (("pairs", "pairs", pairs), ("loss", "preferences", config.loss)):
        row = find(kind, component.name)
        stages.append(Stage(section, f"{row.kind.singular} {row.name!r}", row.reads(component.options), ()))
    return stages


def _need_density(rollout: Rollout, pairs: Pairs, chosen: Segment, rejected: Segment) -> None:
    """Raises ValueError when a side of a pair has no trainable action."""
    trainable = rollout.actions.trainable
    owner = rollout.tree.step_of_action(trainable.numel())
    dense = torch.zeros(len(rollout.tree), dtype=torch.bool)
    dense[owner[trainable & (owner >= 0)]] = True
    for segment in (chosen, rejected):
        some = torch.bincount(segment.pair[dense[segment.step]], minlength=len(pairs)) > 0
        if not bool(some.all()):
            i = int((~some).nonzero()[0])
            raise ValueError(
                f"pair {i}: steps {int(pairs.chosen[i])} and {int(pairs.rejected[i])} were not both sampled with a "
                f"density ({int((~some).sum())} such pairs); compare steps where the policy explores"
            )


def _marks(batch: Batch) -> Tensor:
    """(N,) for the picture of the tree: 1 for steps of chosen segments, -1 of rejected ones, summed over pairs."""
    marks = torch.zeros(len(batch.rollout.tree), dtype=torch.float64)
    for segment, sign in ((batch.chosen, 1.0), (batch.rejected, -1.0)):
        marks.index_add_(0, segment.step, torch.full((len(segment.step),), sign, dtype=torch.float64))
    return marks
