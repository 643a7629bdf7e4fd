"""One stored set of branch rollouts trains GRPO, a latent reward and preferences; what cannot be used is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TinyTask, recipe, write_recipe
from verbs import run_verb

from diffusion.adapters.dit import DiTAdapter
from diffusion.latent.reward import LatentReward
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig
from mmrl.config import load_config, parse_config, trainer_config
from mmrl.preference import Pairs
from mmrl.rollout import BranchPlan, Rollout
from mmrl.trainers import trainer_of

CONFIGS = Path(__file__).parents[2] / "configs" / "diffusion"
SD = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
      "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}  # fmt: skip


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def first(folder, key):
    return next(r[key] for r in metrics(folder) if key in r)


def grpo(model, output, **sections):
    return recipe(model, output, **sections)


def preference(model, output, **sections):
    """Best against worst sibling by the outcomes below, with LPO's loss."""
    tree = recipe(model, output, **({"pairs": {"name": "extremes"}} | sections))
    tree["loss"] = sections.get("loss", {"name": "lpo", "beta": 500})
    return {**tree, "trainer": "step_preference"}


def scorer(model, output, train, held_out, **run):
    """A latent reward on the nodes of stored trees."""
    return {
        "trainer": "step_reward", "scorer": {"name": "latent_reward", "model": str(model)},
        "task": {"name": "tree_pairs", "train": str(train), "eval": str(held_out)},
        "loss": {"name": "preference", "center": 0.01}, "optim": {"lr": 3e-3},
        "run": recipe(model, output)["run"] | {"iterations": 20, "eval_every": 20} | run,
    }  # fmt: skip


def trainer(tree):
    return trainer_of(parse_config(tree, model=trainer_config(tree)))


@pytest.fixture(scope="module")
def disk(tiny_model, tmp_path_factory):
    """Two folders that `mmrl rollouts` wrote: 12 trees to learn from, 8 to measure on."""
    root = tmp_path_factory.mktemp("disk")
    file = write_recipe(root / "r.yaml", grpo(tiny_model, root / "run"))
    told = run_verb("rollouts", file, "--out", root / "train", "run.iterations=3")
    assert "3 rollouts, 12 prompts, 48 leaves" in told
    run_verb("rollouts", file, "--out", root / "held_out", "run.iterations=2", "run.seed=1")
    return root


@pytest.fixture
def rollout(disk):
    """The first stored one: four prompts, forks at steps 0 and 2."""
    return Rollout.load(disk / "train" / "000000-00")


# ---- one set, three trainers ----------------------------------------------------------------------------------------


def test_grpo_learns_from_the_stored_set(tiny_model, disk, tmp_path):
    """Ratios are exactly 1 before the first update and leave 1 after it; the weights move."""
    file = write_recipe(tmp_path / "r.yaml", grpo(tiny_model, tmp_path / "run"))
    run_verb("train", file, f"rollouts={disk / 'train'}", "run.iterations=3")
    deviation = [r["policy/ratio_dev_max"] for r in metrics(tmp_path / "run") if "policy/ratio_dev_max" in r]
    assert len(deviation) == 3 and deviation[0] < 1e-6 < deviation[1]
    assert first(tmp_path / "run", "policy/grad_norm") > 0
    assert moved(tiny_model, tmp_path / "run")


def test_a_latent_reward_learns_from_it_and_feeds_preferences(tiny_model, disk, tmp_path):
    """It orders held-out nodes better than before; then it is the step reward of pairs from the same trees."""
    held = scorer(tiny_model, tmp_path / "run", disk / "train", disk / "held_out")
    run_verb("train", write_recipe(tmp_path / "r.yaml", held))
    accuracy = [r["eval/pair_acc"] for r in metrics(tmp_path / "run") if "eval/pair_acc" in r]
    assert accuracy[-1] > max(accuracy[0], 0.5)
    judge = {"name": "latent_judge", "model": str(tmp_path / "run" / "model")}
    by_judge = preference(tiny_model, tmp_path / "lpo", step_rewards=[judge], run={"iterations": 1},
                          pairs={"name": "extremes", "by": "step_reward", "squash": True})  # fmt: skip
    run_verb("train", write_recipe(tmp_path / "lpo.yaml", by_judge), f"rollouts={disk / 'train'}")
    assert first(tmp_path / "lpo", "preference/loss") == pytest.approx(math.log(2), abs=1e-6)
    assert first(tmp_path / "lpo", "preference/pairs") > 0 and moved(tiny_model, tmp_path / "lpo")


