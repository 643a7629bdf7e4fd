"""Pairs of steps that share a parent: from any tree of any modality to what a preference loss learns from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmrl.preference.builders import (
    best_path,
    contrastive,
    extremes,
    first_wrong,
    leaves,
    recalibrated,
    siblings,
)
from mmrl.preference.pairs import Pairs, fork_of, segment_steps
from mmrl.preference.scores import dynamic_threshold, select_steps, step_scores, token_kl
from mmrl.registry import call, hint
from mmrl.tree import StepTree

BUILDERS: Mapping[str, Callable[..., Pairs]] = {
    "siblings": siblings,
    "extremes": extremes,
    "leaves": leaves,
    "first_wrong": first_wrong,
    "contrastive": contrastive,
    "best_path": best_path,
    "recalibrated": recalibrated,
}

# the builder that belongs to each preset of mmrl.losses.preference, by name and options
PAIRS_OF: Mapping[str, Mapping[str, Any]] = {
    "dpo": {"name": "leaves"},
    "step_dpo": {"name": "first_wrong"},
    "full_step_dpo": {"name": "leaves"},
    "mcts_dpo": {"name": "best_path"},
    "svpo": {"name": "siblings", "threshold": 0.1},
    "pdpo": {"name": "contrastive"},
    "tgdpo": {"name": "leaves"},
    "t_reg": {"name": "leaves"},
    "lpo": {"name": "extremes", "by": "step_reward", "squash": True, "threshold": [0.35, 0.5]},
    "spo": {"name": "extremes", "by": "step_reward", "squash": True, "threshold": 0.3, "first_depth": 4},
}


def build_pairs(tree: StepTree, name: str, options: Mapping[str, Any]) -> Pairs:
    """The pairs of a tree by the builder called `name`, checked.

    Raises:
        ValueError: unknown name or option, or what the builder itself refuses.
    """
    if name not in BUILDERS:
        raise ValueError(f"pairs.name={name!r} is none of {', '.join(BUILDERS)}{hint(name, list(BUILDERS))}")
    pairs: Pairs = call(BUILDERS[name], "pairs", options, tree)
    return pairs.check(tree)


__all__ = [
    "BUILDERS", "PAIRS_OF", "Pairs", "best_path", "build_pairs", "contrastive", "dynamic_threshold",
    "extremes", "first_wrong", "fork_of", "leaves", "recalibrated", "segment_steps", "select_steps",
    "siblings", "step_scores", "token_kl",
]  # fmt: skip
