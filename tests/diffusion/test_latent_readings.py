"""Readings that run a diffusion policy: values by completed courses, what a step owes to its prompt, baselines."""

import json
from dataclasses import replace

import pytest
import torch
from processes import run_ranks
from tiny import recipe, write_recipe

from diffusion.policy import DiffusionPolicy
from diffusion.sampler import transition
from diffusion.schedule import NoiseSchedule, SamplingConfig
from mmrl.config import parse_config
from mmrl.readings import ReadingContext, fill
from mmrl.readings.baseline import Baseline
from mmrl.readings.contrast import divergence
from mmrl.readings.monte_carlo import MonteCarlo
from mmrl.registry import ComponentError, declares
from mmrl.rewards import score
from mmrl.rollout import BranchPlan, Place, Prompt
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer
from mmrl.tree import UNFINISHED

PLAN = BranchPlan({0: 2, 2: 2})
WRITES = ("value", "root_value", "tags.visits", "tags.q_sum")


def brightness(samples):
    return [float(s.output.mean()) for s in samples]


def outcome(samples):
    return score(samples, {"brightness": (brightness, 1.0)}).total


def policy_of(model, **sampling):
    return DiffusionPolicy.build(model=str(model), **({"steps": 5} | sampling))


def rewarded(policy, n=3, plan=PLAN, seed=0):
    rollout = policy.rollout([Prompt(f"class-{i}", {"label": i}) for i in range(n)], plan, seed=seed)
    samples = policy.samples(rollout)
    leaves = torch.tensor([s.step for s in samples])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, outcome(samples)))


def filled(rollout, policy, reading, writes=WRITES, **context):
    return fill(rollout, {"it": (reading, writes)}, ReadingContext(policy, outcome, **context))[0]


def by_hand(policy, rollout, place):
    """The ODE from one state, alone, step after step."""
    sampling, schedule = (
        SamplingConfig(**rollout.about["sampling"]),
        NoiseSchedule.from_record(rollout.about["course"]),
    )
    quiet = NoiseSchedule(schedule.levels, [False] * len(schedule), schedule.std_scale)
    first = 0 if place.step < 0 else int(rollout.tree.depth[place.step]) + 1
    source = rollout.prompt_payload["init"] if place.step < 0 else rollout.actions.payload["latent"]
    x = source[place.prompt if place.step < 0 else place.step][None]
    cond = policy.adapter.encode([rollout.prompts[place.prompt]])
    with torch.no_grad():
        for i in range(first, len(schedule)):
            x0, eps = policy.adapter.predict(policy.model, x, schedule.levels[i], cond, torch.tensor([0]))
            x = transition(sampling, quiet, i, x, x0, eps).mean
    return float(policy.adapter.decode(x).mean())


@pytest.mark.parametrize("final_step", ["mean", "x0"])
def test_the_value_of_a_latent_is_what_its_ode_reaches(tiny_model, final_step):
    policy = policy_of(tiny_model, final_step=final_step)
    rollout = rewarded(policy)
    tree = filled(rollout, policy, MonteCarlo(n=3, temperature=0.0)).tree
    for v in range(len(tree)):
        want = float(tree.outcome[v])
        if not bool(tree.is_leaf[v]):
            want = by_hand(policy, rollout, Place(int(tree.group[v]), v))
        assert float(tree.value[v]) == pytest.approx(want, abs=1e-5)
    roots = [by_hand(policy, rollout, Place(g)) for g in range(3)]
    torch.testing.assert_close(tree.root_value, torch.tensor(roots, dtype=torch.float64), atol=1e-5, rtol=0)
    assert bool((tree.tags["visits"] == 1).all())  # nothing is drawn, so one completion says it all
    torch.testing.assert_close(tree.tags["q_sum"], tree.value)


def test_completions_draw_where_the_rollout_does_and_a_prompt_is_on_its_own(tiny_model):
    policy = policy_of(tiny_model, noise="all", kernel="flow")
    rollout = rewarded(policy)
    reading = MonteCarlo(n=4)
    whole = filled(rollout, policy, reading, seed=7)
    one = filled(rollout.select([1]), policy, reading, seed=7).tree
    own = whole.tree.group == 1
    torch.testing.assert_close(whole.tree.value[own], one.value, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.tree.root_value[1:2], one.root_value, atol=1e-6, rtol=0)
    assert bool((one.tags["visits"][one.depth <= 2] == 4).all())
    assert bool((one.tags["visits"][one.depth == 3] == 1).all())  # the last transition draws nothing
    other = filled(rollout, policy, reading, seed=8).tree
    assert not torch.allclose(whole.tree.value[~whole.tree.is_leaf], other.value[~whole.tree.is_leaf])
    mean = filled(rollout, policy, MonteCarlo(n=64, temperature=0.0)).tree.root_value
    assert not torch.allclose(mean, whole.tree.root_value, atol=1e-4)


