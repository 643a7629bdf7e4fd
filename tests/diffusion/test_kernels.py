import itertools
import math

import numpy as np
import pytest
import torch

from diffusion.kernels import (
    Interval,
    correlated_noise,
    cps,
    dance,
    flow,
    gaussian_kl,
    log_prob,
    ode,
    posterior,
    shifted_sigmas,
    to_x0_eps,
)
from mmrl.registry import find, names

X, V, Z = (torch.tensor([a], dtype=torch.float64) for a in ([0.5, -1.0], [1.0, 0.2], [0.5, -1.0]))
K = Interval(a=0.1, s=0.9, a2=0.25, s2=0.75, s_max=0.9)


def check_close(x, want, atol=2e-6):
    torch.testing.assert_close(x.double(), torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0)


def worked(kernel, **options):
    x0, eps = to_x0_eps(X, V, K.a, K.s, "flow")
    return kernel(X, x0, eps, K, **options)


def test_schedule_is_shifted_once():
    check_close(shifted_sigmas(4, 3.0), [1, 0.9, 0.75, 0.5, 0])


def test_clean_and_noise_estimates():
    x0, eps = to_x0_eps(X, V, K.a, K.s, "flow")
    check_close(x0, [[-0.4, -1.18]])
    check_close(eps, [[0.6, -0.98]])
    check_close(worked(ode).mean, [[0.35, -1.03]])


@pytest.mark.parametrize(
    "kernel, eta, mean, std, x_next, logp",
    [
        (dance, 0.3, [0.3455, -1.02265], 0.1161895, [0.403595, -1.138840], 0.9210943),
        (flow, 0.7, [0.1295, -0.66985], 0.8133265, [0.536163, -1.483177], -1.0248159),
        (cps, 0.7, [0.104296, -0.628683], 0.6682549, [0.438423, -1.296938], -0.8283530),
    ],
)
def test_worked_steps(kernel, eta, mean, std, x_next, logp):
    step = worked(kernel, eta=eta)
    check_close(step.mean, [mean])
    assert step.std == pytest.approx(std, abs=1e-6)
    after = step.mean + step.std * Z.float()
    check_close(after, [x_next])
    check_close(log_prob(after, step.mean, step.std), [logp])
    check_close(log_prob(after, step.mean, step.std, "sum"), [2 * logp])
    normal = torch.distributions.Normal(step.mean, step.std).log_prob(after)
    torch.testing.assert_close(log_prob(after, step.mean, step.std), normal.mean(1))


def test_dance_with_eta_g_is_flow():
    check_close(worked(dance, eta=2.1).mean, worked(flow, eta=0.7).mean.tolist())


def test_kl_and_ratio_worked_numbers():
    step = worked(flow, eta=0.7)
    ref = flow(X, *to_x0_eps(X, torch.tensor([[0.9, 0.25]]), K.a, K.s, "flow"), K, eta=0.7)
    assert float(gaussian_kl(step.mean, ref.mean, step.std)) == pytest.approx(1.647561e-4, abs=1e-9)
    assert float(gaussian_kl(step.mean, ref.mean, step.std, "sum")) == pytest.approx(3.295121e-4, abs=2e-9)
    after = step.mean + step.std * Z.float()
    new = flow(X, *to_x0_eps(X, torch.tensor([[1.02, 0.18]]), K.a, K.s, "flow"), K, eta=0.7)
    logp = log_prob(after, new.mean, new.std)
    check_close(logp, [-1.0282706])
    assert float((logp - log_prob(after, step.mean, step.std)).exp()) == pytest.approx(0.9965512, abs=1e-6)
    total = log_prob(after, new.mean, new.std, "sum") - log_prob(after, step.mean, step.std, "sum")
    assert float(total.exp()) == pytest.approx(0.9931143, abs=1e-6)


