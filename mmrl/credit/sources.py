"""Small reward sources: numbers that come before the tree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def gate_levels(rewards: Sequence[float], thresholds: Sequence[float], immediate: float) -> float:
    """Gated sum of rewards in order of priority, the immediate one last (G-RA with several levels).

    Each reward counts only when all rewards of higher priority reached their thresholds.
    """
    total = 0.0
    for reward, threshold in zip(rewards, thresholds, strict=True):
        total += reward
        if reward < threshold:
            return total
    return total + immediate


def ordered_overlap(plan: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """2 M / (len(plan) + len(reference)), M the longest common subsequence; 1 iff equal (REVER)."""
    if not plan and not reference:
        return 1.0
    best = [0] * (len(reference) + 1)
    for item in plan:
        left = 0  # best[j - 1] of the row above
        for j, want in enumerate(reference, start=1):
            above = best[j]
            best[j] = left + 1 if item == want else max(above, best[j - 1])
            left = above
    return 2 * best[-1] / (len(plan) + len(reference))


def mask_fill(restored: Sequence[Hashable], original: Sequence[Hashable]) -> float:
    """Share of masks restored exactly (MR-RLVR). Missing answers count as wrong."""
    if not original:
        raise ValueError("mask_fill needs at least one mask")
    return sum(a == b for a, b in zip(restored, original, strict=False)) / len(original)


def reorder(order: Sequence[int], *, kendall: bool = False) -> float:
    """Share of positions restored, `order[i]` the original index placed at i; `kendall` maps tau to [0, 1] (MR-RLVR).

    Raises ValueError when `order` is no permutation.
    """
    n = len(order)
    if sorted(order) != list(range(n)) or n == 0:
        raise ValueError(f"reorder needs a permutation of 0..{n - 1}, got {list(order)[:8]}")
    if not kendall:
        return sum(i == x for i, x in enumerate(order)) / n
    pairs = n * (n - 1) / 2
    agree = sum(order[i] < order[j] for i in range(n) for j in range(i + 1, n))
    return agree / pairs if pairs else 1.0
