"""Step-level credit: from a tree with rewards to one advantage per step.

advantages = compose(tree, ["grpo"]).adv                       # (N,), GRPO on outcomes
advantages = compose(tree, ["process_grpo"], ["delta"]).adv    # step rewards, differenced first
"""

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
