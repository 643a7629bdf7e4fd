"""A step scorer that learns while its scores train a policy: one update per rollout, on the outcomes just seen."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Annotated

import torch
from pydantic import PositiveFloat
from torch import Tensor

from mmrl.config import ConfigError, Section
from mmrl.losses.reward import step_loss
from mmrl.registry import of_kind
from mmrl.rollout import Rollout, StepReward, StepScorer
from mmrl.trainers.loop import Loop

log = logging.getLogger(__name__)


class OnlineConfig(Section):
    """A scorer that learns along: after every rollout one update on its outcomes (PRIME, a critic)."""

    scorer: str  # name of the step reward, or of the reading that has it
    loss: Annotated[str, of_kind("step_losses")] = (
        "bce"  # bradley_terry learns from pairs of a prompt's outcomes (OPRL)
    )
    lr: PositiveFloat = 1e-6  # PRIME
    spread: bool = False  # every step gets the mean outcome below it; false: the last step alone gets the outcome


class OnlineScorer:
    """PRIME's loop for any StepScorer: by default cross-entropy on outcomes in [0, 1], with an optimizer of its own.

    A loss that compares steps compares those of a prompt: its leaves, or with `spread` all its steps. The scores an
    iteration used are those of before its update. Checkpoints of the run hold the scorer too.

    Raises:
        ConfigError: the named step reward is missing or cannot be trained, or has no trainable parameter.
    """

    def __init__(self, scorer: StepScorer, loop: Loop, config: OnlineConfig) -> None:
        self.scorer, self.loop, self.config = scorer, loop, config
        parameters = [p for p in scorer.model.parameters() if p.requires_grad]
        if not parameters:
            raise ConfigError("online.scorer has no trainable parameter; leave `online` out to keep it frozen")
        optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)
        scorer.model, self.optimizer = loop.prepare("online", scorer.model, optimizer)
        self._loss = step_loss(config.loss)

    @classmethod
    def of(cls, config: OnlineConfig, scorers: Mapping[str, StepReward | None], loop: Loop) -> OnlineScorer:
        """The one that the recipe's `online:` names, among those of its step rewards and readings."""
        scorer = scorers.get(config.scorer)
        if not isinstance(scorer, StepScorer):
            trainable = sorted(name for name, s in scorers.items() if isinstance(s, StepScorer))
            raise ConfigError(
                f"online.scorer={config.scorer!r} is no trainable step reward or reading; trainable here: "
                f"{', '.join(trainable) or 'none'}"
            )
        return cls(scorer, loop, config)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One optimizer step on the outcomes of this rollout; every rank runs as many backwards as the busiest."""
        label = self.labels(rollout)
        steps = (~label.isnan() & self.scorer.readable(rollout)).nonzero().flatten()
        total = self.loop.all_sum(len(steps))[0]
        whole = self._loss.needs_path
        parts = self.scorer.micro_batches(rollout, steps, whole_prompts=whole) if len(steps) else []
        own = torch.zeros(len(label), dtype=torch.bool)
        own[steps] = True
        sums: list[float] = []
        losses = [partial(self._part, rollout, part[own[part]], label, total, sums) for part in parts]
        idle = partial(self._idle, rollout)
        norm = self.loop.descend(self.scorer.model, self.optimizer, losses, idle, self.loop.busiest(losses))
        if not math.isfinite(norm):
            log.warning("online: gradient norm is %s, update of the scorer skipped", norm)
        return {"online/loss": self.loop.all_sum(sum(sums))[0]}

    def labels(self, rollout: Rollout) -> Tensor:
        """(N,) outcome in [0, 1] at leaves, NaN elsewhere; with `spread`, everywhere the mean outcome below."""
        tree = rollout.tree
        outcome = tree.outcome.clamp(0, 1)
        if not self.config.spread:
            return outcome.float()
        known = ~outcome.isnan()
        total, count = tree.accumulate(outcome.nan_to_num()), tree.accumulate(known.double())
        return (total / count.where(count > 0, torch.nan)).float()

    def _part(self, rollout: Rollout, steps: Tensor, label: Tensor, total: float, sums: list[float]) -> Tensor:
        logits = self.scorer.logits(rollout, steps)
        each = self._loss(logits, label[steps].to(logits.device), path=rollout.tree.group[steps])
        loss = each.sum() / total
        sums.append(float(loss.detach()))
        return loss

    def _idle(self, rollout: Rollout) -> Tensor:
        """A forward of something, for a rank that has fewer parts."""
        first = self.scorer.readable(rollout).nonzero().flatten()[:1]
        return self.scorer.logits(rollout, first).sum()
