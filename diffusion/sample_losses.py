"""Losses on whole samples as rows of `sample_losses`: a rewarded rollout becomes the terms of a published loss.

`trainer: sample_loss` runs them; their arithmetic is in `diffusion.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from diffusion.adapters.base import Level
from diffusion.capabilities import NoisePredictor
from diffusion.losses import diffusion_dpo_loss, drift, nft_loss, nft_share, prediction_error, refl_loss
from diffusion.schedule import NoiseSchedule
from mmrl.capabilities import DifferentiableReward, require
from mmrl.credit import estimate
from mmrl.preference import build_pairs
from mmrl.registry import register
from mmrl.rollout import Rollout, Sample
from mmrl.seeding import named_generator
from mmrl.trainers.sample_loss import Rewards, Term

Key = tuple[int, int]  # (run.seed, iteration)


@register(
    "sample_losses",
    "diffusion_dpo",
    reads=("forks", "actions.latent"),
    fits="latents",
    policy=NoisePredictor,
    source="Diffusion-DPO, 2023",
)
def diffusion_dpo(
    policy: NoisePredictor, rollout: Rollout, rewards: Rewards, key: Key, *, beta: float = 5000.0, levels: int = 4
) -> list[Term]:
    """Best against worst sample of each prompt, noised alike at `levels` random levels of the sampler.

    Published on fixed pairs of pictures and one level each; here the pairs are the rollout's own.
    """
    pairs = build_pairs(rollout.tree, "leaves", {})
    terms = []
    for level, noise in _noised(policy, rollout, pairs.chosen_end, key, levels):
        for p in _chunks(len(pairs), max(policy.max_batch // 2, 1)):
            both = torch.cat([pairs.chosen_end[p], pairs.rejected_end[p]])
            terms.append(
                Term(len(p), partial(_dpo_term, policy, rollout, both, level, torch.cat([noise[p], noise[p]]), beta))
            )
    return terms


def _dpo_term(
    policy: NoisePredictor, rollout: Rollout, leaves: Tensor, level: Level, eps: Tensor, beta: float
) -> Tensor:
    """(P,) loss of pairs whose samples are the first and the second half of `leaves`."""
    x0, own = _latents(rollout, leaves), rollout.tree.group[leaves]
    x = level.a * x0 + level.s * eps

    def errors(reference: bool) -> tuple[Tensor, ...]:
        x0_hat, eps_hat = policy.predict_at(rollout, x, level, own, reference=reference)
        return prediction_error(x0_hat, eps_hat, x0.to(x0_hat), eps.to(x0_hat), level).chunk(2)

    return diffusion_dpo_loss(*errors(False), *errors(True), beta=beta)


@register(
    "sample_losses",
    "refl",
    reads=("actions.latent",),
    fits="latents",
    policy=NoisePredictor,
    source="ReFL (ImageReward), 2023",
    reward=DifferentiableReward,
)
def refl(
    policy: NoisePredictor,
    rollout: Rollout,
    rewards: Rewards,
    key: Key,
    *,
    target: float = 2.0,
    weight: float = 1e-3,
    window: float = 0.25,
) -> list[Term]:
    """The reward's own gradient at the clean estimate of one of the last steps, drawn from the last `window` of them.

    The steps before it have no gradient. ReFL's pre-training loss, which keeps the model on its data, is not here.

    Raises:
        ValueError: a reward without gradient.
    """
    score = _differentiable(rewards)
    schedule = NoiseSchedule.from_record(rollout.about["course"])
    first = max(1, math.ceil(len(schedule) * (1 - window)))
    step = int(torch.randint(first, len(schedule), (), generator=named_generator("refl", *key)))
    states = (rollout.tree.depth == step - 1).nonzero().flatten()
    term = partial(_refl_term, policy, rollout, score, schedule.levels[step], target, weight)
    return [Term(len(p), partial(term, p)) for p in states.split(policy.max_batch)]


def _refl_term(
    policy: NoisePredictor,
    rollout: Rollout,
    score: Callable[[list[Sample]], Tensor],
    level: Level,
    target: float,
    weight: float,
    states: Tensor,
) -> Tensor:
    own = rollout.tree.group[states]
    x0, _ = policy.predict_at(rollout, _latents(rollout, states), level, own)
    pictures = policy.adapter.decode(x0)
    rows = zip(own.tolist(), pictures, states.tolist(), strict=True)
    return refl_loss(score([Sample(rollout.prompts[g], x, s) for g, x, s in rows]), target=target, weight=weight)


def _differentiable(rewards: Rewards) -> Callable[[list[Sample]], Tensor]:
    """The weighted sum of the rewards as a tensor (N,) with gradient."""
    terms: list[tuple[DifferentiableReward, float]] = []
    for name, (reward, weight) in rewards.items():
        terms.append((require(f"reward {name!r}: ReFL", DifferentiableReward, reward, "rewards"), weight))

    def score(samples: list[Sample]) -> Tensor:
        return torch.stack([weight * reward.values(samples) for reward, weight in terms]).sum(0)

    return score


@register(
    "sample_losses",
    "nft",
    reads=("forks", "actions.latent"),
    fits="latents",
    policy=NoisePredictor,
    source="DiffusionNFT, 2025",
)
def nft(
    policy: NoisePredictor,
    rollout: Rollout,
    rewards: Rewards,
    key: Key,
    *,
    b: float = 0.1,
    beta: float = 1e-4,
    levels: int = 4,
) -> list[Term]:
    """DiffusionNFT: every sample noised at `levels` random levels of the sampler, its advantage as its `nft_share`.

    b: how far policy and reflection lie from the old policy, 0.1 .. 1. beta: weight of the distance to the reference.
    Advantages are Flow-GRPO's per prompt; a prompt with equal rewards has share 1/2 and still pulls both ways.
    """
    tree = rollout.tree
    leaves = tree.is_finished.nonzero().flatten()
    share = nft_share(estimate(tree, "grpo", preset="flow_grpo").adv[leaves])
    terms = []
    for level, noise in _noised(policy, rollout, leaves, key, levels):
        for p in _chunks(len(leaves), policy.max_batch):
            x0, own = _latents(rollout, leaves[p]), tree.group[leaves[p]]
            x = level.a * x0 + level.s * noise[p]
            with torch.no_grad():  # by the weights that drew the samples
                old, _ = policy.predict_at(rollout, x, level, own)
            terms.append(Term(len(p), partial(_nft_term, policy, rollout, x, level, own, old, x0, share[p], b, beta)))
    return terms


def _nft_term(
    policy: NoisePredictor,
    rollout: Rollout,
    x: Tensor,
    level: Level,
    own: Tensor,
    old: Tensor,
    x0: Tensor,
    share: Tensor,
    b: float,
    beta: float,
) -> Tensor:
    x0_hat, _ = policy.predict_at(rollout, x, level, own)
    loss = nft_loss(x0_hat, old, x0.to(x0_hat), share.to(x0_hat), b=b)
    if beta == 0:
        return loss
    return loss + beta * drift(x0_hat, policy.predict_at(rollout, x, level, own, reference=True)[0], level)


# --- shared ------------------------------------------------------------------------------------------------------


def _latents(rollout: Rollout, steps: Tensor) -> Tensor:
    """(S, *D) float32 states after these steps."""
    return rollout.actions.payload["latent"][steps].float()


def _chunks(rows: int, size: int) -> list[Tensor]:
    """0 .. rows - 1 in runs of at most `size`; none for 0 rows."""
    return list(torch.arange(rows).split(size)) if rows else []


def _noised(
    policy: NoisePredictor, rollout: Rollout, steps: Tensor, key: Key, count: int
) -> Iterator[tuple[Level, Tensor]]:
    """`count` distinct levels, the same on all ranks, each with noise (S, *D) drawn prompt by prompt."""
    known = policy.levels()
    if not 1 <= count <= len(known):
        raise ValueError(f"loss.levels={count}: the sampler has {len(known)} noise levels (policy.steps)")
    own, shape = rollout.tree.group[steps], rollout.actions.payload["latent"].shape[1:]
    for i in torch.randperm(len(known), generator=named_generator("levels", *key))[:count].tolist():
        noise = torch.zeros(len(steps), *shape)
        for g in own.unique().tolist():
            generator = named_generator("noised", *key, i, rollout.prompts[g].id)
            noise[own == g] = torch.randn((int((own == g).sum()), *shape), generator=generator)
        yield known[i], noise
