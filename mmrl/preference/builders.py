"""Pair builders: StepTree -> Pairs, one per published way of choosing what to compare. Pure functions.

Every builder counts what it leaves out: `equal` (scores do not differ), `below_threshold`, `one_sided` (nothing right,
or nothing wrong, to compare with), `unscored` (forks with fewer than two scored members), `alone` (prompts with fewer
than two finished leaves). A step without siblings is no fork.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor

from mmrl.preference.pairs import Pairs, fork_of
from mmrl.preference.scores import Score, field_of, select_steps, step_scores
from mmrl.registry import register
from mmrl.tree import StepTree
from mmrl.tree_ops import backup, before, path_sum


def _reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that a builder reads with its options: steps to compare, and their scores."""
    return ("forks", *(field_of(options[key]) for key in ("by", "divergence") if key in options))


@register("pairs", "siblings", reads=_reads)
def siblings(tree: StepTree, *, by: Score = "outcome", threshold: NonNegativeFloat = 0.0) -> Pairs:
    """Every two siblings whose scores differ by more than `threshold`, the better one chosen.

    SVPO's pairs with by: value; step pairs for a Q model from a search's values.
    """
    score = step_scores(tree, by)
    found: list[tuple[int, int]] = []
    forks, counts = _forks(tree, torch.ones(len(tree), dtype=torch.bool), ~score.isnan())
    counts |= {"equal": 0, "below_threshold": 0}
    for members in forks:
        ranked = members[torch.argsort(score[members], descending=True, stable=True)].tolist()
        for i, better in enumerate(ranked):
            for worse in ranked[i + 1 :]:
                gap = float(score[better] - score[worse])
                if gap > threshold:
                    found.append((better, worse))
                else:
                    counts["equal" if gap == 0 else "below_threshold"] += 1
    chosen, rejected = _columns(found)
    return Pairs.of_steps(chosen, rejected, score[chosen] - score[rejected], counts)


@register("pairs", "extremes", reads=_reads, source="SPO")
def extremes(
    tree: StepTree,
    *,
    by: Score = "outcome",
    threshold: NonNegativeFloat = 0.0,
    squash: bool = False,
    first_depth: NonNegativeInt = 0,
    last_depth: NonNegativeInt | None = None,
) -> Pairs:
    """Best and worst of the siblings at every fork, when they differ by more than the threshold (SPO).

    Args:
        squash: the gap is tanh((best - worst) / 2), the difference of the two's softmax probabilities.
        first_depth, last_depth: forks at other depths are left out.
    """
    allowed = tree.depth >= first_depth
    if last_depth is not None:
        allowed = allowed & (tree.depth <= last_depth)
    return best_and_worst(tree, step_scores(tree, by), allowed, threshold, squash)


@register("pairs", "best_path", reads=_reads, source="MCTS-DPO")
def best_path(tree: StepTree, *, by: Score = "outcome", threshold: NonNegativeFloat = 0.0) -> Pairs:
    """Along the path of best steps, the best against the worst sibling at every depth (MCTS-DPO; by: value is Q)."""
    score = step_scores(tree, by)
    top = _best_member(tree, score)
    off_path = path_sum(tree, (~top).long()) > 0  # a step on the path is the best of its siblings, as all above it
    above = torch.where(tree.parent >= 0, off_path[tree.parent.clamp(min=0)], False)
    return best_and_worst(tree, score, ~above, threshold)


@register("pairs", "contrastive", reads=_reads, source="video-SALMONN-o1")
def contrastive(
    tree: StepTree,
    *,
    by: Score = "outcome",
    k: PositiveInt = 2,
    threshold: NonNegativeFloat = 0.0,
    divergence: Score = "tags.divergence",
) -> Pairs:
    """Best and worst alternative at the k steps of each solution that diverge most (pDPO).

    divergence: score of a step that says how much it depends on the input, such as the KL between answers to clean and
        to destroyed pictures. A fork is used when a solution has one of its k steps there; k 2 as in the
        authors' code, solutions of at most k steps use all, those with an unmeasured step none.
    """
    d = step_scores(tree, divergence)
    picked = torch.zeros(int(tree.sib.max()) + 1 if len(tree) else 0, dtype=torch.bool)
    for leaf in tree.is_finished.nonzero().flatten().tolist():
        path = _path(tree, leaf)
        if not bool(d[path].isnan().any()):
            picked[tree.sib[[path[i] for i in select_steps(d[path].tolist(), k)]]] = True
    return best_and_worst(tree, step_scores(tree, by), picked[tree.sib], threshold)


