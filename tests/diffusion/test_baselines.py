"""Baselines on whole samples: losses on worked numbers (diffusion.md, 11.4), terms on rollouts, every recipe in small."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import TinyTask, brightness, recipe

from diffusion.adapters.base import Level
from diffusion.clean_reward import CleanReward
from diffusion.losses import (
    awm_loss,
    crd_loss,
    dgpo_loss,
    diffusion_dpo_loss,
    drift,
    nft_loss,
    nft_share,
    prediction_error,
    refl_loss,
    scaled_prediction_error,
)
from diffusion.policy import DiffusionPolicy
from mmrl import registry
from mmrl.config import parse_config
from mmrl.credit import estimate
from mmrl.registry import ComponentError
from mmrl.rewards.scoring import write_outcomes
from mmrl.rollout import BranchPlan
from mmrl.trainers.branch_grpo import BranchGrpo, BranchGrpoConfig
from mmrl.trainers.sample_loss import SampleLossConfig, SampleLossTrainer
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer
from mmrl.tree import StepTree

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
T = torch.tensor


class Brightness:
    """The tiny reward with a gradient."""

    def values(self, samples):
        return torch.stack([s.output.mean() for s in samples])

    def __call__(self, samples):
        return self.values(samples).tolist()


REWARDS = {"brightness": (Brightness(), 1.0)}


# --- losses ------------------------------------------------------------------------------------------------------


def test_diffusion_dpo_on_worked_numbers():
    """-2500 ((.1 - .12) - (.1002 - .1199)) = .75."""
    e = [T([x], requires_grad=True) for x in (0.1, 0.12, 0.1002, 0.1199)]
    loss = diffusion_dpo_loss(*e)
    assert float(loss.detach()) == pytest.approx(0.386871, abs=2e-5)
    loss.sum().backward()
    pull = 2500 * (1 - torch.sigmoid(T(0.75)))  # d loss / d e_w = beta/2 sigmoid(-h)
    assert float(e[0].grad) == pytest.approx(float(pull), rel=1e-4) and float(e[1].grad) == -float(e[0].grad)
    assert e[2].grad is None and e[3].grad is None
    assert float(diffusion_dpo_loss(*(T([0.1]),) * 4)) == pytest.approx(np.log(2))
    swapped = diffusion_dpo_loss(e[1], e[0], e[3], e[2])
    assert float((swapped - loss).detach()) == pytest.approx(0.75, abs=1e-4)  # -ln s(-h) + ln s(h) = h


@pytest.mark.parametrize("level, want", [(Level(0.4, 0.6, 600), 0.025), (Level(0.8, 0.6, 500), 0.045)])
def test_prediction_error_is_of_what_the_network_predicts(level, want):
    """eps errors (.3, 0), x0 errors (.2, -.2): velocity errors (.1, .2) on a flow, noise errors otherwise."""
    x0, eps = T([[1.0, 2.0]]), T([[0.5, -1.0]])
    assert float(prediction_error(x0 + T([0.2, -0.2]), eps + T([0.3, 0.0]), x0, eps, level)) == pytest.approx(want)


@pytest.mark.parametrize("r, want, slope", [(0.5, 1.5e-3, -1e-3), (2.5, 0.0, 0.0)])
def test_refl_on_worked_numbers(r, want, slope):
    reward = T([r], requires_grad=True)
    loss = refl_loss(reward)
    loss.sum().backward()
    assert float(loss) == pytest.approx(want) and float(reward.grad) == pytest.approx(slope)


def test_nft_on_worked_numbers():
    """x0 (.2, -.1), eps (1, -.5), t .5, v_old (.7, -.3), v (.9, -.45), b .1, A 2.5 -> r .75, 2.2830029."""
    x0, eps, t = T([[0.2, -0.1]]), T([[1.0, -0.5]]), 0.5
    x = (1 - t) * x0 + t * eps
    v, v_old = T([[0.9, -0.45]], requires_grad=True), T([[0.7, -0.3]], requires_grad=True)
    assert nft_share(T([2.5, 9.0, -9.0, 0.0])).tolist() == [0.75, 1.0, 0.0, 0.5]
    loss = nft_loss(x - t * v, x - t * v_old, x0, nft_share(T([2.5])))
    assert float(loss) == pytest.approx(2.2830029, abs=1e-5)
    only = [float(nft_loss(x - t * v, x - t * v_old, x0, T([r]))) / 50 for r in (1.0, 0.0)]
    assert only == pytest.approx([0.0412879, 0.0587766], abs=1e-6)
    loss.sum().backward()
    assert v_old.grad is None and bool((v.grad != 0).all())


def test_nft_pulls_good_samples_and_pushes_bad_ones():
    """From the old policy on, the gradient is (2r - 1) times the same direction: 0 where nothing is known."""
    x0, old = torch.randn(1, 5), torch.randn(1, 5)

    def gradient(share):
        x = old.clone().requires_grad_()
        nft_loss(x, old, x0, T([share])).sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(0.0), -gradient(1.0))
    torch.testing.assert_close(gradient(0.75), 0.5 * gradient(1.0))
    torch.testing.assert_close(gradient(0.5), torch.zeros(1, 5))
    assert float((gradient(1.0) * (old - x0)).sum()) > 0  # descent goes towards the sample


@given(st.integers(0, 10**6), st.floats(0.05, 1), st.floats(0.1, 1))
def test_nft_and_drift_equal_their_velocity_forms(seed, t, b):
    g = torch.Generator().manual_seed(seed)
    x0, eps, v, old, share = (torch.randn(3, 4, generator=g) for _ in range(5))
    share, x = share[:, 0].sigmoid(), (1 - t) * x0 + t * eps

    def error(u):
        e = x - t * u - x0
        return (e**2).mean(1) / e.abs().mean(1).clamp(min=1e-5)

    want = 5 / b * (share * error(b * v + (1 - b) * old) + (1 - share) * error((1 + b) * old - b * v))
    torch.testing.assert_close(nft_loss(x - t * v, x - t * old, x0, share, b=b), want, rtol=1e-3, atol=1e-4)
    drifted = drift(x - t * v, x - t * old, Level(1 - t, t, 0))
    torch.testing.assert_close(drifted, ((v - old) ** 2).mean(1), rtol=1e-3, atol=1e-4)


def test_scaled_error_is_the_error_over_its_mean_size():
    """Velocity errors (.1, .2) on a flow: .025 / .15, with the gradient of the numerator alone."""
    x0, eps, v = T([[1.0, 2.0]]), T([[0.5, -1.0]]), T([[0.1, 0.2]], requires_grad=True)
    loss = scaled_prediction_error(x0, eps + v, x0, eps, Level(0.4, 0.6, 600))
    loss.sum().backward()
    assert float(loss) == pytest.approx(0.025 / 0.15)
    torch.testing.assert_close(v.grad, T([[0.1, 0.2]]) / 0.15)


def test_awm_on_worked_numbers():
    """e .3 from .5: rho e^.2 = 1.2214; A 2 pulls, A -2 is clipped at 1.1 only where that is worse, A 2 at 1.1 has none."""
    old, adv = T([0.5, 0.5]), T([2.0, -2.0])
    error = T([0.3, 0.3], requires_grad=True)
    loss = awm_loss(error, old, adv)
    assert loss.tolist() == pytest.approx([-2.4428, 2.4428], abs=1e-4)
    loss.sum().backward()
    assert error.grad.tolist() == pytest.approx([2.4428, -2.4428], abs=1e-4)  # a good sample's error falls
    clipped = awm_loss(error, old, adv, clip=0.1)
    assert clipped.tolist() == pytest.approx([-2.2, 2.4428], abs=1e-4)


def test_awm_starts_as_weighted_pre_training():
    error = T([0.3, 0.7], requires_grad=True)
    awm_loss(error, error.detach(), T([1.5, -0.5])).sum().backward()
    assert error.grad.tolist() == [1.5, -0.5]


def test_dgpo_on_worked_numbers():
    """One group, A (1, -1), e (.10, .20), e_ref (.12, .19): 100/2 (-.02 - .01) = -1.5, w = sigmoid(-1.5) = .182426."""
    error = T([0.10, 0.20], requires_grad=True)
    parts = (T([0.12, 0.19]), T([0.10, 0.20]), T([1.0, -1.0]), T([0, 0]))
    loss = dgpo_loss(error, *parts)
    assert loss.tolist() == pytest.approx([0.0182426, -0.0364852], abs=1e-6)
    loss.sum().backward()
    assert error.grad.tolist() == pytest.approx([0.182426, -0.182426], abs=1e-6)


def test_dgpo_leaves_alone_what_has_moved_far_enough():
    """exp(.4 - .1) > 1.001 with A > 0 and exp(.1 - .4) < .999 with A < 0 get no gradient, the other two do."""
    error = T([0.1, 0.4, 0.4, 0.1], requires_grad=True)
    old, adv = T([0.4, 0.1, 0.1, 0.4]), T([1.0, -1.0, 1.0, -1.0])
    dgpo_loss(error, error.detach(), old, adv, T([0, 0, 0, 0])).sum().backward()
    assert error.grad.tolist() == [0.0, 0.0, 0.5, -0.5]
    error.grad = None
    dgpo_loss(error, error.detach(), old, adv, T([0, 0, 0, 0]), clip=None).sum().backward()
    assert error.grad.tolist() == [0.5, -0.5, 0.5, -0.5]


def test_dgpo_is_the_gradient_of_a_group_preference():
    """-ln sigmoid(R(good) - R(bad)), R = sum |A| beta (e_ref - e) / G, up to the factor beta / G."""
    g = torch.Generator().manual_seed(0)
    error, ref, adv = torch.rand(4, generator=g), torch.rand(4, generator=g), T([1.2, 0.4, -0.3, -1.3])
    ours, text = error.clone().requires_grad_(), error.clone().requires_grad_()
    dgpo_loss(ours, ref, error, adv, T([0] * 4), beta=3.0).sum().backward()
    (-torch.nn.functional.logsigmoid((adv * 3.0 / 4 * (ref - text)).sum())).backward()
    torch.testing.assert_close(ours.grad * 3.0 / 4, text.grad)


def test_crd_on_worked_numbers():
    """Group 0: r = e_old - e = (.2, 0), centred (.1, -.1), R (.75, .25) centred (.25, -.25): 5 (.1 - .25)^2 = .1125.
    Group 1, alone: nothing to compare with. Gradient: 10 (.1 - .25) (-1) = 1.5."""
    error = T([0.3, 0.5, 0.9], requires_grad=True)
    loss = crd_loss(error, T([0.5, 0.5, 0.1]), T([0.75, 0.25, 1.0]), T([0, 0, 1]))
    assert loss.tolist() == pytest.approx([0.1125, 0.1125, 0.0], abs=1e-6)
    loss.sum().backward()
    assert error.grad.tolist() == pytest.approx([1.5, -1.5, 0.0], abs=1e-5)
    assert float(crd_loss(T([0.3]), T([0.5]), T([1.0]), T([0]))) == 0
    steep = crd_loss(T([0.3, 0.5]), T([0.5, 0.5]), T([0.75, 0.25]), T([0, 0]), beta=2.0)
    assert steep.tolist() == pytest.approx([2.5 * 0.05**2] * 2, abs=1e-6)


def test_ddpo_advantages_are_its_per_prompt_statistics():
    """A second implementation: a buffer of 16 rewards per prompt, numpy's std (ddof 0) plus 1e-6."""
    rewards = np.random.default_rng(0).normal(size=(3, 16)) * [[1.0], [0.1], [3.0]]
    tree = StepTree([-1] * 48, [i // 16 for i in range(48)], [1] * 48, rewards.flatten().tolist())
    options = yaml.safe_load((CONFIGS / "digits_ddpo.yaml").read_text())["credit"]["estimators"][0]
    want = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    torch.testing.assert_close(estimate(tree, **options).adv, T(want).flatten(), rtol=1e-6, atol=1e-6)


# --- terms of a rollout ------------------------------------------------------------------------------------------


@pytest.fixture
def policy(tiny_model):
    made = DiffusionPolicy.build(str(tiny_model), steps=6, noise="split", split_noise="independent")
    made.freeze_reference()
    return made


def rewarded(policy, leaves=4, prompts=3):
    rollout = policy.rollout(TinyTask().prompts[:prompts], BranchPlan({0: leaves}), seed=0)
    samples = policy.samples(rollout)
    return write_outcomes(rollout, samples, T(brightness(samples), dtype=torch.float64))


def inputs_of(policy, terms):
    """(x, timestep, rows) of every network call while the terms run with gradient."""
    seen = []
    hook = policy.model.register_forward_hook(
        lambda m, a, kw, out: seen.append((a[0], kw["timestep"])) if torch.is_grad_enabled() else None,
        with_kwargs=True,
    )
    losses = [t.loss() for t in terms]
    hook.remove()
    return seen, losses


def terms_of(policy, name, options, *rest):
    return registry.build("sample_losses", "loss", name, options)(policy, *rest)


def test_the_two_samples_of_a_pair_are_noised_alike(policy):
    rollout = rewarded(policy)
    terms = terms_of(policy, "diffusion_dpo", {"levels": 3}, rollout, REWARDS, (0, 0))
    seen, losses = inputs_of(policy, terms)
    latent, outcome = rollout.actions.payload["latent"], rollout.tree.outcome
    best = [
        int(torch.where(rollout.tree.group == g, outcome, torch.nan).nan_to_num(nan=-9).argmax()) for g in range(3)
    ]
    worst = [
        int(torch.where(rollout.tree.group == g, outcome, torch.nan).nan_to_num(nan=9).argmin()) for g in range(3)
    ]
    assert [t.rows for t in terms] == [3, 3, 3] and len({float(t[0]) for _, t in seen}) == 3
    for x, t in seen:
        a, (w, l) = 1 - float(t[0]) / 1000, x.chunk(2)  # noqa: E741
        torch.testing.assert_close(w - a * latent[best], l - a * latent[worst], atol=1e-5, rtol=1e-5)
    for loss in losses:
        torch.testing.assert_close(loss, torch.full((3,), np.log(2)), rtol=1e-5, atol=1e-6)


def test_refl_goes_through_one_late_step_alone(policy):
    rollout = rewarded(policy)
    late = {round(policy.levels()[i].t) for i in (3, 4, 5)}
    drawn = set()
    for k in range(12):
        terms = terms_of(policy, "refl", {"window": 0.5}, rollout, REWARDS, (0, k))
        seen, losses = inputs_of(policy, terms)
        assert len(seen) == 1 and seen[0][0].shape[0] == terms[0].rows == 12 and not seen[0][0].requires_grad
        drawn.add(round(float(seen[0][1][0])))
        assert losses[0].requires_grad and bool((losses[0] > 0).all())
    assert drawn == late


def test_nft_asks_the_old_policy_when_terms_are_made(policy):
    """The old estimate belongs to the weights that drew the samples, the new one to those of the update."""
    rollout = rewarded(policy)
    make = partial(terms_of, policy, "nft", {"levels": 2, "beta": 0.0}, rollout, REWARDS, (0, 0))
    before = torch.cat([t.loss() for t in make()])
    terms = make()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    moved = torch.cat([t.loss() for t in terms])
    assert before.shape == moved.shape == (24,) and not torch.allclose(before, moved)
    assert not torch.allclose(moved, torch.cat([t.loss() for t in make()]))
    drifting = terms_of(policy, "nft", {"levels": 2, "beta": 0.5}, rollout, REWARDS, (0, 0))
    plain = make()
    assert all(bool((a.loss() > b.loss()).all()) for a, b in zip(drifting, plain, strict=True))


def test_dgpo_noises_a_prompt_s_samples_alike_at_every_level(policy):
    rollout = rewarded(policy)
    seen, _ = inputs_of(policy, terms_of(policy, "dgpo", {"levels": 3}, rollout, REWARDS, (0, 0)))
    leaves = rollout.tree.is_finished.nonzero().flatten()
    latent, owner = rollout.actions.payload["latent"][leaves], rollout.tree.group[leaves]
    noises = []
    for x, t in seen:
        s = float(t[0]) / 1000
        noises.append((x - (1 - s) * latent) / s)
    assert len(noises) == 3
    for noise in noises:
        torch.testing.assert_close(noise, noises[0], atol=1e-4, rtol=1e-4)
        for g in range(3):
            own = noise[owner == g]
            torch.testing.assert_close(own, own[:1].expand_as(own), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(noises[0][owner == 0][0], noises[0][owner == 1][0])


@pytest.mark.parametrize("name", ["diffusion_dpo", "refl", "nft", "awm", "dgpo", "crd"])
def test_micro_batches_and_other_prompts_change_nothing(policy, name):
    grads = []
    for size in (256, 3):
        policy.max_batch = size
        terms = terms_of(policy, name, {}, rewarded(policy), REWARDS, (0, 0))
        policy.model.zero_grad()
        for t in terms:
            loss = t.loss()
            assert loss.shape == (t.rows,)
            loss.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    assert float(grads[0].norm()) > 0
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4 * float(grads[0].abs().max()), rtol=1e-3)
    policy.max_batch = 256
    some, more = (terms_of(policy, name, {}, rewarded(policy, prompts=n), REWARDS, (0, 0)) for n in (2, 3))
    for a, b in zip(some, more, strict=True):
        first = torch.arange(a.rows) if name != "diffusion_dpo" else torch.arange(2)
        torch.testing.assert_close(a.loss(), b.loss()[first], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "nftt",
            {},
            r"unknown sample loss 'nftt' \(did you mean nft\?\); known: awm, crd, dgpo, diffusion_dpo, nft, refl",
        ),
        ("nft", {"bb": 1}, r"unknown key loss.bb=1"),
        ("nft", {"levels": 7}, r"loss.levels=7: the sampler has 6 noise levels"),
        ("refl", {}, r"reward 'plain': ReFL needs the protocol DifferentiableReward .*: legible_symmetric"),
    ],
)
def test_losses_that_cannot_run(policy, name, options, message):
    with pytest.raises(ValueError, match=message):
        terms_of(policy, name, options, rewarded(policy), {"plain": (brightness, 1.0)}, (0, 0))


