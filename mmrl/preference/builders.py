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
    """Fields that a builder reads with its options: forks, and the scores of its steps."""
    scores = [field_of(options[name]) for name in ("by", "divergence") if name in options]
    return ("forks", *scores)


@register("pairs", "siblings", reads=_reads)
def siblings(tree: StepTree, *, by: Score = "outcome", threshold: NonNegativeFloat = 0.0) -> Pairs:
    """Every two siblings whose scores differ by more than `threshold`, the better one chosen.

    SVPO's pairs with by: value; step pairs for a Q model from a search's values.
    """
    score = step_scores(tree, by)
    pairs: list[tuple[int, int]] = []
    forks, counts = _forks(tree, torch.ones(len(tree), dtype=torch.bool), ~score.isnan())
    counts |= {"equal": 0, "below_threshold": 0}
    for members in forks:
        ranked = members[torch.argsort(score[members], descending=True, stable=True)].tolist()
        for i, better in enumerate(ranked):
            for worse in ranked[i + 1 :]:
                gap = float(score[better] - score[worse])
                if gap > threshold:
                    pairs.append((better, worse))
                else:
                    counts["equal" if gap == 0 else "below_threshold"] += 1
    chosen, rejected = _columns(pairs)
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
    # A step lies on the path when it and all steps above it are the best of their siblings.
    off_path = path_sum(tree, (~top).long()) > 0
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

    divergence: score of a step's dependence on the input, such as the KL between answers to clean and to destroyed
        pictures. A fork is used when a solution has one of its k steps there; k 2 as in the authors' code, solutions
        of at most k steps use all, those with an unmeasured step none.
    """
    divergences = step_scores(tree, divergence)
    num_sets = int(tree.sibling_set.max()) + 1 if len(tree) else 0
    is_used = torch.zeros(num_sets, dtype=torch.bool)
    for leaf in tree.is_finished.nonzero().flatten().tolist():
        path = _path(tree, leaf)
        along_path = divergences[path]
        if bool(along_path.isnan().any()):
            continue
        for position in select_steps(along_path.tolist(), k):
            is_used[tree.sibling_set[path[position]]] = True
    return best_and_worst(tree, step_scores(tree, by), is_used[tree.sibling_set], threshold)


@register("pairs", "leaves", reads=("outcome", "forks"), source="DPO")
def leaves(tree: StepTree, *, threshold: NonNegativeFloat = 0.0) -> Pairs:
    """The best and the worst finished leaf of each prompt, from where their paths part to their ends (DPO).

    What they share counts on both sides alike and cancels, so on any tree this is DPO on whole responses.
    """
    segments: list[tuple[int, int, int, int]] = []
    gaps: list[float] = []
    counts = {"prompts": tree.num_groups, "equal": 0, "below_threshold": 0, "alone": 0}
    for group in range(tree.num_groups):
        finished = (tree.is_finished & (tree.group == group)).nonzero().flatten()
        if len(finished) < 2:
            counts["alone"] += 1
            continue
        outcomes = tree.outcome[finished]
        best, worst = int(finished[outcomes.argmax()]), int(finished[outcomes.argmin()])
        gap = float(outcomes.max() - outcomes.min())
        if gap > threshold:
            segments.append((*fork_of(tree, best, worst), best, worst))
            gaps.append(gap)
        else:
            counts["equal" if gap == 0 else "below_threshold"] += 1
    return _continuations(segments, gaps, counts)


@register("pairs", "first_wrong", reads=_reads, source="Step-DPO")
def first_wrong(tree: StepTree, *, by: Score = "ok", right_at: float = 0.5) -> Pairs:
    """Each first wrong step against the best right step after the same right prefix (Step-DPO).

    right_at: score from which a step is right. Steps after an unscored one have an unknown prefix and are left out.
    """
    score = step_scores(tree, by)
    # A step without score (NaN) is not right either.
    right = score >= right_at
    not_right = (~right).long()
    # All steps before it are right.
    clean_prefix = path_sum(tree, not_right) - not_right == 0
    first_wrong_step = clean_prefix & ~right & ~score.isnan()
    pairs: list[tuple[int, int]] = []
    forks, counts = _forks(tree, clean_prefix, ~score.isnan())
    counts["one_sided"] = 0
    for members in forks:
        good, bad = members[right[members]], members[first_wrong_step[members]]
        if not len(good) or not len(bad):
            counts["one_sided"] += 1
            continue
        best = int(good[score[good].argmax()])
        pairs += [(best, wrong) for wrong in bad.tolist()]
    chosen, rejected = _columns(pairs)
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
    finished_of = [tree.is_finished & (tree.group == group) for group in range(tree.num_groups)]
    root = torch.stack([tree.outcome[finished].mean() for finished in finished_of])
    falls = value <= before(tree, value, root)
    families = {int(tree.sibling_set[members[0]]): members for members in _families(tree, tree.valid)}
    # Step of a deviation -> the pair there. Failed leaves are visited from the worst one on, and the first to reach a
    # deviation decides where its rejected segment ends.
    pair_at: dict[int, tuple[int, int, int, int]] = {}
    failed = (tree.is_finished & (tree.outcome < right_at)).nonzero().flatten()
    failed = failed[torch.argsort(tree.outcome[failed], stable=True)]
    counts = {"failed": len(failed), "one_sided": 0}
    for leaf in failed.tolist():
        for step in _path(tree, leaf):
            family = families[int(tree.sibling_set[step])]
            better = family[(top[family] >= right_at) & (value[family] > value[step] + threshold)]
            if bool(falls[step]) and len(better):
                chosen = int(better[value[better].argmax()])
                pair_at.setdefault(step, (chosen, step, _best_leaf(tree, chosen), leaf))
                break
        else:
            counts["one_sided"] += 1
    segments = list(pair_at.values())
    gaps = [float(value[chosen] - value[rejected]) for chosen, rejected, _, _ in segments]
    return _continuations(segments, gaps, counts)


# --- shared ------------------------------------------------------------------------------------------------------


def _families(tree: StepTree, keep: Tensor) -> list[Tensor]:
    """The nodes of `keep` (N,) bool, split into sibling sets; ascending in each, empty sets left out."""
    nodes = keep.nonzero().flatten()
    if not len(nodes):
        return []
    nodes = nodes[torch.argsort(tree.sibling_set[nodes], stable=True)]
    sizes = torch.bincount(tree.sibling_set[nodes])
    return list(nodes.split(sizes[sizes > 0].tolist()))


def _forks(tree: StepTree, allowed: Tensor, scored: Tensor) -> tuple[list[Tensor], dict[str, int]]:
    """The scored members of every fork of `allowed` steps that has at least two of them.

    Returns:
        One tensor of nodes per fork, and the counts `forks` (these) and `unscored` (forks with fewer scored members).
    """
    forks = [members for members in _families(tree, allowed & scored) if len(members) > 1]
    num_forks = sum(len(members) > 1 for members in _families(tree, allowed))
    return forks, {"forks": len(forks), "unscored": num_forks - len(forks)}


def best_and_worst(
    tree: StepTree, score: Tensor, allowed: Tensor, threshold: float | Tensor, squash: bool = False
) -> Pairs:
    """Best and worst of every family of siblings, when their gap exceeds the threshold.

    Args:
        score: (N,), a step with NaN is in no pair. allowed: (N,) bool, steps that may be in a pair.
        threshold: one number, or (N,) of which the best step's entry counts.
        squash: the gap is tanh((best - worst) / 2).
    """
    thresholds = torch.as_tensor(threshold, dtype=torch.float64).expand(len(tree))
    pairs: list[tuple[int, int]] = []
    gaps: list[float] = []
    forks, counts = _forks(tree, allowed, ~score.isnan())
    counts |= {"equal": 0, "below_threshold": 0}
    for members in forks:
        scores = score[members]
        best, worst = int(members[scores.argmax()]), int(members[scores.argmin()])
        gap = float(scores.max() - scores.min())
        if squash:
            gap = math.tanh(gap / 2)
        if gap > float(thresholds[best]):
            pairs.append((best, worst))
            gaps.append(gap)
        else:
            counts["equal" if gap == 0 else "below_threshold"] += 1
    chosen, rejected = _columns(pairs)
    return Pairs.of_steps(chosen, rejected, torch.tensor(gaps), counts)


def _best_member(tree: StepTree, score: Tensor) -> Tensor:
    """(N,) bool, True at the best step of each sibling set, the first one of equals; at none without scores."""
    best = torch.zeros(len(tree), dtype=torch.bool)
    for members in _families(tree, ~score.isnan()):
        best[members[score[members].argmax()]] = True
    return best


def _best_leaf(tree: StepTree, step: int) -> int:
    """The first best finished leaf at or below `step`."""
    mark = torch.zeros(len(tree), dtype=torch.long).index_fill(0, torch.tensor([step]), 1)
    at_or_below = path_sum(tree, mark) > 0
    finished = (at_or_below & tree.is_finished).nonzero().flatten()
    return int(finished[tree.outcome[finished].argmax()])


def _path(tree: StepTree, leaf: int) -> list[int]:
    """The steps from the first one to `leaf`."""
    path = [leaf]
    while int(tree.parent[path[-1]]) >= 0:
        path.append(int(tree.parent[path[-1]]))
    return path[::-1]


def _columns(pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """(chosen, rejected), each (P,) int."""
    table = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _continuations(
    segments: Sequence[tuple[int, int, int, int]], gaps: Sequence[float], counts: dict[str, int]
) -> Pairs:
    """Pairs of segments; each row has the chosen and the rejected step, then their ends."""
    table = torch.tensor(segments, dtype=torch.long).reshape(-1, 4)
    gap = torch.tensor(gaps, dtype=torch.float32)
    return Pairs(table[:, 0], table[:, 1], table[:, 2], table[:, 3], gap, torch.ones_like(gap), counts)