@pytest.mark.parametrize(
    "eta, mean, std, x_next, logp",
    [
        (1.0, [0.506723, -1.013446], 0.4293211, [0.721383, -1.442767], -0.3858885),
        (0.3, [0.529323, -1.058646], 0.1287963, [0.593721, -1.187442], 0.8180843),
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_ddim_eta_worked_numbers_for_every_prediction(prediction, eta, mean, std, x_next, logp):
    a, p = 0.2749991, 0.3455582
    e, v, x0 = [[0.2, -0.4]], [[-0.430460, 0.860921]], [[0.628726, -1.257452]]
    output = torch.tensor({"epsilon": e, "v": v, "sample": x0}[prediction])
    k = Interval(math.sqrt(a), math.sqrt(1 - a), math.sqrt(p), math.sqrt(1 - p))
    clean, eps = to_x0_eps(X, output, k.a, k.s, prediction)
    check_close(clean, x0, 5e-6)
    step = find("kernels", "ddim").target(X, clean, eps, k, eta=eta)
    check_close(step.mean, [mean], 5e-6)
    assert step.std == pytest.approx(std, abs=1e-6)
    after = step.mean + step.std * Z.float()
    check_close(after, [x_next], 5e-6)
    check_close(log_prob(after, step.mean, step.std), [logp], 5e-6)


def test_ddim_std_table():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    abar = np.cumprod(1 - betas)
    want = {51: 0.0406, 101: 0.1673, 501: 0.4293, 951: 0.6444}
    for t, std in want.items():
        a, p = abar[t], abar[max(t - 50, 0)]
        k = Interval(math.sqrt(a), math.sqrt(1 - a), math.sqrt(p), math.sqrt(1 - p))
        assert posterior(X, X, X, k, eta=1.0).std == pytest.approx(std, abs=6e-5)


def test_last_step_and_pure_noise_are_finite():
    for name in names("kernels"):
        kernel = find("kernels", name).target
        for k in (Interval(0.0, 1.0, 0.1, 0.9, 0.9), Interval(0.9, 0.1, 1.0, 0.0, 0.9)):
            step = kernel(X, *to_x0_eps(X, V, k.a, k.s, "flow"), k)
            assert bool(step.mean.isfinite().all()) and math.isfinite(step.std), name
    last = Interval(0.9, 0.1, 1.0, 0.0, 0.9)
    assert posterior(X, X, X, last).std == cps(X, X, X, last).std == 0


def test_deterministic_steps_have_no_density():
    with pytest.raises(ValueError, match="deterministic step"):
        log_prob(X, X, 0.0)
    with pytest.raises(ValueError, match="for flow-matching models"):
        dance(X, X, X, Interval(0.8, 0.6, 0.9, 0.436))


def test_vanishing_noise_is_the_ode():
    for kernel in (posterior, dance, flow, cps):
        check_close(worked(kernel, eta=1e-6).mean, worked(ode).mean.tolist(), 1e-5)


def test_split_noise_worked_numbers_and_statistics():
    xi = correlated_noise(torch.tensor([1.0, -0.5]), torch.tensor([0.2, 0.4]), 4.0)
    check_close(xi, [0.436564, 0.266789])
    g = torch.Generator().manual_seed(0)
    common, a, b = (torch.randn(200_000, generator=g) for _ in range(3))
    x, y = correlated_noise(common, a, 4.0), correlated_noise(common, b, 4.0)
    assert float(x.std()) == pytest.approx(1, abs=0.01)
    assert float((x * y).mean()) == pytest.approx(1 / 17, abs=0.01)


GAUSSIAN = [  # rule, eta, T, final sd of data N(1.5, .5^2) by the exact velocity, last step drawn too
    ("ode", 0.0, 10, 0.431), ("ode", 0.0, 50, 0.486),
    ("posterior", 0.7, 10, 0.414), ("posterior", 1.0, 10, 0.386), ("posterior", 1.0, 20, 0.434),
    ("posterior", 0.7, 50, 0.478), ("flow", 0.7, 20, 0.494), ("dance", 0.3, 10, 0.442),
    ("dance", 0.3, 20, 0.471), ("cps", 0.7, 10, 0.370), ("cps", 1.0, 10, 0.309), ("cps", 0.7, 50, 0.409),
]  # fmt: skip


def exact_x0(x, s):
    """E[x0 | x] for data N(1.5, .5^2)."""
    a = 1 - s
    return 1.5 + a * 0.25 / (a**2 * 0.25 + s**2) * (x - a * 1.5)


@pytest.mark.parametrize("rule, eta, steps, sd", GAUSSIAN)
def test_sampled_spread_against_the_measured_table_and_the_closed_form(rule, eta, steps, sd):
    """Every kernel is affine in x here, so the exact sd follows step by step: sd'^2 = slope^2 sd^2 + std^2."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 1, generator=g, dtype=torch.float64)
    exact, sigmas = 1.0, shifted_sigmas(steps).tolist()
    two = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for s, s2 in itertools.pairwise(sigmas):
        k = Interval(1 - s, s, 1 - s2, s2, sigmas[1])
        at = [
            find("kernels", rule).target(y, exact_x0(y, s), (y - (1 - s) * exact_x0(y, s)) / s, k, eta=eta)
            for y in (x, two)
        ]
        slope = float(at[1].mean[1] - at[1].mean[0])
        exact = math.sqrt(slope**2 * exact**2 + at[1].std ** 2)
        x = at[0].mean.double() + at[0].std * torch.randn(x.shape, generator=g, dtype=torch.float64)
    assert float(x.std()) == pytest.approx(exact, abs=0.004)
    assert exact == pytest.approx(sd, abs=0.005)
