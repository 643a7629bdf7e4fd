"""Readings that run a scorer: its numbers by a slow second way, and the recipes whose estimators need them."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import recipe
from vision_tiny import vision_recipe

from mmrl.config import ConfigError, parse_config
from mmrl.credit.estimate import apply_transform
from mmrl.readings import ReadingContext, write
from mmrl.readings.scorers import AttributionReading, ImplicitReading, ScoreReading
from mmrl.registry import ComponentError
from mmrl.rollout import Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import load_scorer, score_solutions
from mmrl.trainers.branch_grpo import BranchGrpo
from mmrl.tree_ops import path_sum

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder, picture, saved_prm

PRM = {"name": "vision_prm", "model": str(saved_prm("text"))}
ACTOR = {"name": "vision", "model": str(family_folder("text")), "temperature": 0.7}


def trainer_of(tmp_path, **sections):
    (tmp_path / "data").mkdir(parents=True, exist_ok=True)
    tree = vision_recipe(family_folder("text"), tmp_path / "data", tmp_path / "run", **sections)
    tree["task"]["pictures"] = 0
    tree["policy"]["max_new_tokens"] = 80  # a random model seldom writes a line break
    return BranchGrpo(parse_config(tree))


def metrics_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def context_of(trainer):
    return ReadingContext(trainer.policy, trainer.run.rewarder.outcome)


# ---- score -----------------------------------------------------------------------------------------------------------


def test_values_are_the_scores_of_each_path_and_the_root_that_of_an_empty_step(tmp_path):
    trainer = trainer_of(tmp_path)
    rollout = trainer.sample(0)
    first, later = 0, int((rollout.tree.depth == 1).nonzero()[0])
    said = [" \n" if v in (first, later) else t for v, t in enumerate(rollout.texts)]
    rollout = replace(rollout, texts=said)  # a step that says nothing leaves its state as it is
    reading = ScoreReading(PRM, root=True)
    got = reading(rollout, context_of(trainer))
    scorer, tree = reading.scorer, rollout.tree
    for v in range(len(tree)):
        path, at = [], v
        while at >= 0:
            path.append(rollout.texts[at])
            at = int(tree.parent[at])
        written = [t for t in reversed(path) if t.strip()]
        prompt = rollout.prompts[int(tree.group[v])]
        want = (
            score_solutions(scorer, [prompt], [[written]])[0][0][-1] if written else got["root_value"][tree.group[v]]
        )
        assert got["value"][v] == pytest.approx(float(want), abs=1e-5)
    network = scorer._network
    for g, prompt in enumerate(rollout.prompts):
        ids = [*scorer._body.encode(prompt).ids.tolist(), *scorer._encode_text("\n")]
        with torch.no_grad():
            hidden = network.hf.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1:]
            want = torch.sigmoid(network.head(hidden))
        assert float(got["root_value"][g]) == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize("head", ["linear", "likelihood", "tokens"])
@pytest.mark.parametrize("mode", ["rows", "packed", "prefix_packed"])
def test_root_scores_of_every_head_and_layout_agree(tmp_path, head, mode):
    files = []
    for i in range(2):
        files.append(tmp_path / f"{i}.png")
        picture(i).save(files[-1])
    options = {"model": str(saved_prm("qwen2_5_vl", head))}
    prompts = [Prompt(f"p{i}", {"question": "how?" * (i + 1), "images": [str(f)]}) for i, f in enumerate(files)]
    rollout, _ = solution_forest(prompts, [[["a"]], [["b"]]])
    whole = load_scorer("vision_prm", options | {"mode": "auto"}).root_scores(rollout)
    cut = load_scorer("vision_prm", options | {"mode": mode, "max_tokens": 20}).root_scores(rollout)
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=0)
    assert whole[0] != whole[1]


def third_digits(rollout):
    """0, a third, two thirds and no number in turn."""
    return torch.tensor([math.nan if i % 4 == 3 else (i % 4) / 3 for i in range(len(rollout.tree))])


def test_right_steps_are_those_whose_score_reaches_a_bound():
    prompts = [Prompt("p", {"question": "?"})]
    rollout, _ = solution_forest(prompts, [[["a", "b", "c", "d"]]])
    scorer = "trainers.test_scorer_readings:third_digits"
    context = ReadingContext(policy=None, outcome=lambda samples: torch.zeros(len(samples)))
    right = ScoreReading(scorer, into="ok", at_least=1 / 3)(rollout, context)["ok"]
    assert right.dtype == torch.bool and right.tolist() == [False, True, True, False]
    tag = ScoreReading(scorer, into="tags.right", at_least=0.5)(rollout, context)["tags.right"]
    torch.testing.assert_close(tag, torch.tensor([0.0, 0.0, 1.0, math.nan], dtype=torch.float64), equal_nan=True)


def test_what_is_asked_of_the_wrong_scorer_is_refused(tmp_path):
    with pytest.raises(ComponentError, match=r"readings.0.scorer=.*vision_prn.*did you mean vision_prm"):
        trainer_of(tmp_path, readings=[{"name": "score", "scorer": {"name": "vision_prn"}}])
    with pytest.raises(ComponentError, match=r"readings.0.scorer=.*did you mean head"):
        trainer_of(tmp_path, readings=[{"name": "score", "scorer": PRM | {"haed": "linear"}}])
    with pytest.raises(
        ValueError,
        match="root: true needs the protocol RootScorer .*'vision_tiny:step_digits' does not have it; .*vision_prm",
    ):
        ScoreReading("vision_tiny:step_digits", root=True)
    with pytest.raises(ValueError, match="is no field of a step"):
        ScoreReading("vision_tiny:step_digits", into="outcome")
    with pytest.raises(ValueError, match="name ok or a tag"):
        ScoreReading("vision_tiny:step_digits", below=0.5)
    with pytest.raises(ValueError, match="give one of them"):
        ScoreReading("vision_tiny:step_digits", into="ok", below=0.5, at_least=0.5)
    with pytest.raises(ValueError, match="ok is a verdict"):
        ScoreReading("vision_tiny:step_digits", into="ok")
    with pytest.raises(ValueError, match="no log-ratios"):
        ImplicitReading("vision_tiny:step_digits")
    with pytest.raises(ConfigError, match="trainable here: score"):
        readings = [{"name": "score", "scorer": PRM}]
        trainer_of(tmp_path, readings=readings, online={"scorer": "vision_prm"})


def test_a_critic_learns_along_with_the_policy(tmp_path):
    critic = {"name": "score", "scorer": PRM, "root": True}
    trainer = trainer_of(
        tmp_path,
        readings=[critic],
        online={"scorer": "score", "lr": 1e-2, "spread": True},
        credit={"estimators": [{"name": "gae", "lam": 0.9}]},
        run={"iterations": 6},
    )
    prm = trainer.run.rewarder.online.scorer
    start = [p.detach().clone() for p in prm.model.parameters()]
    trainer.train()
    rows = [r for r in metrics_of(tmp_path) if "online/loss" in r]
    assert all(r["policy/grad_norm"] > 0 for r in rows)
    values = [r["reading/score/value"] for r in rows]
    reward = sum(r["reward/mean"] for r in rows) / len(rows)
    assert abs(values[-1] - reward) < abs(values[0] - reward)  # it tells what is to come better than at the start
    assert any(not torch.equal(a, b) for a, b in zip(start, prm.model.parameters(), strict=True))


DIGITS = "vision_tiny:step_digits"
RECIPES = {
    "red": (
        [{"name": "score", "scorer": PRM, "into": "step_reward", "root": True}],
        {"transforms": ["red"], "estimators": [{"name": "process_grpo"}]},
    ),
    "potential": (
        [{"name": "score", "scorer": PRM, "root": True}, {"name": "score", "scorer": DIGITS, "into": "step_reward"}],
        {"transforms": ["potential"], "estimators": [{"name": "process_grpo"}]},
    ),
    "barfi": (
        [{"name": "score", "scorer": PRM, "into": "tags.auxiliary"},
         {"name": "score", "scorer": DIGITS, "into": "step_reward"}],
        {"transforms": [{"name": "blend", "phi": [0.0, 1.0, 0.5]}], "estimators": [{"name": "process_grpo"}]},
    ),
    "spa": (
        [{"name": "score", "scorer": PRM, "into": "tags.contribution", "form": "logit"}],
        {"transforms": ["spa"], "estimators": [{"name": "process_grpo"}]},
    ),
    "alarm": (
        [{"name": "score", "scorer": DIGITS, "into": "tags.aspect"}],
        {"transforms": [{"name": "alarm", "threshold": 0.0}], "estimators": [{"name": "grpo"}]},
    ),
    "capo": (
        [{"name": "score", "scorer": DIGITS, "into": "tags.wrong", "below": 0.1}],
        {"estimators": [{"name": "capo"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", RECIPES)
def test_methods_that_read_what_a_scorer_says(tmp_path, method):
    readings, credit = RECIPES[method]
    trainer = trainer_of(tmp_path, readings=readings, credit=credit, run={"iterations": 1})
    assert trainer.train()["policy/grad_norm"] > 0
    rollout = trainer.sample(0)
    field = readings[0].get("into", "value")
    odd = torch.arange(len(rollout.tree)) % 2 == 1
    if field.startswith("tags."):
        x = rollout.tree.tags[field.removeprefix("tags.")]
    else:
        x = getattr(rollout.tree, field)
    other = write(rollout, {field: torch.where(odd, 1 - x if field == "tags.wrong" else x - 1, x)})
    assert not torch.allclose(trainer.credit(other).adv, trainer.credit(rollout).adv)  # it decides advantages


def test_red_telescopes_to_the_last_score_less_that_of_the_prompt(tmp_path):
    readings, _ = RECIPES["red"]
    trainer = trainer_of(tmp_path, readings=readings, credit=RECIPES["red"][1])
    tree = trainer.sample(0).tree
    scored = tree.replace(step_reward=torch.where(tree.step_reward.isnan(), 0.25, tree.step_reward))  # blank steps
    r = apply_transform(scored, {"name": "red"}).step_reward
    want = scored.step_reward - scored.root_value[tree.group]
    leaves = tree.is_finished
    torch.testing.assert_close(path_sum(tree, r)[leaves], want[leaves])


def test_a_latent_reward_is_a_critic_of_denoising(tiny_model, tmp_path):
    from diffusion.schedule import NoiseSchedule

    critic = {"name": "score", "scorer": {"name": "latent_reward", "model": str(tiny_model)}, "root": True}
    tree = recipe(
        tiny_model,
        tmp_path,
        readings=[critic],
        online={"scorer": "score", "lr": 1e-3, "spread": True},
        credit={"estimators": [{"name": "gae"}]},
        run={"iterations": 2},
    )
    trainer = BranchGrpo(parse_config(tree))
    rollout = trainer.sample(0)
    prm, first = trainer.run.rewarder.online.scorer, NoiseSchedule.from_record(rollout.about["course"]).levels[0]
    label = torch.tensor([p.inputs["label"] for p in rollout.prompts])
    with torch.no_grad():
        t = torch.full((len(label),), float(first[2]))
        cond = {k.removeprefix("cond_"): v for k, v in rollout.prompt_payload.items() if k.startswith("cond_")}
        want = prm.model(rollout.prompt_payload["init"], t, cond).sigmoid().double()
    torch.testing.assert_close(rollout.tree.root_value, want, atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.tree.value, prm(rollout))
    assert trainer.train()["policy/grad_norm"] > 0


# ---- implicit --------------------------------------------------------------------------------------------------------


def shake(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=g))


@pytest.mark.parametrize("against", ["reference", "behaviour"])
def test_log_ratios_of_a_scorer_step_by_step(tmp_path, against):
    trainer = trainer_of(tmp_path)
    rollout = trainer.sample(0)
    reading = ImplicitReading({"name": "implicit_prm", "policy": ACTOR, "beta": 0.2}, against=against)
    prm = reading.scorer
    shake(prm.model)
    got = reading(rollout, context_of(trainer))["tags.implicit"]
    tree = rollout.tree
    with torch.no_grad():
        lp = prm.policy.log_probs(rollout, torch.arange(len(tree)), reference=True)
    old = lp.ref_logp if against == "reference" else rollout.actions.logp[lp.index]
    want = [0.0] * len(tree)
    for position, new, before in zip(lp.index.tolist(), lp.logp.tolist(), old.tolist(), strict=True):
        owner = next(v for v in range(len(tree)) if tree.tok_start[v] <= position < tree.tok_end[v])
        want[owner] += 0.2 * (new - before)
    torch.testing.assert_close(got, torch.tensor(want).double(), atol=1e-5, rtol=1e-4)
    assert bool((got != 0).all())


def test_the_policy_against_its_start(tmp_path):
    trainer = trainer_of(
        tmp_path, readings=[{"name": "implicit", "beta": 0.3}], credit={"estimators": [{"name": "oprl"}]}
    )
    rollout = trainer.sample(0)
    assert bool((rollout.tree.tags["implicit"].abs() < 1e-6).all())  # it has not moved yet
    before = [p.detach().clone() for p in trainer.policy.model.parameters()]
    shake(trainer.policy.model)
    got = trainer.run.rewarder.run_readings(rollout, seed=0, iteration=0).tree.tags["implicit"]
    moved = [p.detach().clone() for p in trainer.policy.model.parameters()]
    logp = []
    for weights in (moved, before):
        with torch.no_grad():
            for p, w in zip(trainer.policy.model.parameters(), weights, strict=True):
                p.copy_(w)
            logp.append(trainer.policy.log_probs(rollout, torch.arange(len(got))))
    ratio = torch.zeros(rollout.actions.logp.numel()).index_add(0, logp[0].index, logp[0].logp - logp[1].logp)
    want = torch.stack(
        [0.3 * ratio[a:b].sum() for a, b in zip(rollout.tree.tok_start, rollout.tree.tok_end, strict=True)]
    )
    torch.testing.assert_close(got, want.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "estimator, plan, reading, loss",
    [("prime", {0: 4}, {}, "bce"), ("oprl", {0: 2, 1: 2}, {"against": "behaviour"}, "bradley_terry")],
)
def test_an_implicit_reward_model_learns_along(tmp_path, estimator, plan, reading, loss):
    """PRIME and OPRL: the estimator reads log-ratios of a model that learns from the outcomes of every rollout."""
    scorer = {"name": "implicit_prm", "policy": ACTOR}
    trainer = trainer_of(
        tmp_path,
        plan=plan,
        readings=[{"name": "implicit", "scorer": scorer} | reading],
        online={"scorer": "implicit", "lr": 1e-2, "loss": loss},
        credit={"estimators": [{"name": estimator}], "clip": None},
        run={"iterations": 3},
    )
    trainer.train()
    rows = [r for r in metrics_of(tmp_path) if "online/loss" in r]
    told = [r["reading/implicit/tags.implicit"] for r in rows]
    assert told[0] == pytest.approx(0, abs=1e-6) and abs(told[2]) > 1e-5
    assert all(r["policy/grad_norm"] > 0 and r["online/loss"] > 0 for r in rows)


def test_log_ratios_of_denoising_steps(tiny_model, tmp_path):
    scorer = {"name": "implicit_prm", "policy": {"name": "diffusion", "model": str(tiny_model)}, "beta": 0.5}
    tree = recipe(
        tiny_model,
        tmp_path,
        readings=[{"name": "implicit", "scorer": scorer}],
        credit={"estimators": [{"name": "oprl"}]},
        online={"scorer": "implicit", "lr": 1e-2},
        run={"iterations": 2},
    )
    trainer = BranchGrpo(parse_config(tree))
    shake(trainer.run.rewarder.online.scorer.model)
    rollout = trainer.sample(0)
    got, dense = rollout.tree.tags["implicit"], rollout.actions.trainable
    assert bool((got[~dense] == 0).all()) and bool((got[dense] != 0).all())  # an ODE step decides nothing
    torch.testing.assert_close(got, trainer.run.rewarder.online.scorer(rollout).nan_to_num())
    assert trainer.train()["policy/grad_norm"] > 0


# ---- attribution -----------------------------------------------------------------------------------------------------


def chains_of(solutions, prompts=1):
    asked = [Prompt(f"p{g}", {"question": "how many?"}) for g in range(prompts)]
    return solution_forest(asked, [solutions] * prompts)[0]


@pytest.mark.parametrize("head", ["linear", "likelihood"])
def test_gradient_times_input_is_the_change_by_scaling_a_steps_embeddings(tmp_path, head):
    """The second way: every embedding of one step's tokens a little longer, and the logit anew."""
    reading = AttributionReading(PRM | {"model": str(saved_prm("text", head)), "mode": "rows"})
    prm, rollout = reading.scorer, chains_of([["one 1", "+ 2", "so 3"], ["just 3"]])
    got, slots = prm.attributions(rollout), prm._slots
    embedding, eps = prm._network.hf.get_input_embeddings(), 1e-2
    prompt = len(prm._body.encode(rollout.prompts[0]).ids)
    for path in ([0, 1, 2], [3]):
        start = prompt
        for t, step in enumerate(path):
            end = start + len(slots.run(prm._encode_text(rollout.texts[step]), first=t == 0))
            change = []
            for sign in (1, -1):

                def longer(module, inputs, out, a=start, b=end, sign=sign):
                    out = out.clone()
                    out[:, a:b] *= 1 + sign * eps
                    return out

                hook = embedding.register_forward_hook(longer)
                with torch.no_grad():
                    change.append(float(logit_of(prm, rollout, path)))
                hook.remove()
            assert float(got[step]) == pytest.approx((change[0] - change[1]) / (2 * eps), rel=2e-2, abs=1e-4)
            start = end
    share = reading(rollout, None)["tags.attribution"][:, 0]
    torch.testing.assert_close(share[:3], got[:3].abs() / got[:3].abs().sum())
    assert share[3] == 1


