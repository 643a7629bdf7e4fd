"""Rules of the policy loss for denoising steps: each changes the log-ratio or the weight of a transition.

A transition brings along (`ActionLogProbs.extra`):
- `std` of its kernel, and `relative_std`, that over the mean std of the schedule's noisy steps;
- `interval`, the width s - s2 of its noise interval;
- `mean_shift` = mean_D (mu - mu_old)^2 / (2 std^2), differentiable, where the rollout kept its means
  (`policy.keep_mean`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import PositiveFloat
from torch import Tensor

from mmrl.registry import declares

_KEEP_MEAN = "Set policy.keep_mean: true with a policy that denoises"
_DENOISES = "Take a policy that denoises"


@declares(
    reads=("actions.mean",),
    fits="latents",
    source="GRPO-Guard, 2025",
    extra={"mean_shift": _KEEP_MEAN, "std": _DENOISES, "interval": _DENOISES},
)
def grpo_guard(
    log_ratio: Tensor, weight: Tensor, advantage: Tensor, extra: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """GRPO-Guard: log rho becomes (log rho + b) std, and the loss is divided by the step's noise interval.

    b = `mean_shift` removes E[log rho] = -b < 0, for which clipping keeps fewer upward than downward ratios; std makes
    ratios of noisy and quiet steps alike.
    """
    return (log_ratio + extra["mean_shift"]) * extra["std"], weight / extra["interval"]


@declares(fits="latents", source="TempFlow-GRPO, 2025", extra={"relative_std": _DENOISES}, reads=("tags.std",))
def noise_weights(
    log_ratio: Tensor, weight: Tensor, advantage: Tensor, extra: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """TempFlow-GRPO's noise-aware weights: a step counts in proportion to its std, 1 on average over the noisy steps.

    Exploration at a noisy step decides more of the sample than at a quiet one; equal weights would train both alike.
    """
    return log_ratio, weight * extra["relative_std"]


@declares(reads=("actions.mean",), fits="latents", source="Flow-DPPO, 2026", extra={"mean_shift": _KEEP_MEAN})
def flow_dppo(
    log_ratio: Tensor,
    weight: Tensor,
    advantage: Tensor,
    extra: Mapping[str, Tensor],
    *,
    threshold: PositiveFloat = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Flow-DPPO: a trust region by divergence in place of the clip, for `surrogate: unclipped`.

    A transition whose mean has moved by KL(new || old) >= `threshold`, a mean over the latent's elements, gets no
    gradient that would move it further: weight 0 where the ratio has left 1 to its advantage's side.
    """
    moved_far = extra["mean_shift"].detach() >= threshold
    to_its_side = log_ratio.detach() * advantage > 0
    return log_ratio, torch.where(moved_far & to_its_side, torch.zeros_like(weight), weight)
