"""The plan of a rollout: its noise levels, the steps that draw noise, and their densities, before anything runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch

from diffusion.adapters.base import Level
from diffusion.kernels import Interval, Reduce
from mmrl.registry import find, of_kind
from mmrl.rollout import BranchPlan
from mmrl.seeding import named_generator

NoiseMode = Literal["split", "all", "window"]
WindowStart = Literal["progressive", "random", "exp_decay"]
SplitNoise = Literal["correlated", "independent", "scaled"]
PURE_NOISE = 0.999  # noise levels from here on count as pure noise
FinalStep = Literal["mean", "x0", "sample"]
Solver = Literal["euler", "dpmpp_2m"]


@dataclass(frozen=True)
class SamplingConfig:
    """Settings of the sampler; all of them are recorded in every rollout, and the update replays the record.

    steps: denoising steps T of a full rollout.
    kernel, eta: a row of `kernels` and its noise strength; None takes the kernel's default.
    noise: where transitions are stochastic, and hence trained. `split`: only where the plan branches. `all`: every
        step but the last. `window`: the plan's splits and a window that slides with the training iteration.
    window_size, window_every: length of the window and iterations between moves by one step; it starts over when its
        end would pass the last noisy step, so it is never empty.
    window_start: how it moves (MixGRPO). `progressive`: as just said. `exp_decay`: as that, and from step 13 on for
        fewer iterations, ceil(window_every exp(-(start - 13) / 10)). `random`: anywhere in each iteration, the same
        for all prompts (Flow-GRPO-Fast).
    window_range: [first, end) steps that the window stays within; None = all that may draw noise.
    plan_in_window: depths of the plan count from the window's start, so that the tree moves with it: with {0: G} one
        ODE prefix is shared by the whole group (Flow-GRPO-Fast).
    tail: steps after the last noisy one, ODE; None keeps the schedule's own.
    split_noise: siblings share part of their noise (`correlated`: correlation 1/(1 + split_scale^2)), none of it
        (`independent`), or draw with `split_scale` times the std in sampling and in both log-probs (`scaled`).
    candidates: latents drawn after every state at a noisy step where the plan does not split; a random one goes on,
        the others are leaves without outcome and cost no network call (LPO, SPO).
    final_step: what becomes of the last transition: its mean, the clean estimate x0, or a trained sample of it.
    solver: of steps without noise, in the tail and in evaluation: `euler` (DDIM), or `dpmpp_2m`, DPM-Solver++ of
        second order, which needs fewer of them. It starts anew after every noisy step and at every completion.
    eval_steps: denoising steps of evaluation; None = `steps`.
    reduce: log-prob averaged or summed over latent elements.
    keep_mean: store the transition means too (GRPO-Guard needs them); doubles a rollout's memory.
    storage: dtype latents are kept in; samples are rounded to it before the old log-prob is taken.
    """

    steps: int = 10
    kernel: Annotated[str, of_kind("kernels")] = "posterior"
    eta: float | None = None
    noise: NoiseMode = "split"
    window_size: int = 4
    window_every: int = 25
    window_start: WindowStart = "progressive"
    window_range: tuple[int, int] | None = None
    plan_in_window: bool = False
    tail: int | None = None
    split_noise: SplitNoise = "correlated"
    split_scale: float = 4.0
    candidates: int = 1
    final_step: FinalStep = "mean"
    solver: Solver = "euler"
    eval_steps: int | None = None
    reduce: Reduce = "mean"
    storage: Literal["float32", "bfloat16"] = "float32"
    keep_mean: bool = False

    def __post_init__(self) -> None:
        if self.eval_steps is not None and self.eval_steps < 1:
            raise ValueError(f"policy.eval_steps={self.eval_steps}: at least one denoising step is needed")
        if self.steps < 1:
            raise ValueError(f"policy.steps={self.steps}: at least one denoising step is needed")
        find("kernels", self.kernel).check(self.kernel_options, "policy")
        if self.tail is not None and self.tail < 1:
            raise ValueError(f"policy.tail={self.tail}: the ODE tail needs at least 1 step; leave it out to keep all")
        if self.candidates < 1:
            raise ValueError(f"policy.candidates={self.candidates}: at least 1, which goes on")
        if self.window_size < 1 or self.window_every < 1:
            raise ValueError("policy.window_size and policy.window_every must be at least 1")
        if self.plan_in_window and self.noise != "window":
            raise ValueError(f"policy.plan_in_window needs policy.noise: window, not {self.noise!r}")
        if self.window_range is not None:
            first, end = self.window_range
            if not 0 <= first < end <= self.steps:
                raise ValueError(
                    f"policy.window_range={[first, end]}: give [first, end) with 0 <= first < end <= {self.steps} "
                    "(policy.steps)"
                )

    @property
    def kernel_options(self) -> dict[str, float]:
        """Options of the kernel that the recipe sets."""
        return {} if self.eta is None else {"eta": self.eta}


# Recorded only where they are set, so that rollouts stored before they existed still compare equal.
_LATER_FIELDS = ("window_start", "window_range", "plan_in_window", "solver", "eval_steps")


@dataclass(frozen=True)
class NoiseSchedule:
    """The steps of one rollout: n + 1 levels, and per step whether it is drawn and with what std scale."""

    levels: list[Level]
    noisy: list[bool]
    std_scale: list[float]

    def __len__(self) -> int:
        return len(self.noisy)

    def interval(self, i: int) -> Interval:
        """The transition of step i for the kernels."""
        here, there = self.levels[i], self.levels[i + 1]
        # UniPC's first flow level is .9999, where the flow kernel's noise would be as wild as at 1
        s_max = self.levels[1].s if self.levels[0].s >= PURE_NOISE else 1.0
        return Interval(here.a, here.s, there.a, there.s, s_max)

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        return {"levels": [list(v) for v in self.levels], "noisy": self.noisy, "std_scale": self.std_scale}

    @staticmethod
    def from_record(record: dict[str, Any]) -> NoiseSchedule:
        """The inverse of `record`."""
        return NoiseSchedule([Level(*v) for v in record["levels"]], list(record["noisy"]), list(record["std_scale"]))


def noisy_steps(sampling: SamplingConfig, splits: Sequence[int], iteration: int = 0) -> list[bool]:
    """Per step of the full schedule: is the transition drawn? The last one only with `final_step="sample"`."""
    noisy = set(splits)
    if sampling.noise == "all":
        noisy |= set(range(_noise_end(sampling)))
    elif sampling.noise == "window":
        noisy |= set(window(sampling, iteration))
    return [i in noisy for i in range(sampling.steps)]


def _noise_end(sampling: SamplingConfig) -> int:
    """The step from which on no noise may be drawn outside of splits."""
    return sampling.steps if sampling.final_step == "sample" else sampling.steps - 1


def window(sampling: SamplingConfig, iteration: int) -> range:
    """The steps of the sliding window in an iteration; never empty."""
    first, end = sampling.window_range or (0, sampling.steps)
    end = min(end, _noise_end(sampling))
    starts = range(first, max(first + 1, end - sampling.window_size + 1))
    start = starts[_place_of_window(sampling, starts, iteration)]
    return range(start, min(start + sampling.window_size, end))


def _place_of_window(sampling: SamplingConfig, starts: range, iteration: int) -> int:
    """Index among the possible starts."""
    if sampling.window_start == "random":
        return int(torch.randint(len(starts), (), generator=named_generator("window", iteration)))
    if sampling.window_start == "progressive":
        return (iteration // sampling.window_every) % len(starts)
    stays = [math.ceil(sampling.window_every * math.exp(-0.1 * max(start - 13, 0))) for start in starts]
    left = iteration % sum(stays)
    for place, stay in enumerate(stays):
        if left < stay:
            return place
        left -= stay
    raise AssertionError("the stays add up to one round")


def placed_plan(sampling: SamplingConfig, plan: BranchPlan, iteration: int) -> BranchPlan:
    """The plan at its depths of the whole schedule: moved to the window's start with `plan_in_window`."""
    if not sampling.plan_in_window:
        return plan
    steps = window(sampling, iteration)
    if plan.splits and plan.splits[-1] >= len(steps):
        raise ValueError(
            f"plan splits at step {plan.splits[-1]} of a window of {len(steps)} steps (policy.plan_in_window); split "
            "earlier, or raise policy.window_size"
        )
    return BranchPlan({steps.start + d: k for d, k in plan.factors.items()}, plan.max_leaves)


