"""One sampler for any branch plan: all live nodes of all prompts of a depth go through the network in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.adapters.base import Level
from diffusion.kernels import Transition, correlated_noise, dpmpp_2m, log_prob, ode
from diffusion.schedule import NoiseSchedule, SamplingConfig, candidates
from mmrl.finite import check_finite
from mmrl.registry import find
from mmrl.rollout import BranchPlan

# (latents (N, *D), step index, prompt of each (N,)) -> (x0, eps)
Predict = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]
# (latents (N, *D), their noise level, prompt of each (N,)) -> (N,) scores
Choose = Callable[[Tensor, Level, Tensor], Tensor]


class Forest(NamedTuple):
    """Steps of G prompts, depth by depth; parents come before children. E steps in all.

    parent, group, depth: (E,) int. latent: (E, *D) state after the step, in storage dtype.
    logp: (E,) float32, NaN on deterministic steps. calls: network rows evaluated.
    mean: (E, *D) float32 transition means, empty unless `keep_mean`.
    std: (E,) float32 of each step's kernel, NaN on deterministic ones. side: (E,) bool, what nothing follows.
    """

    parent: Tensor
    group: Tensor
    depth: Tensor
    latent: Tensor
    logp: Tensor
    mean: Tensor
    std: Tensor
    side: Tensor
    calls: int


class Start(NamedTuple):
    """Where a completion begins: a latent (*D) before step `step` of the schedule, and its prompt."""

    prompt: int
    step: int
    latent: Tensor


def transition(
    sampling: SamplingConfig, schedule: NoiseSchedule, i: int, x: Tensor, x0: Tensor, eps: Tensor
) -> Transition:
    """The Gaussian of step i, by the rollout's kernel where it is drawn, by the ODE elsewhere. (N, *D) in and out.

    The update calls this with the recorded sampling and schedule, so both passes share every line.
    """
    interval = schedule.interval(i)
    if not schedule.noisy[i]:
        out = ode(x, x0, eps, interval)
        last = i == len(schedule) - 1
        return out._replace(mean=x0) if last and sampling.final_step == "x0" else out
    drawn: Transition = find("kernels", sampling.kernel).target(x, x0, eps, interval, **sampling.kernel_options)
    return drawn._replace(std=drawn.std * schedule.std_scale[i])


def solver_step(
    sampling: SamplingConfig, schedule: NoiseSchedule, i: int, x: Tensor, x0: Tensor, eps: Tensor, previous: Tensor
) -> Transition:
    """`transition`, by the rollout's solver where it draws no noise.

    previous: (N, *D) clean estimates of step i - 1, NaN where that was none of the solver's.
    """
    step = transition(sampling, schedule, i, x, x0, eps)
    last = i == len(schedule) - 1
    if schedule.noisy[i] or last or i == 0 or sampling.solver == "euler":
        return step
    return step._replace(mean=dpmpp_2m(x, x0, previous, schedule.interval(i - 1), schedule.interval(i)))


def kernel_stds(sampling: SamplingConfig, schedule: NoiseSchedule) -> list[float]:
    """Standard deviation of each step's transition, 0 where it draws no noise."""
    # a kernel's std depends on the noise levels alone, so any latent will do
    probe = torch.zeros(1, 1)
    return [transition(sampling, schedule, i, probe, probe, probe).std for i in range(len(schedule))]


def sample_forest(
    predict: Predict,
    init: Tensor,
    plan: BranchPlan,
    sampling: SamplingConfig,
    schedule: NoiseSchedule,
    generators: list[torch.Generator],
    choose: Choose | None = None,
) -> Forest:
    """Sample a tree per prompt from `init` (G, *D). Siblings share their parent's forward pass.

    choose: of several candidates the one with the highest score goes on; None = a random one.

    Raises:
        NotFiniteError: latents that are NaN or infinite; the message names the first such step.
    """
    storage = getattr(torch, sampling.storage)
    x = init.to(storage).float()
    own, parent = torch.arange(len(init)), torch.full((len(init),), -1)
    previous = torch.full_like(x, torch.nan)
    rows: dict[str, list[Tensor]] = {k: [] for k in Forest._fields if k != "calls"}
    made = calls = 0
    for i in range(len(schedule)):
        x0, eps = predict(x, i, own)
        calls += len(x)
        step = solver_step(sampling, schedule, i, x, x0, eps, previous)
        tried = candidates(sampling, plan, schedule, i)
        k = plan.factor(i) * tried
        own, parent = own.repeat_interleave(k), parent.repeat_interleave(k)
        mean = step.mean.repeat_interleave(k, 0)
        x, logp = _draw(step, mean, k, schedule.noisy[i], sampling, generators)
        score = choose(x, schedule.levels[i + 1], own) if choose is not None and tried > 1 else None
        kept = _kept(len(x), tried, generators, score)
        side = torch.ones(len(x), dtype=torch.bool).index_fill(0, kept, False)
        row = {"parent": parent, "group": own, "latent": x.to(storage).cpu(), "logp": logp, "side": side}
        row |= {"mean": (mean if sampling.keep_mean else mean[:0]).cpu(), "depth": torch.full_like(own, i)}
        row["std"] = torch.full((len(x),), step.std if schedule.noisy[i] else torch.nan)
        for name, value in row.items():
            rows[name].append(value)
        parent, made = made + kept, made + len(x)
        x, own = x[kept.to(x.device)], own[kept]
        # noise ends what a solver knows; without noise nothing splits, so the rows are those of the estimates
        previous = torch.full_like(x, torch.nan) if schedule.noisy[i] else x0
    forest = Forest(**{k: torch.cat(v) for k, v in rows.items()}, calls=calls)
    _check_latents(forest, len(schedule))
    return forest


