"""Step-level credit: (tree, rewards) -> one advantage per step."""

from mmrl.credit.estimate import StepAdvantage, compose, estimate, validate
from mmrl.credit.norm import NORM_PRESETS, Norm, norm
from mmrl.credit.table import Credit

__all__ = [
    "NORM_PRESETS",
    "Credit",
    "Norm",
    "StepAdvantage",
    "compose",
    "estimate",
    "norm",
    "validate",
]