def logit_of(prm, rollout, path):
    """Of the last step of a path, alone in its row."""
    own = solution_forest(rollout.prompts, [[[rollout.texts[v] for v in path]]])[0]
    return prm.logits(own, torch.tensor([len(path) - 1]))[0, 0]


class Additive:
    """A score that is a sum of what steps are worth, and 2 for the prompt."""

    def __call__(self, rollout):
        worth = torch.tensor([float(t) for t in rollout.texts], dtype=torch.float64)
        return 2 + path_sum(rollout.tree, worth)

    def root_scores(self, rollout):
        return torch.full((len(rollout.prompts),), 2.0)


def test_differences_of_an_additive_scorer_are_its_terms():
    rollout = chains_of([["1", "-2", "5"], ["0", "0.0"], ["4"]], prompts=2)
    reading = AttributionReading("test_scorer_readings:Additive", by=("difference",))
    got = reading(rollout, None)["tags.attribution"]
    want = [1 / 8, 2 / 8, 5 / 8, 1 / 2, 1 / 2, 1.0]  # nothing moves the second one: equal shares
    torch.testing.assert_close(got[:, 0], torch.tensor(want * 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="by: gradient needs the protocol Attributor .*those that do: .*vision_prm"):
        AttributionReading("test_scorer_readings:Additive")
    with pytest.raises(ValueError, match="needs chains, but step 0 branches"):
        reading(chains_of([["1", "2"], ["1", "3"]]), None)


def test_explained_rewards_add_up_to_the_outcome(tmp_path):
    trainer = trainer_of(
        tmp_path,
        plan={0: 4},
        readings=[{"name": "attribution", "scorer": PRM, "by": ["gradient", "difference"]}],
        credit={
            "transforms": [{"name": "attribution", "weights": [0.25, 0.75]}],
            "estimators": [{"name": "process_grpo"}],
        },
        run={"iterations": 1},
    )
    tree = trainer.sample(0).tree
    explained = apply_transform(tree, {"name": "attribution", "weights": [0.25, 0.75]})
    total = path_sum(tree, explained.step_reward)[tree.is_finished]
    torch.testing.assert_close(total, tree.outcome[tree.is_finished])
    assert trainer.train()["policy/grad_norm"] > 0
