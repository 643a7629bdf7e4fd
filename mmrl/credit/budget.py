"""Which prompts teach something: groups to refill."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.credit.norm import Norm, norm
from mmrl.tree import StepTree


def informative_groups(tree: StepTree, min_std: float = 0.0) -> Tensor:
    """(G,) bool: prompts whose finished outcomes differ, with a std of at least `min_std` (UI-S1: 0.3)."""
    z = norm(tree.outcome, tree.group, Norm(scale="none"))
    squares = torch.zeros(tree.num_groups, dtype=torch.float64).index_add_(0, tree.group, z.z**2)
    std = (squares / (z.size - 1).clamp(min=1)).sqrt()
    return (z.size > 1) & ~z.constant & (std >= min_std)
