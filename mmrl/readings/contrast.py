"""The steps of a rollout taken again otherwise: without seeing the media, and under opposite instructions."""

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
    """How much each step depends on what is seen: its divergence from the same policy with the media blanked out, or
    with the frames of its clip shuffled. Of texts the mean KL per token; of denoising steps, for which `blank` is the
    empty prompt, the mean squared difference of the latents that they lead to."""
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
    """sigmoid(ln p(y | better) - ln p(y | worse)) - 1/2 of every action under the initial model, each instruction
    standing behind the question."""
    policy: Instructable = require("reading 'instructed'", Instructable, context.policy, "policies")
    steps = torch.arange(len(rollout.tree))
    index, high = policy.instructed_logps(rollout, steps, better)
    _, low = policy.instructed_logps(rollout, steps, worse)
    reward = torch.full((rollout.actions.logp.numel(),), torch.nan)
    reward[index] = token_rewards(high, low)
    return {"actions.token_reward": reward}
