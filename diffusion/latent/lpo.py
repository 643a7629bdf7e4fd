"""LPO's judge: the scores of candidates that share a parent, by a latent reward and without decoding."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from diffusion.adapters.base import Level
from diffusion.latent.reward import LatentReward
from diffusion.schedule import NoiseSchedule
from mmrl.model_names import model_name
from mmrl.registry import declares
from mmrl.rollout import Rollout


@declares(reads=("actions.latent",), fits="latents")
class LatentJudge:
    """A step reward for pairs of candidates: the raw score of every step that has siblings, NaN on the others.

    Raw scores and not probabilities, because LPO's gap tanh((best - worst) / 2) is taken of scores
    (`pairs: {name: extremes, by: step_reward, squash: true}`).

    Args:
        model: a trained latent reward's folder.
        first_depth, last_depth: denoising steps whose candidates are judged; others cost no call and give no pair.
        told: the noise level that the judge is told: of the candidates (`after`, as it was trained), or of the latent
            they were drawn from (`before`, as in LPO's code).
        max_batch: most latents per network call.
    """

    def __init__(
        self,
        model: Annotated[str, model_name()],
        first_depth: int = 0,
        last_depth: int | None = None,
        told: Literal["after", "before"] = "after",
        max_batch: int = 256,
    ) -> None:
        self.reward = LatentReward.build(model, max_batch=max_batch)
        self._first, self._last, self._told = first_depth, last_depth, told

    @property
    def model(self) -> nn.Module:
        """The network that judges."""
        return self.reward.model

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64.

        Raises:
            ValueError: latents of another shape or schedule than the judge was trained on.
        """
        tree, schedule = rollout.tree, NoiseSchedule.from_record(rollout.about["course"])
        last = len(schedule) - 1 if self._last is None else self._last
        judged = torch.bincount(tree.sibling_set)[tree.sibling_set] > 1
        judged &= (tree.depth >= self._first) & (tree.depth <= last)
        out = torch.full((len(tree),), torch.nan, dtype=torch.float64)
        for depth in tree.depth[judged].unique().tolist():
            steps = (judged & (tree.depth == depth)).nonzero().flatten()
            level = schedule.levels[depth + (self._told == "after")]
            out[steps] = self._scores(rollout, steps, level)
        return out

    def _scores(self, rollout: Rollout, steps: Tensor, level: Level) -> Tensor:
        cond = {k.removeprefix("cond_"): v for k, v in rollout.prompt_payload.items() if k.startswith("cond_")}
        latent = rollout.actions.payload["latent"][steps]
        return self.reward.score(latent, level, cond, rollout.tree.group[steps]).double()