def test_a_forest_costs_one_row_per_state_and_step(tiny_model, monkeypatch):
    policy = policy_of(tiny_model)
    rollout = rewarded(policy)
    calls = []
    predict = policy.adapter.predict
    monkeypatch.setattr(policy.adapter, "predict", lambda m, x, *rest: calls.append(len(x)) or predict(m, x, *rest))
    filled(rollout, policy, MonteCarlo(n=2, temperature=0.0))
    # 3 prompts, widths 1 2 2 4 4 of states before each of the 5 steps, all of them completed side by side
    assert calls == [3, 9, 15, 27, 39]


def test_candidates_that_nothing_follows_get_values_too(tiny_model):
    policy = policy_of(tiny_model, noise="all", candidates=3)
    rollout = rewarded(policy, plan=BranchPlan({0: 2}))
    side = rollout.tree.tags["side"]
    tree = filled(rollout, policy, MonteCarlo(n=2)).tree
    assert bool(side.any()) and bool(tree.value.isfinite().all())
    assert len(tree.value[side].unique()) > 1


def test_a_prover_of_another_kind_is_refused(tiny_model):
    policy = policy_of(tiny_model)
    rollout = rewarded(policy)
    with pytest.raises(ValueError, match=r"temperature=0.5: denoising draws its own noise"):
        policy.complete(rollout, [Place(0)], 1, seeds=[0], temperature=0.5)
    with pytest.raises(ValueError, match="denoises latents of shape"):
        other = replace(rollout, about={**rollout.about, "prediction": "epsilon"})
        policy.complete(other, [Place(0)], 1, seeds=[0], temperature=None)


# ---- what a step owes to its prompt, and the initial model ----------------------------------------------------------


def test_divergence_is_what_the_prompt_changes_in_the_next_latent(tiny_model):
    policy = policy_of(tiny_model)
    rollout = rewarded(policy)
    tree = rollout.tree
    got = filled(rollout, policy, divergence, ("tags.divergence",)).tree.tags["divergence"]
    schedule, null = NoiseSchedule.from_record(rollout.about["course"]), policy.adapter.num_classes
    for v in range(len(tree)):
        label, above = rollout.prompts[int(tree.group[v])].inputs["label"], int(tree.parent[v])
        x = rollout.actions.payload["latent"][above] if above >= 0 else rollout.prompt_payload["init"][tree.group[v]]
        here, there = schedule.levels[int(tree.depth[v])], schedule.levels[int(tree.depth[v]) + 1]
        with torch.no_grad():
            ends = []
            for k in (label, null):
                own = ({"label": torch.tensor([k])}, torch.tensor([0]))
                x0, eps = policy.adapter.predict(policy.model, x[None], here, *own)
                ends.append(there.a * x0 + there.s * eps)
        assert float(got[v]) == pytest.approx(float(((ends[0] - ends[1]) ** 2).mean()), abs=1e-6)
    assert float(got.min()) > 0
    assert float(policy.divergence(rollout, torch.arange(len(tree)), "given").abs().max()) == 0
    with pytest.raises(ValueError, match="sight: shuffled is for clips"):
        policy.divergence(rollout, torch.arange(len(tree)), "shuffled")


def test_baselines_are_pictures_of_the_initial_model(tiny_model):
    policy = policy_of(tiny_model)
    policy.freeze_reference()
    rollout = rewarded(policy)
    first = filled(rollout, policy, Baseline(n=3), ("tags.baseline",)).tree.tags["baseline"]
    direct = [[float(s.output.mean()) for s in own] for own in policy.initial_samples(rollout.prompts, 3, seed=0)]
    torch.testing.assert_close(first, torch.tensor(direct, dtype=torch.float64)[rollout.tree.group])
    assert len(first.unique()) == 9
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.1)
    again = filled(rollout.select([2]), policy, Baseline(n=3), ("tags.baseline",), seed=9).tree.tags["baseline"]
    torch.testing.assert_close(again, first[rollout.tree.group == 2])


def test_rewards_against_the_initial_model_train_on_latents(tiny_model, tmp_path):
    tree = recipe(
        tiny_model, tmp_path, readings=[{"name": "baseline", "n": 2}], loss={"kl": 0.0},
        credit={"estimators": [{"name": "grpo"}], "transforms": ["contrastive"]},
        run={"iterations": 1, "eval_every": 9},
    )  # fmt: skip
    metrics = BranchGrpo(parse_config(tree)).train()
    assert metrics["policy/grad_norm"] > 0 and 0 < metrics["reading/baseline/tags.baseline"] < 1
    assert metrics["rollout/baseline_samples_per_leaf"] == 2 / 4


def test_contrastive_pairs_of_denoising_steps(tiny_model, tmp_path):
    tree = recipe(
        tiny_model, tmp_path, readings=[{"name": "divergence"}], pairs={"name": "contrastive", "k": 6},
        run={"iterations": 1, "eval_every": 9}, trainer="step_preference",
    )  # fmt: skip
    tree["loss"] = {"name": "pdpo"}
    metrics = StepPreferenceTrainer(parse_config(tree, model=StepPreferenceConfig)).train()
    assert metrics["preference/pairs"] > 0 and metrics["policy/grad_norm"] > 0


