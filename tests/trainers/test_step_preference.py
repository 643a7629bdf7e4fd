"""The step-preference trainer on tokens and on latents: log 2 at the start, exact batching, learning, stored rollouts."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from processes import run_ranks
from safetensors.torch import load_file
from tiny import recipe, write_recipe
from vision_tiny import vision_recipe

from mmrl.config import load_config, parse_config
from mmrl.losses.preference import Side, preference_loss
from mmrl.preference import step_scores
from mmrl.rollout import Rollout
from mmrl.trainers import trainer_of
from mmrl.trainers.step_preference import StepPreferenceConfig, StepPreferenceTrainer
from mmrl.trainers.stored import StoredRollouts, store_rollouts

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "vision"))
from families import family_folder  # noqa: E402

MODEL = {"latent": "transformer/diffusion_pytorch_model.safetensors", "token": "model.safetensors"}


def latent(model, output, **sections):
    """Forks at steps 0 and 2 of 6; best against worst sibling by the outcomes below."""
    tree = recipe(model, output, **{"pairs": {"name": "extremes"}, "loss": {"name": "lpo", "kl": None}, **sections})
    tree["loss"].pop("kl", None)
    return {**tree, "trainer": "step_preference"}


def token(tmp_path, output, **sections):
    (tmp_path / "pictures").mkdir(exist_ok=True)
    sections = {"pairs": {"name": "extremes"}, **sections}
    tree = vision_recipe(family_folder("text"), tmp_path / "pictures", output, **sections)
    tree["loss"] = sections.get("loss", {"name": "step_dpo"})
    tree["task"]["pictures"] = 0
    del tree["credit"]
    return {**tree, "trainer": "step_preference"}


@pytest.fixture(params=["latent", "token"])
def make(request, tiny_model, tmp_path):
    """Recipe maker of either kind: make(name, **sections), with its weights file as make.weights."""

    def maker(name, **sections):
        if request.param == "latent":
            return latent(tiny_model, tmp_path / name, **sections)
        return token(tmp_path, tmp_path / name, **sections)

    pictures = {"name": "clean_reward", "reward": "tiny:brightness", "model": str(tiny_model)}
    maker.step_reward = {"latent": pictures, "token": {"name": "vision_tiny:step_digits"}}[request.param]
    maker.middle = {"latent": 0.5, "token": 0.05}[request.param]  # of the step rewards of an untrained model
    maker.weights = lambda name: load_file(tmp_path / name / "model" / MODEL[request.param])
    maker.kind = request.param
    return maker


def build(tree):
    return StepPreferenceTrainer(parse_config(tree, model=StepPreferenceConfig))


def run(tree):
    trainer = build(tree)
    trainer.train()
    return trainer


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


def assert_close(a, b, atol):
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=atol, rtol=0)


# --- both kinds --------------------------------------------------------------------------------------------------


def test_policy_is_the_reference_at_the_start(make):
    first = build(make("r")).iterate(0)
    assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["preference/margin"] == 0 and first["preference/accuracy"] == 0
    assert first["preference/pairs"] > 0 and first["policy/grad_norm"] > 0
    assert {"reward/mean", "pairs/forks_per_prompt", "rollout/calls_per_leaf"} <= set(first)


def test_updates_on_one_batch_order_its_pairs(make):
    beta = {"latent": {"name": "lpo", "beta": 500}, "token": {"name": "step_dpo"}}[make.kind]
    trainer = build(make("r", loss=beta, optim={"lr": 1e-3, "updates_per_rollout": 8}))
    told = trainer.iterate(0)
    assert told["preference/loss_last"] < told["preference/loss"] - 0.02
    assert trainer.update(trainer.batch(trainer.run.rollout(0)))["policy/grad_norm"] > 0


def test_micro_batches_change_nothing(make):
    """Neither in value nor in gradient, and no pair is torn."""
    grads, counts = [], []
    for name in ("whole", "parts"):
        trainer = build(make(name))
        batch = trainer.batch(trainer.run.rollout(0))
        policy = trainer.policy
        if name == "parts" and make.kind == "latent":
            policy.max_batch = 1
        elif name == "parts":
            policy.options = replace(policy.options, max_tokens=1)
        parts = batch.parts(policy)
        counts.append(len(parts))
        assert sum(len(batch.pairs_in(p)) for p in parts) == len(batch.pairs)
        for part in parts:
            trainer.loss(batch, part, {}).backward()
        grads.append(torch.cat([p.grad.flatten() for p in trainer.loop.parameters if p.grad is not None]))
    assert counts[1] > counts[0]
    torch.testing.assert_close(grads[0], grads[1], atol=1e-4 * float(grads[0].abs().max()), rtol=0)


def test_whole_responses_are_dpo(make):
    """Against the plain formula on the log-probs of both whole paths, common steps included."""
    noise = {"noise": "all"} if make.kind == "latent" else {}
    trainer = build(make("r", loss={"name": "dpo"}, pairs={"name": "leaves"}, policy=noise))
    batch = trainer.batch(trainer.run.rollout(0))
    with torch.no_grad():
        for p in trainer.loop.parameters:
            p.add_(1e-3)  # away from the reference
    each, rows = trainer.pair_losses(batch, batch.parts(trainer.policy)[0])
    tree, own = batch.rollout.tree, int(rows[0])
    totals = []
    for end in (batch.pairs.chosen_end[own], batch.pairs.rejected_end[own]):
        path = [int(end)]
        while int(tree.parent[path[-1]]) >= 0:
            path.append(int(tree.parent[path[-1]]))
        new = trainer.policy.log_probs(batch.rollout, torch.tensor(sorted(path)), reference=True)
        totals.append(float((new.logp - new.ref_logp).sum().detach()))
    want = -torch.nn.functional.logsigmoid(torch.tensor(0.1 * (totals[0] - totals[1])))
    assert float(each.loss[0].detach()) == pytest.approx(float(want), abs=1e-5)
    assert float(each.margin[0]) == pytest.approx(0.1 * (totals[0] - totals[1]), abs=1e-5)


def test_steps_outside_the_pairs_do_not_matter(make):
    """The loss of a part reads its segments alone: it is that of the flat function on their actions."""
    trainer = build(make("r", loss={"name": "dpo", "reference_free": True}))
    batch = trainer.batch(trainer.run.rollout(0))
    part = batch.parts(trainer.policy)[0]
    each, rows = trainer.pair_losses(batch, part)
    new, tree = trainer.policy.log_probs(batch.rollout, part), batch.rollout.tree
    owner = tree.step_of_action(batch.rollout.actions.logp.numel())[new.index]
    sides = []
    for steps in (batch.pairs.chosen[rows], batch.pairs.rejected[rows]):
        at = torch.cat([(owner == s).nonzero().flatten() for s in steps])
        pair = torch.cat([torch.full((int((owner == s).sum()),), i) for i, s in enumerate(steps)])
        sides.append(Side(new.logp[at], None, pair))
    want = preference_loss(*sides, len(rows), trainer.settings)
    torch.testing.assert_close(each.loss, want.loss)


# What fills the fields that a loss and its pairs read, and the field that says which of two steps is the better one.
NEEDS = {
    "dpo": ({}, "outcome"),
    "step_dpo": ({"pairs": {"name": "first_wrong", "by": "step_reward"}, "step_rewards": True}, "step_reward"),
    "full_step_dpo": ({"step_rewards": True}, "outcome"),
    "svpo": ({"readings": [{"name": "tree_value"}], "pairs": {"name": "siblings", "by": "value"}}, "value"),
    "pdpo": ({"readings": [{"name": "divergence"}], "pairs": {"name": "contrastive", "k": 1}}, "outcome"),
    "lpo": ({"step_rewards": True, "pairs": {"name": "extremes", "by": "step_reward"}}, "step_reward"),
    "spo": ({"step_rewards": True, "pairs": {"name": "extremes", "by": "step_reward"}}, "step_reward"),
}  # fmt: skip


def learner(make, name, **more):
    """A trainer with this preset, and the field that orders its pairs."""
    sections, field = NEEDS[name]
    sections = {"pairs": None, **sections, **more}
    if sections.pop("step_rewards", False):
        sections["step_rewards"] = [make.step_reward]
    if name == "step_dpo":
        sections["pairs"] = {**sections["pairs"], "right_at": make.middle}
    return build(make("r", loss={"name": name}, optim={"lr": 1e-3}, **sections)), field


# A text alone has nothing to blank out, so it has no divergence; tests/vision/test_token_readings.py has pictures.
# LPO and SPO are for log-probs that are means over a latent, and refuse other policies.
NO_TEXT = ("pdpo", "lpo", "spo")
CASES = [(kind, name) for kind in ("latent", "token") for name in NEEDS if kind == "latent" or name not in NO_TEXT]


@pytest.mark.parametrize("make, name", CASES, indirect=["make"])
def test_every_preset_raises_the_better_step_over_the_worse(make, name):
    """By fields that components of the recipe filled; the distance between the two is measured apart from the loss."""
    trainer, field = learner(make, name)
    batch = trainer.batch(trainer.run.rollout(0))
    quality = step_scores(batch.rollout.tree, field)
    assert bool((quality[batch.pairs.chosen_end] > quality[batch.pairs.rejected_end]).all()) and len(batch.pairs)

    def distance():
        """Log-prob of the chosen segments less that of the rejected ones, averaged over pairs."""
        total = 0.0
        for segment, sign in ((batch.chosen, 1), (batch.rejected, -1)):
            steps = torch.unique(segment.step)
            with torch.no_grad():
                new = trainer.policy.log_probs(batch.rollout, steps)
            owner = batch.rollout.tree.step_of_action(batch.rollout.actions.logp.numel())[new.index.cpu()]
            of_step = torch.zeros(len(batch.rollout.tree)).index_add(0, owner, new.logp.cpu())
            total += sign * float(of_step[segment.step].sum()) / len(batch.pairs)
        return total

    before = distance()
    for _ in range(4):
        trainer.update(batch)
    assert distance() > before + 1e-4


@pytest.mark.parametrize("make", ["latent"], indirect=True)  # whose segments have several steps
def test_rewards_of_steps_weigh_both_sides_of_a_pair(make):
    """Full-Step-DPO: of the chosen segment the best step counts most, of the rejected one the worst."""
    trainer, _ = learner(make, "full_step_dpo")
    batch = trainer.batch(trainer.run.rollout(0))
    reward = batch.rollout.tree.step_reward
    for segment, sign in ((batch.chosen, 1.0), (batch.rejected, -1.0)):
        for pair in segment.pair.unique():
            own = segment.pair == pair
            want = (sign * reward[segment.step[own]]).softmax(0) * int(own.sum())
            torch.testing.assert_close(segment.weight[own], want.float(), atol=1e-5, rtol=0)
    assert float(batch.chosen.weight.std()) > 0


def test_stored_rollouts_train_like_sampled_ones(make, tmp_path):
    """One iteration from disk equals the same iteration sampled; batches come in the order of the seed."""
    sampled = build(make("sampled"))
    store_rollouts(sampled.run, tmp_path / "disk", 1)
    want = build(make("again")).iterate(0)
    got = build(make("stored", rollouts=str(tmp_path / "disk"))).iterate(0)
    for k in ("preference/loss", "preference/pairs", "policy/grad_norm"):
        assert got[k] == pytest.approx(want[k], rel=1e-4), k


# --- one kind ----------------------------------------------------------------------------------------------------


def test_lpo_raises_the_reward(tiny_model, tmp_path):
    tree = latent(tiny_model, tmp_path / "r", loss={"name": "lpo", "beta": 100}, optim={"lr": 3e-3},
                  run={"iterations": 20, "eval_every": 20})  # fmt: skip
    run(tree)
    evals = [r["eval/reward"] for r in metrics(tmp_path / "r") if "eval/reward" in r]
    assert evals[-1] > evals[0] + 0.03
    assert (tmp_path / "r" / "trees" / "first" / "outputs.json").exists()


def test_a_run_resumes_where_it_stopped(tiny_model, tmp_path):
    run(latent(tiny_model, tmp_path / "whole", run={"iterations": 4}))
    run(latent(tiny_model, tmp_path / "cut", run={"iterations": 2}))
    run(latent(tiny_model, tmp_path / "cut", run={"iterations": 4, "resume": True}))
    a, b = (load_file(tmp_path / name / "model" / MODEL["latent"]) for name in ("whole", "cut"))
    assert_close(a, b, 0)


def test_nothing_to_compare_is_told(tiny_model, tmp_path, caplog):
    rewards = [{"name": "tiny:constant", "timeout_s": 0}]
    tree = latent(tiny_model, tmp_path / "r", rewards=rewards)
    before = load_file(tiny_model / MODEL["latent"])
    trainer = run(tree)
    assert "nothing to learn in this iteration: 0 pairs" in caplog.text and "equal" in caplog.text
    assert_close(before, load_file(tmp_path / "r" / "model" / MODEL["latent"]), 0)
    store_rollouts(trainer.run, tmp_path / "disk", 1)
    stored = latent(tiny_model, tmp_path / "s", rewards=rewards, rollouts=str(tmp_path / "disk"))
    with pytest.raises(ValueError, match="none of the stored rollouts in .* gives a pair"):
        run(stored)


def test_tgdpo_takes_its_guide(tiny_model, tmp_path):
    """A guide that equals the reference leaves DPO as it is."""
    guide = {"name": "diffusion", "model": str(tiny_model), "steps": 6}
    got = build(latent(tiny_model, tmp_path / "a", loss={"name": "tgdpo"}, guide=guide)).iterate(0)
    want = build(latent(tiny_model, tmp_path / "b", loss={"name": "dpo"})).iterate(0)
    assert got["policy/grad_norm"] == pytest.approx(want["policy/grad_norm"], rel=1e-4)
    with pytest.raises(ValueError, match="name it as `guide`"):
        build(latent(tiny_model, tmp_path / "c", loss={"name": "tgdpo"}))
    with pytest.raises(ValueError, match="its loss uses none"):
        build(latent(tiny_model, tmp_path / "d", guide=guide))


def test_t_reg_adds_its_regulariser(tmp_path):
    """Before the first update w = 1/2: ln 2 + alpha / 2 (R(w) + R(l)), R(y) = -beta sum rhat_i ln pi(i)."""
    readings = [{"name": "instructed"}]
    trainer = build(token(tmp_path, tmp_path / "r", loss={"name": "t_reg"}, pairs=None, readings=readings))
    batch = trainer.batch(trainer.run.rollout(0))
    each, rows = trainer.pair_losses(batch, batch.parts(trainer.policy)[0])
    rollout, tree = batch.rollout, batch.rollout.tree
    rhat = rollout.actions.payload["token_reward"]
    for loss, i in zip(each.loss.tolist(), rows.tolist(), strict=True):
        terms = []
        for segment in (batch.chosen, batch.rejected):
            at = tree.actions_of(segment.step[segment.pair == i])
            terms.append(-0.1 * float((rhat[at] * rollout.actions.logp[at]).sum()))
        assert loss == pytest.approx(math.log(2) + 0.25 * 0.5 * sum(terms), abs=1e-4) and loss != math.log(2)


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"loss": {"name": "diffusion_dpo"}}, r"unknown preference loss 'diffusion_dpo'"),
        ({"loss": {"name": "lpo", "bta": 3}}, r"unknown key loss.bta=3 \(did you mean beta"),
        ({"pairs": {"name": "extremes", "byy": "value"}}, r"unknown key pairs.byy='value' \(did you mean by"),
        ({"rollouts": "nowhere"}, "holds no rollouts"),
        (
            {"loss": {"name": "lpo"}, "pairs": None},
            "pairs: pair builder 'noise_extremes' reads step_reward, which nothing",
        ),
        ({"loss": {"name": "step_dpo"}, "pairs": None}, "pairs: pair builder 'first_wrong' reads ok, which nothing"),
        (
            {"loss": {"name": "full_step_dpo"}},
            "loss: preference loss 'full_step_dpo' reads step_reward, which nothing",
        ),
        (
            {"loss": {"name": "mcts_dpo"}},
            r"reads tags.visits, which nothing .* the readings monte_carlo, score, tree_value \(`readings:`\)",
        ),
        ({"loss": {"name": "svpo"}, "pairs": None}, r"reads value, which nothing .* the readings .*tree_value"),
        (
            {"loss": {"name": "pdpo"}, "pairs": None},
            "reads tags.divergence, which nothing .* by the readings divergence",
        ),
        (
            {"loss": {"name": "t_reg"}},
            "loss: .* reads actions.token_reward, which nothing .* by the readings instructed",
        ),
        ({"plan": {0: 1}}, "pair builder 'extremes' reads forks, which nothing"),
    ],
)
def test_recipes_that_cannot_run_are_refused_before_a_model_is_loaded(tmp_path, sections, message):
    model = tmp_path / "no model here"
    with pytest.raises(ValueError, match=message):
        build(latent(model, tmp_path / "r", **sections))


def test_a_plan_that_does_not_fit(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="depth 9 lies beyond the last step"):
        build(latent(tiny_model, tmp_path / "r", plan={9: 2}))


def test_a_policy_without_reference_log_probs(tiny_model, tmp_path, monkeypatch):
    trainer = build(latent(tiny_model, tmp_path / "r"))
    old = trainer.policy.log_probs
    monkeypatch.setattr(trainer.policy, "log_probs", lambda *a, **k: replace(old(*a, **k), ref_logp=None))
    with pytest.raises(ValueError, match="gives no reference log-probs"):
        trainer.iterate(0)


def test_pairs_need_a_density(tiny_model, tmp_path):
    """Forks whose steps were not sampled with noise cannot be compared."""
    trainer = build(latent(tiny_model, tmp_path / "r"))
    rollout = trainer.run.rollout(0)
    none = replace(rollout.actions, trainable=torch.zeros_like(rollout.actions.trainable))
    with pytest.raises(ValueError, match="were not both sampled with a density"):
        trainer.batch(replace(rollout, actions=none))


def test_stored_batches(tiny_model, tmp_path):
    """Two rollouts of 4 prompts in batches of 3: the remainder is a batch too, unless ranks would have nothing."""
    trainer = build(latent(tiny_model, tmp_path / "r", plan={0: 2}))
    folders = store_rollouts(trainer.run, tmp_path / "disk", 2)
    assert [len(Rollout.load(f).prompts) for f in folders] == [4, 4]
    stored = StoredRollouts(tmp_path / "disk", 3)
    assert len(stored) == 4 and stored.left_out == 0
    assert sorted(len(stored.batch(i).prompts) for i in range(4)) == [1, 1, 3, 3]
    both = [StoredRollouts(tmp_path / "disk", 3, rank=r, world=2) for r in range(2)]
    assert len(both[0]) == 2 and both[0].left_out == 2
    ids = [{p.id for p in s.batch(0).prompts} for s in both]
    assert not ids[0] & ids[1] and len(ids[0] | ids[1]) == 3
    assert len(StoredRollouts(folders[0], 4)) == 1
    with pytest.raises(ValueError, match="has a prompt for each of 5 processes"):
        StoredRollouts(tmp_path / "disk", 3, world=5)


@pytest.mark.multiproc
def test_two_processes_learn_what_one_does(tiny_model, tmp_path):
    """Even classes have equal rewards, so ranks have unequal numbers of pairs, one of them perhaps none."""

    def tree(world):
        return latent(
            tiny_model, tmp_path / f"w{world}", rewards=[{"name": "tiny:constant_for_even", "timeout_s": 0}],
            optim={"eps": 1e-3}, run={"iterations": 2, "prompts_per_iteration": 5, "processes": world},
        )  # fmt: skip

    run(tree(1))
    run_ranks(2, "train", write_recipe(tmp_path / "w2.yaml", tree(2)))
    one, two = (metrics(tmp_path / f"w{world}") for world in (1, 2))
    for a, b in zip(one[1:3], two[1:3], strict=True):
        for k in ("preference/loss", "preference/pairs", "policy/grad_norm", "reward/mean"):
            assert a[k] == pytest.approx(b[k], rel=1e-3), k
    assert_close(*(load_file(tmp_path / f"w{world}" / "model" / MODEL["latent"]) for world in (1, 2)), 1e-4)


def test_the_command_line_finds_it(tiny_model, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(latent(tiny_model, tmp_path / "r")))
    assert isinstance(trainer_of(load_config(tmp_path / "r.yaml")), StepPreferenceTrainer)
