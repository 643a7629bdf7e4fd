"""One sampler for any branch plan: all live nodes of all prompts of a depth go through the network in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from diffusion.kernels import KERNELS, Transition, correlated_noise, log_prob
from diffusion.schedule import Course, Sampling
from mmrl.rollout import BranchPlan

# (latents (N, *D), step index, prompt of each (N,)) -> (x0, eps)
Predict = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]


class Forest(NamedTuple):
    """Steps of G prompts, depth by depth; parents come before children. E steps in all.

    parent, group, depth: (E,) int. latent: (E, *D) state after the step, in storage dtype.
    logp: (E,) float32, NaN on deterministic steps. calls: network rows evaluated.
    mean: (E, *D) float32 transition means, empty unless `keep_mean`.
    """

    parent: Tensor
    group: Tensor
    depth: Tensor
    latent: Tensor
    logp: Tensor
    mean: Tensor
    calls: int


def transition(sampling: Sampling, course: Course, i: int, x: Tensor, x0: Tensor, eps: Tensor) -> Transition:
    """The Gaussian of step i, by the rollout's kernel where it is drawn, by the ODE elsewhere. (N, *D) in and out.

    The update calls this with the recorded sampling and course, so both passes share every line.
    """
    interval = course.interval(i)
    if not course.noisy[i]:
        out = KERNELS["ode"](x, x0, eps, interval)
        last = i == len(course) - 1
        return out._replace(mean=x0) if last and sampling.final_step == "x0" else out
    options = {} if sampling.eta is None else {"eta": sampling.eta}
    out = KERNELS[sampling.kernel](x, x0, eps, interval, **options)
    return out._replace(std=out.std * course.std_scale[i])


def sample_forest(
    predict: Predict,
    init: Tensor,
    plan: BranchPlan,
    sampling: Sampling,
    course: Course,
    generators: list[torch.Generator],
) -> Forest:
    """Sample a tree per prompt from `init` (G, *D). Siblings share their parent's forward pass."""
    storage = getattr(torch, sampling.storage)
    x = init.to(storage).float()
    own, parent = torch.arange(len(init)), torch.full((len(init),), -1)
    rows: dict[str, list[Tensor]] = {k: [] for k in ("parent", "group", "depth", "latent", "logp", "mean")}
    made = calls = 0
    for i in range(len(course)):
        x0, eps = predict(x, i, own)
        calls += len(x)
        step = transition(sampling, course, i, x, x0, eps)
        k = plan.factor(i)
        own, parent = own.repeat_interleave(k), parent.repeat_interleave(k)
        mean = step.mean.repeat_interleave(k, 0)
        logp = torch.full((len(mean),), torch.nan)
        if course.noisy[i]:
            if step.std <= 0:
                raise ValueError(f"step {i} should draw noise, but kernel {sampling.kernel!r} has std 0 there")
            noise = _noise(mean.shape, k, sampling, generators).to(mean.device)
            # rounded to storage first: the old log-prob belongs to the latent that the update will read back
            x = (mean + step.std * noise).to(storage).float()
            logp = log_prob(x, mean, step.std, sampling.reduce).cpu()
        else:
            x = mean.to(storage).float()
        for name, value in (("parent", parent), ("group", own), ("latent", x.to(storage).cpu()), ("logp", logp)):
            rows[name].append(value)
        rows["mean"].append(mean.cpu() if sampling.keep_mean else mean[:0].cpu())
        rows["depth"].append(torch.full_like(own, i))
        parent = torch.arange(made, made + len(x))
        made += len(x)
    return Forest(**{k: torch.cat(v) for k, v in rows.items()}, calls=calls)


def _noise(shape: torch.Size, k: int, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
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


def sample_ode(predict: Predict, init: Tensor, sampling: Sampling, course: Course) -> Tensor:
    """(N, *D) clean latents by the deterministic solver, one row per initial latent, every row its own prompt."""
    quiet = replace(course, noisy=[False] * len(course))
    own, x = torch.arange(len(init)), init
    for i in range(len(quiet)):
        x0, eps = predict(x, i, own)
        x = transition(sampling, quiet, i, x, x0, eps).mean
    return x
