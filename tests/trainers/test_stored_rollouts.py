"""Rollouts on disk: one set feeds GRPO and preferences as sampling would, in parts, over ranks, or is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny import recipe, save_tiny_dit, write_recipe
from verbs import run_verb
from vision_tiny import vision_recipe

from mmrl.config import ConfigError, load_config, parse_config, trainer_config
from mmrl.rollout import Rollout
from mmrl.trainers import trainer_of
from mmrl.trainers.rollouts import run_rollouts
from mmrl.trainers.stored import StoredRollouts, store_rollouts

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS / "vision"))
from families import family_folder  # noqa: E402

WEIGHTS = {"latent": "transformer/diffusion_pytorch_model.safetensors", "token": "model.safetensors"}


def latent(model, output, **sections):
    return recipe(model, output, **sections)


def token(folder, output, **sections):
    (folder / "pictures").mkdir(exist_ok=True)
    tree = vision_recipe(family_folder("text"), folder / "pictures", output, **sections)
    tree["task"]["pictures"] = 0
    return tree


@pytest.fixture(params=["latent", "token"])
def make(request, tiny_model, tmp_path):
    """Recipe maker of either kind: make(name, **sections), with its weights file as make.weights(name)."""

    def maker(name, **sections):
        if request.param == "latent":
            return latent(tiny_model, tmp_path / name, **sections)
        return token(tmp_path, tmp_path / name, **sections)

    maker.weights = lambda name: load_file(tmp_path / name / "model" / WEIGHTS[request.param])
    return maker


def build(tree):
    return trainer_of(load_tree(tree))


def load_tree(tree):
    return parse_config(tree, model=trainer_config(tree))


def store(tree, folder, iterations=1):
    """Rollouts of a recipe on disk; returns their folders."""
    trainer = build(tree)
    return store_rollouts(trainer.run, folder, iterations)


def read(make, tmp_path, **sections):
    return build(make("read", rollouts=str(tmp_path / "disk"), **sections))


def metrics(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]


# ---- as sampled -----------------------------------------------------------------------------------------------------


def test_grpo_from_disk_is_grpo_sampled(make, tmp_path):
    """The first iteration, weights bit for bit; only what sampling cost is missing."""
    store(make("store"), tmp_path / "disk")
    want, got = build(make("sampled")), build(make("stored", rollouts=str(tmp_path / "disk")))
    a, b = want.iterate(0), got.iterate(0)
    same = [k for k in a if not k.startswith(("time/", "rollout/"))]
    assert {k: a[k] for k in same} == {k: b[k] for k in same}
    assert b["policy/ratio_dev_max"] == a["policy/ratio_dev_max"] and "reward/mean" in b
    assert b["rollout/trained_states_per_leaf"] == a["rollout/trained_states_per_leaf"]
    for p, q in zip(want.loop.parameters, got.loop.parameters, strict=True):
        assert torch.equal(p, q)


def test_later_iterations_are_off_policy(make, tmp_path, caplog):
    """Ratios leave 1 where the policy has moved, without the warning that sampling and training disagree."""
    store(make("store"), tmp_path / "disk")
    tree = make("stored", rollouts=str(tmp_path / "disk"), run={"iterations": 3, "eval_every": 9})
    build(tree).train()
    deviation = [r["policy/ratio_dev_max"] for r in metrics(tree["run"]["output"]) if "policy/ratio_dev_max" in r]
    assert deviation[0] < 1e-4 < deviation[1] and "ratio deviates" not in caplog.text


def test_training_from_disk_resumes_bit_for_bit(make, tmp_path):
    store(make("store"), tmp_path / "disk", 3)
    disk = str(tmp_path / "disk")
    for name, iterations, resume in (("whole", 4, False), ("cut", 2, False), ("cut", 4, True)):
        build(make(name, rollouts=disk, run={"iterations": iterations, "resume": resume})).train()
    a, b = make.weights("whole"), make.weights("cut")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(ConfigError, match="rollouts: .*disk -> .*other"):
        shutil.copytree(tmp_path / "disk", tmp_path / "other")
        build(make("cut", rollouts=str(tmp_path / "other"), run={"resume": True, "iterations": 5})).train()


def test_one_set_feeds_grpo_and_preferences(make, tmp_path):
    store(make("store"), tmp_path / "disk")
    tree = make("dpo", rollouts=str(tmp_path / "disk"), trainer="step_preference", pairs={"name": "extremes"})
    told = build({**{k: v for k, v in tree.items() if k != "credit"}, "loss": {"name": "step_dpo"}}).iterate(0)
    assert told["preference/pairs"] > 0 and told["preference/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert read(make, tmp_path).iterate(0)["policy/grad_norm"] > 0


@pytest.mark.parametrize("name", ["brightness", "constant"])
def test_leaves_are_rewarded_anew_for_other_rewards(tiny_model, tmp_path, name, caplog):
    """The same rewards: what is stored is read; others: every leaf is decoded and rewarded."""
    caplog.set_level("INFO")
    store(latent(tiny_model, tmp_path / "a"), tmp_path / "disk")
    trainer = build(latent(tiny_model, tmp_path / "b", rewards=[{"name": f"tiny:{name}", "timeout_s": 0}],
                           rollouts=str(tmp_path / "disk")))  # fmt: skip
    tree = trainer.run.rollout(0).tree
    outcome = tree.outcome[tree.is_finished]
    assert ("every leaf is rewarded anew" in caplog.text) is (name == "constant")
    assert bool((outcome == 0.5).all()) is (name == "constant") and len(outcome) == 16


def test_rollouts_without_rewards_are_rewarded(make, tmp_path):
    trainer = build(make("store"))
    prompts = trainer.run.sampler.prompts(0)
    trainer.policy.rollout(prompts, trainer.run.plan, seed=0).save(tmp_path / "disk" / "mine")
    rollout = read(make, tmp_path).run.rollout(0)
    assert bool(rollout.tree.is_finished.any()) and rollout.tree.is_finished.sum() == rollout.tree.is_leaf.sum()


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_folders_of_ranks_are_one_rollout(tiny_model, tmp_path):
    """Two ranks wrote prompts 0, 2 and 1, 3; one reader gets 0..3 in order, two readers what the writers had."""
    trainer = build(latent(tiny_model, tmp_path / "r"))
    whole = trainer.run.rollout(0)
    for rank in range(2):
        whole.select([rank, rank + 2]).save(tmp_path / "disk" / f"000000-{rank:02d}")
    got = StoredRollouts(tmp_path / "disk", 4).batch(0)
    assert [p.id for p in got.prompts] == [p.id for p in whole.prompts]
    for j in range(4):
        a, b = got.select([j]), whole.select([j])
        assert torch.equal(a.actions.payload["latent"], b.actions.payload["latent"])
        torch.testing.assert_close(a.tree.outcome, b.tree.outcome, atol=0, rtol=0, equal_nan=True)
    for rank in range(2):
        own = StoredRollouts(tmp_path / "disk", 4, rank=rank, world=2).batch(0)
        assert [p.id for p in own.prompts] == [p.id for p in whole.prompts][rank::2]


def test_a_missing_rank_is_told(tiny_model, tmp_path):
    (folder,) = store(latent(tiny_model, tmp_path / "r"), tmp_path / "disk")
    told = json.loads((tmp_path / "disk" / "recipe.json").read_text())
    (tmp_path / "disk" / "recipe.json").write_text(json.dumps(told | {"processes": 2}))
    with pytest.raises(ValueError, match=f"{folder.name}: 2 processes wrote these rollouts and 1 of them this one"):
        StoredRollouts(tmp_path / "disk", 4)


SCRIPT = """
import sys
from pathlib import Path
from mmrl.config import load_config
from mmrl.trainers.rollouts import run_rollouts
from mmrl.trainers import trainer_of
recipe, disk, output = sys.argv[1:]
run_rollouts(load_config(recipe), Path(disk))
trainer_of(load_config(recipe, [f"rollouts={disk}", f"run.output={output}"])).train()
"""


@pytest.mark.multiproc
def test_two_processes_store_and_learn_what_one_does(tiny_model, tmp_path):
    tree = latent(tiny_model, tmp_path / "w1", run={"iterations": 1}, optim={"eps": 1e-3})
    build(tree).train()
    (tmp_path / "both.py").write_text(SCRIPT)
    file, disk = write_recipe(tmp_path / "r.yaml", tree), tmp_path / "disk"
    run_ranks(2, tmp_path / "both.py", file, disk, tmp_path / "w2")
    assert sorted(f.name for f in disk.glob("0*")) == ["000000-00", "000000-01"]
    one, two = (metrics(tmp_path / name)[1] for name in ("w1", "w2"))
    for k in ("policy/loss", "policy/grad_norm", "reward/mean", "reward/std", "policy/kl"):
        assert one[k] == pytest.approx(two[k], rel=1e-4, abs=1e-6), k
    a, b = (load_file(tmp_path / name / "model" / WEIGHTS["latent"]) for name in ("w1", "w2"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], atol=1e-5, rtol=0)


# ---- the verb -------------------------------------------------------------------------------------------------------


def test_the_verb_stores_and_goes_on(tiny_model, tmp_path):
    tree = latent(tiny_model, tmp_path / "r", run={"iterations": 2})
    config = load_config(write_recipe(tmp_path / "r.yaml", tree))
    told = run_rollouts(config, tmp_path / "disk")
    assert (told["rollouts"], told["prompts"], told["leaves"]) == (2, 8, 32)
    assert not (tmp_path / "r").exists()  # nothing was trained
    first = tmp_path / "disk" / "000000-00" / "rollout.json"
    made = first.stat().st_mtime_ns
    latents = load_file(tmp_path / "disk" / "000001-00" / "actions.safetensors")["action.latent"]
    shutil.rmtree(tmp_path / "disk" / "000001-00")
    (tmp_path / "disk" / ".000001-00.part").mkdir()  # of a run that was killed
    longer = load_config(tmp_path / "r.yaml", ["run.iterations=3"])
    with FileLock(tmp_path / "disk" / ".lock"), pytest.raises(ConfigError, match="another process writes into"):
        run_rollouts(longer, tmp_path / "disk")
    assert run_rollouts(longer, tmp_path / "disk")["rollouts"] == 3
    assert first.stat().st_mtime_ns == made
    again = load_file(tmp_path / "disk" / "000001-00" / "actions.safetensors")["action.latent"]
    assert torch.equal(latents, again)
    assert [p.name for p in (tmp_path / "disk").glob(".*")] == [".lock"]


@pytest.mark.parametrize(
    "change, told",
    [("run.seed=1", "seed: 0 -> 1"), ("plan={0: 4}", "plan.0: "), ("policy.steps=7", "policy.steps: "),
     ("run.prompts_per_iteration=5", "prompts_per_iteration: 4 -> 5")],
)  # fmt: skip
def test_recipes_are_not_mixed(tiny_model, tmp_path, change, told):
    file = write_recipe(tmp_path / "r.yaml", latent(tiny_model, tmp_path / "r", run={"iterations": 1}))
    run_rollouts(load_config(file), tmp_path / "disk")
    with pytest.raises(ConfigError, match=f"holds rollouts of another recipe: .*{told}"):
        run_rollouts(load_config(file, [change]), tmp_path / "disk")


def test_the_verb_refuses(tiny_model, tmp_path):
    tree = latent(tiny_model, tmp_path / "r", run={"iterations": 1})
    config = load_config(write_recipe(tmp_path / "r.yaml", tree))
    trainer = build(tree)
    trainer.run.rollout(0).save(tmp_path / "mine" / "a")
    with pytest.raises(ConfigError, match=r"holds rollouts without recipe\.json"):
        run_rollouts(config, tmp_path / "mine")
    scorer = load_tree({"trainer": "step_reward", "task": {"name": "x"}, "scorer": {"name": "vision_prm"}})
    with pytest.raises(ConfigError, match="trainer='step_reward' has none"):
        run_rollouts(scorer, tmp_path / "disk")


def test_the_command_line(tiny_model, tmp_path):
    file = str(write_recipe(tmp_path / "r.yaml", latent(tiny_model, tmp_path / "r")))
    done = run_verb("rollouts", file, "--out", tmp_path / "disk", "run.iterations=2")
    assert "2 rollouts, 8 prompts, 32 leaves, mean reward" in done
    tried = run_verb("doctor", file, f"rollouts={tmp_path / 'disk'}")
    assert "verdict    fine" in tried and "policy/grad_norm" in tried


# ---- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tiny_model, tmp_path):
    """A stored rollout of the tiny latent recipe."""
    return store(latent(tiny_model, tmp_path / "store"), tmp_path / "disk")[0]


@pytest.mark.parametrize(
    "sections, told",
    [
        (
            {"policy": {"steps": 8}},
            r"course.levels: .* stored, .* here; .*sampling.steps: 6 stored, 8 here.*policy` as",
        ),
        ({"policy": {"eta": 0.5}}, "sampling.eta: null stored, 0.5 here"),
        ({"policy": {"keep_mean": True}}, "has no action payload mean .it has latent.*another kind of policy"),
        ({"plan": {0: 4, 2: 2}}, r"at depth 0 the stored trees have 2 siblings, those of this recipe's plan .* 4;"),
        ({"plan": {0: 2, 3: 2}}, "at depth 2 the stored trees have 2 siblings, those of this recipe's plan .* 1;"),
        ({"run": {"refill": 1}}, "set run.refill=0"),
        ({"rollouts": "nowhere"}, "holds no rollouts .*mmrl rollouts RECIPE"),
    ],
)
def test_rollouts_of_another_recipe(tiny_model, tmp_path, disk, sections, told):
    tree = latent(tiny_model, tmp_path / "r", **{"rollouts": str(disk.parent), **sections})
    with pytest.raises(ValueError, match=told):
        build(tree).iterate(0)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="holds no rollouts"):
        StoredRollouts(tmp_path, 4)


def test_prompts_that_the_task_does_not_know(tiny_model, tmp_path, disk):
    rollout = Rollout.load(disk)
    strange = [{"id": f"{p.id}x", "inputs": p.inputs, "reference": None} for p in rollout.prompts]
    rewrite(disk, prompts=strange)
    with pytest.raises(ValueError, match="4 of 4 stored prompts are none of the task's 10 training prompts"):
        build(latent(tiny_model, tmp_path / "r", rollouts=str(disk.parent)))
    rewrite(disk, prompts=[{"id": p.id, "inputs": p.inputs, "reference": "9"} for p in rollout.prompts])
    with pytest.raises(ValueError, match="4 of 4 stored prompts have another reference"):
        build(latent(tiny_model, tmp_path / "r", rollouts=str(disk.parent)))


def test_the_tasks_own_prompts_are_used(tiny_model, tmp_path, disk):
    """A media path of another machine does not matter: the task knows where its pictures lie."""
    rollout = Rollout.load(disk)
    rewrite(disk, prompts=[{"id": p.id, "inputs": {**p.inputs, "images": ["/gone.png"]}} for p in rollout.prompts])
    got = build(latent(tiny_model, tmp_path / "r", rollouts=str(disk.parent))).run.rollout(0)
    assert all("images" not in p.inputs for p in got.prompts)


def test_a_rollout_that_lacks_its_latents(tiny_model, tmp_path, disk):
    file = disk / "actions.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "action.latent"}, file)
    with pytest.raises(ValueError, match="no action payload latent .it has none"):
        build(latent(tiny_model, tmp_path / "r", rollouts=str(disk.parent)))


def test_latents_of_another_shape(tiny_model, tmp_path, disk):
    file = disk / "actions.safetensors"
    tensors = load_file(file)
    tensors["action.latent"] = tensors["action.latent"][..., :2].clone()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"stored latent of an action has shape \(1, 4, 2\), .* has \(1, 4, 4\)"):
        build(latent(tiny_model, tmp_path / "r", rollouts=str(disk.parent)))


def test_rollouts_of_another_kind_of_policy(tiny_model, tmp_path, disk):
    """Tokens where latents are needed, and the other way round."""
    tree = token(tmp_path, tmp_path / "t")
    store(tree, tmp_path / "texts")
    known = {"task": {"name": "tiny:TinyTask"}}
    words = [p.__dict__ for p in build(tree).run.task.prompts]
    rewrite(disk, prompts=[{"id": w["id"], "inputs": w["inputs"]} for w in words[:4]])
    with pytest.raises(ValueError, match="no action payload token .it has latent"):
        build({**tree, "rollouts": str(disk.parent)})
    (folder,) = (tmp_path / "texts").glob("0*")
    rewrite(folder, prompts=[{"id": f"class-{i}", "inputs": {"label": i}} for i in range(4)])
    with pytest.raises(ValueError, match="no action payload latent .it has token"):
        build(latent(tiny_model, tmp_path / "l", rollouts=str(tmp_path / "texts"), **known))


def test_rollouts_of_another_temperature(tmp_path):
    store(token(tmp_path, tmp_path / "t"), tmp_path / "disk")
    tree = token(tmp_path, tmp_path / "r", rollouts=str(tmp_path / "disk"), policy={"temperature": 1.0})
    with pytest.raises(ValueError, match="temperature: 0.7 stored, 1.0 here"):
        build(tree)


def test_rollouts_of_other_weights(tmp_path, tiny_model, disk):
    """Another model of the same shape: nearly every ratio is clipped before anything was learned."""
    other = save_tiny_dit(tmp_path / "other")
    file = other / WEIGHTS["latent"]
    save_file({k: v + 0.05 * torch.randn_like(v) for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="% of the stored actions lie outside the clip range before the first update"):
        build(latent(other, tmp_path / "r", rollouts=str(disk.parent))).iterate(0)
    recomputed = latent(other, tmp_path / "s", rollouts=str(disk.parent), loss={"recompute_old_logp": True})
    assert build(recomputed).iterate(0)["mismatch/max"] > 0


def test_a_cut_file(tmp_path, disk):
    (disk / "rollout.json").write_text('{"format": 1, "prom')
    with pytest.raises(ValueError, match=r"rollout\.json cannot be read .*delete the folder"):
        StoredRollouts(disk.parent, 4)


def rewrite(folder, **changes):
    """Change entries of a stored rollout.json."""
    file = folder / "rollout.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- step rewards of another space ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shape", "schedule"])
def test_a_latent_reward_of_another_space_is_told(tiny_model, tmp_path, kind):
    """LPO with a judge of larger latents, and with one that was trained on an epsilon model."""
    from diffusion.latent.reward import LatentReward

    LatentReward.build(str(tiny_model)).save(tmp_path / "judge")
    (file,) = (tmp_path / "judge").glob("*.json")
    record = json.loads(file.read_text())
    if kind == "shape":
        record["shape"] = [1, 8, 8]
    else:
        record["scheduler"] = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "epsilon",
                               "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # fmt: skip
        record["prediction"] = "epsilon"
    file.write_text(json.dumps(record))
    judge = {"name": "diffusion.latent.reward:LatentReward.build", "model": str(tmp_path / "judge")}
    tree = latent(tiny_model, tmp_path / "r", trainer="step_preference", step_rewards=[judge])
    del tree["loss"]
    told = {"shape": r"latents of shape \(1, 8, 8\) and got \(1, 4, 4\)", "schedule": "another schedule|'epsilon'"}[
        kind
    ]
    with pytest.raises(RuntimeError, match=f"every step reward raised: .*{told}"):
        build({**tree, "loss": {"name": "lpo"}}).iterate(0)


def test_one_sided_and_equal_trees_train_nothing(tiny_model, tmp_path, caplog):
    """Every step right, so first_wrong has nothing to set against: told, and the weights stay."""
    tree = latent(tiny_model, tmp_path / "r", trainer="step_preference", run={"iterations": 1},
                  pairs={"name": "first_wrong", "by": "outcome", "right_at": -1.0})  # fmt: skip
    trainer = build({**tree, "loss": {"name": "step_dpo"}})
    told = trainer.iterate(0)
    assert told["preference/pairs"] == 0 and told["policy/grad_norm"] == 0
    assert "nothing to learn in this iteration: 0 pairs" in caplog.text
