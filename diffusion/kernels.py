"""Step kernels: from the denoiser's output to a Gaussian over the next latent. One contract, one log-prob.

Every latent is written x = a * x0 + s * eps: a = 1 - sigma, s = sigma for flow matching, a = sqrt(abar),
s = sqrt(1 - abar) for epsilon and v models. A kernel gets the clean estimate x0 and the noise estimate eps, so that
one function serves all predictions. Everything is float32, outside autocast: in bf16 the squared difference of the
log-prob loses the digits a clip range of 1e-4 needs.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from mmrl.registry import Kind, add_kind, register

# (latents (N, *D), clean estimate, noise estimate, interval, eta=...) -> Transition
add_kind(Kind("kernels", "kernel", arguments=4))

Reduce = Literal["mean", "sum"]
Prediction = Literal["flow", "epsilon", "v", "sample"]


class Interval(NamedTuple):
    """One transition (a, s) -> (a2, s2). `s_max` stands in for s where 1 - s would be 0 (the flow kernel at s = 1)."""

    a: float
    s: float
    a2: float
    s2: float
    s_max: float = 0.999


class Transition(NamedTuple):
    """Gaussian over the next latent. mean, x0: (N, *D) float32; std: one number, 0 = deterministic (ODE)."""

    mean: Tensor
    std: float
    x0: Tensor


def to_x0_eps(x: Tensor, output: Tensor, a: float, s: float, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(x0, eps), float32, from the network's output: velocity eps - x0 (flow), noise, v, or the clean sample.

    For epsilon a = 0 and for sample s = 0 are singular and give inf, as in every public implementation.
    """
    x, output = x.float(), output.float()
    if prediction == "flow":
        return x - s * output, x + (1 - s) * output
    if prediction == "epsilon":
        return (x - s * output) / a, output
    if prediction == "v":
        return a * x - s * output, a * output + s * x
    if prediction == "sample":
        return output, (x - a * output) / s
    raise ValueError(f"prediction {prediction!r} is none of flow, epsilon, v, sample")


@register("kernels", "ode", source="DDIM, Euler")
def ode(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, eta: float = 0.0) -> Transition:
    """Deterministic step a2 x0 + s2 eps: flow Euler, DDIM with eta 0."""
    return Transition(k.a2 * x0 + k.s2 * eps, 0.0, x0)


@register("kernels", "ddim", source="DDIM; DDPO, SPO, LPO")  # the name users of epsilon models search for
@register("kernels", "posterior", source="DDIM; DDPO, SPO, LPO")
def posterior(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, eta: NonNegativeFloat = 1.0) -> Transition:
    """DDIM's eta for any schedule: std = eta (s2/s) sqrt(s^2 - (a s2/a2)^2), mean = a2 x0 + sqrt(s2^2 - std^2) eps.

    Never exceeds s2, finite at s = 1, 0 at the last step. On an epsilon model this is exactly DDIM-eta (DDPO, SPO,
    LPO use eta 1). On a flow model it equals Flow-GRPO's kernel to leading order with noise level sqrt(2) * eta.
    """
    std = eta * k.s2 / k.s * math.sqrt(max(k.s**2 - (k.a * k.s2 / k.a2) ** 2, 0.0))
    return Transition(k.a2 * x0 + math.sqrt(max(k.s2**2 - std**2, 0.0)) * eps, std, x0)


@register("kernels", "dance", source="DanceGRPO, BranchGRPO")
def dance(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, eta: NonNegativeFloat = 0.3) -> Transition:
    """Flow SDE with constant coefficient (DanceGRPO, BranchGRPO): std = eta sqrt(h)."""
    return _euler_maruyama(x, x0, eps, k, eta)


@register("kernels", "flow", source="Flow-GRPO, MixGRPO")
def flow(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, eta: NonNegativeFloat = 0.7) -> Transition:
    """Flow SDE with g = eta sqrt(sigma/(1 - sigma)) (Flow-GRPO, MixGRPO); at sigma = 1 the denominator uses s_max."""
    return _euler_maruyama(x, x0, eps, k, eta * math.sqrt(k.s / (1 - min(k.s, k.s_max))))


