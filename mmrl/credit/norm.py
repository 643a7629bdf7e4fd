"""Normalisation inside sets: the one place where a baseline is subtracted and a scale is divided by.

    norm(x=[1, 0, 3], sets=[0, 0, 1]).z   # [.7071, -.7071, 0]: two samples of prompt 0, one of prompt 1

Shapes: N entries (steps or leaves), S sets (prompts, depths of a prompt, siblings). All arithmetic is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from pydantic import Field
from torch import Tensor

from mmrl.registry import hint, option_group

Scale = Literal["std", "none", "loo", "bernoulli", "batch", "global_std"]
Singleton = Literal["zero", "raw"]
# A share or a discount.
Unit = Annotated[float, Field(ge=0, le=1)]
# Sums a small tensor over processes; the identity where there is one process.
AllSum = Callable[[Tensor], Tensor]

# (ddof, eps, singleton) as read in each codebase. BranchGRPO's hard zero below std 1e-6 is `std_floor`.
NORM_PRESETS: dict[str, dict[str, Any]] = {
    "verl": {"ddof": 1, "eps": 1e-6, "singleton": "zero"},
    "trl": {"ddof": 1, "eps": 1e-4, "singleton": "zero"},
    "openrlhf": {"ddof": 1, "eps": 1e-9, "singleton": "zero"},
    "flow_grpo": {"ddof": 0, "eps": 1e-4, "singleton": "zero"},
    "branch": {"ddof": 1, "eps": 1e-8, "singleton": "zero", "std_floor": 1e-6},
}


class Norm(NamedTuple):
    """Options of a normalisation, shared by all estimators that normalise; see `norm` for their meaning."""

    scale: Scale = "std"
    eps: Annotated[float, Field(ge=0)] = 1e-6
    ddof: Annotated[int, Field(ge=0, le=1)] = 1
    singleton: Singleton = "zero"
    std_floor: Annotated[float, Field(ge=0)] = 0.0


option_group(Norm, NORM_PRESETS)


class Normed(NamedTuple):
    """Normalised entries, and facts of their sets.

    z: (N,) float64. size: (S,) members per set. constant: (S,) bool, two or more members without spread.
    """

    z: Tensor
    size: Tensor
    constant: Tensor

    @property
    def info(self) -> dict[str, float]:
        """Counts of sets that carry no preference."""
        return {
            "sets": float((self.size > 0).sum()),
            "singleton_sets": float((self.size == 1).sum()),
            "zero_spread_sets": float(self.constant.sum()),
        }


def norm(
    x: Tensor, sets: Tensor, how: Norm = Norm(), *, weight: Tensor | None = None, all_sum: AllSum | None = None
) -> Normed:
    """Centre `x` inside each set and scale it.

    std: (x - mean)/(std + eps), std with `ddof`. none: x - mean. loo: x minus the mean of the others, which is
    n/(n-1)(x - mean). bernoulli: (x - mean)/(sqrt(mean(1-mean)) + eps). batch: centred per set, divided by the
    std of all centred values + eps. global_std: centred per set, divided by the std of all values as they were given
    + eps (Flow-GRPO). Both pools span all processes. Two passes in float64.

    A set of one gives 0 (`singleton="raw"`: x itself, for parity with peers). A set with
    max - min <= 1e-8 * max(1, max|x|), or with std < `std_floor`, gives exactly 0: the spread is tested, not std,
    because rounding residue in std has made advantages thousands of times too large in practice.

    Args:
        x: (N,) float; NaN entries (an outcome off the finished leaves) belong to no set and give 0.
        sets: (N,) int >= 0, set of each entry; negative = no set.
        weight: (N,) how often each entry counts in n, mean and std; default once. An entry of weight 0 is measured
            against the others of its set and decides nothing.

    Raises:
        ValueError: unknown scale or singleton, shapes that differ, or `bernoulli` with values outside [0, 1].
    """
    if how.scale not in get_args(Scale):
        raise unknown_choice("scale", how.scale, Scale)
    if how.singleton not in get_args(Singleton):
        raise unknown_choice("singleton", how.singleton, Singleton)
    if x.shape != sets.shape:
        raise ValueError(f"x {tuple(x.shape)} and sets {tuple(sets.shape)} must have one entry per step each")
    member = ~x.isnan() & (sets >= 0)
    # Entries of no set are summed into set 0 with weight 0.
    set_of = sets.clamp(min=0)
    value = torch.where(member, x.double(), 0.0)
    num_sets = int(sets.max().clamp(min=0)) + 1 if sets.numel() else 0
    weights = member.double() if weight is None else torch.where(member, weight.double(), 0.0)
    counted = weights > 0
    # (S,) entries, total weight, mean and variance of each set
    size = _sum(counted.double(), set_of, num_sets)
    total = size if weight is None else _sum(weights, set_of, num_sets)
    mean = _sum(weights * value, set_of, num_sets) / total.clamp(min=1)
    centred = torch.where(member, value - mean[set_of], 0.0)
    var = _sum(weights * centred**2, set_of, num_sets) / (total - how.ddof).clamp(min=1)
    flat = _is_flat(value, set_of, counted, num_sets) | (var.sqrt() < how.std_floor)
    constant = (size > 1) & flat
    if how.scale == "bernoulli":
        _check_unit(value, member)
    # Before the pool is taken: a set without spread must not widen the spread of the others.
    centred = torch.where((constant | (size <= 1))[set_of], 0.0, centred)
    # These two scales divide by one spread of the whole batch in place of each set's.
    if how.scale == "batch":
        var = moments(centred, weights, all_sum, how.ddof)[1]
    elif how.scale == "global_std":
        var = moments(value, weights, all_sum, how.ddof)[1]
    z = centred * _factor(how, total, mean, var)[set_of]
    if how.singleton == "raw":
        z = torch.where((size <= 1)[set_of], value, z)
    return Normed(torch.where(member, z, 0.0), size.long(), constant)


def whiten(x: Tensor, weight: Tensor, all_sum: AllSum | None = None, eps: float = 1e-8, ddof: int = 1) -> Tensor:
    """(N,) (x - mean)/sqrt(var + eps) over everything with positive weight, over all processes; 0 elsewhere."""
    mean, var = moments(x, weight, all_sum, ddof)
    return torch.where(weight > 0, (x - mean) / (var + eps).sqrt(), 0.0)


def moments(x: Tensor, weight: Tensor, all_sum: AllSum | None = None, ddof: int = 1) -> tuple[Tensor, Tensor]:
    """(mean, variance), scalars: of x (N,), each entry counted `weight` (N,) times, over all processes."""
    reduce = all_sum or _same
    count, total = reduce(torch.stack([weight.sum(), (weight * x).sum()])).unbind()
    mean = total / count.clamp(min=1)
    # A second pass around the mean of all processes; a difference of sums of squares would cancel.
    squares = reduce((weight * (x - mean) ** 2).sum()[None])[0]
    return mean, squares / (count - ddof).clamp(min=1)


def unknown_choice(option: str, value: object, choices: object) -> ValueError:
    """The error for a value that is none of the `choices` of a Literal."""
    allowed = get_args(choices)
    return ValueError(f"{option} {value!r} is none of {', '.join(allowed)}{hint(str(value), allowed)}")


def _factor(how: Norm, n: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """(S,) factor for each set's centred values; n: (S,) total weight, var: of each set, or one of the whole batch."""
    if how.scale == "none":
        return torch.ones_like(n)
    if how.scale == "loo":
        return n / (n - 1).clamp(min=1)
    if how.scale == "bernoulli":
        var = (mean * (1 - mean)).clamp(min=0)
    spread = var.sqrt() + how.eps
    # With eps 0 a set without spread has nothing to divide by; its values are 0 in any case.
    return torch.where(spread > 0, 1 / spread, 0.0).expand_as(n)