@register("pairs", "leaves", reads=("outcome", "forks"), source="DPO")
def leaves(tree: StepTree, *, threshold: NonNegativeFloat = 0.0) -> Pairs:
    """The best and the worst finished leaf of each prompt, from where their paths part to their ends (DPO).

    What they share counts on both sides alike and cancels, so on any tree this is DPO on whole responses.
    """
    found: list[tuple[int, int, int, int]] = []
    gaps: list[float] = []
    counts = {"prompts": tree.num_groups, "equal": 0, "below_threshold": 0, "alone": 0}
    for g in range(tree.num_groups):
        own = (tree.is_finished & (tree.group == g)).nonzero().flatten()
        if len(own) < 2:
            counts["alone"] += 1
            continue
        best, worst = int(own[tree.outcome[own].argmax()]), int(own[tree.outcome[own].argmin()])
        gap = float(tree.outcome[best] - tree.outcome[worst])
        if gap > threshold:
            found.append((*fork_of(tree, best, worst), best, worst))
            gaps.append(gap)
        else:
            counts["equal" if gap == 0 else "below_threshold"] += 1
    return _continuations(found, gaps, counts)


@register("pairs", "first_wrong", reads=_reads, source="Step-DPO")
def first_wrong(tree: StepTree, *, by: Score = "ok", right_at: float = 0.5) -> Pairs:
    """Each first wrong step against the best right step after the same right prefix (Step-DPO).

    right_at: score from which a step is right. Steps after an unscored one have an unknown prefix and are left out.
    """
    score = step_scores(tree, by)
    right = score >= right_at  # NaN is not right
    faults = path_sum(tree, (~right).long())
    clean = faults - (~right).long() == 0  # all steps before it are right
    wrong = clean & ~right & ~score.isnan()
    found: list[tuple[int, int]] = []
    forks, counts = _forks(tree, clean, ~score.isnan())
    counts["one_sided"] = 0
    for members in forks:
        good, bad = members[right[members]], members[wrong[members]]
        if not len(good) or not len(bad):
            counts["one_sided"] += 1
            continue
        best = int(good[score[good].argmax()])
        found += [(best, v) for v in bad.tolist()]
    chosen, rejected = _columns(found)
    return Pairs.of_steps(chosen, rejected, score[chosen] - score[rejected], counts)


@register("pairs", "recalibrated", reads=("outcome", "forks"), source="STeCa")
def recalibrated(tree: StepTree, *, right_at: float = 1.0, threshold: NonNegativeFloat = 0.0) -> Pairs:
    """Where a failed solution first deviates, a better continuation to a right end against the failed one (STeCa).

    A step deviates when its value, the mean outcome below it, is not above the value before it and some sibling's is
    more than `threshold` above its own. The chosen segment goes from the best sibling with a right end to the best
    leaf below it; the rejected one from the deviation to the worst leaf.

    right_at: outcome from which a leaf is right.
    """
    value = torch.where(tree.valid, backup(tree, "leaf_mean"), torch.nan)
    top = torch.where(tree.valid, backup(tree, "leaf_max"), torch.nan)
    root = torch.stack([tree.outcome[tree.is_finished & (tree.group == g)].mean() for g in range(tree.num_groups)])
    falls = value <= before(tree, value, root)
    families = {int(tree.sib[m[0]]): m for m in _families(tree, tree.valid)}
    found: dict[int, tuple[int, int, int, int]] = {}
    failed = (tree.is_finished & (tree.outcome < right_at)).nonzero().flatten()
    failed = failed[torch.argsort(tree.outcome[failed], stable=True)]  # the worst leaf below a deviation comes first
    counts = {"failed": len(failed), "one_sided": 0}
    for leaf in failed.tolist():
        for v in _path(tree, leaf):
            family = families[int(tree.sib[v])]
            better = family[(top[family] >= right_at) & (value[family] > value[v] + threshold)]
            if bool(falls[v]) and len(better):
                u = int(better[value[better].argmax()])
                found.setdefault(v, (u, v, _best_leaf(tree, u), leaf))
                break
        else:
            counts["one_sided"] += 1
    gaps = [float(value[u] - value[v]) for u, v, _, _ in found.values()]
    return _continuations(list(found.values()), gaps, counts)


