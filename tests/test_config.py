import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import yaml

from mmrl.config import ConfigError, load_config, load_section, parse_config
from mmrl.reasoning.annotate.recipe import AnnotateConfig
from mmrl.registry import ComponentError, build, find
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
