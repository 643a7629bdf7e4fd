"""Estimators that read nothing but the outcomes of finished leaves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.credit.norm import Normed, Scale, norm
from mmrl.credit.table import Credit, estimator
from mmrl.tree import StepTree
from mmrl.tree_ops import Backup, backup, lift


def leaf_norm(tree: StepTree, scale: Scale, eps: float, ddof: int) -> Normed:
    """Outcomes normalised over the finished leaves of each prompt; 0 on every other node."""
    return norm(tree.outcome, tree.group, scale=scale, eps=eps, ddof=ddof)


@estimator("grpo", source="DeepSeekMath; parity with verl and TRL")
def grpo(tree: StepTree, *, scale: Scale = "std", eps: float = 1e-6, ddof: int = 1) -> Credit:
    """A = lift(a), a(leaf) = (R - mean)/(std + eps) over the finished leaves of the prompt.

    A prompt with one finished leaf, or with equal outcomes, gets exactly 0.
    """
    a = leaf_norm(tree, scale, eps, ddof)
    return Credit(lift(tree, a.z), info=a.info)


@estimator("dr_grpo", source="Dr. GRPO; parity with verl norm_adv_by_std_in_grpo=False and TRL scale_rewards='none'")
def dr_grpo(tree: StepTree) -> Credit:
    """A = lift(R - mean) over the finished leaves of the prompt, unscaled.

    Pair it with `aggregation: constant`; another length normaliser brings the length bias back.
    """
    return grpo(tree, scale="none")


@estimator("rloo", source="Back to Basics (RLOO); parity with verl and OpenRLHF")
def rloo(tree: StepTree) -> Credit:
    """A = lift(R - mean of the other finished leaves of the prompt). A group of one gets 0."""
    return grpo(tree, scale="loo")


@estimator("tree_rpo", source="TreeRPO; as defined here (structure from the paper)", fits="forks")
def tree_rpo(
    tree: StepTree,
    *,
    value: Backup = "child_mean",
    scale: Scale = "std",
    unary: Literal["inherit", "zero"] = "inherit",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Credit:
    """A(n) = V(n) normalised over the siblings of n, V backed up from the leaves.

    A sibling set without spread gives 0. An only active child has no siblings: `inherit` copies its parent's
    advantage, so that a forest of chains reduces exactly to grpo; `zero` is the literal reading. A lone first step
    of a prompt gets 0.
    """
    v = torch.where(tree.valid, backup(tree, value), torch.nan)
    z = norm(v, tree.sib, scale=scale, eps=eps, ddof=ddof)
    if unary == "zero":
        return Credit(z.z, info=z.info)
    only = tree.valid & (z.size[tree.sib] == 1) & (tree.parent >= 0)
    return Credit(z.z[_first_with_siblings(tree, only)], info=z.info)


@estimator(
    "branch_depth",
    source="BranchGRPO; parity with the released depth-wise form",
    fits="denoising, and other aligned depths",
)
def branch_depth(
    tree: StepTree,
    *,
    value: Backup = "leaf_mean",
    spread: Literal["depth", "leaf"] = "depth",
    eps: float = 1e-8,
    ddof: int = 1,
) -> Credit:
    """A(n) = (V(n) - mean)/(std + eps) over all nodes of the same prompt and depth; 0 if alone or std < 1e-6.

    Every node counts once, so a leaf-rich branch does not dominate. `value`: leaf_mean, edge_softmax (their code)
    or path_prob (their text). `spread="leaf"` divides by the std of the prompt's leaf outcomes instead, which keeps
    magnitudes: with `depth`, two nodes at a depth always get +-0.7071 whatever their gap. info["singleton_nodes"] is
    the share of valid nodes alone at their depth; above 0.2 (ragged depths) the estimator is a poor choice.
    """
    v = torch.where(tree.valid, backup(tree, value), torch.nan)
    sets = tree.depth * tree.num_groups + tree.group
    z = norm(v, sets, scale="std" if spread == "depth" else "none", eps=eps, ddof=ddof, std_floor=1e-6)
    adv = z.z if spread == "depth" else _over_leaf_std(tree, z.z, eps, ddof)
    alone = (z.size[sets] == 1) & tree.valid
    return Credit(adv, info=z.info | {"singleton_nodes": float(alone.sum() / tree.valid.sum().clamp(min=1))})


@estimator("child_minus_parent", source="as defined here", fits="forks")
def child_minus_parent(tree: StepTree, *, eps: float = 1e-8, ddof: int = 1) -> Credit:
    """A(n) = (V(n) - V(parent))/(std of the prompt's leaf outcomes + eps), V = leaf_mean; local credit of a fork.

    V of the virtual root is the prompt's mean outcome, so the terms telescope: along any path they sum to the
    leaf's grpo advantage. An only child gets 0. Prompts without spread get 0.
    """
    v = backup(tree, "leaf_mean")
    centre = lift(tree, leaf_norm(tree, "none", eps, ddof).z)  # V minus the prompt's mean, exact 0 without spread
    above = torch.where(tree.parent >= 0, v[tree.parent.clamp(min=0)], v - centre)
    flat = leaf_norm(tree, "none", eps, ddof)
    step = torch.where(flat.constant[tree.group] | ~tree.valid, 0.0, v - above)
    return Credit(_over_leaf_std(tree, step, eps, ddof), info=flat.info)


def _over_leaf_std(tree: StepTree, x: Tensor, eps: float, ddof: int) -> Tensor:
    """x divided by the std of its prompt's finished outcomes."""
    leaves = tree.is_finished
    group, r = tree.group[leaves], tree.outcome[leaves]
    zero = torch.zeros(tree.num_groups, dtype=torch.float64)
    n = zero.index_add(0, group, torch.ones_like(r))
    mean = zero.index_add(0, group, r) / n.clamp(min=1)
    var = zero.index_add(0, group, (r - mean[group]) ** 2) / (n - ddof).clamp(min=1)
    return x / (var.sqrt() + eps)[tree.group]


def _first_with_siblings(tree: StepTree, only: Tensor) -> Tensor:
    """(N,) the nearest ancestor-or-self that is no only child."""
    index = torch.arange(len(tree))
    p = torch.where(only, tree.parent, index)
    while bool((p != p[p]).any()):
        p = p[p]
    return p
