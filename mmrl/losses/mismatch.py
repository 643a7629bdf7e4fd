"""Mismatch of log-probs between a generation engine and the trainer, and weights that correct for it.

Actions were sampled by a generation engine (vLLM) under `rollout_logp`; the trainer recomputes `train_logp` with the
same weights. Other kernels and precisions make them differ a little, and the gradient is then slightly off-policy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mismatch(train_logp: Tensor, rollout_logp: Tensor) -> dict[str, float]:
    """Distances between the log-probs of two engines on sampled actions, d = train_logp - rollout_logp.

    mean: mean |d|, nats. max: max |d|, nats. k3: mean(exp(d) - 1 - d) >= 0, an unbiased estimate of
    KL(rollout || train), since the actions were drawn from the rollout engine; |d| above 20 counts as 20 in it.

    Args:
        train_logp, rollout_logp: (A,) float, natural log, any float dtype; computed in float64.
    Raises:
        ValueError: shapes differ, nothing to compare, or a value that is not finite (its index is named).
    """
    difference = _difference(train_logp, rollout_logp)
    if not difference.numel():
        raise ValueError("no actions to compare; mismatch needs at least one")
    # One action of probability 0 under an engine would make exp(d), and with it the mean, infinite.
    bounded = difference.clamp(-20, 20)
    return {
        "mean": float(difference.abs().mean()),
        "max": float(difference.abs().max()),
        "k3": float((bounded.expm1() - bounded).mean()),
    }


def truncated_importance(train_logp: Tensor, rollout_logp: Tensor, *, cap: float = 2.0) -> Tensor:
    """(A,) float32 weights min(exp(train_logp - rollout_logp), cap), no gradient: multiply them onto the losses.

    They make the gradient an estimate under the trainer's own policy; the cap bounds the variance that rare large
    ratios bring (truncated importance sampling, Espeholt et al. 2018; its use between rollout engine and trainer:
    Yao et al. 2025, default cap 2).

    Args:
        train_logp: (A,) of the trainer before the update (not the ratio's moving numerator). rollout_logp: (A,).
        cap: > 0, largest weight; 1 never raises an action above its plain weight.
    Raises:
        ValueError: shapes differ, a value that is not finite, or cap <= 0.
    """
    if cap <= 0:
        raise ValueError(f"cap={cap} must be above 0; 2 is usual")
    return _difference(train_logp, rollout_logp).clamp(max=20.0).exp().clamp(max=cap).float()


def _difference(train_logp: Tensor, rollout_logp: Tensor) -> Tensor:
    """(A,) float64 train_logp - rollout_logp, without gradient; raises ValueError as `mismatch` does."""
    if train_logp.shape != rollout_logp.shape:
        raise ValueError(f"train_logp {tuple(train_logp.shape)} and rollout_logp {tuple(rollout_logp.shape)} differ")
    train, rollout = train_logp.detach().double(), rollout_logp.detach().double().to(train_logp.device)
    for name, value in (("train_logp", train), ("rollout_logp", rollout)):
        bad = (~torch.isfinite(value)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"{name} is not finite at actions {bad[:5]} ({len(bad)} in all); leave them out")
    return train - rollout
