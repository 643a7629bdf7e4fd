"""Readings that evaluate the same steps again under a changed input: without the media, or with an instruction."""

from __future__ import annotations

from typing import Literal

import torch

from mmrl.capabilities import Instructable, SightReader, require
from mmrl.losses.preference import token_rewards
from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Rollout


@register("readings", "divergence", writes=("tags.divergence",), source="pDPO of video-SALMONN-o1", policy=SightReader)
def divergence(rollout: Rollout, context: ReadingContext, *, sight: Literal["blank", "shuffled"] = "blank") -> Values:
    """Dependence of each step on the media: divergence from the same policy that sees them blanked out or shuffled.

    Of texts the mean KL per token. Of denoising steps, for which `blank` is the empty prompt, the mean squared
    difference of the latents that they lead to. `shuffled` changes the order of a clip's frames.
    """
    policy: SightReader = require("reading 'divergence'", SightReader, context.policy, "policies")
    return {"tags.divergence": policy.divergence(rollout, torch.arange(len(rollout.tree)), sight)}


@register(
    "readings",
    "instructed",
    writes=("actions.token_reward",),
    fits="policies that write",
    source="T-REG; the wording as set here",
    policy=Instructable,
    reference=True,
)
def instructed(
    rollout: Rollout,
    context: ReadingContext,
    *,
    better: str = "Write the best possible response: correct, complete and to the point.",
    worse: str = "Write the worst possible response: wrong, incomplete and beside the point.",
) -> Values:
    """sigmoid(ln p(y | better) - ln p(y | worse)) - 1/2 of every action under the initial model.

    Each instruction stands behind the question.
    """
    policy: Instructable = require("reading 'instructed'", Instructable, context.policy, "policies")
    steps = torch.arange(len(rollout.tree))
    index, better_logp = policy.instructed_logps(rollout, steps, better)
    _, worse_logp = policy.instructed_logps(rollout, steps, worse)
    # (T,) NaN for actions that have no log-prob
    reward = torch.full((rollout.actions.logp.numel(),), torch.nan)
    reward[index] = token_rewards(better_logp, worse_logp)
    return {"actions.token_reward": reward}