def _check_latents(forest: Forest, num_steps: int) -> None:
    """NotFiniteError where the network's output made latents NaN or infinite: by the first step at which it did."""
    fine = forest.latent.flatten(1).isfinite().all(1)
    if not bool(fine.all()):
        first = int(forest.depth[~fine].min())
        there = forest.depth == first
        check_finite(forest.latent, f"the denoising network at step {first + 1} of {num_steps}", "latents", there)


def complete(
    predict: Predict,
    starts: Sequence[Start],
    n: int,
    sampling: SamplingConfig,
    schedule: NoiseSchedule,
    generators: Sequence[torch.Generator],
) -> list[Tensor]:
    """Clean latents (k, *D) from each start: k = n where a step is still drawn, 1 where the rest is deterministic.

    All starts of a prompt or of several go through the network together once the earlier ones have reached the later.
    What a start draws is its own generator's.
    """
    storage = getattr(torch, sampling.storage)
    x = starts[0].latent.new_zeros((0, *starts[0].latent.shape))
    own = torch.zeros(0, dtype=torch.long)
    previous = x
    # per row of x, the start that it belongs to
    row: list[int] = []
    for i in range(min(s.step for s in starts), len(schedule)):
        # without noise to come, copies of a start would all end alike
        copies = n if any(schedule.noisy[i:]) else 1
        joining: list[int] = []
        for j, start in enumerate(starts):
            if start.step == i:
                joining += [j] * copies
        x = torch.cat([x, *(starts[j].latent[None] for j in joining)])
        own = torch.cat([own, torch.tensor([starts[j].prompt for j in joining], dtype=torch.long)])
        row += joining
        estimates = predict(x, i, own)
        previous = torch.cat([previous, previous.new_full((len(joining), *x.shape[1:]), torch.nan)])
        step = solver_step(sampling, schedule, i, x, *estimates, previous)
        x, previous = step.mean, estimates[0]
        if schedule.noisy[i]:
            previous = torch.full_like(x, torch.nan)
            # those that joined before have n rows each, as has everything that joins while noise is to come
            noise = [torch.randn((n, *x.shape[1:]), generator=generators[j]) for j in dict.fromkeys(row)]
            x = x + step.std * torch.cat(noise).to(x.device)
        x = x.to(storage).float()
    place = torch.tensor(row)
    return [x[(place == j).to(x.device)] for j in range(len(starts))]


def _draw(
    step: Transition, mean: Tensor, k: int, noisy: bool, sampling: SamplingConfig, generators: list[torch.Generator]
) -> tuple[Tensor, Tensor]:
    """Latents (N, *D) drawn around `mean`, and their log-probs (N,); `mean` itself and NaN on deterministic steps."""
    storage = getattr(torch, sampling.storage)
    if not noisy:
        return mean.to(storage).float(), torch.full((len(mean),), torch.nan)
    if step.std <= 0:
        raise ValueError(f"a step that should draw noise has std 0 by kernel {sampling.kernel!r}")
    noise = _noise(mean.shape, k, sampling, generators).to(mean.device)
    # rounded to storage first: the old log-prob belongs to the latent that the update will read back
    x = (mean + step.std * noise).to(storage).float()
    return x, log_prob(x, mean, step.std, sampling.reduce).cpu()


def _kept(n: int, tried: int, generators: list[torch.Generator], score: Tensor | None) -> Tensor:
    """Ascending rows of the n latents that go on: one of every `tried` in a row, the best or a random one."""
    if tried == 1:
        return torch.arange(n)
    states = n // tried
    if score is None:
        per_prompt = states // len(generators)
        pick = torch.cat([torch.randint(tried, (per_prompt,), generator=g) for g in generators])
    else:
        pick = score.cpu().view(states, tried).argmax(1)
    return torch.arange(states) * tried + pick


def _noise(shape: torch.Size, k: int, sampling: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    """(N, *D) noise drawn prompt by prompt; at a split of k > 1 siblings may share a part of it."""
    per_prompt = shape[0] // len(generators)
    parts = []
    for g in generators:
        own = torch.randn((per_prompt, *shape[1:]), generator=g)
        if k > 1 and sampling.split_noise == "correlated":
            common = torch.randn((per_prompt // k, *shape[1:]), generator=g)
            own = correlated_noise(common.repeat_interleave(k, 0), own, sampling.split_scale)
        parts.append(own)
    return torch.cat(parts)


def sample_ode(predict: Predict, init: Tensor, sampling: SamplingConfig, schedule: NoiseSchedule) -> Tensor:
    """(N, *D) clean latents by the deterministic solver, one row per initial latent, every row its own prompt."""
    quiet = replace(schedule, noisy=[False] * len(schedule))
    own, x, previous = torch.arange(len(init)), init, torch.full_like(init, torch.nan)
    for i in range(len(quiet)):
        x0, eps = predict(x, i, own)
        x, previous = solver_step(sampling, quiet, i, x, x0, eps, previous).mean, x0
    return x