# --- the trainer -------------------------------------------------------------------------------------------------


def small(model, output, name, **sections):
    """A recipe of configs/diffusion on the tiny model: its own loss, plan shape and credit."""
    own = yaml.safe_load((CONFIGS / f"digits_{name}.yaml").read_text())
    tree = recipe(model, output, **{k: v for k, v in sections.items() if k != "loss"})
    tree |= {"loss": sections.get("loss")}
    tree |= {k: v for k, v in own.items() if k not in ("task", "policy", "rewards", "run", "optim", *sections)}
    tree["policy"] = own["policy"] | tree["policy"]
    tree["policy"].pop("tail", None)
    if "step_rewards" in tree:
        tree["step_rewards"] = [tree["step_rewards"][0] | {"reward": "tiny:brightness", "model": str(model)}]
        tree["pairs"] |= {"threshold": 0.0, "first_depth": 1}
        tree["plan"] = {1: 2, 3: 2}
    return tree


def build(tree):
    kinds = {
        "branch_grpo": (BranchGrpo, BranchGrpoConfig, {}),
        "step_preference": (StepPreferenceTrainer, StepPreferenceConfig, {}),
        "sample_loss": (SampleLossTrainer, SampleLossConfig, {"rewards": REWARDS}),
    }
    trainer, model, more = kinds[tree["trainer"]]
    return trainer(parse_config(tree, model=model), **more)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["ddpo", "spo", "diffusion_dpo", "refl", "nft"])
