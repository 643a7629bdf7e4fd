"""Rewards: calling them safely, weighing them, and writing them into the tree.

The names load on first use: a worker process that only checks answers must not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl.rewards.isolation import Isolated
    from mmrl.rewards.scoring import RewardError, Scored, score
    from mmrl.rewards.steps import ScoredSteps, StepView, score_steps, step_views

_LAZY = {
    "Isolated": "mmrl.rewards.isolation",
    "RewardError": "mmrl.rewards.scoring",
    "Scored": "mmrl.rewards.scoring",
    "ScoredSteps": "mmrl.rewards.steps",
    "StepView": "mmrl.rewards.steps",
    "score": "mmrl.rewards.scoring",
    "score_steps": "mmrl.rewards.steps",
    "step_views": "mmrl.rewards.steps",
}

__all__ = ["Isolated", "RewardError", "Scored", "ScoredSteps", "StepView", "score", "score_steps", "step_views"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmrl.rewards' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
