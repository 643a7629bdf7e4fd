"""Losses on whole samples as rows of `sample_losses`: a rewarded rollout becomes the terms of a published loss.

`trainer: sample_loss` runs them; their arithmetic is in `diffusion.losses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor

from diffusion.adapters.base import Level
from diffusion.capabilities import NoisePredictor
from diffusion.losses import (
    awm_loss,
    crd_loss,
    dgpo_loss,
    diffusion_dpo_loss,
    drift,
    nft_loss,
    nft_share,
    prediction_error,
    refl_loss,
    scaled_prediction_error,
)
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
            rows = _NoisedSamples.of(policy, rollout, both, level, torch.cat([noise[p], noise[p]]))
            terms.append(Term(len(p), partial(_dpo_term, rows, beta)))
    return terms


def _dpo_term(rows: _NoisedSamples, beta: float) -> Tensor:
    """(P,) loss of pairs whose samples are the first and the second half of the rows."""
    chosen, rejected = rows.error(*rows.predict()).chunk(2)
    ref_chosen, ref_rejected = rows.error(*rows.predict(reference=True)).chunk(2)
    return diffusion_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)


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
    leaves, advantage = _advantages(rollout)
    share = nft_share(advantage)
    terms = []
    for p, rows in _noised_parts(policy, rollout, leaves, key, levels):
        # by the weights that drew the samples
        with torch.no_grad():
            old, _ = rows.predict()
        terms.append(Term(len(p), partial(_nft_term, rows, old, share[p], b, beta)))
    return terms


def _nft_term(rows: _NoisedSamples, old: Tensor, share: Tensor, b: float, beta: float) -> Tensor:
    x0_hat, _ = rows.predict()
    loss = nft_loss(x0_hat, old, rows.x0.to(x0_hat), share.to(x0_hat), b=b)
    return rows.near_reference(loss, x0_hat, beta)


@register(
    "sample_losses",
    "awm",
    reads=("forks", "actions.latent"),
    fits="latents",
    policy=NoisePredictor,
    source="Advantage Weighted Matching, 2025",
)
def awm(
    policy: NoisePredictor,
    rollout: Rollout,
    rewards: Rewards,
    key: Key,
    *,
    clip: PositiveFloat = 1.0,
    beta: NonNegativeFloat = 1e-3,
    levels: int = 4,
) -> list[Term]:
    """AWM: the pre-training loss of every sample, noised at `levels` random levels, weighted by its advantage.

    clip: range of the ratio of likelihoods. beta: weight of the distance to the reference.
    Advantages are Flow-GRPO's per prompt, clamped to +-5.
    """
    leaves, advantage = _advantages(rollout)
    terms = []
    for p, rows in _noised_parts(policy, rollout, leaves, key, levels):
        terms.append(Term(len(p), partial(_awm_term, rows, rows.old_error(), advantage[p], clip, beta)))
    return terms


def _awm_term(rows: _NoisedSamples, old: Tensor, advantage: Tensor, clip: float, beta: float) -> Tensor:
    x0_hat, eps_hat = rows.predict()
    loss = awm_loss(rows.error(x0_hat, eps_hat), old, advantage, clip=clip)
    return rows.near_reference(loss, x0_hat, beta)


@register(
    "sample_losses",
    "dgpo",
    reads=("forks", "actions.latent"),
    fits="latents",
    policy=NoisePredictor,
    source="Direct Group Preference Optimization, 2026",
)
def dgpo(
    policy: NoisePredictor,
    rollout: Rollout,
    rewards: Rewards,
    key: Key,
    *,
    dpo_beta: PositiveFloat = 100.0,
    clip: PositiveFloat | None = 1e-3,
    beta: NonNegativeFloat = 1e-3,
    levels: int = 4,
) -> list[Term]:
    """DGPO: the good samples of a prompt against its bad ones, all noised alike at `levels` random levels.

    dpo_beta: scale of the group's implicit reward. clip: range beyond which a sample gets no gradient; null = none.
    beta: weight of the distance to the reference. A prompt's samples are never parted: a group may exceed
    `policy.max_batch`.
    """
    leaves, advantage = _advantages(rollout)
    terms = []
    for p, rows in _noised_parts(policy, rollout, leaves, key, levels, whole_prompts=True, shared=True):
        terms.append(Term(len(p), partial(_dgpo_term, rows, rows.old_error(), advantage[p], dpo_beta, clip, beta)))
    return terms


def _dgpo_term(
    rows: _NoisedSamples, old: Tensor, advantage: Tensor, dpo_beta: float, clip: float | None, beta: float
) -> Tensor:
    x0_hat, eps_hat = rows.predict()
    reference = rows.predict(reference=True)
    error = rows.error(x0_hat, eps_hat)
    loss = dgpo_loss(error, rows.error(*reference), old, advantage, rows.own, beta=dpo_beta, clip=clip)
    return loss if beta == 0 else loss + beta * drift(x0_hat, reference[0], rows.level)


@register(
    "sample_losses",
    "crd",
    reads=("forks", "actions.latent"),
    fits="latents",
    policy=NoisePredictor,
    source="Centered Reward Distillation, 2026",
)
def crd(
    policy: NoisePredictor,
    rollout: Rollout,
    rewards: Rewards,
    key: Key,
    *,
    crd_beta: PositiveFloat = 1.0,
    beta: NonNegativeFloat = 1e-4,
    levels: int = 4,
) -> list[Term]:
    """CRD: the implicit reward of every sample, noised at `levels` random levels, is fitted to its centred reward.

    crd_beta: scale of the implicit reward. beta: weight of the distance to the reference. A prompt's samples are never
    parted: a group may exceed `policy.max_batch`.
    """
    leaves, advantage = _advantages(rollout)
    share = nft_share(advantage)
    terms = []
    for p, rows in _noised_parts(policy, rollout, leaves, key, levels, whole_prompts=True):
        terms.append(Term(len(p), partial(_crd_term, rows, rows.old_error(scaled=True), share[p], crd_beta, beta)))
    return terms


def _crd_term(rows: _NoisedSamples, old: Tensor, share: Tensor, crd_beta: float, beta: float) -> Tensor:
    x0_hat, eps_hat = rows.predict()
    loss = crd_loss(rows.error(x0_hat, eps_hat, scaled=True), old, share, rows.own, beta=crd_beta)
    return rows.near_reference(loss, x0_hat, beta)


# --- shared ------------------------------------------------------------------------------------------------------


def _latents(rollout: Rollout, steps: Tensor) -> Tensor:
    """(S, *D) float32 states after these steps."""
    return rollout.actions.payload["latent"][steps].float()


@dataclass(frozen=True)
class _NoisedSamples:
    """Samples of a rollout noised to one level: x = a x0 + s eps. x, x0, eps: (N, *D); own: (N,) prompt of each."""

    policy: NoisePredictor
    rollout: Rollout
    level: Level
    own: Tensor
    x0: Tensor
    eps: Tensor
    x: Tensor

    @staticmethod
    def of(policy: NoisePredictor, rollout: Rollout, leaves: Tensor, level: Level, eps: Tensor) -> _NoisedSamples:
        """The samples that end at `leaves`."""
        x0 = _latents(rollout, leaves)
        return _NoisedSamples(
            policy, rollout, level, rollout.tree.group[leaves], x0, eps, level.a * x0 + level.s * eps
        )

    def predict(self, *, reference: bool = False) -> tuple[Tensor, Tensor]:
        """Clean estimate and noise estimate of the present weights, or of the initial ones."""
        return self.policy.predict_at(self.rollout, self.x, self.level, self.own, reference=reference)

    def error(self, x0_hat: Tensor, eps_hat: Tensor, *, scaled: bool = False) -> Tensor:
        """(N,) error of these estimates."""
        measure = scaled_prediction_error if scaled else prediction_error
        return measure(x0_hat, eps_hat, self.x0.to(x0_hat), self.eps.to(x0_hat), self.level)

    def near_reference(self, loss: Tensor, x0_hat: Tensor, beta: float) -> Tensor:
        """The loss and `beta` times the distance of a clean estimate to that of the initial weights."""
        if beta == 0:
            return loss
        return loss + beta * drift(x0_hat, self.predict(reference=True)[0], self.level)

    @torch.no_grad()
    def old_error(self, *, scaled: bool = False) -> Tensor:
        """(N,) error of the present weights, when terms are made those that drew the samples; without gradient."""
        return self.error(*self.predict(), scaled=scaled)


def _advantages(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Finished leaves, and their advantages: Flow-GRPO's per prompt, clamped to +-5 as by every public trainer."""
    leaves = rollout.tree.is_finished.nonzero().flatten()
    return leaves, estimate(rollout.tree, "grpo", preset="flow_grpo").adv[leaves].clamp(-5, 5).float()


