"""How many rollouts: truncation budgets, and refilling groups that teach nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.credit.norm import Norm, norm
from mmrl.tree import StepTree


def truncation_budget(horizon: int, transitions: int, gamma: float = 1.0) -> Tensor:
    """(T,) float64: how many trajectories should reach step t when `transitions` are paid for in all.

    n_t proportional to sqrt(d_t), d_t = gamma^t (gamma^t + gamma^(t+1) - 2 gamma^T)/(1 - gamma), for gamma 1
    d_t = 1 + 2(T - 1 - t): it minimises the Hoeffding width sum d_t / n_t (Truncating Trajectories; derived). n_t
    falls, so trajectories simply end early.

    Raises:
        ValueError: gamma outside (0, 1], or fewer transitions than the horizon.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma} must lie in (0, 1]")
    if transitions < horizon:
        raise ValueError(f"{transitions} transitions cannot reach a horizon of {horizon}; at least one per step")
    t = torch.arange(horizon, dtype=torch.float64)
    if gamma == 1:
        d = 1 + 2 * (horizon - 1 - t)
    else:
        d = gamma**t * (gamma**t + gamma ** (t + 1) - 2 * gamma**horizon) / (1 - gamma)
    root = d.sqrt()
    return transitions * root / root.sum()


def trajectory_lengths(budget: Tensor) -> Tensor:
    """(K,) int, lengths of the K trajectories that spend a `truncation_budget`: n_t rounded down, at least 1."""
    n = budget.floor().clamp(min=1).long()
    return torch.stack([(n > k).sum() for k in range(int(n[0]))])


def informative_groups(tree: StepTree, min_std: float = 0.0) -> Tensor:
    """(G,) bool: prompts whose finished outcomes differ, with a std of at least `min_std` (UI-S1: 0.3)."""
    z = norm(tree.outcome, tree.group, Norm(scale="none"))
    squares = torch.zeros(tree.num_groups, dtype=torch.float64).index_add_(0, tree.group, z.z**2)
    std = (squares / (z.size - 1).clamp(min=1)).sqrt()
    return (z.size > 1) & ~z.constant & (std >= min_std)
