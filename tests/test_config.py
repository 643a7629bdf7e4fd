import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml

from mmrl.cli import _section
from mmrl.config import ConfigError, load_config, load_section, parse_config
from mmrl.foreign_keys import FOREIGN_KEYS
from mmrl.reasoning.annotate.recipe import AnnotateConfig
from mmrl.registry import ComponentError, build, find, rows
from mmrl.search.recipe import SearchConfig

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))
BASE = {"task": {"name": "digits"}, "policy": {"name": "diffusion"}, "plan": {0: 2}}


@pytest.mark.parametrize(
    "file", [f for f in CONFIGS if not {"accelerate", "credit"} & set(f.parts)], ids=lambda f: f.stem
)
def test_every_recipe_parses(file):
    tree = yaml.safe_load(file.read_text())
    if "method" in tree:  # of annotate or search
        model = SearchConfig if "scorer" in tree else AnnotateConfig
        config = load_section(file, model)
        assert parse_config(config.model_dump(mode="json"), model=model) == config
        return
    config = load_config(file)
    assert parse_config(yaml.safe_load(config.dump())) == config


def test_overrides(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    many = load_config(file, ["credit.estimators=[{name: grpo}, {name: rloo}]", "credit.estimators.1.weight=0.5"])
    assert [e.weight for e in many.credit.estimators] == [1.0, 0.5]
    with pytest.raises(ConfigError, match="leads nowhere"):
        load_config(file, ["credit.estimators=[]", "credit.estimators.1.weight=0.5"])
    config = load_config(file, ["optim.lr=3e-5", "plan={0: 16}", "policy.eta=0.5", "run.resume=true"])
    assert config.optim.lr == 3e-5 and config.plan == {0: 16} and config.policy.options == {"eta": 0.5}


@pytest.mark.parametrize(
    "text, value",
    [("1e-6", 1e-6), ("1E3", 1000.0), ("-2e-1", -0.2), (".5", 0.5), ("1.", 1.0), ("+3e0", 3.0), ("12", 12), ("1e", "1e"),
     ("e6", "e6"), ("1e-6b", "1e-6b"), ("'1e-6'", "1e-6")],
)  # fmt: skip
def test_numbers_of_a_recipe_are_those_of_yaml_1_2(tmp_path, text, value):
    file = tmp_path / "r.yaml"
    file.write_text(f"{yaml.safe_dump(BASE)}step_rewards: [{{name: any, given: {text}}}]\n")
    config = load_config(file, [f"policy.given={text}"])
    for got in (config.step_rewards[0].options["given"], config.policy.options["given"]):
        assert got == value and type(got) is type(value)


def test_modules_beside_a_recipe_can_be_named_in_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "recipes" / "beside_the_recipe.py").write_text("def mine(samples, *, k: int): ...\n")
    (tmp_path / "in_the_working_directory.py").write_text("def mine(samples, *, k: int): ...\n")
    (tmp_path / "yaml.py").touch()
    monkeypatch.chdir(tmp_path)
    load_config("recipes/r.yaml")
    for module in ("beside_the_recipe", "in_the_working_directory"):
        assert list(find("rewards", f"{module}:mine").options) == ["k"]
    assert PathFinder.find_spec("yaml", sys.path).origin == yaml.__file__  # no file of a user takes a library's place


@pytest.mark.parametrize(
    "override, message",
    [
        ("optim.lrr=1", r"unknown key optim.lrr=1 \(did you mean optim.lr\?\)"),
        ("rum.seed=1", r"unknown key rum=\{'seed': 1\} \(did you mean run\?\)"),
        ("optim.lr=fast", r"optim.lr='fast': input should be a valid number"),
        ("optim.lr=-1", r"optim.lr=-1: input should be greater than 0"),
        ("loss.ratio=word", r"loss.ratio='word': input should be 'action', 'step' or 'trajectory'"),
        ("plan={a: 2}", r"plan.a"),
        ("optim.lr", "must be key.path=value"),
        ("plan.0.x=2", "plan.0.x leads nowhere; a part of it is a value or a missing entry"),
        ("credit={estimators: []}", "credit.estimators"),
        ("task.name.first=2", "leads nowhere"),
    ],
)
def test_bad_keys_name_path_value_and_nearest(tmp_path, override, message):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE | {"plan": {"0": 2}} if "plan.0" in override else BASE))
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(ConfigError, match="no recipe at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping of sections"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is no valid YAML"):
        load_config(tmp_path / "broken.yaml")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: find("tasks", "digit"), r"unknown task 'digit' \(did you mean digits\?\)"),
        (lambda: find("tasks", "tiny:Nope"), "no attribute 'Nope'"),
        (lambda: find("tasks", "nowhere:x"), "No module named 'nowhere'"),
        (
            lambda: build("policies", "policy", "diffusion", {"kernal": "ode"}),
            r"unknown key policy.kernal='ode' \(did you mean kernel\?\)",
        ),
        (
            lambda: build("policies", "policy", "diffusion", {"steps": "many"}),
            r"policy.steps='many': input should be a valid integer",
        ),
        (
            lambda: build("policies", "policy", "diffusion", {"noise": "some"}),
            r"policy.noise='some': input should be 'split', 'all' or 'window'",
        ),
        (lambda: build("rewards", "rewards.0", "tiny:brightness", {"k": 1}), "'tiny:brightness' takes none"),
        (
            lambda: build("policies", "policy", "video", {"views": {"frame": 8}}),
            r"unknown key policy.views.frame=8 \(did you mean policy.views.frames\?\); known: frames, segment_frames, ",
        ),
        (
            lambda: build("policies", "policy", "video", {"views": {"frames": 0}}),
            r"policy.views=\{'frames': 0\}: policy.views.frames=0: at least 1$",
        ),
        (
            lambda: build("scorers", "scorer", "vision_prm", {"format": {"marker": "+", "marks": "turns"}}),
            r"unknown key scorer.format.marks='turns' \(did you mean scorer.format.markers\?\); known: marker, joiner",
        ),
    ],
)
def test_components_by_name(call, message):
    with pytest.raises(ComponentError, match=message):
        call()


