"""The reading `baseline`: outcomes of the initial model on each prompt, for rewards that are measured against it."""

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

    Each prompt is sampled when a process first meets it, by weights that never change and with random numbers that
    depend on the prompt alone, so that a resumed run gets the same ones.
    """

    def __init__(self, n: Annotated[int, Field(ge=1)] = 5, seed: int = 0) -> None:
        self._n, self._seed = n, seed
        # Prompt id -> (n,) outcomes.
        self._outcomes: dict[str, Tensor] = {}

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """`tags.baseline` (N, n) of a rollout."""
        policy: InitialSampler = require("reading 'baseline'", InitialSampler, context.policy, "policies")
        new = [prompt for prompt in rollout.prompts if prompt.id not in self._outcomes]
        if new:
            groups = policy.initial_samples(new, self._n, seed=self._seed)
            outcome = context.outcome([sample for group in groups for sample in group])
            outcomes_of_prompts = outcome.split([len(group) for group in groups])
            for prompt, outcomes in zip(new, outcomes_of_prompts, strict=True):
                self._outcomes[prompt.id] = outcomes
            context.cost["baseline_samples"] += len(outcome)
        table = torch.stack([self._outcomes[prompt.id] for prompt in rollout.prompts])
        return {"tags.baseline": table[rollout.tree.group]}
