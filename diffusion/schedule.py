"""Which steps a rollout takes, where it draws noise, and with what density: decided before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from diffusion.adapters.base import Level
from diffusion.kernels import Interval, Reduce
from mmrl.registry import find, of_kind
from mmrl.rollout import BranchPlan

NoiseMode = Literal["split", "all", "window"]
SplitNoise = Literal["correlated", "independent", "scaled"]
PURE_NOISE = 0.999  # noise levels from here on count as pure noise
FinalStep = Literal["mean", "x0", "sample"]


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample; the whole of it is recorded in every rollout, and the update replays the record.

    steps: denoising steps T of a full rollout.
    kernel, eta: a row of `kernels` and its noise strength; None takes the kernel's default.
    noise: where transitions are stochastic, and hence trained. `split`: only where the plan branches. `all`: every
        step but the last. `window`: the plan's splits and a window that slides with the training iteration.
    window_size, window_every: length of the window and iterations between moves by one step; it starts over when its
        end would pass the last noisy step, so it is never empty.
    tail: steps after the last noisy one, ODE; None keeps the schedule's own.
    split_noise: siblings share part of their noise (`correlated`: correlation 1/(1 + split_scale^2)), none of it
        (`independent`), or draw with `split_scale` times the std in sampling and in both log-probs (`scaled`).
    candidates: latents drawn after every state at a noisy step where the plan does not split; a random one goes on,
        the others are leaves without outcome and cost no network call (LPO, SPO).
    final_step: what becomes of the last transition: its mean, the clean estimate x0, or a trained sample of it.
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
    tail: int | None = None
    split_noise: SplitNoise = "correlated"
    split_scale: float = 4.0
    candidates: int = 1
    final_step: FinalStep = "mean"
    reduce: Reduce = "mean"
    storage: Literal["float32", "bfloat16"] = "float32"
    keep_mean: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"policy.steps={self.steps}: at least one denoising step is needed")
        find("kernels", self.kernel).check(self.kernel_options, "policy")
        if self.tail is not None and self.tail < 1:
            raise ValueError(f"policy.tail={self.tail}: the ODE tail needs at least 1 step; leave it out to keep all")
        if self.candidates < 1:
            raise ValueError(f"policy.candidates={self.candidates}: at least 1, which goes on")
        if self.window_size < 1 or self.window_every < 1:
            raise ValueError("policy.window_size and policy.window_every must be at least 1")

    @property
    def kernel_options(self) -> dict[str, float]:
        """What the recipe sets of the kernel's own options."""
        return {} if self.eta is None else {"eta": self.eta}


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
    last = sampling.steps if sampling.final_step == "sample" else sampling.steps - 1
    noisy = set(splits)
    if sampling.noise == "all":
        noisy |= set(range(last))
    elif sampling.noise == "window":
        starts = max(1, last - sampling.window_size + 1)
        start = (iteration // sampling.window_every) % starts
        noisy |= set(range(start, min(start + sampling.window_size, last)))
    return [i in noisy for i in range(sampling.steps)]


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
    """What a rollout keeps so that its log-probs can be recomputed without the config that made it."""
    return {"sampling": asdict(sampling), "course": schedule.record()}
