"""Step-level credit: (tree, rewards) -> one advantage per step."""

from mmrl.credit.estimate import StepAdvantage, compose, estimate, validate
from mmrl.credit.norm import NORM_PRESETS, Norm, norm

__all__ = [
    "NORM_PRESETS",
    "Norm",
    "StepAdvantage",
    "compose",
    "estimate",
    "norm",
    "validate",
]
