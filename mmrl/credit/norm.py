"""Normalisation inside sets: the one place where a baseline and a scale are taken."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scale = Literal["std", "none", "loo", "bernoulli", "batch"]

# (ddof, eps, singleton) as read in each codebase. `branch` also turns sets with std < 1e-6 to 0, which the
# constant-set rule below does for every preset.
NORM_PRESETS: dict[str, dict[str, float | str]] = {
    "verl": {"ddof": 1, "eps": 1e-6, "singleton": "zero"},
    "trl": {"ddof": 1, "eps": 1e-4, "singleton": "zero"},
    "openrlhf": {"ddof": 1, "eps": 1e-9, "singleton": "zero"},
    "flow_grpo": {"ddof": 0, "eps": 1e-4, "singleton": "zero"},
    "branch": {"ddof": 1, "eps": 1e-8, "singleton": "zero"},
}


class Normed(NamedTuple):
    """z: (N,) float64. size: (S,) members per set. constant: (S,) bool, two or more members without spread."""

    z: Tensor
    size: Tensor
    constant: Tensor

    @property
    def info(self) -> dict[str, float]:
        """Counts of sets that carry no preference."""
        return {"sets": float((self.size > 0).sum()), "singleton_sets": float((self.size == 1).sum()),
                "zero_spread_sets": float(self.constant.sum())}  # fmt: skip


def norm(
    x: Tensor,
    sets: Tensor,
    *,
    scale: Scale = "std",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: Literal["zero", "raw"] = "zero",
    std_floor: float = 0.0,
) -> Normed:
    """Centre `x` inside each set and scale it.

    std: (x - mean)/(std + eps), std with `ddof`. none: x - mean. loo: x minus the mean of the others, which is
    n/(n-1)(x - mean). bernoulli: (x - mean)/(sqrt(mean(1-mean)) + eps). batch: centred per set, divided by the
    std of all centred values + eps. Two passes in float64.

    A set of one gives 0 (`singleton="raw"`: x itself, for parity with peers). A set with
    max - min <= 1e-8 * max(1, max|x|), or with std < `std_floor`, gives exactly 0: the spread is tested, not std,
    because rounding residue in std has made advantages thousands of times too large in practice.

    Args:
        x: (N,) float; NaN entries (an outcome off the finished leaves) belong to no set and give 0.
        sets: (N,) int >= 0, set of each entry; negative = no set.

    Raises:
        ValueError: unknown scale, shapes that differ, or `bernoulli` with values outside [0, 1].
    """
    if scale not in get_args(Scale):
        raise ValueError(f"scale {scale!r} is none of {', '.join(get_args(Scale))}")
    if x.shape != sets.shape:
        raise ValueError(f"x {tuple(x.shape)} and sets {tuple(sets.shape)} must have one entry per step each")
    member = ~x.isnan() & (sets >= 0)
    sid = sets.clamp(min=0)
    v = torch.where(member, x.double(), 0.0)
    num = int(sets.max()) + 1 if sets.numel() else 0
    n = _sum(member.double(), sid, num)
    mean = _sum(v, sid, num) / n.clamp(min=1)
    centred = torch.where(member, v - mean[sid], 0.0)
    var = _sum(centred**2, sid, num) / (n - ddof).clamp(min=1)
    constant = (n > 1) & (_is_flat(v, sid, member, num) | (var.sqrt() < std_floor))
    if scale == "bernoulli" and bool((member & ((v < 0) | (v > 1))).any()):
        i = int((member & ((v < 0) | (v > 1))).nonzero()[0])
        raise ValueError(f"scale='bernoulli' needs values in [0, 1]; step {i} has {v[i].item()}: use scale='std'")
    centred = torch.where(constant[sid], 0.0, centred)  # before `batch` pools them
    z = centred * _factor(scale, centred, member, n, mean, var, eps)[sid]
    alone = (n <= 1)[sid]
    z = torch.where(alone, v if singleton == "raw" else 0.0, z)
    return Normed(torch.where(member & ~constant[sid], z, 0.0), n.long(), constant)


def _factor(scale: str, centred: Tensor, member: Tensor, n: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(S,) what each set's centred values are multiplied by."""
    if scale == "std":
        return 1 / (var.sqrt() + eps)
    if scale == "loo":
        return n / (n - 1).clamp(min=1)
    if scale == "bernoulli":
        return 1 / ((mean * (1 - mean)).clamp(min=0).sqrt() + eps)
    if scale == "batch":
        pool = centred[member]
        return torch.full_like(n, 1 / (float(pool.std()) + eps) if pool.numel() > 1 else 0.0)
    return torch.ones_like(n)


def _sum(x: Tensor, sets: Tensor, num: int) -> Tensor:
    return torch.zeros(num, dtype=torch.float64).index_add_(0, sets, x)


def _is_flat(v: Tensor, sets: Tensor, member: Tensor, num: int) -> Tensor:
    """(S,) bool: no spread beyond rounding."""
    empty = torch.full((num,), torch.inf, dtype=torch.float64)
    low = empty.clone().scatter_reduce_(0, sets, torch.where(member, v, torch.inf), "amin")
    high = (-empty).scatter_reduce_(0, sets, torch.where(member, v, -torch.inf), "amax")
    return high - low <= 1e-8 * torch.maximum(low.abs(), high.abs()).clamp(min=1)
