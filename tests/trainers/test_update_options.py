"""Options of the update: cut completions, uncertain actions, minibatches of a rollout, overlong answers."""

import json

import pytest
import torch
from tiny import recipe

from mmrl.config import ConfigError, parse_config
from mmrl.credit import StepAdvantage
from mmrl.credit.estimate import apply_transform
from mmrl.losses.policy import LossConfig
from mmrl.registry import ComponentError
from mmrl.rollout import ActionLogProbs, Actions, Prompt, Rollout
from mmrl.trainers import trainer_of
from mmrl.trainers.policy_update import build_batch, has_uncut_leaf, most_uncertain
from mmrl.tree import FINISHED, INTERNAL, StepTree


def small_rollout(truncated):
    """One prompt, a step with two leaves and a leaf beside it; two actions a step."""
    tree = StepTree(
        torch.tensor([-1, 0, 0, -1]), torch.zeros(4, dtype=torch.long),
        torch.tensor([INTERNAL, FINISHED, FINISHED, FINISHED]), torch.tensor([torch.nan, 1.0, 0.0, 0.5]),
        tok_start=torch.tensor([0, 2, 4, 6]), tok_end=torch.tensor([2, 4, 6, 8]),
        tags={"truncated": torch.tensor(truncated)},
    )  # fmt: skip
    actions = Actions(torch.zeros(8), torch.ones(8, dtype=torch.bool), {})
    return Rollout([Prompt("p", {})], tree, actions, {}, {}, {}, [""] * 4)


def credit_of(rollout):
    n = len(rollout.tree)
    return StepAdvantage(torch.ones(n), torch.ones(n), torch.ones(n, dtype=torch.bool), torch.ones(n))


def test_cut_completions_have_no_weight_and_leave_the_denominator():
    rollout = small_rollout([False, True, False, True])
    assert has_uncut_leaf(rollout.tree).tolist() == [True, False, True, False]
    every = torch.ones(4, dtype=torch.bool)
    batch = build_batch(rollout, credit_of(rollout), every, LossConfig(mask_truncated=True), None)
    assert batch.weight.tolist() == [1, 1, 0, 0, 1, 1, 0, 0] and batch.denominator == 4
    assert build_batch(rollout, credit_of(rollout), every, LossConfig(), None).denominator == 8
    both = small_rollout([False, True, True, False])
    assert has_uncut_leaf(both.tree).tolist() == [False, False, False, True]


class Uncertain:
    """A policy that tells a given entropy, a step a call."""

    def __init__(self, entropy):
        self.entropy = entropy

    def micro_batches(self, rollout, steps, *, whole_prompts=False):
        return list(steps.split(1))

    def log_probs(self, rollout, steps, *, reference=False):
        owner = rollout.tree.step_of_action(rollout.actions.logp.numel())
        index = torch.isin(owner, steps).nonzero().flatten()
        entropy = None if self.entropy is None else self.entropy[index]
        return ActionLogProbs(index, torch.zeros(len(index)), entropy=entropy)


def test_the_most_uncertain_actions_of_all_ranks_keep_their_weight():
    rollout = small_rollout([False] * 4)
    batch = build_batch(rollout, credit_of(rollout), torch.ones(4, dtype=torch.bool), LossConfig(), None)
    entropy = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])
    kept = most_uncertain(Uncertain(entropy), batch, 0.5, int, list)
    assert kept.weight.tolist() == [0, 1, 0, 1, 0, 1, 0, 1] and kept.denominator == batch.denominator
    # another rank whose actions are all more uncertain takes the places
    assert most_uncertain(Uncertain(entropy), batch, 0.5, int, lambda x: [*x, *[2.0] * 8]).weight.sum() == 0
    with pytest.raises(ValueError, match="loss.top_entropy: this policy tells no entropy"):
        most_uncertain(Uncertain(None), batch, 0.5, int, list)


def test_overlong_answers_cost_linearly_in_the_buffer():
    tree = small_rollout([False] * 4).tree  # leaves of 4, 4 and 2 actions
    cost = apply_transform(tree, {"name": "overlong", "limit": 5, "buffer": 2, "weight": 0.5}).outcome
    assert cost[1:].tolist() == [0.75, -0.25, 0.5]
    assert apply_transform(tree, {"name": "overlong", "limit": 4, "buffer": 1}).outcome[1:].tolist() == [0, -1, 0.5]
    with pytest.raises(ValueError, match="buffer=3 must lie in"):
        apply_transform(tree, {"name": "overlong", "limit": 2, "buffer": 3})


