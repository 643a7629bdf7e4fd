"""VisualProcessBench: every step of multimodal solutions right or wrong; neutral steps do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, of_groups, thresholds
from mmrl.reasoning.formats.benches import visualprocessbench
from mmrl.registry import register
from mmrl.scorers.metrics import f1, macro_f1, roc_auc

Array = NDArray[Any]


def read_row(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """The group is the data source (MMMU, MathVision, MathVerse, DynaMath, WeMath)."""
    (record,) = visualprocessbench(row, name)
    return [Item((record,), str(record.meta.get("data_source", "")))]


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """macro_f1 = (F1 of right + F1 of wrong steps) / 2 with "right" iff p >= threshold, per source and in all.

    `micro_f1` is the mean over sources weighted by their steps, `macro_f1` pools the steps; `oracle_*` use the
    threshold that is best on this very set, an upper bound and no result.
    """
    parts = {name: pooled(part) for name, part in of_groups(scored).items()}
    groups = {name: _measures(p, y, threshold) for name, (p, y) in parts.items()}
    p, y = pooled(scored)
    best = oracle(list(parts.values()))
    metrics = {"micro_f1": weighted_f1(list(parts.values()), threshold), **_measures(p, y, threshold)}
    metrics |= {"oracle_threshold": best, "oracle_micro_f1": weighted_f1(list(parts.values()), best)}
    return Result(metrics, groups, ("oracle_threshold is tuned on the test set itself: an upper bound, no result",))


def pooled(scored: Sequence[Scored]) -> tuple[Array, Array]:
    """Scores and labels (True = right) of all steps that are labelled."""
    pairs = [
        (p, y == 1)
        for s in scored
        for p, y in zip(s.scores[0] or (), s.item.records[0].labels or (), strict=True)
        if y is not None
    ]
    return np.array([p for p, _ in pairs], float), np.array([y for _, y in pairs], bool)


def weighted_f1(parts: Sequence[tuple[Array, Array]], threshold: float) -> float:
    """Mean of the sources' macro F1, weighted by their labelled steps; NaN without any step."""
    sizes = [p.size for p, _ in parts]
    values = [macro_f1(p >= threshold, y) for p, y in parts]
    return sum(n * v for n, v in zip(sizes, values, strict=True)) / sum(sizes) if sum(sizes) else math.nan


def oracle(parts: Sequence[tuple[Array, Array]], *, most: int = 1000) -> float:
    """The threshold that is best on the test set itself; the lowest on ties, NaN without steps."""
    candidates = thresholds([p.tolist() for p, _ in parts], most)
    return max(candidates, key=lambda t: weighted_f1(parts, t), default=math.nan)


def quick(scored: Sequence[Scored], threshold: float) -> Callable[[NDArray[np.intp]], float]:
    """`micro_f1` of items by index."""
    names = list(of_groups(scored))
    source = np.array([names.index(s.item.group) for s in scored])
    table = np.zeros((len(scored), 4), int)  # TP, FP, TN, FN
    for row, s in zip(table, scored, strict=True):
        p, y = pooled([s])
        called = p >= threshold
        row[:] = [(called & y).sum(), (called & ~y).sum(), (~called & ~y).sum(), (~called & y).sum()]

    def value(index: NDArray[np.intp]) -> float:
        counts = np.zeros((len(names), 4))
        np.add.at(counts, source[index], table[index])
        tp, fp, tn, fn = counts.T
        right, wrong = (2 * t / np.maximum(2 * t + fp + fn, 1) for t in (tp, tn))
        steps = counts.sum(1)
        return float(steps @ (right + wrong) / 2 / steps.sum()) if steps.sum() else math.nan

    return value


def _measures(p: Array, y: Array, threshold: float) -> dict[str, float]:
    called = p >= threshold
    return {
        "macro_f1": macro_f1(called, y),
        "f1_right": f1(called, y),
        "f1_wrong": f1(~called, ~y),
        "auc": roc_auc(p, y),
        "macro_f1_at_half": macro_f1(p >= 0.5, y),
        "steps": float(p.size),
    }


BENCH = register("benchmarks", "visualprocessbench")(Benchmark(read_row, measure, "micro_f1", quick=quick))
