"""VisualProcessBench: every step of multimodal solutions right or wrong; neutral steps do not count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, of_groups, thresholds
from mmrl.reasoning.formats.benches import visualprocessbench
from mmrl.registry import register
from mmrl.scorers.metrics import f1, macro_f1, roc_auc

# Scores (T,) and labels (T,) of labelled steps, True = right.
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
    groups = {}
    for name, (scores, labels) in parts.items():
        groups[name] = _measures(scores, labels, threshold)
    sources = list(parts.values())
    best = oracle(sources)
    metrics = {"micro_f1": weighted_f1(sources, threshold), **_measures(*pooled(scored), threshold)}
    metrics |= {"oracle_threshold": best, "oracle_micro_f1": weighted_f1(sources, best)}
    return Result(metrics, groups, ("oracle_threshold is tuned on the test set itself: an upper bound, no result",))


def pooled(scored: Sequence[Scored]) -> tuple[Array, Array]:
    """Scores and labels (True = right) of all steps that are labelled."""
    scores: list[float] = []
    right: list[bool] = []
    for entry in scored:
        for score, label in zip(entry.scores[0] or (), entry.item.records[0].labels or (), strict=True):
            if label is not None:
                scores.append(score)
                right.append(label == 1)
    return np.array(scores, float), np.array(right, bool)


def weighted_f1(parts: Sequence[tuple[Array, Array]], threshold: float) -> float:
    """Mean of the sources' macro F1, weighted by their labelled steps; NaN without any step."""
    weighted, num_steps = 0.0, 0
    for scores, labels in parts:
        weighted += scores.size * macro_f1(scores >= threshold, labels)
        num_steps += scores.size
    return weighted / num_steps if num_steps else math.nan


def oracle(parts: Sequence[tuple[Array, Array]], *, most: int = 1000) -> float:
    """The threshold that is best on the test set itself; the lowest on ties, NaN without steps."""
    candidates = thresholds([scores.tolist() for scores, _ in parts], most)
    return max(candidates, key=partial(weighted_f1, parts), default=math.nan)


def quick(scored: Sequence[Scored], threshold: float) -> Callable[[NDArray[np.intp]], float]:
    """`micro_f1` of items by index."""
    names = list(of_groups(scored))
    # (items,) the source of each, and (items, 4) its steps: TP, FP, TN, FN.
    source = np.array([names.index(entry.item.group) for entry in scored])
    table = np.zeros((len(scored), 4), int)
    for row, entry in zip(table, scored, strict=True):
        scores, labels = pooled([entry])
        called = scores >= threshold
        row[:] = [
            (called & labels).sum(),
            (called & ~labels).sum(),
            (~called & ~labels).sum(),
            (~called & labels).sum(),
        ]

    def value(index: NDArray[np.intp]) -> float:
        counts = np.zeros((len(names), 4))
        np.add.at(counts, source[index], table[index])
        tp, fp, tn, fn = counts.T
        # (sources,) F1 = 2 TP / (2 TP + FP + FN) of right steps, and the same of wrong ones; 0 without any.
        f1_right = 2 * tp / np.maximum(2 * tp + fp + fn, 1)
        f1_wrong = 2 * tn / np.maximum(2 * tn + fp + fn, 1)
        steps = counts.sum(1)
        return float(steps @ (f1_right + f1_wrong) / 2 / steps.sum()) if steps.sum() else math.nan

    return value


def _measures(scores: Array, labels: Array, threshold: float) -> dict[str, float]:
    called = scores >= threshold
    return {
        "macro_f1": macro_f1(called, labels),
        "f1_right": f1(called, labels),
        "f1_wrong": f1(~called, ~labels),
        "auc": roc_auc(scores, labels),
        "macro_f1_at_half": macro_f1(scores >= 0.5, labels),
        "steps": float(scores.size),
    }


BENCH = register("benchmarks", "visualprocessbench")(Benchmark(read_row, measure, "micro_f1", quick=quick))