def test_every_recipe_runs(tiny_model, tmp_path, name):
    build(small(tiny_model, tmp_path, name, run={"iterations": 3}, optim={"lr": 1e-4})).train()
    told = [r for r in rows(tmp_path) if "reward/mean" in r]
    assert len(told) == 3 and all(r["policy/grad_norm"] > 0 for r in told)
    start, end = load_file(tiny_model / WEIGHTS), load_file(tmp_path / "model" / WEIGHTS)
    assert any(not torch.equal(start[k], end[k]) for k in start)


@pytest.mark.parametrize(
    "name, options",
    [
        ("diffusion_dpo", {"beta": 5}),
        ("refl", {}),
        ("nft", {}),
        ("awm", {}),
        ("dgpo", {"dpo_beta": 5.0, "clip": None}),
        ("crd", {}),
    ],
)
def test_every_loss_raises_the_reward(tiny_model, tmp_path, name, options):
    sections = {"run": {"iterations": 20, "eval_every": 20}, "optim": {"lr": 5e-3}, "loss": {"name": name, **options}}
    like = name if (CONFIGS / f"digits_{name}.yaml").exists() else "nft"
    build(small(tiny_model, tmp_path, like, **sections)).train()
    evals = [r["eval/reward"] for r in rows(tmp_path) if "eval/reward" in r]
    assert evals[-1] > evals[0] + 0.2