# --- shared ------------------------------------------------------------------------------------------------------


def _families(tree: StepTree, keep: Tensor) -> list[Tensor]:
    """Members (ascending, of `keep`) of every sibling set that has any."""
    nodes = keep.nonzero().flatten()
    nodes = nodes[torch.argsort(tree.sib[nodes], stable=True)]
    sizes = torch.bincount(tree.sib[nodes])
    return list(nodes.split(sizes[sizes > 0].tolist())) if len(nodes) else []


def _forks(tree: StepTree, allowed: Tensor, scored: Tensor) -> tuple[list[Tensor], dict[str, int]]:
    """The scored members of every fork of `allowed` steps that has two; how many those are, how many have fewer."""
    families = [m for m in _families(tree, allowed & scored) if len(m) > 1]
    every = sum(len(m) > 1 for m in _families(tree, allowed))
    return families, {"forks": len(families), "unscored": every - len(families)}


def best_and_worst(
    tree: StepTree, score: Tensor, allowed: Tensor, threshold: float | Tensor, squash: bool = False
) -> Pairs:
    """Best and worst of every family of siblings, when their gap exceeds the threshold.

    Args:
        score: (N,), NaN is in no pair. allowed: (N,) bool, steps that may be in one.
        threshold: one number, or (N,), read at the best. squash: the gap is tanh((best - worst) / 2).
    """
    least = torch.as_tensor(threshold, dtype=torch.float64).expand(len(tree))
    found: list[tuple[int, int]] = []
    gaps: list[float] = []
    forks, counts = _forks(tree, allowed, ~score.isnan())
    counts |= {"equal": 0, "below_threshold": 0}
    for members in forks:
        own = score[members]
        best, worst = int(members[own.argmax()]), int(members[own.argmin()])
        gap = float(own.max() - own.min())
        gap = math.tanh(gap / 2) if squash else gap
        if gap > float(least[best]):
            found.append((best, worst))
            gaps.append(gap)
        else:
            counts["equal" if gap == 0 else "below_threshold"] += 1
    chosen, rejected = _columns(found)
    return Pairs.of_steps(chosen, rejected, torch.tensor(gaps), counts)


def _best_member(tree: StepTree, score: Tensor) -> Tensor:
    """(N,) bool, the first best step of each family; of a family without scores, none."""
    best = torch.zeros(len(tree), dtype=torch.bool)
    for members in _families(tree, ~score.isnan()):
        best[members[score[members].argmax()]] = True
    return best


def _best_leaf(tree: StepTree, step: int) -> int:
    """The first best finished leaf at or below `step`."""
    inside = torch.zeros(len(tree), dtype=torch.long).index_fill(0, torch.tensor([step]), 1)
    own = ((path_sum(tree, inside) > 0) & tree.is_finished).nonzero().flatten()
    return int(own[tree.outcome[own].argmax()])


def _path(tree: StepTree, leaf: int) -> list[int]:
    """The steps to `leaf`, the first one first."""
    path = [leaf]
    while int(tree.parent[path[-1]]) >= 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


def _columns(found: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    table = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _continuations(found: Sequence[tuple[int, int, int, int]], gaps: Sequence[float], counts: dict[str, int]) -> Pairs:
    """Pairs of segments; each row has chosen and rejected step, then their ends."""
    table = torch.tensor(found, dtype=torch.long).reshape(-1, 4)
    gap = torch.tensor(gaps, dtype=torch.float32)
    return Pairs(table[:, 0], table[:, 1], table[:, 2], table[:, 3], gap, torch.ones_like(gap), counts)
