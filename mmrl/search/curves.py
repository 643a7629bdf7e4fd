"""Accuracy against the number of candidates, from one pool per problem.

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

_EXACT = 256  # candidates per problem; beyond, binomials near the end of float64 and the time argue for sampling


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
    out = np.empty((len(scores), len(ks)))
    for p, (s, c) in enumerate(zip(scores, correct, strict=True)):
        values, right = np.asarray(s, np.float64), np.asarray(c, np.float64)
        _check(p, values, right, ks)
        out[p] = _rank_weights(len(values), tuple(ks)) @ right[np.argsort(-values, kind="stable")]
    return out


def pass_at_k(correct: Sequence[Sequence[bool]], ks: Sequence[int]) -> Floats:
    """(P, K) probability that a random k-subset holds a right candidate: 1 - C(n-c, k) / C(n, k)."""
    for p, c in enumerate(correct):
        _check(p, np.zeros(len(c)), np.asarray(c), ks)
    return np.array([_pass(len(c), int(np.sum(c)), tuple(ks)) for c in correct], np.float64).reshape(-1, len(ks))


def majority_at_k(
    answers: Sequence[Answers], correct: Sequence[Sequence[bool]], ks: Sequence[int], *, seed: int = 0
) -> tuple[Floats, Literal["exact", "sampled"]]:
    """(P, K) expected accuracy of the majority answer of k candidates drawn in random order, and how it was found.

    A tie goes to the answer drawn first, which by symmetry is each tied one with equal probability. None does not
    vote but is drawn. An answer is right when its first candidate is. Exact up to 256 candidates, beyond from 1024
    draws with a fixed seed.
    """
    if max(map(len, answers), default=0) > _EXACT:
        ones = [[1.0] * len(a) for a in answers]
        return weighted_at_k(answers, ones, correct, ks, seed=seed, draws=1024), "sampled"
    out = np.empty((len(answers), len(ks)))
    for p, (a, c) in enumerate(zip(answers, correct, strict=True)):
        _check(p, np.zeros(len(a)), np.asarray(c), ks)
        groups, right = _groups(a, c)
        counts = np.bincount(groups[groups >= 0], minlength=len(right))
        key = (tuple(sorted(counts[right].tolist())), tuple(sorted(counts[~right].tolist())))
        out[p] = np.asarray(_majority(*key, len(a)))[list(ks)]
    return out, "exact"


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
    out = np.zeros((len(answers), len(ks)))
    for p, (a, s, c) in enumerate(zip(answers, scores, correct, strict=True)):
        values = np.asarray(s, np.float64)
        _check(p, values, np.asarray(c), ks)
        groups, right = _groups(a, c)
        if not len(right):
            continue
        order, right = _orders(len(a), draws, seed), np.append(right, False)  # the last one: nobody voted
        for i, k in enumerate(ks):
            out[p, i] = right[_winners(groups[order[:, :k]], values[order[:, :k]], len(right) - 1)].mean()
    return out


def mean_interval(
    values: Floats, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Floats, Floats, Floats]:
    """Mean over problems (rows) and the percentile bootstrap's bounds, each (K,); the order of rows is free."""
    v = np.sort(values, axis=0)  # each column's interval stands alone, so sorting makes it independent of the order
    if not len(v):
        raise ValueError("mean_interval: no problems; an interval needs at least one")
    times = np.random.default_rng(seed).multinomial(len(v), np.full(len(v), 1 / len(v)), size=resamples)
    low, high = np.quantile(times @ v / len(v), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return v.mean(axis=0), low, high


# ---- counting -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _rank_weights(n: int, ks: tuple[int, ...]) -> Floats:
    return np.array([[comb(n - 1 - j, k - 1) / comb(n, k) for j in range(n)] for k in ks])


@lru_cache(maxsize=4096)
def _pass(n: int, right: int, ks: tuple[int, ...]) -> tuple[float, ...]:
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
        big_right, big_wrong = [r for r in right if r >= m], [w for w in wrong if w >= m]
        free = n - sum(big_right) - sum(big_wrong)
        ways = np.zeros((len(big_right) + 1, len(big_wrong) + 1, n + 1))
        ways[0, 0, : free + 1] = [float(comb(free, j)) for j in range(free + 1)]
        for i, size in enumerate(big_right + big_wrong):
            ways = _with_answer(ways, size, m, axis=0 if i < len(big_right) else 1)
        c, w = np.ogrid[: ways.shape[0], : ways.shape[1]]
        total += np.tensordot(c / np.maximum(c + w, 1), ways, axes=2)
    return tuple(total / [float(comb(n, k)) for k in range(n + 1)])


def _with_answer(ways: Floats, size: int, m: int, *, axis: int) -> Floats:
    out = np.zeros_like(ways)
    for j in range(min(m, size + 1)):
        out[..., j:] += float(comb(size, j)) * ways[..., : ways.shape[-1] - j]
    tied = float(comb(size, m)) * ways[..., : ways.shape[-1] - m]
    if axis == 0:
        out[1:, :, m:] += tied[:-1]
    else:
        out[:, 1:, m:] += tied[:, :-1]
    return out


# ---- sampling -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _orders(n: int, draws: int, seed: int) -> NDArray[np.intp]:
    return np.argsort(np.random.default_rng([seed, n]).random((draws, n)), axis=1)


def _winners(groups: NDArray[np.intp], values: Floats, num: int) -> NDArray[np.intp]:
    """Per draw the group with the largest sum, the one drawn first on ties; `num` (no group) when nobody voted."""
    draws, k = groups.shape
    cell = (np.where(groups < 0, num, groups) + np.arange(draws)[:, None] * (num + 1)).ravel()
    sums = np.bincount(cell, values.ravel(), draws * (num + 1)).reshape(draws, num + 1)
    first = np.full(draws * (num + 1), k)
    first[cell[::-1]] = np.tile(np.arange(k)[::-1], draws)  # of equal indices the last assignment stands
    first = first.reshape(draws, num + 1)
    sums[first == k] = -np.inf
    sums[:, num] = -np.inf
    top = sums.max(axis=1, keepdims=True)
    return np.where(np.isneginf(top[:, 0]), num, np.where(sums == top, first, k + 1).argmin(axis=1))


def _groups(answers: Answers, correct: Sequence[bool]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Group of each candidate in order first seen (-1 = unreadable), and whether each group is right."""
    index: dict[str, int] = {}
    right: list[bool] = []
    for a, c in zip(answers, correct, strict=True):
        if a is not None and a not in index:
            index[a] = len(index)
            right.append(bool(c))
    return np.array([-1 if a is None else index[a] for a in answers], np.intp), np.array(right, np.bool_)


def _check(problem: int, scores: Floats, correct: NDArray, ks: Sequence[int]) -> None:
    n = len(correct)
    if len(scores) != n:
        raise ValueError(f"problem {problem}: {len(scores)} scores for {n} candidates; give one each")
    if bool(np.isnan(scores).any()):
        raise ValueError(f"problem {problem}: score {int(np.isnan(scores).argmax())} is NaN; it has no rank")
    if not all(1 <= k <= n for k in ks):
        raise ValueError(f"problem {problem}: k in {list(ks)} must lie in 1..{n}, the candidates of its pool")