# ---- in a run -------------------------------------------------------------------------------------------------------

ESTIMATORS = [{"name": "gae"}, {"name": "pav", "alpha": 3.0}, {"name": "vsrm"}]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: e["name"])
def test_estimators_of_values_train_on_latents(tiny_model, tmp_path, estimator):
    prover = {"name": "diffusion", "model": str(tiny_model), "steps": 6}
    reading = {"name": "monte_carlo", "n": 2} | ({"policy": prover} if estimator["name"] == "pav" else {})
    tree = recipe(
        tiny_model, tmp_path, readings=[reading], credit={"estimators": [estimator]},
        run={"iterations": 1, "eval_every": 9}, plan={0: 2} if estimator["name"] == "vsrm" else {0: 2, 2: 2},
    )  # fmt: skip
    metrics = BranchGrpo(parse_config(tree)).train()
    assert metrics["policy/grad_norm"] > 0 and metrics["rollout/completions_per_leaf"] > 0
    assert metrics["reading/monte_carlo/failed_prompts"] == 0
    assert 0 < metrics["reading/monte_carlo/root_value"] < 1


def test_unscored_leaves_go_on_with_the_value_before_them(tiny_model, tmp_path):
    tree = recipe(
        tiny_model, tmp_path, readings=[{"name": "monte_carlo", "n": 2}],
        credit={"estimators": [{"name": "gae"}], "transforms": ["bootstrap"]},
        rewards=[{"name": "tiny:nan_for_first", "timeout_s": 0}],
        run={"iterations": 1, "eval_every": 9, "max_unscored": 0.5},
    )  # fmt: skip
    trainer = BranchGrpo(parse_config(tree))
    sampled = trainer.sample(0).tree
    (cut,) = (sampled.status == UNFINISHED).nonzero().flatten().tolist()
    assert float(sampled.value[cut]) == float(sampled.value[sampled.parent[cut]])
    assert trainer.train()["policy/grad_norm"] > 0


@pytest.mark.multiproc
def test_readings_of_two_ranks_are_those_of_one(tiny_model, tmp_path):
    """Prompts go from rank to rank between iterations, and what one rank knows of them the other does not."""
    sections = {
        "readings": [{"name": "monte_carlo", "n": 2}, {"name": "baseline", "n": 2}],
        "credit": {"estimators": [{"name": "gae"}], "transforms": ["contrastive"]}, "optim": {"lr": 1e-3},
        "policy": {"noise": "all"}, "run": {"prompts_per_iteration": 5, "iterations": 3},
    }  # fmt: skip
    two = recipe(tiny_model, tmp_path / "two", **sections)
    two["run"]["processes"] = 2
    run_ranks(2, "train", write_recipe(tmp_path / "two.yaml", two))
    BranchGrpo(parse_config(recipe(tiny_model, tmp_path / "one", **sections))).train()
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    for one, other in zip(*rows, strict=True):
        for key in one:
            # each rank takes baseline samples of its own
            if key.startswith(("reading/", "rollout/")) and "baseline_samples" not in key:
                assert other[key] == pytest.approx(one[key], abs=1e-3), key
    assert sum("reading/baseline/tags.baseline" in row for row in rows[0]) == 3


class CannotComplete:
    """A policy without the protocol, known by its annotation alone."""

    model = torch.nn.Linear(1, 1)
    forecast = admit = rollout = micro_batches = log_probs = lambda self, *args, **options: None
    samples = generate = describe = freeze_reference = save = forecast


@declares(writes=("logp",))
def cannot_complete(weights: str = "none") -> CannotComplete:
    raise AssertionError("refused before it is made")


def untold():
    return CannotComplete()


def test_a_policy_that_cannot_complete_is_refused_before_it_is_made(tiny_model, tmp_path):
    credit = {"estimators": [{"name": "gae"}]}
    own = recipe(tiny_model, tmp_path, credit=credit, readings=[{"name": "monte_carlo"}])
    own["policy"] = {"name": "test_latent_readings:cannot_complete"}
    with pytest.raises(
        ComponentError,
        match=r"readings.0: reading 'monte_carlo' needs the protocol Completer.*does not have it.*diffusion",
    ):
        BranchGrpo(parse_config(own))
    reading = {"name": "monte_carlo", "policy": {"name": "test_latent_readings:cannot_complete"}}
    own["policy"] = {"name": "test_latent_readings:untold"}
    with pytest.raises(ComponentError, match=r"readings.0: .* needs the protocol Completer.*CannotComplete does not"):
        BranchGrpo(parse_config(own))
    with pytest.raises(ComponentError, match=r"readings.0.policy=.*: the policy here needs the protocol Completer"):
        BranchGrpo(parse_config(recipe(tiny_model, tmp_path, credit=credit, readings=[reading])))
