"""Operators on a StepTree: means over the leaves below, sums along a path, discounted returns, backed-up values.

Everything is vectorised: one pass per depth level, or pointer doubling where no step has two children, so that a
chain of 20,000 steps costs 15 passes. All results are float64 and 0 on invalid nodes (no finished leaf below).
A prompt's result never depends on another prompt, not even in the last bit.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from mmrl.tree import StepTree

Backup = Literal["leaf_mean", "leaf_max", "child_mean", "edge_softmax", "path_prob"]


def leaf_sum(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) sum of the leaf quantity `x` (N,) over the finished leaves under each node."""
    return tree.accumulate(torch.where(tree.is_finished, x.double(), 0.0))


def lift(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) mean of the leaf quantity `x` (N,) over the finished leaves under each node."""
    return leaf_sum(tree, x) / tree.leaves_below.clamp(min=1)


def prompt_sum(tree: StepTree, x: Tensor) -> Tensor:
    """(G,) float64 sum of `x` (N,) over the steps of each prompt."""
    return torch.zeros(tree.num_groups, dtype=torch.float64).index_add(0, tree.group, x)


def need_chains(tree: StepTree, name: str, fix: str) -> None:
    """Raises ValueError when a step has two children: the method called `name` needs chains, `fix` says what helps."""
    if not tree.is_chains:
        branching = int((tree.num_children > 1).nonzero()[0])
        raise ValueError(f"{name} needs chains, but step {branching} branches; {fix}")


def to_go(tree: StepTree, x: Tensor, gamma: float = 1.0) -> Tensor:
    """(N,) to_go(n) = x(n) + gamma * sum over children c of m(c)/m(n) * to_go(c); the suffix sum on a chain."""
    return tree.accumulate(torch.where(tree.valid, x.double(), 0.0), gamma * leaf_share(tree))


def leaf_share(tree: StepTree) -> Tensor:
    """(N,) m(n)/m(parent), the weight of a child in its parent's to-go; 0 for first steps."""
    m = tree.leaves_below.double()
    return torch.where(tree.parent >= 0, m / m[tree.parent.clamp(min=0)].clamp(min=1), 0.0)


def before(tree: StepTree, x: Tensor, root: Tensor) -> Tensor:
    """(N,) `x` (N,) of the parent, or `root` (G,) of the prompt for first steps: the value before each step."""
    return torch.where(tree.parent >= 0, x[tree.parent.clamp(min=0)], root[tree.group])


def last_scored(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) `x` (N,) of the nearest step at or above n that has one (is not NaN); NaN where none has."""
    return x[run_head(tree, x.isnan())]


def run_head(tree: StepTree, joined: Tensor) -> Tensor:
    """(N,) first step of the run that n belongs to, where `joined` (N,) bool says that n continues its parent."""
    head = torch.where(joined & (tree.parent >= 0), tree.parent, torch.arange(len(tree)))
    # Pointer doubling: each pass jumps twice as far up, so a run of K steps needs log2(K) passes.
    while bool((head != head[head]).any()):
        head = head[head]
    return head


def returns(tree: StepTree, gamma: float = 1.0) -> Tensor:
    """(N,) discounted return of step rewards (NaN reads 0) plus the outcome at finished leaves."""
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    return to_go(tree, tree.step_reward.nan_to_num(nan=0.0) + outcome, gamma)


def path_sum(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) sum of `x` (N,) over the path from the first step to n, n included. Integer or float."""
    ancestor, total = tree.parent, x
    # Pointer doubling: `total` covers the steps from n up to just below `ancestor`; adding the ancestor's own total
    # doubles that stretch.
    while bool((ancestor >= 0).any()):
        above = ancestor.clamp(min=0)
        total = total + torch.where(ancestor >= 0, total[above], torch.zeros_like(total))
        ancestor = torch.where(ancestor >= 0, ancestor[above], -1)
    return total


def backup(tree: StepTree, how: Backup = "leaf_mean") -> Tensor:
    """(N,) value of every node from the outcomes of the finished leaves under it (methods: credit, section 2).

    leaf_mean: mean over leaves. leaf_max: best leaf. child_mean: mean over active children, level by level.
    edge_softmax: children weighted by softmax of their `logp` among siblings. path_prob: leaves weighted by
    exp of the summed `logp` from below n. leaf_mean and child_mean differ when siblings have unequal leaf counts.

    Raises:
        ValueError: unknown name, or a weighted form on a tree whose branching steps have no `logp`.
    """
    # (N,) every one of these passes values from the leaves up; they differ in how siblings are combined.
    if how not in get_args(Backup):
        raise ValueError(f"backup {how!r} is none of {', '.join(get_args(Backup))}")
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    if how == "leaf_mean":
        return lift(tree, outcome)
    if how in ("edge_softmax", "path_prob"):
        _need_logp(tree, how)
    if how == "leaf_max":
        best = torch.where(tree.is_finished, outcome, -torch.inf)
        for level in reversed(tree.levels[1:]):
            best.scatter_reduce_(0, tree.parent[level], best[level], "amax")
        return torch.where(tree.valid, best, 0.0)
    if how == "path_prob":
        return _path_prob(tree, outcome)
    # child_mean: equal scores give every active sibling the same weight.
    score = tree.logp.nan_to_num(nan=0.0) if how == "edge_softmax" else torch.zeros_like(outcome)
    return tree.accumulate(outcome, _sibling_softmax(tree, score))


