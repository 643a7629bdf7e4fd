"""Selection of the steps that get a gradient. The rollout, its rewards and its advantages stay as they are."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from mmrl.config import Section
from mmrl.credit.norm import unknown_choice
from mmrl.tree import StepTree

Width = Literal["none", "top", "extreme", "best_of_n"]


class PruneConfig(Section):
    """Pruning of steps from the update; the rollout and its rewards are untouched (BranchGRPO)."""

    # The leaves whose paths are trained, see `prune_width`.
    width: Literal["none", "top", "extreme", "best_of_n"] = "none"
    # Share of the leaves that `extreme` and `best_of_n` keep.
    keep: float = Field(0.5, gt=0, le=1)
    # Steps at a depth of depth_first or more are dropped; every depth_every iterations this border falls by one, down
    # to depth_stop.
    depth_first: PositiveInt | None = None
    depth_stop: NonNegativeInt = 0
    depth_every: PositiveInt = 30
    # Share of the iterations during which steps are pruned.
    until: float = Field(1.0, ge=0, le=1)


def prune_depths(tree: StepTree, first: int, stop: int, every: int, iteration: int) -> Tensor:
    """(N,) bool, True = keep: drops steps at depth >= a border that starts at `first` and moves down.

    The border falls by one every `every` iterations until it reaches `stop` (BranchGRPO: 15, 9 = last split, 30).
    """
    border = first - min(iteration // every, first - stop)
    return tree.depth < border


def prune_width(tree: StepTree, how: Width, last_split: int, keep: float = 0.5) -> Tensor:
    """(N,) bool, True = keep: below the last split only the paths of selected leaves are trained, tree by tree.

    top: the best child of every fork at the last split (BranchGRPO "parent top-1"). extreme: the best and the worst
    leaves of each prompt, `keep` of them in all, half and half. Ties go to the earlier leaf. Steps at or above the
    last split are always kept: they are shared decisions. best_of_n: the leaves of `extreme`, and no step that leads
    to others alone (DanceGRPO's best-of-n of independent samples; advantages are still those among all n).
    """
    if how == "none":
        return torch.ones(len(tree), dtype=torch.bool)
    leaves = tree.is_finished.nonzero().flatten()
    if how == "top":
        fork = tree.sibling_set[_ancestor_at(tree, leaves, last_split)]
        chosen = leaves[_rank_in(fork, -tree.outcome[leaves]) == 0]
    elif how in ("extreme", "best_of_n"):
        group, outcome = tree.group[leaves], tree.outcome[leaves]
        half = (torch.bincount(group)[group] * keep / 2).round().clamp(min=1)
        among_best = _rank_in(group, -outcome) < half
        among_worst = _rank_in(group, outcome) < half
        chosen = leaves[among_best | among_worst]
    else:
        raise unknown_choice("prune.width", how, Width)
    # Steps above a chosen leaf count at least one of them.
    marked = torch.zeros(len(tree), dtype=torch.float64)
    marked[chosen] = 1
    above_chosen = tree.accumulate(marked) > 0
    return above_chosen if how == "best_of_n" else above_chosen | (tree.depth <= last_split)


def _ancestor_at(tree: StepTree, nodes: Tensor, depth: int) -> Tensor:
    """(M,) the ancestor at `depth` of each of `nodes` (M,), or the node itself where it lies no deeper."""
    ancestor = nodes
    while bool((tree.depth[ancestor] > depth).any()):
        ancestor = torch.where(tree.depth[ancestor] > depth, tree.parent[ancestor], ancestor)
    return ancestor


def _rank_in(sets: Tensor, x: Tensor) -> Tensor:
    """(M,) rank of each entry in its set: 0 for the smallest `x`, 1 for the next; of equal ones the earlier first."""
    by_x = torch.argsort(x, stable=True)
    # Set after set, each from its smallest entry to its largest.
    order = by_x[torch.argsort(sets[by_x], stable=True)]
    size = torch.bincount(sets)
    start = (size.cumsum(0) - size)[sets[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - start
    return rank