def candidates(sampling: SamplingConfig, plan: BranchPlan, schedule: NoiseSchedule, i: int) -> int:
    """Latents drawn after a state at step i of which one goes on; 1 where the plan splits, since there all go on."""
    return sampling.candidates if schedule.noisy[i] and plan.factor(i) == 1 else 1


def plan_schedule(
    sampling: SamplingConfig, plan: BranchPlan, levels: Sequence[Level], iteration: int = 0
) -> NoiseSchedule:
    """Lay out a rollout.

    Raises:
        ValueError: the plan splits beyond the last step, at a step that has no noise (its children would be
            copies), or not at all while noise is only drawn at splits.
    """
    plan.check(sampling.steps)
    if sampling.kernel == "ode":
        raise ValueError("policy.kernel='ode' draws no noise, so there is nothing to train; choose another kernel")
    if plan.splits and plan.splits[-1] == sampling.steps - 1 and sampling.final_step != "sample":
        raise ValueError(
            f"plan splits at step {plan.splits[-1]}, the last, which draws no noise: its children would be copies. "
            "Split earlier, or set policy.final_step: sample"
        )
    noisy = noisy_steps(sampling, plan.splits, iteration)
    if not any(noisy):
        raise ValueError("no step of this rollout draws noise: the plan has no split and policy.noise is 'split'")
    if sampling.candidates > 1 and all(i in plan.splits for i, n in enumerate(noisy) if n):
        raise ValueError(
            f"policy.candidates={sampling.candidates} are drawn at noisy steps where the plan does not split; there "
            "are none; set policy.noise: all"
        )
    kept = list(levels)
    if sampling.tail is not None:
        first = max(i for i, n in enumerate(noisy) if n) + 1
        rest = sampling.steps - first
        tail = min(sampling.tail, rest)
        picks = [first + round(rest * j / tail) for j in range(tail + 1)]
        kept, noisy = [*levels[:first], *(levels[p] for p in picks)], noisy[:first] + [False] * tail
    scaled = sampling.split_noise == "scaled"
    scale = [sampling.split_scale if scaled and i in plan.splits else 1.0 for i in range(len(noisy))]
    return NoiseSchedule(kept, noisy, scale)


def record(sampling: SamplingConfig, schedule: NoiseSchedule) -> dict[str, Any]:
    """The record by which log-probs of a rollout are recomputed without the config that made it, as JSON values."""
    fields = asdict(sampling)
    for name in _LATER_FIELDS:
        if fields[name] == SamplingConfig.__dataclass_fields__[name].default:
            del fields[name]
    if sampling.window_range is not None:
        fields["window_range"] = list(sampling.window_range)
    return {"sampling": fields, "course": schedule.record()}
