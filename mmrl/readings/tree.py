"""Readings of the tree itself: no model is run."""

from __future__ import annotations

import torch

from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Rollout
from mmrl.tree_ops import Backup, backup, leaf_sum


@register(
    "readings",
    "tree_value",
    reads=("outcome",),
    writes=("value", "root_value", "tags.visits", "tags.q_sum"),
    source="Monte Carlo tree search statistics; VinePPO on the rollout's own tree",
)
def tree_value(rollout: Rollout, context: ReadingContext, *, how: Backup = "leaf_mean") -> Values:
    """Values and visits that the rollout's own leaves give: no further sampling.

    value: outcomes below the step, backed up by `how`. root_value: mean outcome of the prompt. visits: finished leaves
    below the step. q_sum: sum of their outcomes. A tree of a stored search has visits of its own: leave this out.
    """
    tree = rollout.tree
    value = torch.where(tree.valid, backup(tree, how), torch.nan)
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    zero = torch.zeros(tree.num_groups, dtype=torch.float64)
    count = zero.index_add(0, tree.group, tree.is_finished.double())
    root = zero.index_add(0, tree.group, outcome) / count
    return {"value": value, "root_value": root, "tags.visits": tree.m, "tags.q_sum": leaf_sum(tree, outcome)}
