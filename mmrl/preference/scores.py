"""Scores by which steps are compared, and the choice of the steps that are worth comparing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator
from torch import Tensor

from mmrl.registry import hint
from mmrl.tree import StepTree
from mmrl.tree_ops import backup

_SCORES = ("outcome", "best", "value", "step_reward", "ok")


def _check_score(by: str) -> str:
    if by not in _SCORES and not by.startswith("tags."):
        raise ValueError(f"a score of steps is one of {', '.join(_SCORES)} or tags.<name>{hint(by, _SCORES)}")
    return by


# The type of an option that names a score of steps.
Score = Annotated[str, AfterValidator(_check_score)]


def field_of(by: str) -> str:
    """The field of the rollout that a score is read from."""
    return "outcome" if by == "best" else by


def step_scores(tree: StepTree, by: str) -> Tensor:
    """(N,) float64 score of each step, NaN where it has none.

    by: `outcome` (mean outcome of the finished leaves below), `best` (the best of them), `value`, `step_reward`, `ok`
        (1 right, 0 wrong), or `tags.<name>`.

    Raises:
        ValueError: unknown name, or no step has such a score.
    """
    _check_score(by)
    if by in ("outcome", "best"):
        lifted = backup(tree, "leaf_mean" if by == "outcome" else "leaf_max")
        score = torch.where(tree.valid, lifted, torch.nan)
    elif by in ("value", "step_reward"):
        score = getattr(tree, by)
    elif by == "ok":
        score = torch.full((len(tree),), torch.nan) if tree.ok is None else tree.ok.double()
    else:
        score = tag_scores(tree, by.removeprefix("tags."))
    if len(tree) and bool(score.isnan().all()):
        raise ValueError(f"pairs.by={by!r}: no step of the rollout has one; {_REMEDY.get(by, 'write that tag')}")
    return score.double()


# Score -> the end of the error message when no step has one.
_REMEDY = {
    "outcome": "reward its leaves",
    "best": "reward its leaves",
    "value": "give values, or take by: outcome",
    "step_reward": "name a step reward in the recipe's step_rewards, or take by: outcome",
    "ok": "mark right steps, or take by: step_reward",
}


def tag_scores(tree: StepTree, name: str) -> Tensor:
    """(N,) float64, a tag as scores. Raises ValueError: no such tag, or several numbers per step."""
    if name not in tree.tags:
        raise ValueError(f"the rollout has no tag {name!r}; it has {', '.join(tree.tags) or 'none'}")
    scores = tree.tags[name]
    if scores.ndim != 1:
        raise ValueError(f"tag {name!r} has shape {tuple(scores.shape)}; a score is one number per step")
    return scores.double()


def select_steps(divergences: Sequence[float], k: int = 2) -> list[int]:
    """Ascending indices of the k largest divergences; all steps when there are at most k. Ties: the earlier one.

    pDPO compares alternatives at the steps that depend most on the media.
    """
    # sorted() is stable: of equal divergences the earlier index stays first, also in reverse.
    order = sorted(range(len(divergences)), key=divergences.__getitem__, reverse=True)
    return sorted(order[:k])
