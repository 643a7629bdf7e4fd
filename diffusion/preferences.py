"""Step preferences of denoising: LPO and SPO, and pairs whose gap must be larger where the sampler is noisier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import Tensor

from diffusion.capabilities import NoisePredictor
from mmrl.losses.preference import Preference, Share, fields_read
from mmrl.preference import Pairs, best_and_worst, step_scores
from mmrl.preference.scores import Score, field_of, tag_scores
from mmrl.registry import declares
from mmrl.tree import StepTree

NoiseBy = Literal["depth", "std"]

LPO_PAIRS = {"name": "noise_extremes", "by": "step_reward", "squash": True, "threshold": [0.35, 0.5]}
SPO_PAIRS = {"name": "extremes", "by": "step_reward", "squash": True, "threshold": 0.3, "first_depth": 4}


@declares(reads=fields_read, source="LPO, 2025", pairs=LPO_PAIRS, policy=NoisePredictor, fits="latents")
@dataclass(frozen=True)
class Lpo(Preference):
    """-ln sigmoid(beta (ln rho_w - ln rho_l)), rho = clamp(pi / pi_ref, 1 - .1, 1 + .1) of one transition, beta 500.

    Log-probs are means over the latent's elements, hence the large beta. Pairs: best and worst of k candidates after
    one latent by a latent reward model, dynamic threshold (LPO, 2025; as in the authors' code).
    """

    beta: PositiveFloat = 500.0
    clip: Share | None = 0.1


@declares(reads=fields_read, source="SPO, 2024", pairs=SPO_PAIRS, policy=NoisePredictor, fits="latents")
@dataclass(frozen=True)
class Spo(Preference):
    """As `lpo` with beta 10: candidates are judged by a step-aware preference model on pictures (SPO, 2024)."""

    beta: PositiveFloat = 10.0
    clip: Share | None = 0.1


def _reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields that `noise_extremes` reads with these options."""
    by_std = options["noise"] == "std" and not isinstance(options["threshold"], float)
    return ("forks", field_of(options["by"]), *(["tags.std"] if by_std else []))


@declares(reads=_reads, source="LPO", fits="latents")
def noise_extremes(
    tree: StepTree,
    *,
    by: Score = "outcome",
    threshold: NonNegativeFloat | list[float] = 0.0,
    noise: NoiseBy = "depth",
    squash: bool = False,
    first_depth: NonNegativeInt = 0,
    last_depth: NonNegativeInt | None = None,
) -> Pairs:
    """Best and worst of the siblings at every fork, when their gap exceeds a threshold that rises with noise (LPO).

    Args:
        threshold: one number, or [low, high] from quiet to noisy steps. noise: what tells how noisy a step is, see
            `thresholds`.
        squash: the gap is tanh((best - worst) / 2), the difference of the two's softmax probabilities.
        first_depth, last_depth: forks at other depths are left out.
    """
    allowed = tree.depth >= first_depth
    if last_depth is not None:
        allowed = allowed & (tree.depth <= last_depth)
    return best_and_worst(tree, step_scores(tree, by), allowed, thresholds(tree, threshold, noise), squash)


def thresholds(tree: StepTree, threshold: float | Sequence[float], noise: NoiseBy) -> Tensor:
    """(N,) the gap that a pair of each step must exceed: one number, or [low, high] from quiet to noisy steps.

    noise: `std`: the kernel's standard deviation, tag `std`. `depth`: from high at the first step to low at the last,
        as noise falls along a schedule.

    Raises:
        ValueError: not one or two numbers, low above high, or no tag `std`.
    """
    if isinstance(threshold, (int, float)):
        return torch.full((len(tree),), float(threshold), dtype=torch.float64)
    if len(threshold) != 2 or threshold[0] > threshold[1]:
        raise ValueError(f"pairs.threshold={list(threshold)}: give one number, or [low, high] with low <= high")
    low, high = threshold
    if noise == "std":
        return dynamic_threshold(tag_scores(tree, "std"), low, high)
    return dynamic_threshold(-tree.depth.double(), low, high)


def dynamic_threshold(
    std: Tensor, low: float, high: float, *, std_min: float | None = None, std_max: float | None = None
) -> Tensor:
    """low + (std - std_min) / (std_max - std_min) (high - low): noisy steps must differ more (LPO).

    Args:
        std: (N,) standard deviation of each step's kernel. std_min, std_max: of the whole schedule, by default the
            smallest and largest of `std`. Equal ones give `high`.
    """
    known = std[~std.isnan()].double()
    smallest = float(known.min()) if std_min is None else std_min
    largest = float(known.max()) if std_max is None else std_max
    if largest <= smallest:
        return torch.full_like(std, high, dtype=torch.float64)
    return low + (std.double() - smallest) / (largest - smallest) * (high - low)