def test_equal_rewards_teach_nothing(tiny_model, tmp_path, caplog):
    tree = small(tiny_model, tmp_path, "diffusion_dpo", run={"iterations": 2})
    config = parse_config(tree | {"rewards": [{"name": "tiny:constant", "timeout_s": 0}]}, model=SampleLossConfig)
    SampleLossTrainer(config).train()
    assert "nothing to learn" in caplog.text
    assert all(r["sample_loss/rows"] == r["policy/grad_norm"] == 0 for r in rows(tmp_path) if "reward/mean" in r)


def test_samples_come_from_the_average_of_the_weights(tiny_model, tmp_path):
    trainer = build(small(tiny_model, tmp_path, "nft", old_decay=0.9))
    start = [p.detach().clone() for p in trainer.loop.parameters]
    trainer.iterate(0)
    with trainer._old_weights():
        for p, first, shadow in zip(trainer.loop.parameters, start, trainer.old.shadow, strict=True):
            torch.testing.assert_close(p, shadow)
            assert float((p - first).abs().max()) <= 0.11 * trainer.config.optim.lr  # a tenth of one step
    assert any(not torch.equal(p, s) for p, s in zip(trainer.loop.parameters, trainer.old.shadow, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_resumes_where_it_stopped(tiny_model, tmp_path, decay):
    def train(name, **run):
        options = {"iterations": 4, "checkpoint_every": 2, "eval_every": 4, **run}
        build(small(tiny_model, tmp_path / name, "nft", run=options, old_decay=decay)).train()
        return load_file(tmp_path / name / "model" / WEIGHTS)

    whole = train("whole")
    train("parts", iterations=2)
    parts = train("parts", resume=True)
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_policy_whose_steps_are_no_latents_is_refused(tiny_model, tmp_path):
    tree = small(tiny_model, tmp_path, "nft") | {"policy": {"name": "vision", "model": "not loaded"}}
    message = "loss: sample loss 'nft' reads actions.latent, which nothing .* by the policies diffusion"
    with pytest.raises(ValueError, match=message):
        SampleLossTrainer(parse_config(tree, model=SampleLossConfig))


def test_a_policy_that_cannot_be_asked_about_noise_is_refused_before_it_is_made(tiny_model, tmp_path):
    tree = small(tiny_model, tmp_path, "nft") | {"policy": {"name": "test_latent_readings:CannotComplete"}}
    with pytest.raises(
        ComponentError, match="loss 'nft' needs the protocol NoisePredictor .*those that do: diffusion$"
    ):
        SampleLossTrainer(parse_config(tree, model=SampleLossConfig))


def test_a_reward_without_gradient_is_refused_before_a_model_is_loaded(tiny_model, tmp_path):
    tree = small(tiny_model, tmp_path, "refl") | {"rewards": [{"name": "tiny:constant", "timeout_s": 0}]}
    # a folder without a model: whoever loads it raises another error
    tree["policy"]["model"] = str(tmp_path)
    with pytest.raises(ComponentError, match="'tiny:constant': sample loss 'refl' needs the protocol Differentiable"):
        SampleLossTrainer(parse_config(tree, model=SampleLossConfig))


def test_imitation_by_a_policy_that_does_not_write_is_refused_before_a_model_is_loaded(tiny_model, tmp_path):
    tree = recipe(tiny_model, tmp_path, imitation={"weight": 0.1})
    tree["policy"]["model"] = str(tmp_path / "not there")
    with pytest.raises(ComponentError, match="imitation.weight=0. needs the protocol OutputWriter .*: video, vision"):
        BranchGrpo(parse_config(tree))


def test_clean_reward_judges_predicted_pictures(tiny_model, policy):
    rollout = rewarded(policy)
    judge = CleanReward("tiny:brightness", str(tiny_model))
    pictures = policy.describe(rollout, torch.arange(len(rollout.tree)))
    want = T([float(p.mean()) for p in pictures], dtype=torch.float64)
    torch.testing.assert_close(judge(rollout), want, atol=1e-6, rtol=1e-6)
    leaves = rollout.tree.is_leaf
    torch.testing.assert_close(judge(rollout)[leaves], rollout.tree.outcome[leaves], atol=1e-6, rtol=1e-6)
