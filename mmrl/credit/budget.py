"""Prompts whose samples differ in reward; the others have advantages 0, teach nothing and are sampled anew."""

from __future__ import annotations

from torch import Tensor

from mmrl.credit.norm import Norm, norm
from mmrl.tree import StepTree
from mmrl.tree_ops import prompt_sum


def informative_groups(tree: StepTree, min_std: float = 0.0) -> Tensor:
    """(G,) bool: prompts whose finished outcomes differ, with a std of at least `min_std` (UI-S1: 0.3)."""
    centred = norm(tree.outcome, tree.group, Norm(scale="none"))
    squares = prompt_sum(tree, centred.z**2)
    std = (squares / (centred.size - 1).clamp(min=1)).sqrt()
    return (centred.size > 1) & ~centred.constant & (std >= min_std)