@register("kernels", "cps", source="Flow-CPS")
def cps(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, eta: NonNegativeFloat = 0.8) -> Transition:
    """Coefficient-preserving step (later Flow-GRPO): std = s2 sin(eta pi/2). Shrinks the marginal if always used."""
    std = k.s2 * math.sin(eta * math.pi / 2)
    return Transition(k.a2 * x0 + math.sqrt(max(k.s2**2 - std**2, 0.0)) * eps, std, x0)


def _euler_maruyama(x: Tensor, x0: Tensor, eps: Tensor, k: Interval, g: float) -> Transition:
    if abs(k.a + k.s - 1) > 1e-4:
        raise ValueError("the dance and flow kernels are for flow-matching models (a + s = 1); use posterior")
    dt = k.s2 - k.s
    mean = x.float() + dt * (eps - x0) + 0.5 * g**2 * dt * eps / k.s
    return Transition(mean, g * math.sqrt(-dt), x0)


def dpmpp_2m(x: Tensor, x0: Tensor, previous: Tensor, before: Interval, k: Interval) -> Tensor:
    """Deterministic step of DPM-Solver++, second order, multistep, midpoint (2022; the tail of MixGRPO-Flash).

    s2/s x - (s2 a/s - a2) (x0 + (x0 - previous) h / (2 h_before)), h the width of a step in ln(a/s): the clean
    estimate is carried on in a straight line. With no estimate before, at pure noise and at the last step it is `ode`.

    Args:
        previous: (N, *D) clean estimate of the step `before`, NaN where there is none.
    """
    slope = torch.zeros_like(x0)
    if k.s2 > 0 and before.a > 0:
        width = math.log(k.a2 / k.s2) - math.log(k.a / k.s)
        width_before = math.log(before.a2 / before.s2) - math.log(before.a / before.s)
        slope = ((x0 - previous) * width / (2 * width_before)).nan_to_num(nan=0.0)
    return k.s2 / k.s * x.float() - (k.s2 * k.a / k.s - k.a2) * (x0 + slope)


def log_prob(x_next: Tensor, mean: Tensor, std: float, reduce: Reduce = "mean") -> Tensor:
    """(N,) float32 log N(x_next; mean, std^2), averaged ("mean", as every public trainer) or summed over D.

    With "mean" the ratio is exp(sum / D), which is why practical clip ranges are 1e-5 .. 1e-3.
    Raises ValueError for std = 0: a deterministic step has no density, and 0 in its place would enter ratios.
    """
    if std <= 0:
        raise ValueError("log_prob of a deterministic step (std 0); leave ODE steps out of the loss")
    z = (x_next.float() - mean.float()) / std
    elementwise = -0.5 * z**2 - math.log(std) - 0.5 * math.log(2 * math.pi)
    flat = elementwise.flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


def gaussian_kl(mean: Tensor, ref_mean: Tensor, std: float, reduce: Reduce = "mean") -> Tensor:
    """(N,) KL of two Gaussians of equal std: (mean - ref_mean)^2 / (2 std^2), averaged or summed over D."""
    flat = ((mean.float() - ref_mean.float()) ** 2 / (2 * std**2)).flatten(1)
    return flat.mean(1) if reduce == "mean" else flat.sum(1)


def correlated_noise(common: Tensor, own: Tensor, s: float) -> Tensor:
    """Sibling noise (common + s own)/sqrt(1 + s^2): each exactly N(0, I), correlation of siblings 1/(1 + s^2)."""
    return (common + s * own) / math.sqrt(1 + s**2)


def shifted_sigmas(num_steps: int, shift: float = 1.0) -> Tensor:
    """(T+1,) float64 flow noise levels 1 .. 0: k t / (1 + (k-1) t) of a uniform grid.

    Passed to schedulers explicitly; `set_timesteps(n)` alone applies the shift twice to the end points.
    """
    t = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t / (1 + (shift - 1) * t)