def _same(x: Tensor) -> Tensor:
    return x


def _check_unit(value: Tensor, member: Tensor) -> None:
    bad = member & ((value < 0) | (value > 1))
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        raise ValueError(f"scale='bernoulli' needs values in [0, 1]; step {i} has {value[i].item()}: use scale='std'")


def _sum(x: Tensor, sets: Tensor, num_sets: int) -> Tensor:
    """(S,) float64 sum of `x` (N,) over each set."""
    return torch.zeros(num_sets, dtype=torch.float64).index_add_(0, sets, x)


def set_range(x: Tensor, sets: Tensor, member: Tensor, num_sets: int) -> tuple[Tensor, Tensor]:
    """(smallest, largest) of `x` (N,) among the members of each set, (S,) each; inf and -inf where a set has none."""
    empty = torch.full((num_sets,), torch.inf, dtype=torch.float64)
    low = empty.clone().scatter_reduce_(0, sets, torch.where(member, x, torch.inf), "amin")
    high = (-empty).scatter_reduce_(0, sets, torch.where(member, x, -torch.inf), "amax")
    return low, high


def _is_flat(value: Tensor, sets: Tensor, member: Tensor, num_sets: int) -> Tensor:
    """(S,) bool: no spread beyond rounding."""
    low, high = set_range(value, sets, member, num_sets)
    return high - low <= 1e-8 * torch.maximum(low.abs(), high.abs()).clamp(min=1)


def group_scaled_sum(rewards: Sequence[tuple[Tensor, float]], group: Tensor) -> Tensor:
    """(L,) sum over the rewards of weight (r - mean) / (std + eps), mean and std of a prompt's samples (ddof 1).

    In a plain sum the reward with the widest spread decides; here each counts by its weight alone, and one without
    spread in a prompt counts nothing there (GDPO, 2026; the default of MixGRPO).

    Args:
        rewards: numbers (L,) with their weight; a sample that lacks one (NaN) gets NaN and enters no mean.
        group: (L,) int, the prompt of each sample.
    """
    known = ~torch.stack([values for values, _ in rewards]).isnan().any(0)
    total = torch.full(group.shape, torch.nan, dtype=torch.float64)
    parts = [weight * norm(values[known], group[known]).z for values, weight in rewards]
    total[known] = torch.stack(parts).sum(0)
    return total
