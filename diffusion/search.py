"""Search along denoising steps: at every noisy step the candidate that a latent reward scores highest goes on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.adapters.base import Cond, LatentScorer, Level
from mmrl.capabilities import Found, require
from mmrl.rollout import BranchPlan, Prompt

if TYPE_CHECKING:
    from diffusion.policy import DiffusionPolicy


def best_of_k(policy: DiffusionPolicy, prompts: Sequence[Prompt], scorer: Any, *, n: int, k: int, seed: int) -> Found:
    """n samples per prompt, each from initial noise of its own, with the best of k candidates at every noisy step.

    The candidates of a step share the network call on their parent. Samples are ranked by the scores of their clean
    latents, so nothing but what the caller verifies needs decoding.

    Args:
        scorer: a `diffusion.policy.LatentScorer`, such as `LatentReward`.

    Raises:
        ValueError: another scorer, or noise at splits only, of which a search has none.
    """
    judge = require("a search over denoising steps", LatentScorer, scorer, "scorers").score
    if policy.sampling.noise == "split":
        raise ValueError("policy.noise='split' draws noise where a plan splits, which a search lacks; set it to all")
    scored = 0

    def choose(x: Tensor, level: Level, cond: Cond, own: Tensor) -> Tensor:
        nonlocal scored
        scored += len(x)
        out: Tensor = judge(x, level, cond, own)
        return out

    searcher = copy(policy)
    searcher.sampling = replace(policy.sampling, candidates=k)
    copies = [replace(p, id=f"{p.id}#{j}") for p in prompts for j in range(n)]
    rollout = searcher.rollout(copies, BranchPlan({}), seed=seed, judge=choose if k > 1 else None)
    samples = searcher.samples(rollout)  # by prompt: all leaves lie at one depth
    steps = torch.tensor([s.step for s in samples])
    cond = {name.removeprefix("cond_"): v for name, v in rollout.prompt_payload.items() if name.startswith("cond_")}
    last = Level(*rollout.about["course"]["levels"][-1])
    own = rollout.tree.group[steps]
    values = judge(rollout.actions.payload["latent"][steps].float(), last, cond, own).tolist()
    told = [replace(s, prompt=prompts[int(g) // n]) for s, g in zip(samples, own.tolist(), strict=True)]
    rows = range(0, len(told), n)
    by_prompt = [told[i : i + n] for i in rows]
    return Found(by_prompt, [values[i : i + n] for i in rows], rollout.counts["calls"], scored, rollout)
