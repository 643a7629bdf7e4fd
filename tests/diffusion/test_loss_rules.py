"""Rules of the policy loss that only denoising knows: worked numbers, recipes, and who cannot use them."""

import json

import pytest
import torch
from tiny import TinyTask, recipe

from diffusion.loss_rules import flow_dppo, grpo_guard, noise_weights
from diffusion.policy import DiffusionPolicy
from mmrl.config import parse_config
from mmrl.losses.policy import LossConfig, loss_rules
from mmrl.registry import ComponentError
from mmrl.rollout import BranchPlan
from mmrl.trainers.branch_grpo import BranchGrpo

T = torch.tensor


def run(model, folder, rule, loss=None, **policy):
    tree = recipe(
        model,
        folder,
        loss={"rules": [rule], **(loss or {})},
        policy=policy,
        optim={"updates_per_rollout": 2},
        run={"iterations": 2},
    )
    BranchGrpo(parse_config(tree)).train()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if "policy/grad_norm" in r]


def test_guard_on_worked_numbers():
    """log rho -.0034547, bias 1.054439e-5, std .8133265: guarded rho .9972027; the loss is divided by h = .15."""
    extra = {"mean_shift": T([1.054439e-5]), "std": T([0.8133265]), "interval": T([0.15])}
    log_ratio, weight = grpo_guard(T([-0.0034547]), T([3.0]), T([1.0]), extra)
    assert float(log_ratio.exp()) == pytest.approx(0.9972027, abs=1e-6) and float(weight) == pytest.approx(20)


def test_guard_trains_with_kept_means(tiny_model, tmp_path):
    rows = run(tiny_model, tmp_path, "grpo_guard", keep_mean=True)
    assert len(rows) == 2 and all(r["policy/grad_norm"] > 0 for r in rows)
    assert rows[0]["policy/ratio_dev_max"] < 1e-6


def test_noise_weights_are_proportional_to_std_and_1_on_average(tiny_model):
    """Five noisy steps of Flow-GRPO's kernel, whose std falls with the noise level; the last step draws nothing."""
    policy = DiffusionPolicy.build(str(tiny_model), steps=6, kernel="flow", noise="all")
    rollout = policy.rollout(TinyTask().prompts[:2], BranchPlan({0: 2}), seed=0)
    new = policy.log_probs(rollout, torch.arange(len(rollout.tree)))
    _, weight = noise_weights(new.logp, torch.ones(len(new.index)), new.logp, new.extra)
    std = rollout.tree.tags["std"][rollout.tree.step_of_action(len(rollout.tree))[new.index]]
    assert float(weight.mean()) == pytest.approx(1, abs=1e-6) and len(weight) == 20
    torch.testing.assert_close(weight / weight[0], std / std[0])
    assert float(weight.max() / weight.min()) > 1.5


def test_noise_weights_train(tiny_model, tmp_path):
    rows = run(tiny_model, tmp_path, "noise_weights", kernel="flow", noise="all")
    assert len(rows) == 2 and all(r["policy/grad_norm"] > 0 for r in rows)


def test_flow_dppo_stops_what_has_moved_far_to_its_side():
    """KL 2e-5 is over, 5e-6 under the threshold of 1e-5; a ratio on the other side may still come back."""
    log_ratio = T([0.1, -0.1, 0.1, -0.1, 0.1])
    advantage = T([1.0, 1.0, -1.0, -1.0, 1.0])
    extra = {"mean_shift": T([2e-5, 2e-5, 2e-5, 2e-5, 5e-6])}
    same, weight = flow_dppo(log_ratio, torch.full((5,), 3.0), advantage, extra)
    assert same is log_ratio and weight.tolist() == [0.0, 3.0, 3.0, 0.0, 3.0]


def test_flow_dppo_trains_and_at_first_nothing_is_stopped(tiny_model, tmp_path):
    rows = run(tiny_model, tmp_path, "flow_dppo", loss={"surrogate": "unclipped"}, keep_mean=True)
    assert len(rows) == 2 and all(r["policy/grad_norm"] > 0 for r in rows)


def test_guard_without_kept_means_is_refused_before_a_model_is_loaded(tmp_path):
    message = (
        "loss.rules.0: loss rule 'grpo_guard' reads actions.mean, which nothing in this recipe writes before. "
        "actions.mean is written by the policies diffusion with keep_mean: true"
    )
    with pytest.raises(ComponentError, match=message):
        run(tmp_path / "no model here", tmp_path, "grpo_guard")


def test_guard_with_a_policy_of_texts_is_refused(tmp_path):
    tree = recipe("none", tmp_path, loss={"rules": ["grpo_guard"]})
    tree["policy"] = {"name": "vision", "model": "not loaded"}
    with pytest.raises(ComponentError, match="'grpo_guard' reads actions.mean.* policies diffusion with keep_mean"):
        BranchGrpo(parse_config(tree))


def test_a_policy_that_gives_less_than_a_rule_asks_for():
    """One made in Python, which no recipe has checked."""
    (rule,) = loss_rules(LossConfig(rules=["grpo_guard"]))
    with pytest.raises(ComponentError, match="'grpo_guard' needs 'mean_shift' of every action; .* gives std. Set pol"):
        rule(T([0.0]), T([1.0]), T([1.0]), {"std": T([1.0])})


def test_rules_that_do_not_exist(tmp_path):
    with pytest.raises(ComponentError, match=r"unknown loss rule 'grpo_gard' \(did you mean grpo_guard\?\)"):
        run("none", tmp_path, "grpo_gard")
