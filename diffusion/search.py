"""Search along denoising steps: at every noisy step the candidate that a latent reward scores highest goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion.adapters.base import Cond, Level
from diffusion.capabilities import CandidateSampler, LatentScorer
from mmrl.capabilities import require
from mmrl.registry import register
from mmrl.rollout import Prompt
from mmrl.search.samples import SearchResult


@register("sample_searches", "best_of_k", policy=CandidateSampler, scorer=LatentScorer)
def best_of_k(
    policy: CandidateSampler, prompts: Sequence[Prompt], scorer: Any, *, n: int, k: int, seed: int
) -> SearchResult:
    """n samples per prompt, each from initial noise of its own, with the best of k candidates at every noisy step.

    The candidates of a step share the network call on their parent. Samples are ranked by the scores of their clean
    latents, so nothing but what the caller verifies needs decoding.

    Args:
        scorer: a `LatentScorer`, such as `LatentReward`.

    Raises:
        ValueError: another scorer, or noise at splits only, of which a search has none.
    """
    judge = require("a search over denoising steps", LatentScorer, scorer, "scorers").score
    if policy.sampling.noise == "split":
        raise ValueError("policy.noise='split' draws noise where a plan splits, which a search lacks; set it to all")
    if policy.sampling.eval_steps not in (None, policy.sampling.steps):
        raise ValueError("policy.eval_steps: a search is compared at equal steps with plain samples; leave it out")
    scored = 0

    def counted_score(x: Tensor, level: Level, cond: Cond, own: Tensor) -> Tensor:
        nonlocal scored
        scored += len(x)
        out: Tensor = judge(x, level, cond, own)
        return out

    # A prompt's n samples are prompts of their own: each then has its own initial noise and random numbers.
    copies = [replace(p, id=f"{p.id}#{j}") for p in prompts for j in range(n)]
    rollout = policy.sample_best(copies, k=k, score=counted_score, seed=seed)

    samples = policy.samples(rollout)  # by prompt: all leaves lie at one depth
    steps = torch.tensor([s.step for s in samples])
    owner = rollout.tree.group[steps]
    cond = {name.removeprefix("cond_"): v for name, v in rollout.prompt_payload.items() if name.startswith("cond_")}
    last = Level(*rollout.about["course"]["levels"][-1])
    scores = judge(rollout.actions.payload["latent"][steps].float(), last, cond, owner).tolist()

    of_prompt = [replace(s, prompt=prompts[int(g) // n]) for s, g in zip(samples, owner.tolist(), strict=True)]
    starts = range(0, len(of_prompt), n)
    return SearchResult(
        [of_prompt[i : i + n] for i in starts],
        [scores[i : i + n] for i in starts],
        rollout.counts["calls"],
        scored,
        rollout,
    )
