"""Losses on whole samples of a diffusion model: Diffusion-DPO, ReFL, DiffusionNFT, AWM, DGPO, CRD. Pure functions, one
number per row.

None of them needs the density of a transition, so any solver may have drawn the samples. A noised sample is
x = a x0 + s eps, as in `diffusion.kernels`, and a network's answer is a clean estimate x0 and a noise estimate eps, so
that flow, epsilon and v models share every line. All arithmetic is float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.adapters.base import Level
from mmrl.losses.policy import clipped_surrogate
from mmrl.losses.preference import Preference, Side, preference_loss


def prediction_error(x0_hat: Tensor, eps_hat: Tensor, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """(N,) mean squared error of what the network predicts, from its two estimates (N, *D) and the truth (N, *D).

    Flow matching (a + s = 1): of the velocity eps - x0. Otherwise: of the noise.
    """
    return (_residual(x0_hat, eps_hat, x0, eps, level) ** 2).flatten(1).mean(1)


def scaled_prediction_error(x0_hat: Tensor, eps_hat: Tensor, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """(N,) `prediction_error` over the mean absolute error, which has no gradient and is at least 1e-5.

    Errors of quiet and noisy levels, which differ by orders of magnitude, then weigh alike (DiffusionNFT, CRD).
    """
    residual = _residual(x0_hat, eps_hat, x0, eps, level).flatten(1)
    return (residual**2).mean(1) / residual.detach().abs().mean(1).clamp(min=1e-5)


def _residual(x0_hat: Tensor, eps_hat: Tensor, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    error = eps_hat.float() - eps.float()
    if abs(level.a + level.s - 1) < 1e-4:
        error = error - (x0_hat.float() - x0.float())
    return error


def diffusion_dpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 5000.0
) -> Tensor:
    """(P,) -ln sigmoid(-beta/2 ((e_w - e_l) - (eref_w - eref_l))) (Diffusion-DPO, 2023; authors' code).

    Args:
        chosen, rejected: (P,) `prediction_error` of the policy on the two samples of a pair, noised to the same level
            with the same noise. ref_chosen, ref_rejected: (P,) of the reference; they get no gradient.
    """
    # Where a model predicts noise with mean squared error e, -e / 2 stands for a log-prob.
    pair = torch.arange(len(chosen), device=chosen.device)
    better = Side(-chosen.float() / 2, -ref_chosen.float() / 2, pair)
    worse = Side(-rejected.float() / 2, -ref_rejected.float() / 2, pair)
    return preference_loss(better, worse, len(chosen), Preference(beta=beta)).loss


def refl_loss(reward: Tensor, *, target: float = 2.0, weight: float = 1e-3) -> Tensor:
    """(N,) weight * max(0, target - r), r the differentiable reward of a clean estimate (ReFL, 2023; authors' code).

    Rewards from `target` on have no gradient. The defaults belong to ImageReward, which is about N(0, 1).
    """
    return weight * (target - reward.float()).clamp(min=0)


def nft_share(advantage: Tensor, *, clip: float = 5.0) -> Tensor:
    """(N,) r = A / (2 clip) + 1/2 in [0, 1], A clamped to +-clip: how much a sample counts as a positive one."""
    return (advantage.float() / (2 * clip) + 0.5).clamp(0, 1)


def nft_loss(
    x0_hat: Tensor, x0_old: Tensor, x0: Tensor, share: Tensor, *, b: float = 0.1, clip: float = 5.0
) -> Tensor:
    """(N,) clip/b (r |x+ - x0|^2 / w+ + (1 - r) |x- - x0|^2 / w-), means over D (DiffusionNFT, 2025; authors' code).

    x+ = b x0_hat + (1 - b) x0_old and x- = (1 + b) x0_old - b x0_hat: a good sample draws the policy towards itself, a
    bad one draws the policy's reflection in the old policy. w = max(mean |x - x0|, 1e-5), without gradient. Clean
    estimates are linear in the velocity at a fixed noised sample, so this is the published form with velocities.

    Args:
        x0_hat: (N, *D) clean estimate of the policy (differentiable). x0_old: of the policy that drew the samples.
        x0: the samples. share: (N,) `nft_share`.
    """
    old, x0 = x0_old.detach().float(), x0.float()
    plus = b * x0_hat.float() + (1 - b) * old
    minus = (1 + b) * old - b * x0_hat.float()
    return clip / b * (share * _scaled_error(plus, x0) + (1 - share) * _scaled_error(minus, x0))


def _scaled_error(x: Tensor, x0: Tensor) -> Tensor:
    error = (x - x0).flatten(1)
    return (error**2).mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


def drift(x0_hat: Tensor, x0_ref: Tensor, level: Level) -> Tensor:
    """(N,) mean (x0_hat - x0_ref)^2 / s^2, for flow models mean (v - v_ref)^2 (DiffusionNFT's regulariser)."""
    return ((x0_hat.float() - x0_ref.detach().float()) ** 2).flatten(1).mean(1) / level.s**2


def awm_loss(error: Tensor, old_error: Tensor, advantage: Tensor, *, clip: float = 1.0) -> Tensor:
    """(N,) max(-A rho, -A clip(rho, 1 +- clip)), rho = exp(e_old - e) (AWM, 2025; authors' code).

    The negative prediction error stands for the log-likelihood of a sample, as in pre-training, so that at rho = 1 the
    gradient is that of pre-training weighted by the advantage.

    Args:
        error: (N,) `prediction_error` of the policy (differentiable). old_error: of the policy that drew the samples.
        clip: PPO's range; the authors' 1 hardly clips.
    """
    return clipped_surrogate(old_error.detach() - error, advantage.to(error), clip, clip)


def dgpo_loss(
    error: Tensor,
    ref_error: Tensor,
    old_error: Tensor,
    advantage: Tensor,
    group: Tensor,
    *,
    beta: float = 100.0,
    clip: float | None = 1e-3,
) -> Tensor:
    """(N,) w A e, w = sigmoid(sum over the group of beta A (e - e_ref) / G) without gradient (DGPO, 2026).

    It has the gradient of -ln sigmoid(R(good samples) - R(bad ones)), R the implicit rewards of the two halves. A
    group whose good samples the policy fits better than the reference, and whose bad ones worse, has little left to
    learn. As in the authors' code.

    Args:
        error, ref_error, old_error: (N,) `prediction_error` of the policy (differentiable), the reference, and the
            policy that drew the samples. advantage: (N,). group: (N,) int, whole groups.
        clip: samples whose exp(e_old - e) has left 1 +- clip to their advantage's side get no gradient; None = all do.
    """
    adv, now = advantage.to(error), error.detach()
    _, member, size = torch.unique(group.to(error.device), return_inverse=True, return_counts=True)
    share = adv * beta * (now - ref_error.detach()) / size[member]
    total = torch.zeros(len(size), device=error.device).index_add(0, member, share)
    if clip is not None:
        ratio = (old_error.detach() - now).exp()
        settled = torch.where(adv > 0, ratio > 1 + clip, ratio < 1 - clip)
        error = torch.where(settled, now, error)
    return torch.sigmoid(total)[member] * adv * error


def crd_loss(
    error: Tensor, old_error: Tensor, share: Tensor, group: Tensor, *, beta: float = 1.0, clip: float = 5.0
) -> Tensor:
    """(N,) clip/beta (beta (r - mean r) - (R - mean R))^2, r = e_old - e, means over the group (CRD, 2026).

    The implicit reward of the policy against the one that drew the samples is fitted to the reward, both centred, so
    that the partition function cancels. The group's mean of r has no gradient. As in Flow-Factory's code with uniform
    weights and the squared loss.

    Args:
        error, old_error: (N,) `scaled_prediction_error` of the policy (differentiable) and of the one that drew the
            samples. share: (N,) R in [0, 1], `nft_share`. group: (N,) int, whole groups.
    """
    implicit = old_error.detach() - error
    _, member, size = torch.unique(group.to(error.device), return_inverse=True, return_counts=True)

    def centred(x: Tensor) -> Tensor:
        mean = torch.zeros(len(size), device=x.device).index_add(0, member, x.detach()) / size
        return x - mean[member]

    return clip / beta * (beta * centred(implicit) - centred(share.to(error))) ** 2
