"""What the initial model earns on each prompt, for rewards that are measured against it."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.capabilities import InitialSampler, require
from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Rollout


@register(
    "readings",
    "baseline",
    writes=("tags.baseline",),
    source="Contrastive Rewards",
    policy=InitialSampler,
    reference=True,
    costs=("baseline_samples",),
)
class Baseline:
    """Outcomes of `n` samples of the initial model per prompt, the same for all its steps; NaN = not scorable.

    Each prompt is sampled when a process first meets it, by weights that never change and from random numbers of its
    own, so that a run that goes on has the same ones.
    """

    def __init__(self, n: Annotated[int, Field(ge=1)] = 5, seed: int = 0) -> None:
        self._n, self._seed = n, seed
        self._outcomes: dict[str, Tensor] = {}  # (n,) by prompt id

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """tags.baseline (N, n) of a rollout."""
        policy: InitialSampler = require("reading 'baseline'", InitialSampler, context.policy, "policies")
        new = [p for p in rollout.prompts if p.id not in self._outcomes]
        if new:
            groups = policy.initial_samples(new, self._n, seed=self._seed)
            outcome = context.outcome([s for group in groups for s in group])
            for prompt, own in zip(new, outcome.split([len(g) for g in groups]), strict=True):
                self._outcomes[prompt.id] = own
            context.cost["baseline_samples"] += len(outcome)
        table = torch.stack([self._outcomes[p.id] for p in rollout.prompts])
        return {"tags.baseline": table[rollout.tree.group]}