@pytest.mark.parametrize(
    "policy, clip, estimator, bound", [("vision", 0.2, "grpo", None), ("diffusion", 1e-3, "branch_depth", 5.0)]
)
def test_defaults_that_differ_by_modality_come_from_the_policy(policy, clip, estimator, bound):
    tree = {"task": {"name": "shapes"}, "policy": {"name": policy}, "plan": {0: 4}}
    config = parse_config(tree)
    assert (config.loss.clip_low, config.loss.clip_high, config.credit.clip) == (clip, clip, bound)
    assert [e.name for e in config.credit.estimators] == [estimator]
    # a section that sets something else keeps them, a value of its own wins
    own = parse_config(tree | {"loss": {"kl": 0.1, "clip_high": 0.3}, "credit": {"clip": 2.0}})
    assert (own.loss.kl, own.loss.clip_low, own.loss.clip_high, own.credit.clip) == (0.1, clip, 0.3, 2.0)
    assert [e.name for e in own.credit.estimators] == [estimator]


def test_a_token_policy_needs_no_closed_divergence():
    """`loss: {kl: 0.04}` alone is a recipe: tokens estimate what Gaussian steps have in closed form."""
    tree = {"task": {"name": "shapes"}, "plan": {0: 4}, "loss": {"kl": 0.04}}
    forms = {p: parse_config(tree | {"policy": p}).loss.kl_form for p in ("vision", "video", "diffusion")}
    assert forms == {"vision": "k3", "video": "k3", "diffusion": "exact"}


def test_a_scorer_has_defaults_of_its_own():
    """A language model that learns to judge takes VL-PRM's rate, a latent reward the one of denoisers."""
    tree = {"trainer": "step_reward", "task": {"name": "step_records"}}
    rates = {s: parse_config(tree | {"scorer": s}).optim.lr for s in ("vision_prm", "latent_reward")}
    assert rates == {"vision_prm": 1e-5, "latent_reward": 2e-4}
    assert parse_config(tree | {"scorer": {"name": "vision_prm"}, "optim": {"lr": 0.1}}).optim.lr == 0.1
    with pytest.raises(ConfigError, match="scorer.name: unknown step reward 'vision_prn'"):
        parse_config(tree | {"scorer": "vision_prn"})


def test_a_trainer_has_defaults_of_its_own():
    tree = {"task": {"name": "shapes"}, "policy": {"name": "vision"}}
    assert parse_config(tree | {"trainer": "imitation"}).optim.lr == 2e-5
    assert parse_config(tree | {"trainer": "step_preference"}).optim.lr == 1e-6


def test_a_bare_name_is_a_section_without_options():
    tree = {
        "task": "shapes",
        "policy": "vision",
        "plan": {0: 4},
        "rewards": ["shapes_answer"],
        "readings": ["tree_value"],
    }
    short = parse_config(tree | {"credit": {"estimators": ["gae", {"name": "grpo", "weight": 0.5}]}})
    named = {k: {"name": tree[k]} for k in ("task", "policy")} | {
        k: [{"name": tree[k][0]}] for k in ("rewards", "readings")
    }
    full = parse_config(tree | named | {"credit": {"estimators": [{"name": "gae"}, {"name": "grpo", "weight": 0.5}]}})
    assert short == full and short.loss.clip_low == 0.2  # the policy's defaults reach a bare name too