def test_preferences_learn_from_the_stored_set(tiny_model, disk, tmp_path):
    """Policy and reference agree at first, so the loss is ln 2; 4 prompts with 1 + 2 forks give at most 12 pairs."""
    file = write_recipe(tmp_path / "r.yaml", preference(tiny_model, tmp_path / "run"))
    run_verb("train", file, f"rollouts={disk / 'train'}", "run.iterations=3")
    assert first(tmp_path / "run", "preference/loss") == pytest.approx(math.log(2), abs=1e-6)
    assert 0 < first(tmp_path / "run", "preference/pairs") <= 12
    assert moved(tiny_model, tmp_path / "run")


def moved(model, output):
    name = "transformer/diffusion_pytorch_model.safetensors"
    a, b = load_file(Path(model) / name), load_file(output / "model" / name)
    return any(not torch.equal(a[k], b[k]) for k in a)


def test_the_published_recipes_name_one_sampling():
    """Rollouts of digits_branch.yaml are what digits_tree_preference.yaml reads: same policy options, same plan."""
    a, b = (load_config(CONFIGS / f"{n}.yaml") for n in ("digits_branch", "digits_tree_preference"))
    options = [SamplingConfig(**{k: v for k, v in c.policy.options.items() if k != "model"}) for c in (a, b)]
    assert options[0] == options[1] and a.plan == b.plan and a.task == b.task
    assert a.run.prompts_per_iteration == b.run.prompts_per_iteration


# ---- what gives nothing is counted ----------------------------------------------------------------------------------


def rewarded(rollout, reward):
    """The same tree with other rewards: reward(leaf number)."""
    leaves = rollout.tree.is_leaf.nonzero().flatten()
    outcome = torch.tensor([float(reward(i)) for i in range(len(leaves))])
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, outcome))


def stored(rollout, tmp_path, reward):
    return rewarded(rollout, reward).save(tmp_path / "disk" / "a").parent


@pytest.mark.parametrize("reward", [0.5, 0.0, 1.0])
def test_equal_scores_are_counted_and_end_the_run(tiny_model, rollout, tmp_path, reward, caplog):
    """All leaves alike: 4 prompts with 3 forks each give no pair, GRPO sees 4 of 4 groups without spread."""
    folder = stored(rollout, tmp_path, lambda i: reward)
    tree = preference(tiny_model, tmp_path / "p", rollouts=str(folder))
    with pytest.raises(ValueError, match=r"none of the stored rollouts in .* \(12 forks.*12 equal.*Lower pairs.thres"):
        trainer(tree).train()
    assert "nothing to learn in this iteration: 0 pairs" in caplog.text
    told = trainer(grpo(tiny_model, tmp_path / "g", rollouts=str(folder), loss={"kl": 0.0})).iterate(0)
    assert told["reward/zero_spread_frac"] == 1 and told["policy/grad_norm"] == 0 == told["credit/adv_abs_max"]


def test_one_equal_tree_among_others_is_left_out(tiny_model, rollout, tmp_path):
    """Prompt 0 has equal rewards, the others 0 and 1 in turn: siblings at step 2 differ, those at
    step 0 have means of .5. So 3 forks of prompt 0 and one of each other prompt are equal."""
    folder = stored(rollout, tmp_path, lambda i: 0.5 if i < 4 else i % 2)
    told = trainer(preference(tiny_model, tmp_path / "p", rollouts=str(folder))).iterate(0)
    assert told["preference/pairs"] == 6 and told["pairs/equal_per_prompt"] == 6 / 4
    assert told["pairs/forks_per_prompt"] == 3


