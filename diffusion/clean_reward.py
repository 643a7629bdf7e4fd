"""SPO's judge with a reward that knows no noise: an outcome reward on the clean picture predicted after each step."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from diffusion.policy import DiffusionPolicy
from mmrl.model_names import model_name
from mmrl.registry import build, declares
from mmrl.rollout import Rollout, Sample


@declares(reads=("actions.latent",), fits="latents")
class CleanReward:
    """A step reward for denoising steps: an outcome reward on the clean picture predicted after each step.

    The step-aware judge of SPO with a reward that knows no noise: one network row and one decoding per step, which a
    latent reward saves.

    Args:
        reward: of the group `mmrl.rewards`, or a dotted path; called in this process.
        model: what predicts the clean picture, frozen; as `policy.model`.
        first_depth, last_depth: denoising steps that are judged; others cost nothing and get NaN.
    """

    def __init__(
        self,
        reward: str = "legible_symmetric",
        model: Annotated[str, model_name("digits")] = "digits",
        first_depth: int = 0,
        last_depth: int | None = None,
    ) -> None:
        self._policy = DiffusionPolicy.build(model)
        self._reward = build("rewards", "step_rewards.reward", reward, {})
        self._first, self._last = first_depth, last_depth

    @property
    def model(self) -> nn.Module:
        """The network that predicts."""
        return self._policy.model

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN where the reward has no opinion."""
        tree = rollout.tree
        last = int(tree.depth.max()) if self._last is None else self._last
        steps = ((tree.depth >= self._first) & (tree.depth <= last)).nonzero().flatten()
        pictures, owner = self._policy.describe(rollout, steps), tree.group[steps].tolist()
        rows = zip(owner, pictures, steps.tolist(), strict=True)
        scores = self._reward([Sample(rollout.prompts[g], x, i) for g, x, i in rows])
        out = torch.full((len(tree),), math.nan, dtype=torch.float64)
        out[steps] = torch.tensor([math.nan if r is None else r for r in scores], dtype=torch.float64)
        return out