def test_minibatches_are_updates_of_their_own_on_the_ratios_of_the_rollout(tiny_model, tmp_path):
    trainer = trainer_of(
        parse_config(
            recipe(tiny_model, tmp_path / "r", optim={"minibatches": 2}, loss={"kl": 0.0}, credit={"clip": None})
        )
    )
    rollout = trainer.sample(0)
    credit = trainer.credit(rollout)
    parts = trainer.select(rollout, credit, 0)
    groups = [set(rollout.tree.group[b.steps].tolist()) for b in parts]
    assert groups == [{0, 2}, {1, 3}]
    trainer.config.optim.minibatches = 1
    (all_of_it,) = trainer.select(rollout, credit, 0)
    assert torch.equal(sum(b.weight for b in parts), all_of_it.weight)
    assert sum(b.denominator for b in parts) == pytest.approx(all_of_it.denominator)
    trainer.config.optim.minibatches = 2
    before = [p.detach().clone() for p in trainer.loop.parameters]
    first = trainer.update(parts[0], first=True)
    assert first["policy/ratio_dev_max"] < 1e-6
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.loop.parameters, strict=True))
    second = trainer.update(parts[1], first=True)
    assert second["policy/ratio_dev_max"] > 1e-6  # the first update has moved the policy
    metrics = trainer.iterate(1)
    assert metrics["policy/grad_norm"] > 0


@pytest.mark.parametrize(
    "sections, error, message",
    [
        ({"optim": {"minibatches": 5}}, ConfigError, "optim.minibatches=5: an update needs a prompt"),
        ({"loss": {"mask_truncated": True}}, (ComponentError, ValueError), "tags.truncated"),
    ],
)
def test_options_that_do_not_fit_are_told_before_the_task_is_made(tiny_model, tmp_path, sections, error, message):
    tree = recipe(tiny_model, tmp_path / "r", **sections) | {"task": "test_optimizers:Never"}
    with pytest.raises(error, match=message):
        trainer_of(parse_config(tree))


def test_a_reference_follows_the_policy_and_survives_a_resume(tiny_model, tmp_path):
    loss = {"kl": 1.0, "reference_every": 2}
    extra = {"loss": loss, "run": {"iterations": 4, "checkpoint_every": 1, "eval_every": 9}}
    straight = trainer_of(parse_config(recipe(tiny_model, tmp_path / "a", **extra)))
    straight.train()
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    kl = [row["policy/kl"] for row in rows if "policy/kl" in row]
    assert kl[0] == kl[2] == 0 < kl[1] and kl[3] > 0  # the reference is the policy again after the second iteration
    short = trainer_of(
        parse_config(recipe(tiny_model, tmp_path / "b", **extra | {"run": {**extra["run"], "iterations": 3}}))
    )
    short.train()
    again = trainer_of(
        parse_config(recipe(tiny_model, tmp_path / "b", **extra | {"run": {**extra["run"], "resume": True}}))
    )
    again.train()
    for a, b in zip(straight.loop.parameters, again.loop.parameters, strict=True):
        assert torch.equal(a, b)
    # a soft update goes a part of the way
    policy = straight.policy
    kept = {name: x.clone() for name, x in policy.reference_tensors().items()}
    with torch.no_grad():
        for p in straight.loop.parameters:
            p.add_(1.0)
    policy.move_reference(0.25)
    for name, p in straight.loop.model.named_parameters():
        torch.testing.assert_close(policy.reference_tensors()[name], 0.75 * kept[name] + 0.25 * p.detach())


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": {"kl": 0.0, "reference_every": 2}}, "which is off; set loss.kl"),
        (
            {"loss": {"kl": 0.1, "reference_every": 2}, "policy": {"lora_rank": 2}},
            "with LoRA the reference is the base",
        ),
    ],
)
def test_references_that_cannot_move(tiny_model, tmp_path, sections, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(parse_config(recipe(tiny_model, tmp_path / "r", **sections)))
