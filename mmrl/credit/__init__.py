"""Step-level credit: (tree, rewards) -> one advantage per step."""

from mmrl.credit.estimate import StepAdvantage, estimate
from mmrl.credit.norm import NORM_PRESETS, norm
from mmrl.credit.table import ESTIMATORS, TRANSFORMS

__all__ = ["ESTIMATORS", "NORM_PRESETS", "TRANSFORMS", "StepAdvantage", "estimate", "norm"]
