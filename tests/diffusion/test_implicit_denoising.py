"""The implicit process reward on denoising steps: the same form, and the same code, as on tokens."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TinyTask, brightness, recipe

from diffusion.policy import DiffusionPolicy
from mmrl.config import parse_config
from mmrl.losses.reward import step_loss
from mmrl.rewards.scoring import write_outcomes
from mmrl.rollout import BranchPlan
from mmrl.scorers.implicit import ImplicitPrm
from mmrl.trainers.branch_grpo import BranchGrpo, BranchGrpoConfig
from mmrl.tree import FINISHED, INTERNAL, StepTree
from mmrl.tree_ops import path_sum

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "diffusion" / "digits_implicit.yaml"
PLAN = BranchPlan({0: 2, 2: 2})


def policy(model, **sampling):
    return DiffusionPolicy.build(str(model), **({"steps": 6, "split_noise": "independent"} | sampling))


def rollout_of(p, plan=PLAN, seed=0):
    rollout = p.rollout(TinyTask().prompts[:4], plan, seed=seed)
    samples = p.samples(rollout)
    return write_outcomes(rollout, samples, torch.tensor(brightness(samples), dtype=torch.float64))


def shake(prm):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in prm.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("noise", ["split", "all"])
@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_step_rewards_are_log_ratios_of_transitions(tiny_model, noise, reduce):
    """r = beta (ln p(x'|x) - ln p_ref(x'|x)), 0 before training; q their sum along the path."""
    prm = ImplicitPrm(policy(tiny_model), beta=0.5)
    rollout = rollout_of(policy(tiny_model, noise=noise, reduce=reduce))
    dense = rollout.actions.trainable
    assert bool((prm(rollout).nan_to_num() == 0).all())
    shake(prm)
    r = prm(rollout)
    with torch.no_grad():
        lp = prm.policy.log_probs(rollout, torch.arange(len(rollout.tree)), reference=True)
    want = torch.zeros(len(rollout.tree)).index_add(0, lp.index, 0.5 * (lp.logp - lp.ref_logp)).double()
    torch.testing.assert_close(r[dense], want[dense])
    assert bool((r[dense] != 0).all()) and bool((r[~dense].nan_to_num() == 0).all())  # an ODE step decides nothing
    q = prm.logits(rollout, torch.arange(len(r)))[:, 0].detach().double()
    torch.testing.assert_close(q, path_sum(rollout.tree, r.nan_to_num()), atol=1e-6, rtol=1e-6)


def test_steps_without_noise_have_no_log_probs(tiny_model):
    p = policy(tiny_model)
    rollout = rollout_of(p)
    quiet = (~rollout.actions.trainable).nonzero().flatten()
    assert len(quiet) and p.log_probs(rollout, quiet).logp.shape == (0,)
    p.freeze_reference()
    assert p.log_probs(rollout, quiet, reference=True).ref_logp.shape == (0,)


def test_the_gradient_of_a_leaf_reaches_its_own_noisy_steps(tiny_model):
    """q of a leaf is beta times the log-ratio of its path, so its gradient is that of the path's log-probs."""
    prm = ImplicitPrm(policy(tiny_model), beta=0.5)
    rollout = rollout_of(policy(tiny_model))
    leaf = int(rollout.tree.is_leaf.nonzero()[0])
    path, v = [], leaf
    while v >= 0:
        path.append(v)
        v = int(rollout.tree.parent[v])
    prm.logits(rollout, torch.tensor([leaf])).sum().backward()
    got = torch.cat([p.grad.flatten() for p in prm.model.parameters() if p.grad is not None])
    prm.model.zero_grad()
    (0.5 * prm.policy.log_probs(rollout, torch.tensor(sorted(path))).logp.sum()).backward()
    want = torch.cat([p.grad.flatten() for p in prm.model.parameters() if p.grad is not None])
    assert float(want.norm()) > 0
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


def test_outcomes_teach_it_which_steps_were_good(tiny_model):
    """Cross-entropy on outcomes alone; then, of two siblings, the one with the better outcomes has the higher reward."""
    actor, prm = policy(tiny_model), ImplicitPrm(policy(tiny_model), beta=5.0)
    optimizer, loss_of = torch.optim.AdamW(prm.model.parameters(), lr=1e-2), step_loss("bce")
    for seed in range(30):
        rollout = rollout_of(actor, BranchPlan({0: 8}), seed)
        leaves = rollout.tree.is_finished.nonzero().flatten()
        outcome = rollout.tree.outcome[leaves]
        label = (outcome > outcome.median()).float()
        loss = loss_of(prm.logits(rollout, leaves), label).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = rollout_of(actor, BranchPlan({0: 16}), seed=99)
    first = held_out.tree.depth == 0
    gain = held_out.tree.accumulate(held_out.tree.outcome.nan_to_num())[first].reshape(4, 16)
    r = prm(held_out)[first].reshape(4, 16)
    agree = (torch.sign(gain[:, :, None] - gain[:, None]) * torch.sign(r[:, :, None] - r[:, None])).sum() / (
        4 * 16 * 15
    )
    assert float(agree) > 0.3  # Kendall's tau within prompts; 0 by chance


