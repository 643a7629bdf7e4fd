"""The second-order solver of steps without noise: against diffusers' own, in evaluation, tails and completions."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from tiny import TinyTask

from diffusion.adapters.base import Level
from diffusion.kernels import Interval, dpmpp_2m, ode
from diffusion.policy import DiffusionPolicy
from diffusion.sampler import sample_ode
from diffusion.schedule import NoiseSchedule, SamplingConfig
from mmrl.rollout import BranchPlan, Place

PROMPTS = TinyTask().prompts[:2]


def velocity(x, sigma):
    """A smooth field that is no straight line."""
    return torch.sin(x) + sigma * x.flip(1)


@pytest.mark.parametrize("steps", [4, 9])
def test_it_is_dpm_solver_plus_plus_of_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2, solver_type="midpoint", algorithm_type="dpmsolver++", prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero",
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.tolist()
    init = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    want = init
    for i, t in enumerate(scheduler.timesteps):
        want = scheduler.step(velocity(want, sigmas[i]), t, want).prev_sample

    def predict(x, i, own):
        v = velocity(x, sigmas[i])
        return x - sigmas[i] * v, x + (1 - sigmas[i]) * v

    levels = [Level(1 - s, s, 1000 * s) for s in sigmas]
    schedule = NoiseSchedule(levels, [False] * steps, [1.0] * steps)
    got = sample_ode(predict, init, SamplingConfig(steps=steps, solver="dpmpp_2m"), schedule)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    plain = sample_ode(predict, init, SamplingConfig(steps=steps), schedule)
    assert float((plain - want).abs().max()) > 1e-2


def test_without_an_estimate_before_at_pure_noise_and_at_the_end_it_is_the_ode():
    x, x0, eps = torch.randn(3, 2, 4)
    middle, pure, end = Interval(0.4, 0.6, 0.6, 0.4), Interval(0.0, 1.0, 0.2, 0.8), Interval(0.6, 0.4, 1.0, 0.0)
    x = middle.a * x0 + middle.s * eps
    for before, k, previous in (
        (Interval(0.2, 0.8, 0.4, 0.6), middle, torch.full_like(x0, torch.nan)),
        (pure, middle, x0 + 1),
    ):
        torch.testing.assert_close(dpmpp_2m(x, x0, previous, before, k), ode(x, x0, eps, k).mean)
    torch.testing.assert_close(dpmpp_2m(end.a * x0 + end.s * eps, x0, x0 + 1, middle, end), x0)


def test_it_needs_fewer_steps(tiny_model):
    """Six steps, against 200 of the plain solver, on the tiny model."""

    def pictures(**options):
        p = DiffusionPolicy.build(str(tiny_model), steps=6, **options)
        return torch.stack([s.output for s in p.generate(PROMPTS, seed=0)])

    exact = pictures(eval_steps=200)
    plain, second = (float((pictures(solver=s) - exact).abs().mean()) for s in ("euler", "dpmpp_2m"))
    assert second < 0.75 * plain


def test_a_rollout_s_tail_and_its_completions_use_it(tiny_model):
    p = DiffusionPolicy.build(str(tiny_model), steps=8, solver="dpmpp_2m")
    rollout = p.rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    plain = DiffusionPolicy.build(str(tiny_model), steps=8).rollout(PROMPTS, BranchPlan({0: 2}), seed=0)
    latent, other = rollout.actions.payload["latent"], plain.actions.payload["latent"]
    depth = rollout.tree.depth
    same = torch.isclose(latent, other).flatten(1).all(1)
    # the noisy step, and the first one after it, which has no estimate before it
    assert bool(same[depth <= 1].all()) and not bool(same[depth > 1].any())
    first = (depth == 0).nonzero().flatten().tolist()
    places = [Place(int(rollout.tree.group[v]), v) for v in first]
    done = p.complete(rollout, places, 1, seeds=[0] * len(places), temperature=0)
    leaves = [s.output for s in p.samples(rollout)]
    for (sample,), leaf in zip(done, leaves, strict=True):
        torch.testing.assert_close(sample.output, leaf, atol=1e-5, rtol=1e-5)
