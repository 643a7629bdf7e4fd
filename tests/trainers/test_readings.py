"""Readings in a run: what they fill reaches the estimators, what they break stays their own."""

import pytest
import torch
from tiny import recipe

from mmrl.config import parse_config
from mmrl.readings import ReadingContext, fill
from mmrl.registry import ComponentError, declares
from mmrl.rewards.scoring import RewardError
from mmrl.trainers.branch_grpo import BranchGrpo

GAE = {"estimators": [{"name": "gae", "lam": 0.9}]}


@declares(reads=("outcome",), writes=("value", "root_value"))
def half(rollout, context, *, level: float = 0.5):
    return {"value": torch.full((len(rollout.tree),), level), "root_value": torch.full((len(rollout.prompts),), level)}


@declares(writes=("tags.wrong",))
def raises_for_two(rollout, context):
    if any(p.inputs["label"] < 2 for p in rollout.prompts):
        raise KeyError("no verdict")
    return {"tags.wrong": torch.arange(len(rollout.tree)) % 2 == 0}


@declares(writes=("value",))
def wrong_shape(rollout, context):
    return {"value": torch.zeros(3)}


@declares(writes=("value",))
def undeclared(rollout, context):
    return {"root_value": torch.zeros(len(rollout.prompts))}


def trained(model, folder, **sections):
    return BranchGrpo(parse_config(recipe(model, folder, **sections))).train()


def test_values_of_the_tree_train_a_critic_estimator(tiny_model, tmp_path):
    metrics = trained(tiny_model, tmp_path, credit=GAE, readings=[{"name": "tree_value"}])
    assert metrics["policy/grad_norm"] > 0 and metrics["reading/tree_value/failed_prompts"] == 0
    # values lie between the outcomes, so their mean over prompts is the mean outcome of the iteration
    assert metrics["reading/tree_value/root_value"] == pytest.approx(metrics["reward/mean"])
    assert metrics["time/readings_s"] > 0


def test_an_estimator_without_its_reading_is_refused_before_a_model_is_loaded(tiny_model, tmp_path):
    config = parse_config(recipe(tmp_path / "no model there", tmp_path, credit=GAE))
    with pytest.raises(
        ComponentError, match=r"credit.estimators.0: estimator 'gae' reads value, root_value.*tree_value"
    ):
        BranchGrpo(config)


def test_a_reading_of_ones_own_by_dotted_path(tiny_model, tmp_path):
    own = {"name": "trainers.test_readings:half", "level": 0.25}
    metrics = trained(tiny_model, tmp_path, credit=GAE, readings=[own])
    assert metrics["reading/trainers.test_readings:half/value"] == pytest.approx(0.25)
    wrong = recipe(tiny_model, tmp_path / "b", credit=GAE, readings=[own | {"level": "high"}])
    with pytest.raises(ComponentError, match=r"readings.0.level='high'"):
        BranchGrpo(parse_config(wrong))


def test_a_prompt_that_breaks_a_reading_is_set_aside_and_its_neighbours_stay(tiny_model, tmp_path):
    run = {"prompts_per_iteration": 10}
    trainer = BranchGrpo(parse_config(recipe(tiny_model, tmp_path, run=run)))
    rollout = trainer.sample(0)
    context = ReadingContext(trainer.policy, trainer.run.rewarder.outcome)
    known = [p.inputs["label"] for p in rollout.prompts]
    bad = sum(label < 2 for label in known)
    assert 0 < bad < len(known)
    filled, records = fill(rollout, {"own": (raises_for_two, ("tags.wrong",))}, context, limit=1.0)
    assert records["own"].failed_prompts == bad
    lost = torch.tensor(known)[rollout.tree.group] < 2
    assert not bool(filled.tree.valid[lost].any()) and torch.equal(filled.tree.valid[~lost], rollout.tree.valid[~lost])
    place = torch.zeros(len(rollout.tree), dtype=torch.long)  # of each step among those of its prompt
    for g in range(len(known)):
        own = rollout.tree.group == g
        place[own] = torch.arange(int(own.sum()))
    assert torch.equal(filled.tree.tags["wrong"][~lost], (place % 2 == 0)[~lost])
    with pytest.raises(RewardError, match=f"'own' raised on {bad} of {len(known)} prompts.*no verdict"):
        fill(rollout, {"own": (raises_for_two, ("tags.wrong",))}, context, limit=0.0)


@pytest.mark.parametrize(
    "reading, message",
    [(wrong_shape, r"value has shape \(3,\) for \d+ steps"), (undeclared, "'root_value', which it does not declare")],
)
def test_a_reading_that_breaks_its_contract_stops_the_run(tiny_model, tmp_path, reading, message):
    trainer = BranchGrpo(parse_config(recipe(tiny_model, tmp_path)))
    context = ReadingContext(trainer.policy, trainer.run.rewarder.outcome)
    with pytest.raises(RewardError, match=message):
        fill(trainer.sample(0), {"own": (reading, ("value",))}, context)


@pytest.mark.parametrize(
    "sections, message",
    [
        (
            {"step_rewards": [{"name": "vision_prm"}]},
            "step_rewards.0: step reward 'vision_prm' reads texts, which noth",
        ),
        ({"step_rewards": [{"name": "virl_step"}]}, "reads texts, which nothing .* texts: take a policy that writes"),
        ({"rewards": [{"name": "math_answer"}]}, "rewards.0: reward 'math_answer' reads texts, which nothing"),
        (
            {"policy": {"name": "vision"}, "step_rewards": [{"name": "latent_reward"}]},
            r"'latent_reward' reads actions.latent, which nothing .* the policies diffusion",
        ),
    ],
)
def test_rewards_of_another_modality_are_refused_before_a_model_is_loaded(tmp_path, sections, message):
    tree = recipe(tmp_path / "no model there", tmp_path, **sections)
    tree["policy"] = sections.get("policy", tree["policy"])
    with pytest.raises(ComponentError, match=message):
        BranchGrpo(parse_config(tree))