def test_the_recipe_trains_policy_and_reward_apart(tiny_model, tmp_path):
    tree = recipe(tiny_model, tmp_path, run={"iterations": 3})
    own = yaml.safe_load(CONFIG.read_text())
    tree |= {k: own[k] for k in ("step_rewards", "online", "credit", "loss")}
    tree["step_rewards"][0]["policy"]["model"] = str(tiny_model)
    trainer = BranchGrpo(parse_config(tree, model=BranchGrpoConfig))
    prm = trainer.run.rewarder.step_rewards["implicit_prm"][0]
    start = [p.detach().clone() for p in prm.model.parameters()]
    assert prm.model is not trainer.policy.model
    trainer.train()
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [r for r in told if "online/loss" in r]
    assert len(told) == 3 and all(r["policy/grad_norm"] > 0 for r in told) and told[0]["step_reward/implicit_prm"] == 0
    assert told[2]["step_reward/implicit_prm"] != 0
    assert any(not torch.equal(a, b) for a, b in zip(start, prm.model.parameters(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(trainer.policy.model.parameters(), prm.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("size, parts", [(256, 1), (8, 2), (3, 4)])
def test_whole_prompts_share_a_micro_batch_while_they_fit(tiny_model, size, parts):
    """Four prompts of four leaves; a prompt is never torn, and nothing changes but the number of calls."""
    prm, rollout = ImplicitPrm(policy(tiny_model), beta=0.5), rollout_of(policy(tiny_model))
    shake(prm)
    leaves = rollout.tree.is_leaf.nonzero().flatten()
    whole = prm.logits(rollout, leaves)[:, 0]
    prm.policy.max_batch = size
    split = prm.micro_batches(rollout, leaves)
    assert len(split) == parts and sorted(torch.cat(split).tolist()) == leaves.tolist()
    owners = [set(rollout.tree.group[p].tolist()) for p in split]
    assert sum(map(len, owners)) == 4 and set.union(*owners) == {0, 1, 2, 3}
    for p in split:
        torch.testing.assert_close(prm.logits(rollout, p)[:, 0], whole[torch.searchsorted(leaves, p)])


# ---- tools/implicit_advantage.py ------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("implicit_advantage", ROOT / "tools" / "implicit_advantage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FORKS", (0, 1))
    return module


def test_correlations_by_hand(tool):
    """Leaves 1, 0 | 1, 1: advantages -1/4, 1/4 of the first steps and 1/2, -1/2, 0, 0 of the second ones."""
    status = torch.tensor([INTERNAL] * 2 + [FINISHED] * 4)
    outcome = torch.tensor([torch.nan, torch.nan, 1.0, 0.0, 1.0, 1.0])
    tree = StepTree([-1, -1, 0, 0, 1, 1], [0] * 6, status, outcome)
    assert tool.paths(tree).tolist() == [[0, 2], [0, 3], [1, 4], [1, 5]]
    broadcast = tool.centred(tree, outcome[2:, None].expand(4, 2))
    # deviations 1/4, -3/4, 1/4, 1/4 against -1/4, -1/4, 1/4, 1/4 and against 1/2, -1/2, 0, 0; all: .75 / sqrt(.75 * 1.5)
    assert tool.correlations(tree, broadcast) == {"depth 0": 0.577, "depth 1": 0.816, "all": 0.707}
    truth = torch.tensor([[-0.25, 0.5], [-0.25, -0.5], [0.25, 0.0], [0.25, 0.0]])
    assert tool.correlations(tree, truth) == {"depth 0": 1.0, "depth 1": 1.0, "all": 1.0}


def test_the_tool_trains_on_a_stored_set(tool, tiny_model, tmp_path):
    """Its loss falls on one batch seen again and again."""
    actor, prm = policy(tiny_model), ImplicitPrm(policy(tiny_model), beta=5.0)
    rollout_of(actor).save(tmp_path / "a")
    optimizer = torch.optim.AdamW(prm.model.parameters(), lr=3e-3)
    stored = tool.StoredRollouts(tmp_path, 4)
    losses = [tool.train(prm, stored, optimizer, range(i, i + 10)) for i in (0, 10, 20)]
    assert losses[2] < losses[1] < losses[0]
