"""Step-level credit: (tree, rewards) -> one advantage per step."""

from mmrl.credit.estimate import StepAdvantage, compose, estimate, validate
from mmrl.credit.norm import NORM_PRESETS, Norm, norm
from mmrl.credit.table import ESTIMATORS, TRANSFORMS

__all__ = [
    "ESTIMATORS",
    "NORM_PRESETS",
    "TRANSFORMS",
    "Norm",
    "StepAdvantage",
    "compose",
    "estimate",
    "norm",
    "validate",
]
