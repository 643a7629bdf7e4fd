"""Preference pairs from trees of any modality: two steps after one state, of which one is better.

pairs = build_pairs(tree, "siblings", {"by": "value", "threshold": 0.1})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrl.preference.builders import (
    best_and_worst,
    best_path,
    contrastive,
    extremes,
    first_wrong,
    leaves,
    recalibrated,
    siblings,
)
from mmrl.preference.pairs import Pairs, fork_of, segment_steps
from mmrl.preference.scores import select_steps, step_scores
from mmrl.registry import build
from mmrl.tree import StepTree


def build_pairs(tree: StepTree, name: str, options: Mapping[str, Any]) -> Pairs:
    """The pairs of a tree by the builder called `name`, checked.

    Raises:
        ComponentError: unknown name or option.
        ValueError: what the builder itself refuses.
    """
    pairs: Pairs = build("pairs", "pairs", name, options)(tree)
    return pairs.check(tree)


__all__ = [
    "Pairs",
    "best_and_worst",
    "best_path",
    "build_pairs",
    "contrastive",
    "extremes",
    "first_wrong",
    "fork_of",
    "leaves",
    "recalibrated",
    "segment_steps",
    "select_steps",
    "siblings",
    "step_scores",
]
