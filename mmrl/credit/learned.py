"""Learned credit: rewards read off a model's log-probs, and the losses that train such models. Tensors in and out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrl.seeding import named_generator


def implicit_rewards(logp: Tensor, ref_logp: Tensor, beta: float = 0.05) -> Tensor:
    """(T,) beta (logp - ref_logp) per token: the implicit process reward (PRIME 0.05; DPO-trained models use 0.1)."""
    return beta * (logp - ref_logp)


def segment_sum(x: Tensor, owner: Tensor, num: int) -> Tensor:
    """(num,) sum of x (T,) over the entries of each owner (T,); negative owners are left out."""
    keep = owner >= 0
    return torch.zeros(num, dtype=x.dtype, device=x.device).index_add(0, owner[keep], x[keep])


def outcome_bce_loss(implicit: Tensor, sample: Tensor, correct: Tensor) -> Tensor:
    """Scalar: mean cross-entropy of sigmoid(sum of implicit rewards of a sample) against its outcome (PRIME).

    implicit: (T,) beta-scaled log-ratios. sample: (T,) int. correct: (S,) in {0, 1}.
    """
    logit = segment_sum(implicit, sample, correct.numel())
    return F.binary_cross_entropy_with_logits(logit, correct.to(logit.dtype))


def progress_loss(contribution: Tensor, trajectory: Tensor, outcome: Tensor) -> Tensor:
    """Scalar: mean squared difference of each trajectory's summed contributions and its outcome (SPA).

    contribution: (N,) per step. trajectory: (N,) int. outcome: (K,).
    """
    total = segment_sum(contribution, trajectory, outcome.numel())
    return F.mse_loss(total, outcome.to(total.dtype))


def implicit_turn_advantage(logp: Tensor, ref_logp: Tensor, turn: Tensor, num_turns: int) -> Tensor:
    """(num_turns,) mean over a turn's tokens of logp - ref_logp (SWEET).

    logp comes from a critic that may see training-only information such as the reference answer; the policy may not.
    """
    count = segment_sum(torch.ones_like(logp), turn, num_turns).clamp(min=1)
    return segment_sum(logp - ref_logp, turn, num_turns) / count


def bt_trajectory_loss(better: Tensor, worse: Tensor, beta: float = 0.1) -> Tensor:
    """(P,) or scalar: -log sigmoid(beta (sum better - sum worse)), turn advantages in the last dimension (SWEET)."""
    return -F.logsigmoid(beta * (better.sum(-1) - worse.sum(-1)))


def half_split_pairs(score: Tensor, num_pairs: int, seed: int) -> Tensor:
    """(P, 2) int, chosen drawn from the top half of the candidates of one state, rejected from the bottom half.

    score: (K,), K >= 2; with odd K the middle one is left out. Pairs whose scores are equal are dropped.
    Raises ValueError for a single candidate.
    """
    k = score.numel()
    if k < 2:
        raise ValueError(f"half_split_pairs needs at least 2 candidates, got {k}")
    order = torch.argsort(score, descending=True, stable=True)
    g = named_generator("half_split_pairs", seed)
    top = order[: k // 2][torch.randint(k // 2, (num_pairs,), generator=g)]
    bottom = order[(k + 1) // 2 :][torch.randint(k // 2, (num_pairs,), generator=g)]
    pairs = torch.stack([top, bottom], 1)
    return pairs[score[top] > score[bottom]]


def discriminator_reward(p_expert: Tensor) -> Tensor:
    """(N,) -log(1 - D) of a discriminator's probability that a step is the expert's (StepAgent); D is kept below 1."""
    return -torch.log1p(-p_expert.clamp(max=1 - 1e-6))
