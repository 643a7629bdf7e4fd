"""The reading `tree_value`: values of steps from the outcomes below them, without running a model."""

from __future__ import annotations

import torch

from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Rollout
from mmrl.tree_ops import Backup, backup, leaf_sum, prompt_sum


@register(
    "readings",
    "tree_value",
    reads=("outcome",),
    writes=("value", "root_value", "tags.visits", "tags.q_sum"),
    source="Monte Carlo tree search statistics; VinePPO on the rollout's own tree",
)
def tree_value(rollout: Rollout, context: ReadingContext, *, how: Backup = "leaf_mean") -> Values:
    """Values and visits computed from the rollout's own leaves, without further sampling.

    value: outcomes below the step, backed up by `how`. root_value: mean outcome of the prompt. visits: finished leaves
    below the step. q_sum: sum of their outcomes. A tree of a stored search has visits of its own: leave this out.
    """
    tree = rollout.tree
    value = torch.where(tree.valid, backup(tree, how), torch.nan)
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    root = prompt_sum(tree, outcome) / prompt_sum(tree, tree.is_finished.double())
    return {
        "value": value,
        "root_value": root,
        "tags.visits": tree.leaves_below,
        "tags.q_sum": leaf_sum(tree, outcome),
    }