@pytest.mark.parametrize("right_at", [-1.0, 2.0])
def test_one_sided_forks_are_counted_and_end_the_run(tiny_model, disk, tmp_path, right_at):
    """Every step right, or every step wrong: no first wrong step beside a right one in an epoch of 3 batches."""
    pairs = {"name": "first_wrong", "by": "outcome", "right_at": right_at}
    tree = preference(tiny_model, tmp_path / "p", rollouts=str(disk / "train"), pairs=pairs, run={"iterations": 9})
    one = trainer(tree)
    told = one.iterate(0)
    assert told["preference/pairs"] == 0 and told["pairs/one_sided_per_prompt"] == (3 if right_at < 0 else 1)
    assert one.iterate(1)["policy/grad_norm"] == 0
    with pytest.raises(ValueError, match=r"gives a pair; the last: 0 pairs .*one sided.*store rollouts whose rewards"):
        one.iterate(2)


def strangers(tree):
    """A pair builder of one's own that compares the first step of two prompts."""
    roots = (tree.depth == 0).nonzero().flatten()
    return Pairs.of_steps(roots[:1], roots[2:3], torch.ones(1))


def test_pairs_without_a_common_parent_are_refused(tiny_model, disk, tmp_path):
    pairs = {"name": f"{__name__}:strangers"}
    tree = preference(tiny_model, tmp_path / "p", rollouts=str(disk / "train"), pairs=pairs)
    with pytest.raises(ValueError, match=r"pair 0: steps 0 and \d+ share no parent; only continuations of one state"):
        trainer(tree).iterate(0)


def test_a_missing_reference_names_the_remedy(tiny_model, disk, tmp_path, monkeypatch):
    from dataclasses import replace

    tree = preference(tiny_model, tmp_path / "p", rollouts=str(disk / "train"))
    for free in (False, True):
        one = trainer({**tree, "loss": {"name": "lpo", "beta": 500, "reference_free": free}})
        known = one.policy.log_probs
        without = lambda *a, known=known, **k: replace(known(*a, **k), ref_logp=None)  # noqa: E731
        monkeypatch.setattr(one.policy, "log_probs", without)
        if free:
            assert one.iterate(0)["preference/pairs"] > 0
        else:
            with pytest.raises(ValueError, match=r"no reference log-probs .*set loss\.reference_free=true"):
                one.iterate(0)


# ---- a latent reward of another space ---------------------------------------------------------------------------------


@pytest.fixture
def judge(tiny_model, tmp_path):
    """judge(**changes of its record): the folder of a saved latent reward."""

    def make(**changes):
        LatentReward.build(str(tiny_model)).save(tmp_path / "judge")
        file = tmp_path / "judge" / "step_format.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(tmp_path / "judge")

    return make


SPACES = [
    ({"shape": [1, 8, 8]}, r"trained on latents of shape \(1, 8, 8\) and got \(1, 4, 4\)"),
    ({"scheduler": SD}, "trained on a denoiser that predicts 'epsilon'; the policy predicts 'flow'"),
]


@pytest.mark.parametrize("changes, told", SPACES)
def test_a_latent_reward_of_another_space_refuses_the_rollout(judge, rollout, changes, told):
    reward = LatentReward.build(judge(**changes))
    with pytest.raises(ValueError, match=told):
        reward(rollout)


@pytest.mark.parametrize("changes, told", SPACES)
def test_it_does_not_train_on_them_either(judge, disk, tmp_path, changes, told):
    tree = scorer(judge(**changes), tmp_path / "run", disk / "train", disk / "held_out")
    with pytest.raises(ValueError, match=told):
        trainer(tree).iterate(0)


def test_another_schedule_of_the_same_prediction(judge, rollout):
    """Times from 0 to 1 in place of 0 to 1000: the level is known under another time."""
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1, "shift": 1.0}
    with pytest.raises(ValueError, match=r"another schedule: at t = .* knows x = .* the rollout has"):
        LatentReward.build(judge(scheduler=flow))(rollout)


class VelocityDiT(DiTAdapter):
    """Another family: its network predicts v."""

    prediction = "v"


def test_rollouts_say_what_their_network_predicts(tiny_model, rollout):
    assert rollout.about["prediction"] == "flow"
    p = DiffusionPolicy(VelocityDiT.from_pretrained(tiny_model), SamplingConfig(steps=5))
    other = p.rollout(TinyTask().prompts[:2], BranchPlan({0: 2}), seed=0)
    assert other.about["prediction"] == "v"
    with pytest.raises(ValueError, match="predicts 'flow'; the policy predicts 'v'"):
        LatentReward.build(str(tiny_model))(other)
