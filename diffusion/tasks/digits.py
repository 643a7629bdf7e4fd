"""Task `digits`: draw a digit that a classifier reads and that is mirror-symmetric. Real pictures, no download.

The reward starts near .54, so there is headroom, and it can be hacked: without a KL every class collapses into one
symmetric glyph. Evaluation therefore reports an independent judge and the diversity beside the reward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from diffusion.digits_base import DigitsBase, digits_base
from mmrl.rollout import Prompt, Sample

_base = lru_cache(maxsize=1)(digits_base)


class LegibleSymmetric:
    """p(prompted class) by the reward classifier minus mean |x - mirror(x)|, x in [-1, 1]. Range about -2 .. 1."""

    def __init__(self, base: DigitsBase | None = None) -> None:
        self.classifier = (base or _base()).classifier

    def values(self, samples: Sequence[Sample]) -> Tensor:
        """(N,) float32, differentiable in the pictures, as ReFL needs it."""
        x, label = _stack(samples)
        p = self.classifier(x).softmax(1).gather(1, label[:, None])[:, 0]
        return p - (x - x.flip(3)).abs().mean((1, 2, 3))

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return list(self.values(samples).tolist())


class DigitsTask:
    """Ten prompts, one per digit; evaluation draws `eval_per_class` pictures of each from fixed noise."""

    rewards = ("legible_symmetric",)

    def __init__(self, eval_per_class: int = 20, base: DigitsBase | None = None) -> None:
        self.judge = (base or _base()).judge
        self.prompts = [Prompt(f"digit-{d}", {"label": d}) for d in range(10)]
        self.eval_prompts = [Prompt(f"digit-{d}/{k}", {"label": d}) for d in range(10) for k in range(eval_per_class)]

    @torch.no_grad()
    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """judge: mean p(prompted class) by a classifier that no reward uses. diversity: see `diversity`."""
        x, label = _stack(samples)
        p = self.judge(x).softmax(1).gather(1, label[:, None])
        return {"judge": float(p.mean()), "diversity": diversity(x / 2 + 0.5, label)}


def diversity(pictures: Tensor, label: Tensor) -> float:
    """Mean absolute pixel difference over all pairs of one class, averaged over classes. Pictures in [0, 1]."""
    per_class = []
    for c in label.unique():
        x = pictures[label == c].flatten(1)
        if len(x) > 1:
            per_class.append(torch.cdist(x, x, p=1).sum() / (len(x) * (len(x) - 1)) / x.shape[1])
    return float(torch.stack(per_class).mean()) if per_class else 0.0


def _stack(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Pixels (N, 1, 8, 8) in [-1, 1] and labels (N,)."""
    x = torch.stack([s.output for s in samples]) * 2 - 1
    return x, torch.tensor([s.prompt.inputs["label"] for s in samples])