def _whole_prompts(owner: Tensor, size: int) -> list[Tensor]:
    """Rows 0 .. N - 1 in parts of at most `size` that hold all rows of a prompt; a larger prompt is a part of its own.

    owner: (N,) int, the prompt of each row.
    """
    parts: list[Tensor] = []
    for prompt in owner.unique().tolist():
        rows = (owner == prompt).nonzero().flatten()
        if parts and len(parts[-1]) + len(rows) <= size:
            parts[-1] = torch.cat([parts[-1], rows])
        else:
            parts.append(rows)
    return parts


def _chunks(rows: int, size: int) -> list[Tensor]:
    """0 .. rows - 1 in runs of at most `size`; none for 0 rows."""
    return list(torch.arange(rows).split(size)) if rows else []


def _noised_parts(
    policy: NoisePredictor,
    rollout: Rollout,
    leaves: Tensor,
    key: Key,
    count: int,
    *,
    whole_prompts: bool = False,
    shared: bool = False,
) -> Iterator[tuple[Tensor, _NoisedSamples]]:
    """Every sample at `count` random levels, in parts that one network call takes: (rows of `leaves`, the samples).

    whole_prompts: a prompt's samples are never parted. shared: see `_noised`.
    """
    if whole_prompts:
        parts = _whole_prompts(rollout.tree.group[leaves], policy.max_batch)
    else:
        parts = _chunks(len(leaves), policy.max_batch)
    for level, noise in _noised(policy, rollout, leaves, key, count, shared=shared):
        for part in parts:
            yield part, _NoisedSamples.of(policy, rollout, leaves[part], level, noise[part])


def _noised(
    policy: NoisePredictor, rollout: Rollout, steps: Tensor, key: Key, count: int, *, shared: bool = False
) -> Iterator[tuple[Level, Tensor]]:
    """`count` distinct levels, the same on all ranks, each with noise (S, *D) drawn prompt by prompt.

    shared: all samples of a prompt get one noise, the same at every level (DGPO).
    """
    known = policy.levels()
    if not 1 <= count <= len(known):
        raise ValueError(f"loss.levels={count}: the sampler has {len(known)} noise levels (policy.steps)")
    own, shape = rollout.tree.group[steps], rollout.actions.payload["latent"].shape[1:]
    for i in torch.randperm(len(known), generator=named_generator("levels", *key))[:count].tolist():
        noise = torch.zeros(len(steps), *shape)
        for g in own.unique().tolist():
            level_name = () if shared else (i,)
            generator = named_generator("noised", *key, *level_name, rollout.prompts[g].id)
            count_drawn = 1 if shared else int((own == g).sum())
            noise[own == g] = torch.randn((count_drawn, *shape), generator=generator)
        yield known[i], noise