def test_names_of_other_trainers_are_told_the_key_here(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(BASE))
    for key, told in [
        ("optim.learning_rate=1e-4", r"unknown key optim.learning_rate=0.0001 \(here: optim.lr\); known: "),
        ("run.gradient_accumulation_steps=4", "(here: policy.max_tokens"),
        ("gradient_checkpointing=true", "(here: policy.gradient_checkpointing)"),
        ("precision=bf16", "(here: run.mixed_precision"),
        ("run.num_train_epochs=3", "(here: run."),
        ("run.per_device_train_batch_size=8", "(here: run.prompts_per_iteration"),
        ("loss.beta=0.04", "(here: loss.kl)"),
        ("loss.epsilon=0.2", "(here: loss.clip_low and loss.clip_high)"),
        ("num_generations=8", "(here: plan, such as plan: {0: 8})"),
    ]:
        with pytest.raises(ConfigError, match=told if "\\" in told else re.escape(told)):
            load_config(file, [key])
    for key, told in [("lora_r", "policy.lora_rank"), ("max_completion_length", "policy.max_new_tokens")]:
        with pytest.raises(ComponentError, match=rf"unknown key policy\.{key}=16 \(here: {told}\)"):
            find("policies", "vision").check({key: 16}, "policy")


def test_every_key_that_other_trainers_names_lead_to_exists():
    """No hint sends anybody to a key that a recipe does not have."""
    recipes = [find("trainers", name).facts["config"] for name in ("branch_grpo", "step_preference")]
    known = {"policy": {}, "task": {}}
    for recipe in recipes:
        for section, field in recipe.model_fields.items():
            known.setdefault(section, {}).update(getattr(field.annotation, "model_fields", {}))
    for kind, section in (("policies", "policy"), ("tasks", "task")):
        for row in rows(kind):
            known[section].update(row.options)
    for foreign, told in FOREIGN_KEYS.items():
        for key in re.findall(r"\b(?:optim|run|loss|credit|policy|task)\.\w+|^(?:plan|rewards|callbacks)\b", told):
            section, _, name = key.partition(".")
            assert section in known and (not name or name in known[section]), (foreign, told)
            assert foreign not in known[section] or foreign == name, f"{foreign} is a key of {section} itself"
        assert re.match(r"(optim|run|loss|credit|policy|task)\.\w|plan|rewards|callbacks", told), (foreign, told)


def test_truth_values_and_times_are_those_of_yaml_1_2(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(
        yaml.safe_dump(BASE)
        + "run: {resume: yes, cpu: Off, mixed_precision: no, output: 1:30}\n"
        + "step_rewards: [{name: vision_prm, format: {positive: Yes, negative: No}}]\n"
    )
    config = load_config(file, ["run.report=no"])
    assert (config.run.resume, config.run.cpu, config.run.report, config.run.mixed_precision) == (
        True,
        False,
        False,
        "no",
    )
    assert config.run.output == Path("1:30")
    options = config.step_rewards[0].options
    assert find("scorers", "vision_prm").check(options) == {"format": {"positive": "Yes", "negative": "No"}}
    with pytest.raises(ComponentError, match="format.positive=True: .* goes in quotes"):
        find("scorers", "vision_prm").check({"format": {"positive": True}})
    # an own function without types
    assert find("rewards", "test_config:_untyped").check({"strict": "no"}) == {"strict": False}
    assert _section("{name: vision_prm, format: {positive: Yes}, lr: 1e-6}")["lr"] == 1e-6


def _untyped(samples, *, strict=True):
    return [0.0 for _ in samples]


def test_a_blank_that_lacks_behind_a_colon_is_told(tmp_path):
    file = tmp_path / "r.yaml"
    for section, told in [("plan: {0:8}", "'0: 8', not '0:8'"), ("rewards: [{name:x}]", "'name: x', not 'name:x'")]:
        file.write_text(f"trainer: branch_grpo\n{section}\n")
        with pytest.raises(ConfigError, match=f"is no valid YAML: write a blank after the colon: {told}(.|\n)*line 2"):
            load_config(file)
    file.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="override 'plan={0:8}': .*write a blank after the colon"):
        load_config(file, ["plan={0:8}"])
    assert load_config(file, ["task.given={'0:8', a}"]).task.options["given"] == {"0:8": None, "a": None}


@pytest.mark.parametrize(
    "kind, name", [("policies", "vision"), ("policies", "video"), ("policies", "diffusion"), ("scorers", "vision_prm")]
)
def test_a_model_that_is_not_there_is_told_when_options_are_checked(kind, name, tmp_path, monkeypatch):
    row = find(kind, name)
    for missing in (str(tmp_path / "none"), "runs/of/nobody", "./none"):
        with pytest.raises(ComponentError, match=rf"policy.model='{missing}': there is no such folder"):
            row.check({"model": missing}, "policy")
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ComponentError, match="this is a file; give the folder of the model"):
        row.check({"model": str(tmp_path / "weights.bin")}, "policy")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert row.check({"model": "own/model"}) == {"model": "own/model"}


def test_a_hub_name_is_looked_for_in_the_cache_and_on_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    row = find("policies", "vision")
    with pytest.raises(ComponentError, match="no such folder in .*, and the hub cannot be asked"):
        row.check({"model": "Qwen/not-cached"}, "policy")
    (tmp_path / "models--Qwen--cached").mkdir()
    assert row.check({"model": "Qwen/cached"}, "policy") == {"model": "Qwen/cached"}
