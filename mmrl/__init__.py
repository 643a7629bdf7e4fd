"""mmrl: training from rewards on steps, for vision-language, diffusion and video models.

The names below load on first use, so that `import mmrl` and `mmrl --help` cost milliseconds.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "StepTree": "mmrl.tree",
    "Prompt": "mmrl.sample",
    "Sample": "mmrl.sample",
    "BranchPlan": "mmrl.rollout",
    "Actions": "mmrl.rollout",
    "Rollout": "mmrl.rollout",
    "Policy": "mmrl.rollout",
    "estimate": "mmrl.credit",
    "StepAdvantage": "mmrl.credit",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mmrl' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
