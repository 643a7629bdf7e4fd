"""Exact search curves: expected accuracy against the number k of candidates, from one pool of n per problem.

A pool of n candidates says more than its first k: every k-subset is as likely as any other, so the expected accuracy
at k is a sum over subsets. Best-of-k, pass@k and majority@k are exact; the weighted vote needs the scores of each
subset and is sampled. Pools may differ in size; k must not exceed the smallest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Answers = Sequence[str | None]

# The largest pool for which majorities are counted exactly. Beyond it binomials come near the end of float64, and
# counting takes long.
_EXACT = 256


def sizes(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def best_of_k(scores: Sequence[Sequence[float]], correct: Sequence[Sequence[float]], ks: Sequence[int]) -> Floats:
    """(P, K) expected accuracy (or, of rewards in place of verdicts, reward) of the best of a random k-subset.

    With candidates sorted by score (stable, so ties go to the earlier one) the one at rank j is the best of a
    k-subset with probability C(n-1-j, k-1) / C(n, k).

    Raises:
        ValueError: a score is NaN, lengths differ, or k is outside 1..n.
    """
    accuracy = np.empty((len(scores), len(ks)))
    for problem, (problem_scores, problem_correct) in enumerate(zip(scores, correct, strict=True)):
        values = np.asarray(problem_scores, np.float64)
        right = np.asarray(problem_correct, np.float64)
        _check(problem, values, right, ks)
        best_first = np.argsort(-values, kind="stable")
        accuracy[problem] = _rank_weights(len(values), tuple(ks)) @ right[best_first]
    return accuracy


def pass_at_k(correct: Sequence[Sequence[bool]], ks: Sequence[int]) -> Floats:
    """(P, K) probability that a random k-subset holds a right candidate: 1 - C(n-c, k) / C(n, k)."""
    rows = []
    for problem, right in enumerate(correct):
        _check(problem, np.zeros(len(right)), np.asarray(right), ks)
        rows.append(_pass(len(right), int(np.sum(right)), tuple(ks)))
    return np.array(rows, np.float64).reshape(-1, len(ks))


def majority_at_k(
    answers: Sequence[Answers], correct: Sequence[Sequence[bool]], ks: Sequence[int], *, seed: int = 0
) -> tuple[Floats, Literal["exact", "sampled"]]:
    """(P, K) expected accuracy of the majority answer of k candidates drawn in random order; "exact" or "sampled".

    A tie goes to the answer drawn first, which by symmetry is each tied one with equal probability. None does not
    vote but is drawn. An answer is right when its first candidate is. Exact up to 256 candidates, beyond from 1024
    draws with a fixed seed.
    """
    if max(map(len, answers), default=0) > _EXACT:
        equal_weights = [[1.0] * len(pool) for pool in answers]
        return weighted_at_k(answers, equal_weights, correct, ks, seed=seed, draws=1024), "sampled"
    accuracy = np.empty((len(answers), len(ks)))
    for problem, (pool, problem_correct) in enumerate(zip(answers, correct, strict=True)):
        _check(problem, np.zeros(len(pool)), np.asarray(problem_correct), ks)
        groups, right = _groups(pool, problem_correct)
        counts = np.bincount(groups[groups >= 0], minlength=len(right))
        # Sorted, so that problems with the same counts share one cached result.
        right_counts = tuple(sorted(counts[right].tolist()))
        wrong_counts = tuple(sorted(counts[~right].tolist()))
        accuracy[problem] = np.asarray(_majority(right_counts, wrong_counts, len(pool)))[list(ks)]
    return accuracy, "exact"


def weighted_at_k(
    answers: Sequence[Answers],
    scores: Sequence[Sequence[float]],
    correct: Sequence[Sequence[bool]],
    ks: Sequence[int],
    *,
    seed: int = 0,
    draws: int = 256,
) -> Floats:
    """(P, K) accuracy of the score-weighted vote over `draws` random k-subsets, nested in k.

    The draws depend on the seed and on n alone: permuting problems permutes rows. Ties as in `majority_at_k`.
    """
    accuracy = np.zeros((len(answers), len(ks)))
    for problem, (pool, problem_scores, problem_correct) in enumerate(zip(answers, scores, correct, strict=True)):
        values = np.asarray(problem_scores, np.float64)
        _check(problem, values, np.asarray(problem_correct), ks)
        groups, right = _groups(pool, problem_correct)
        num_groups = len(right)
        if not num_groups:
            continue
        # One entry more, which is wrong, for draws in which nobody voted.
        right = np.append(right, False)
        order = _orders(len(pool), draws, seed)
        for i, k in enumerate(ks):
            drawn = order[:, :k]
            winners = _winners(groups[drawn], values[drawn], num_groups)
            accuracy[problem, i] = right[winners].mean()
    return accuracy


def mean_interval(
    values: Floats, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Mean over problems (rows) and the percentile bootstrap's bounds, each (K,); the order of rows is free."""
    n = len(values)
    if not n:
        raise ValueError("mean_interval: no problems; an interval needs at least one")
    # Each column has its own interval, so columns can be sorted apart; this makes them independent of the row order.
    values = np.sort(values, axis=0)
    # (resamples, P) how often each problem is drawn
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    low, high = np.quantile(counts @ values / n, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(axis=0), low, high


# ---- counting -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _rank_weights(n: int, ks: tuple[int, ...]) -> Floats:
    """(K, n) probability that the candidate at each rank is the best of a random k-subset."""
    return np.array([[comb(n - 1 - rank, k - 1) / comb(n, k) for rank in range(n)] for k in ks])


@lru_cache(maxsize=4096)
def _pass(n: int, right: int, ks: tuple[int, ...]) -> tuple[float, ...]:
    """Per k, the probability that a random k-subset of n candidates holds one of the `right` right ones."""
    return tuple(1 - comb(n - right, k) / comb(n, k) for k in ks)


@lru_cache(maxsize=4096)
def _majority(right: tuple[int, ...], wrong: tuple[int, ...], n: int) -> tuple[float, ...]:
    """Accuracy at k = 0..n for answers with these numbers of candidates.

    By the largest count m: ways[c, w, k] counts k-subsets in which c right and w wrong answers have m candidates and
    all others fewer; such a subset is right with probability c / (c + w). Answers with fewer than m candidates and
    unreadable ones are free, so together they are one binomial.
    """
    total = np.zeros(n + 1)
    for m in range(1, max(right + wrong, default=0) + 1):
        big_right = [count for count in right if count >= m]
        big_wrong = [count for count in wrong if count >= m]
        free = n - sum(big_right) - sum(big_wrong)
        ways = np.zeros((len(big_right) + 1, len(big_wrong) + 1, n + 1))
        ways[0, 0, : free + 1] = [float(comb(free, drawn)) for drawn in range(free + 1)]
        # Answers with at least m candidates are added one by one.
        for size in big_right:
            ways = _with_answer(ways, size, m, axis=0)
        for size in big_wrong:
            ways = _with_answer(ways, size, m, axis=1)
        c, w = np.ogrid[: ways.shape[0], : ways.shape[1]]
        total += np.tensordot(c / np.maximum(c + w, 1), ways, axes=2)
    return tuple(total / [float(comb(n, k)) for k in range(n + 1)])


def _with_answer(ways: Floats, size: int, m: int, *, axis: int) -> Floats:
    """`ways` of `_majority` with one further answer of `size` candidates; axis 0: a right answer, 1: a wrong."""
    extended = np.zeros_like(ways)
    # Fewer than m of its candidates in the subset: the tie does not change.
    for drawn in range(min(m, size + 1)):
        extended[..., drawn:] += float(comb(size, drawn)) * ways[..., : ways.shape[-1] - drawn]
    # Exactly m of them: one more answer in the tie.
    tied = float(comb(size, m)) * ways[..., : ways.shape[-1] - m]
    if axis == 0:
        extended[1:, :, m:] += tied[:-1]
    else:
        extended[:, 1:, m:] += tied[:, :-1]
    return extended


# ---- sampling -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _orders(n: int, draws: int, seed: int) -> NDArray[np.intp]:
    """(draws, n) random orders of n candidates."""
    return np.argsort(np.random.default_rng([seed, n]).random((draws, n)), axis=1)


def _winners(groups: NDArray[np.intp], values: Floats, num: int) -> NDArray[np.intp]:
    """(draws,) the group with the largest sum, the one drawn first on ties; `num` (no group) when nobody voted.

    Args:
        groups: (draws, k) in 0..num-1, -1 = no vote. values: (draws, k) weights of the votes.
    """
    draws, k = groups.shape
    # One cell per draw and group, flat; group `num` of a draw collects those that do not vote.
    cell = (np.where(groups < 0, num, groups) + np.arange(draws)[:, None] * (num + 1)).ravel()
    sums = np.bincount(cell, values.ravel(), draws * (num + 1)).reshape(draws, num + 1)
    # Position of the first vote of each cell, k without one: assigned backwards, as the last assignment stands.
    first = np.full(draws * (num + 1), k)
    first[cell[::-1]] = np.tile(np.arange(k)[::-1], draws)
    first = first.reshape(draws, num + 1)
    sums[first == k] = -np.inf
    sums[:, num] = -np.inf
    top = sums.max(axis=1, keepdims=True)
    nobody_voted = np.isneginf(top[:, 0])
    earliest_top = np.where(sums == top, first, k + 1).argmin(axis=1)
    return np.where(nobody_voted, num, earliest_top)


def _groups(answers: Answers, correct: Sequence[bool]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """(n,) group of each candidate's answer, -1 = unreadable; and (groups,) True for right answers.

    Groups are numbered in order of first appearance.
    """
    group_of: dict[str, int] = {}
    groups: list[int] = []
    right: list[bool] = []
    for answer, is_right in zip(answers, correct, strict=True):
        if answer is None:
            groups.append(-1)
            continue
        if answer not in group_of:
            group_of[answer] = len(group_of)
            right.append(bool(is_right))
        groups.append(group_of[answer])
    return np.array(groups, np.intp), np.array(right, np.bool_)


def _check(problem: int, scores: Floats, correct: NDArray, ks: Sequence[int]) -> None:
    n = len(correct)
    if len(scores) != n:
        raise ValueError(f"problem {problem}: {len(scores)} scores for {n} candidates; give one each")
    if bool(np.isnan(scores).any()):
        raise ValueError(f"problem {problem}: score {int(np.isnan(scores).argmax())} is NaN; it has no rank")
    if not all(1 <= k <= n for k in ks):
        raise ValueError(f"problem {problem}: k in {list(ks)} must lie in 1..{n}, the candidates of its pool")
