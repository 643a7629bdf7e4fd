"""Runs that cannot learn are told: by doctor with a verdict and an exit code, by the trainer once, with counts."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import recipe, write_recipe
from typer.testing import CliRunner
from vision_tiny import Words, vision_recipe

from mmrl.cli import app
from mmrl.config import ConfigError, load_config, parse_config
from mmrl.doctor import examine
from mmrl.finite import NotFiniteError, check_finite
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import labelled_forest
from mmrl.registry import ComponentError
from mmrl.rollout import BranchPlan, Prompt
from mmrl.trainers import trainer_of
from mmrl.trainers.verdicts import Watch, is_idle, verdicts

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder, saved_prm

CONSTANT = [{"name": "tiny:constant", "timeout_s": 0}]
PAIRS = {"trainer": "step_preference", "loss": {"name": "lpo"}, "pairs": {"name": "extremes", "by": "outcome"}}
DIT = Path("transformer") / "diffusion_pytorch_model.safetensors"


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def doctor(tmp_path, tree, *overrides):
    """Exit code and lines of `mmrl doctor`."""
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    done = CliRunner().invoke(app, ["doctor", str(file), *overrides])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def train(tree):
    trainer = trainer_of(parse_config(tree))
    trainer.train()
    return trainer


def text_recipe(tmp_path, **sections):
    tree = vision_recipe(family_folder("text"), tmp_path, tmp_path / "run", **sections)
    tree["task"].setdefault("pictures", 0)
    return tree


# ---- rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metrics, name, hopeless, told",
    [
        ({"credit/adv_abs_max": 0.0, "reward/zero_spread_frac": 1.0, "reward/mean": 0.5}, "idle", True, "mean 0.5"),
        ({"credit/adv_abs_max": 0.0, "reward/mean": 0.5, "reward/std": 0.2}, "idle", True, "std 0.2"),
        ({"preference/pairs": 0.0}, "idle", True, "no pair"),
        (
            {"sample_loss/differing_prompts": 0.0, "sample_loss/rows": 9.0},
            "idle",
            True,
            "no reward of a prompt differs",
        ),
        ({"sample_loss/rows": 0.0}, "idle", True, "no sample enters"),
        ({"loss/mean": 1.0, "policy/grad_norm": 0.0}, "idle", True, "the gradient is 0"),
        ({"imitation/actions": 0.0}, "idle", True, "keep_above"),
        ({"data/labelled_steps": 0.0}, "idle", True, "label"),
        ({"rollout/truncated_per_leaf": 0.97}, "cut", True, "97% of the completions"),
        ({"rollout/truncated_per_leaf": 0.6}, "cut", False, "raise policy.max_new_tokens"),
        ({"imitation/cut_frac": 0.1}, "cut_references", False, "10% of the reference"),
        ({"imitation/cut_frac": 1.0}, "cut_references", True, "100% of the reference"),
        ({"policy/clip_frac": 1.0}, "clipped", True, "loss.clip_low"),
        ({"policy/grad_norm": math.nan}, "not_finite", True, "gradient is nan"),
        ({"policy/grad_norm": math.inf}, "not_finite", True, "gradient is inf"),
    ],
)
def test_what_an_iteration_shows(metrics, name, hopeless, told):
    (verdict,) = verdicts(metrics)
    assert (verdict.name, verdict.hopeless) == (name, hopeless) and told in verdict.text


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {
            "credit/adv_abs_max": 0.3,
            "reward/zero_spread_frac": 1.0,
            "reward/mean": 0.5,
        },  # steps have their own rewards
        {"credit/adv_abs_max": 0.0, "imitation/grad_norm": 1.0},  # learns references instead
        {"preference/pairs": 1.0, "rollout/truncated_per_leaf": 0.4, "policy/clip_frac": 0.5, "policy/grad_norm": 0.1},
    ],
)
def test_what_is_no_fault(metrics):
    assert verdicts(metrics) == [] and not is_idle(metrics)


def test_told_once_after_some_iterations_in_a_row():
    idle, cut, fine = {"preference/pairs": 0.0}, {"rollout/truncated_per_leaf": 1.0}, {"preference/pairs": 4.0}
    watch = Watch()
    told = [[v.name for v in watch.look(m, last=False)] for m in (idle, fine, idle, idle, idle | cut, idle | cut)]
    assert told == [[], [], [], [], ["idle", "cut"], []]


def test_a_short_run_is_told_at_its_end():
    watch, idle = Watch(), {"preference/pairs": 0.0}
    assert watch.look(idle, last=False) == [] and [v.name for v in watch.look(idle, last=True)] == ["idle"]
    watch = Watch()
    assert watch.look({"preference/pairs": 1.0}, last=False) == [] and watch.look(idle, last=True) == []


# ---- nothing to learn from --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sections",
    [
        {"rewards": CONSTANT},
        PAIRS | {"rewards": CONSTANT},
        {"trainer": "sample_loss", "rewards": CONSTANT, "loss": {"name": "diffusion_dpo"}, "plan": {0: 4}},
        {"trainer": "sample_loss", "rewards": CONSTANT, "loss": {"name": "nft"}, "plan": {0: 4}},
        {"trainer": "imitation", "source": "samples", "keep_above": 10.0, "loss": None},
    ],
    ids=lambda s: s.get("trainer", "branch_grpo"),
)
def test_doctor_fails_what_has_nothing_to_learn_from(tiny_model, tmp_path, sections):
    tree = recipe(tiny_model, tmp_path / "r") | sections
    if tree["loss"] is None:
        del tree["loss"]
    code, told = doctor(tmp_path, tree)
    assert code == 1 and "verdict    CANNOT LEARN: nothing to learn" in told
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "sections",
    [
        {},
        PAIRS,
        {"trainer": "sample_loss", "loss": {"name": "diffusion_dpo"}, "plan": {0: 4}},
        {"trainer": "imitation", "source": "samples", "keep_above": -10.0, "loss": None},
    ],
    ids=lambda s: s.get("trainer", "branch_grpo"),
)
def test_doctor_passes_every_kind_of_recipe(tiny_model, tmp_path, sections):
    tree = recipe(tiny_model, tmp_path / "r") | sections
    if tree["loss"] is None:
        del tree["loss"]
    code, told = doctor(tmp_path, tree)
    assert code == 0 and told.splitlines()[-1] == "verdict    fine"
    assert "reward     tiny:brightness: mean" in told and "calls per leaf, as forecast" in told


def test_doctor_tries_a_reward_model(tmp_path):
    trees = {
        "trainer": "step_reward", "scorer": {"name": "vision_prm", "model": str(family_folder("text"))},
        "task": {"name": "test_cannot_learn:Labelled"}, "run": {"output": str(tmp_path / "r"), "trackers": []},
    }  # fmt: skip
    trees["run"] |= {"prompts_per_iteration": 2, "cpu": True}
    code, told = doctor(tmp_path, trees)
    assert code == 0 and "data/labelled_steps 4" in told and "verdict    fine" in told


class Labelled:
    """Two questions with a right and a wrong step each."""

    def __init__(self):
        self.prompts = [Prompt(f"q{i}", {"question": "?" * (i + 1)}) for i in range(2)]
        self.eval_prompts = [Prompt("q2", {"question": "?"})]

    def labelled(self, prompts):
        steps = (Step("good"), Step("bad"))
        return labelled_forest(prompts, [[SolutionRecord(p.id, "?", steps, labels=(1.0, 0.0))] for p in prompts])


def test_the_trainer_warns_once_and_counts(tiny_model, tmp_path, caplog):
    tree = recipe(tiny_model, tmp_path / "r", rewards=CONSTANT, loss={"kl": 0.0}, run={"iterations": 5})
    train(tree)
    warnings = [r.message for r in caplog.records if "nothing to learn" in r.message]
    assert len(warnings) == 1 and warnings[0].startswith("iteration 3: nothing to learn: every advantage is 0")
    assert "are equal (mean 0.5)" in warnings[0]
    counts = [r["policy/idle_iterations"] for r in rows(tmp_path / "r") if "policy/idle_iterations" in r]
    assert counts == [1, 2, 3, 4, 5]
    train(
        recipe(tiny_model, tmp_path / "r", rewards=CONSTANT, loss={"kl": 0.0}, run={"iterations": 6, "resume": True})
    )
    assert rows(tmp_path / "r")[-2]["policy/idle_iterations"] == 6  # the last row is the evaluation


@pytest.mark.parametrize(
    "sections",
    [
        {"credit": {"estimators": [{"name": "grpo"}]}},
        PAIRS,
        {"trainer": "sample_loss", "loss": {"name": "diffusion_dpo"}},
    ],
    ids=lambda s: s.get("trainer", "branch_grpo"),
)
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_a_group_of_one_is_refused(tmp_path, sections, verb):
    tree = recipe(tmp_path / "no model there", tmp_path / "r", plan={0: 1}) | sections
    file = write_recipe(tmp_path / "recipe.yaml", tree)
    done = CliRunner().invoke(app, [verb, str(file)])
    assert done.exit_code != 0 and "plan" in str(done.exception) and "{0: 8}" in str(done.exception)


# ---- cut completions --------------------------------------------------------------------------------------------------


def test_cut_completions(tmp_path, caplog):
    """A random model hardly ever ends by itself."""
    tree = text_recipe(tmp_path, policy={"max_new_tokens": 3})
    code, told = doctor(tmp_path, tree)
    assert code == 1 and "of the completions were cut at the longest length" in told
    assert "raise policy.max_new_tokens" in told and "of the completions cut at the longest length" in told
    train(tree)
    warnings = [r.message for r in caplog.records if "of the completions were cut" in r.message]
    assert len(warnings) == 1 and warnings[0].startswith("iteration 1: ")


class Solved(Words):
    """Every question of Words with a reference: half of them one line, half of them longer."""

    def __init__(self, folder):
        super().__init__(folder, pictures=0)
        for i, p in enumerate(self.prompts):
            steps = ["so 7"] if i % 2 else ["one and two and three and four and five and six and seven", "so 7"]
            self.prompts[i] = Prompt(p.id, p.inputs, {"steps": steps})
        self.eval_prompts = self.prompts[:2]


def imitation(tmp_path, limit):
    tree = text_recipe(tmp_path, policy={"max_new_tokens": limit}) | {"trainer": "imitation"}
    for key in ("credit", "loss"):
        del tree[key]
    tree["task"] = {"name": "test_cannot_learn:Solved", "folder": str(tmp_path)}
    return tree


def test_references_longer_than_sampling_may_write(tmp_path, caplog):
    tree = imitation(tmp_path, 12)
    trainer = trainer_of(parse_config(tree))  # told before anything is trained
    assert "4 of 8 reference solutions are longer than sampling may write" in caplog.text
    length = len(trainer.policy.tokenizer.encode("\n".join(trainer.prompts[0].reference["steps"]))) + 1
    assert f"prompt 'q0', {length} tokens (policy.max_new_tokens=12)" in caplog.text
    assert trainer.iterate(0)["imitation/cut_frac"] == 0.5
    code, told = doctor(tmp_path, tree)
    assert code == 0 and "verdict    warning: 50% of the reference solutions are longer" in told
    code, told = doctor(tmp_path, tree, "policy.max_new_tokens=2")
    assert code == 1 and "CANNOT LEARN: 100% of the reference solutions" in told
    code, told = doctor(tmp_path, tree, f"policy.max_new_tokens={length}")
    assert code == 0 and "verdict    fine" in told


def test_turns_longer_than_sampling_may_write():
    from agent_tiny import agent

    policy = agent(str(family_folder("qwen2_5_vl")), max_new_tokens=6, max_steps=2)
    said = ["FIND_FRAME(it) = 7 and more and more of it\nx", "x\ny\nz", "x\ny"]
    long, many, fits = policy.beyond_limits(said)
    assert long.startswith("a turn of ") and long.endswith("(policy.max_new_tokens=6)")
    assert many == "3 turns (policy.max_steps=2)" and fits == ""


# ---- clipped ----------------------------------------------------------------------------------------------------------


def test_ratios_outside_the_clip_range(tmp_path, caplog):
    """Several large updates on one rollout, with the clip range of denoising."""
    narrow = {"loss": {"clip_low": 1e-6, "clip_high": 1e-6}, "optim": {"lr": 1e-2, "updates_per_rollout": 4}}
    tree = text_recipe(tmp_path, policy={"max_new_tokens": 80, "max_steps": 2}, **narrow)
    code, told = doctor(tmp_path, tree)
    assert code == 1 and "of the ratios of the last update lie outside the clip range" in told
    assert "loss.clip_low 1e-06 (the recipe's; policy vision has 0.2)" in told
    train(tree)
    assert sum("lie outside the clip range" in r.message for r in caplog.records) == 1


# ---- networks that are not finite ---------------------------------------------------------------------------------------


def test_the_check_counts_and_names():
    check_finite(torch.zeros(0), "x", "rows")
    check_finite(torch.tensor([[1.0, math.nan], [0.0, 0.0]]), "x", "rows", [1])
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(NotFiniteError, match="the output of net is not finite for 1 of 2 rows"):
            check_finite(torch.tensor([[1.0, bad], [0.0, 0.0]]), "net", "rows")
    with pytest.raises(NotFiniteError, match="for 1 of 1 rows"):
        check_finite(torch.tensor([math.nan, 0.0]), "net", "rows", torch.tensor([True, False]))


@pytest.fixture(scope="module")
def broken_dit(tiny_model, tmp_path_factory):
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("broken") / "dit")
    weights = load_file(folder / DIT)
    save_file({k: torch.full_like(v, torch.nan) if "proj_out" in k else v for k, v in weights.items()}, folder / DIT)
    return folder


@pytest.mark.parametrize("noise", ["split", "all"])
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_a_denoising_network_that_is_not_finite(broken_dit, tmp_path, verb, noise):
    """Not told, NaN latents would count as deterministic steps, or the reward would be blamed."""
    tree = recipe(broken_dit, tmp_path / "r", policy={"noise": noise})
    done = CliRunner().invoke(app, [verb, str(write_recipe(tmp_path / "recipe.yaml", tree))])
    assert isinstance(done.exception, NotFiniteError)
    assert "the output of the denoising network" in str(done.exception)


def test_the_rollout_names_the_first_step(broken_dit):
    from diffusion.policy import DiffusionPolicy

    policy = DiffusionPolicy.build(str(broken_dit), steps=6)
    with pytest.raises(NotFiniteError, match=r"denoising network at step 1 of 6 is not finite for 2 of 2 latents"):
        policy.rollout([Prompt("a", {"label": 1})], BranchPlan({0: 2}), seed=0)


def test_a_decoder_that_is_not_finite(tiny_model, tmp_path):
    """The half-precision decoder of SDXL is the known case."""
    trainer = trainer_of(parse_config(recipe(tiny_model, tmp_path / "r")))
    trainer.policy.adapter.decode = lambda x: torch.full((len(x), 1, 4, 4), torch.nan)
    with pytest.raises(NotFiniteError, match=r"the decoder of latents \(VAE\) is not finite"):
        trainer.iterate(0)
    with pytest.raises(NotFiniteError, match="the decoder"):
        trainer.evaluate(0)


def broken_text(tmp_path, value=torch.nan):
    folder = shutil.copytree(family_folder("text"), tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith("norm.weight"):
            weights[name] = torch.full_like(weights[name], value)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("verb", ["train", "doctor"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_language_model_that_is_not_finite(tmp_path, verb, value):
    tree = text_recipe(tmp_path, policy={"model": str(broken_text(tmp_path, value))})
    done = CliRunner().invoke(app, [verb, str(write_recipe(tmp_path / "recipe.yaml", tree))])
    assert isinstance(done.exception, NotFiniteError) and "the language model" in str(done.exception)


def test_an_agent_that_is_not_finite():
    from agent_tiny import agent

    policy = agent(str(family_folder("qwen2_5_vl")))
    with torch.no_grad():
        policy._network.hf.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NotFiniteError, match="the language model"):
        policy.rollout([Prompt("a", {"question": "?"})], BranchPlan({0: 2}), seed=0)


def test_a_scorer_that_is_not_finite_is_named(tmp_path):
    folder = shutil.copytree(saved_prm("text"), tmp_path / "prm")
    head = load_file(folder / "head.safetensors")
    save_file({k: torch.full_like(v, torch.nan) for k, v in head.items()}, folder / "head.safetensors")
    judge = {"name": "vision_prm", "model": str(folder)}
    with pytest.raises(NotFiniteError, match="the network of scorer VisionPrm"):
        train(text_recipe(tmp_path, step_rewards=[judge], credit={"estimators": [{"name": "process_grpo"}]}))
    reading = {"name": "score", "scorer": judge, "root": True}
    tree = text_recipe(tmp_path, readings=[reading], credit={"estimators": [{"name": "gae"}]})
    with pytest.raises(NotFiniteError, match="the network of scorer VisionPrm"):
        trainer_of(parse_config(tree)).iterate(0)


def test_an_update_that_is_not_finite_is_counted_and_told(tiny_model, tmp_path, caplog):
    """The rollout is fine, the replay of the update is not."""
    trainer = trainer_of(parse_config(recipe(tiny_model, tmp_path / "r", run={"iterations": 3}, loss={"kl": 0.0})))
    inner = trainer.policy.log_probs

    def overflowing(*args, **kwargs):
        out = inner(*args, **kwargs)
        return type(out)(out.index, out.logp * torch.nan)

    trainer.policy.log_probs = overflowing
    trainer.train()
    told = [r for r in rows(tmp_path / "r") if "policy/skipped_updates" in r]
    assert [r["policy/skipped_updates"] for r in told] == [1, 2, 3]
    assert "ratio deviates from 1 by nan" in caplog.text
    assert sum("the gradient is nan, so the update was skipped" in r.message for r in caplog.records) == 1


# ---- untrained heads ----------------------------------------------------------------------------------------------------

PLAIN = {"name": "vision_prm", "model": str(family_folder("text"))}


@pytest.mark.parametrize(
    "sections, where",
    [
        ({"step_rewards": [PLAIN]}, "step_rewards.0: the head of 'vision_prm' is untrained"),
        ({"step_rewards": [PLAIN | {"head": "likelihood"}]}, "step_rewards.0: the head of .*head likelihood"),
        ({"readings": [{"name": "score", "scorer": PLAIN}]}, "readings.0.scorer: the head of 'vision_prm'"),
        ({"readings": [{"name": "attribution", "scorer": PLAIN}], "plan": {0: 2}}, "readings.0.scorer: the head"),
        ({"step_rewards": [PLAIN], "readings": [{"name": "score", "scorer": PLAIN}], "online": {"scorer": "score"}},
         "step_rewards.0: the head"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_an_untrained_head_is_refused_before_anything_is_loaded(tmp_path, sections, where, verb):
    tree = text_recipe(tmp_path, policy={"model": str(tmp_path / "no model there")}, **sections)
    with pytest.raises(ComponentError, match=where):
        trainer_of(parse_config(tree)) if verb == "train" else list(examine(parse_config(tree)))


def test_a_new_latent_head_is_refused(tiny_model, tmp_path):
    tree = recipe(tmp_path / "no model there", tmp_path / "r", trainer="step_preference")
    tree |= {"loss": {"name": "lpo"}, "step_rewards": [{"name": "latent_reward", "model": str(tiny_model)}]}
    with pytest.raises(ComponentError, match="step_rewards.0: the head of 'latent_reward' is untrained"):
        trainer_of(parse_config(tree))


def test_a_head_that_learns_along_or_reads_the_models_own_tokens_is_taken(tmp_path):
    credit = {"estimators": [{"name": "process_grpo"}]}
    learning = text_recipe(tmp_path, step_rewards=[PLAIN], online={"scorer": "vision_prm"}, credit=credit)
    assert trainer_of(parse_config(learning)).run.rewarder.step_rewards
    own = PLAIN | {"head": "tokens", "format": {"marker": "#", "positive": "+", "negative": "-", "read_offset": -1}}
    assert trainer_of(parse_config(text_recipe(tmp_path, step_rewards=[own], credit=credit))).run.rewarder.step_rewards


def test_score_search_and_bench_refuse_it_too(tmp_path):
    from mmrl.reasoning.verbs import run_benchmark, run_score
    from mmrl.search.recipe import SearchConfig
    from mmrl.search.verb import run_search

    (tmp_path / "data.jsonl").write_text(json.dumps({"id": "a", "question": "?", "steps": ["x"]}) + "\n")
    with pytest.raises(ComponentError, match="the head of 'vision_prm' is untrained"):
        run_score(PLAIN, tmp_path / "data.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(ComponentError, match="the head of 'vision_prm' is untrained"):
        run_benchmark("processbench", tmp_path / "data.jsonl", PLAIN, None)
    search = {
        "policy": {"name": "vision", "model": str(tmp_path / "no model there")}, "output": str(tmp_path / "s"),
        "task": {"name": "vision_tiny:Words", "folder": str(tmp_path)}, "method": {"name": "best_of_n"},
        "scorer": PLAIN,
    }  # fmt: skip
    with pytest.raises(ComponentError, match="the head of 'vision_prm' is untrained"):
        run_search(parse_config(search, model=SearchConfig))


# ---- trackers and defaults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tracker, told",
    [("comet_ml", "the package of comet_ml is not installed.*pip install"), ("wandbb", "did you mean wandb")],
)
@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_a_tracker_that_is_not_there_is_an_error_before_loading(tmp_path, tracker, told, verb, monkeypatch):
    from mmrl.trainers import processes

    monkeypatch.setattr(processes, "get_available_trackers", lambda: ["tensorboard"])
    tree = recipe(tmp_path / "no model there", tmp_path / "r", run={"trackers": [tracker]})
    with pytest.raises(ConfigError, match=told):
        trainer_of(parse_config(tree)) if verb == "train" else list(examine(parse_config(tree)))


def test_doctor_shows_the_defaults_of_the_modality(tiny_model, tmp_path):
    tree = recipe(tiny_model, tmp_path / "r")
    line = next(str(x) for x in examine(parse_config(tree)) if x.topic == "defaults")
    assert "loss.clip_low 0.001 (default of policy diffusion)" in line
    assert "optim.lr 0.01 (the recipe's; policy diffusion has 0.0002)" in line
    assert "credit.estimators branch_depth (default of policy diffusion)" in line
    shown = load_config(write_recipe(tmp_path / "r.yaml", imitation(tmp_path, 80) | {"optim": {}}))
    line = next(str(x) for x in examine(shown) if x.topic == "defaults")
    assert "optim.lr 2e-05 (default of trainer imitation)" in line and "clip" not in line