def _sibling_softmax(tree: StepTree, score: Tensor) -> Tensor:
    """(N,) softmax of `score` over the active members of each sibling set; 0 on invalid nodes."""
    sets = tree.sibling_set
    score = torch.where(tree.valid, score, -torch.inf)
    num_sets = int(sets.max()) + 1 if len(tree) else 0
    # The largest score of each set is taken off first, so that exp cannot overflow.
    top = torch.full((num_sets,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, sets, score, "amax")
    weight = torch.where(tree.valid, torch.exp(score - top[sets]), 0.0)
    total = torch.zeros(num_sets, dtype=torch.float64).index_add_(0, sets, weight)
    return weight / total[sets].clamp(min=1e-300)


def _path_prob(tree: StepTree, value: Tensor) -> Tensor:
    """Carry (log of the summed path weight, weighted mean) upward, one level at a time."""
    log_weight = torch.where(tree.is_finished, 0.0, -torch.inf)
    logp = tree.logp.nan_to_num(nan=0.0)
    for level in reversed(tree.levels[1:]):
        up = tree.parent[level]
        # log of the weight that each step of this level gives to its parent
        term = log_weight[level] + logp[level]
        # A long path has a probability that no float holds; weights are relative to the best sibling's.
        top = torch.full_like(value, -torch.inf).scatter_reduce_(0, up, term, "amax")
        weight = torch.where(term > -torch.inf, torch.exp(term - top[up]), 0.0)
        total = torch.zeros_like(value).index_add_(0, up, weight)
        mean = torch.zeros_like(value).index_add_(0, up, weight * value[level]) / total.clamp(min=1e-300)
        # Only parents of this level have children here; the others keep what they have.
        has_children = total > 0
        log_weight = torch.where(has_children, top + total.clamp(min=1e-300).log(), log_weight)
        value = torch.where(has_children, mean, value)
    return value


def _need_logp(tree: StepTree, how: str) -> None:
    siblings = torch.bincount(tree.sibling_set)[tree.sibling_set] > 1
    bad = siblings & tree.valid & tree.logp.isnan()
    if bool(bad.any()):
        raise ValueError(
            f"backup {how!r} needs logp on every branching step; step {int(bad.nonzero()[0])} has none. "
            "Use leaf_mean, or record log-probs in the rollout"
        )


def path_pairs(tree: StepTree) -> tuple[Tensor, Tensor]:
    """(leaf, node), each (P,) int: every finished leaf with every step on its path, itself included."""
    leaf = node = tree.is_finished.nonzero().flatten()
    leaves, nodes = [], []
    # All leaves climb together, one step per pass; those that arrive at the prompt drop out.
    while len(node):
        leaves.append(leaf)
        nodes.append(node)
        up = tree.parent[node]
        leaf, node = leaf[up >= 0], up[up >= 0]
    if not nodes:
        empty = torch.zeros(0, dtype=torch.long)
        return empty, empty
    return torch.cat(leaves), torch.cat(nodes)


def discounted_leaf(tree: StepTree, gamma: float, agg: Literal["mean", "max"] = "mean") -> Tensor:
    """(N,) mean or max over the finished leaves below of gamma^(depth(leaf) - depth(n)) * outcome, gamma in (0, 1].

    Raises ValueError for another gamma or another name.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma} must lie in (0, 1]")
    if agg not in ("mean", "max"):
        raise ValueError(f"agg {agg!r} is none of mean, max")
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    if agg == "mean":
        discount = torch.full((len(tree),), gamma, dtype=torch.float64)
        return tree.accumulate(outcome, discount) / tree.leaves_below.clamp(min=1)
    if tree.is_chains:
        # One leaf below each step: the maximum is that leaf, and accumulate needs fewer passes than the levels.
        return tree.accumulate(outcome, torch.full((len(tree),), gamma, dtype=torch.float64))
    best = torch.where(tree.is_finished, tree.outcome, -torch.inf)
    for level in reversed(tree.levels[1:]):
        best.scatter_reduce_(0, tree.parent[level], gamma * best[level], "amax")
    return torch.where(tree.valid, best, 0.0)


def path_max(tree: StepTree, x: Tensor) -> Tensor:
    """(N, ...) maximum of `x` over the path from the first step to n, n included, by pointer doubling."""
    ancestor, top = tree.parent, x
    while bool((ancestor >= 0).any()):
        above = ancestor.clamp(min=0)
        # (N, 1, ...), to choose whole rows of x
        live = (ancestor >= 0).reshape(-1, *[1] * (x.ndim - 1))
        top = torch.where(live, torch.maximum(top, top[above]), top)
        ancestor = torch.where(ancestor >= 0, ancestor[above], -1)
    return top
