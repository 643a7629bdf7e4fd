"""Stored searches and annotations of the shapes task train every trainer, from the command lines of docs/guides/search.md."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from families import family_folder
from verbs import run_verb

from mmrl.config import load_config
from mmrl.rollout import Rollout
from mmrl.trainers import trainer_of

ROOT = Path(__file__).parents[2]
CONFIGS, DOCS = ROOT / "configs" / "vision", ROOT / "docs"
SHORT = ["run.cpu=true", "run.iterations=1", "run.prompts_per_iteration=2", "run.trackers=[]", "run.report=false"]
TASK = ["task.train=6", "task.held_out=2"]
# a random model never answers right, so what is searched for is digits
DIGITS = "{name: 'vision_tiny:digits', timeout_s: 0}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the documented commands name configs/
        patch.setenv("MMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def policy(**more):
    options = {"model": str(family_folder("qwen2_5_vl")), "max_new_tokens": 40, "temperature": 1.0, **more}
    return [f"policy.{k}={v}" for k, v in options.items()]


def documented():
    """The commands of "Train on what was searched": words after `mmrl`, by the method or loss that they name."""
    section = (
        (DOCS / "guides" / "search.md").read_text().partition("## Train on what was searched")[2].partition("\n## ")[0]
    )
    lines = section.partition("```\n")[2].partition("```")[0].replace("\\\n", " ").splitlines()
    rows = [shlex.split(line, comments=True) for line in lines]
    return {name: row[1:] for name, row in zip(("mcts", "mcts_dpo", "svpo", "propa"), filter(None, rows), strict=True)}


@pytest.fixture(scope="module")
def trees(cache, tmp_path_factory):
    """The trees of the documented search, of four questions and fewer iterations."""
    folder = tmp_path_factory.mktemp("mcts")
    run_verb(
        *documented()["mcts"], *TASK, *policy(), "method={name: mcts, n: 3, iterations: 8}", "prompts=4", "batch=2",
        "cpu=true", "scorer=vision_tiny:step_digits", f"verifier={DIGITS}", f"output={folder / 'search'}",
        f"rollouts={folder / 'trees'}",
    )  # fmt: skip
    return folder / "trees"


def train(recipe, output, *more):
    """Metrics of a command of the documentation, by its name, or of a recipe: one iteration on a random model."""
    command = documented().get(recipe) or ["train", str(CONFIGS / recipe)]
    run_verb(*command, *SHORT, *TASK, *policy(), f"rewards=[{DIGITS}]", f"run.output={output}", *more)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {k: v for row in rows for k, v in row.items()}


def rollouts(folder):
    return [Rollout.load(f) for f in sorted(folder.glob("0*"))]


def test_a_search_stores_what_it_knows(trees):
    """Every ended path has its verdict, every step the scorer's number, its visits and its value."""
    record = json.loads((trees / "recipe.json").read_text())
    assert record["grown_by"]["name"] == "mcts" and record["task"]["train"] == 6
    stored = rollouts(trees)
    assert [len(r.prompts) for r in stored] == [2, 2]
    for rollout in stored:
        tree = rollout.tree
        ended = tree.is_leaf & ~tree.tags["open"]
        assert torch.equal(tree.is_finished, ended) and bool(tree.tags["open"].any()) and bool(ended.any())
        assert not bool(tree.value.isnan().any() | tree.root_value.isnan().any())
        seen = tree.tags["visits"] > 0
        torch.testing.assert_close(tree.tags["q_sum"][seen] / tree.tags["visits"][seen], tree.value[seen])
        first = tree.depth == 0
        for g in range(2):  # the first iteration opens the prompt, each of the others walks through a first step
            assert int(tree.tags["visits"][first & (tree.group == g)].sum()) == 7
        read = [t.strip() != "" for t in rollout.texts]
        assert torch.equal(~tree.step_reward.isnan(), torch.tensor(read))
        assert rollout.about == {"grown_by": "mcts", "seed": 2, "temperature": 1.0, "written": True}


def test_mcts_dpo_with_visits(trees, tmp_path):
    told = train("mcts_dpo", tmp_path, f"rollouts={trees}")
    assert told["preference/pairs"] > 0 and told["preference/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert told["policy/grad_norm"] > 0


def test_visits_say_how_sure_a_label_is(trees, tmp_path):
    """eps = min(1 - c, 1/2), c = 1 / (1 + N_l / N_w): below 1/2 where the chosen step was visited more."""
    config = load_config(
        CONFIGS / "shapes_step_dpo.yaml",
        [*SHORT, *TASK, *policy(), f"rewards=[{DIGITS}]", f"run.output={tmp_path}", f"rollouts={trees}",
         "step_rewards=[]", "loss={name: mcts_dpo}", "pairs=null"],
    )  # fmt: skip
    trainer = trainer_of(config)
    batch = trainer.batch(trainer.run.rollout(0))
    visits = batch.rollout.tree.tags["visits"]
    w, l = visits[batch.pairs.chosen].double(), visits[batch.pairs.rejected].double()  # noqa: E741
    assert bool((w != l).any())
    torch.testing.assert_close(batch.smoothing.double(), (1 - w / (w + l)).clamp(max=0.5), atol=1e-6, rtol=0)


def test_svpo_with_values(trees, tmp_path):
    told = train("svpo", tmp_path, f"rollouts={trees}", "pairs.threshold=0.01")
    assert told["preference/pairs"] > 0 and told["policy/grad_norm"] > 0


def test_propa_with_visits(trees, tmp_path):
    told = train("propa", tmp_path, f"rollouts={trees}")
    assert told["policy/ratio_dev_max"] < 1e-4 and told["policy/grad_norm"] > 0 and told["credit/adv_abs_max"] > 0


def test_a_value_model_and_imitation(trees, tmp_path):
    """step_reward learns the values of the search, imitation the best of what it found."""
    scorer = f"{{name: vision_prm, model: {family_folder('qwen2_5_vl')}, head: likelihood}}"
    held_out = shutil.copytree(trees, tmp_path / "held_out")
    run_verb(
        "train", CONFIGS / "shapes_svpo_value.yaml", *SHORT, f"scorer={scorer}", f"rollouts={trees}",
        f"task={{name: tree_values, eval: {held_out}, by: value}}", f"run.output={tmp_path / 'value'}",
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "value" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/value_mse" in row for row in rows) and any(row.get("policy/grad_norm", 0) > 0 for row in rows)
    recipe = {
        "trainer": "imitation", "task": {"name": "shapes", "filled": [10, 15]}, "policy": {"name": "vision"},
        "source": "samples", "keep_above": 0.0,
    }  # fmt: skip
    (tmp_path / "imitation.yaml").write_text(json.dumps(recipe))
    told = train(tmp_path / "imitation.yaml", tmp_path / "imitation", f"rollouts={trees}")
    assert told["imitation/solutions_per_prompt"] == 1 and told["policy/grad_norm"] > 0
    with pytest.raises(ValueError, match="set source=samples"):
        train(tmp_path / "imitation.yaml", tmp_path / "r", f"rollouts={trees}", "source=reference")


def test_other_rewards_leave_open_leaves_alone(trees, tmp_path):
    """Where a search did not go on nobody knows the outcome, whatever the reward."""
    from mmrl.config import load_config
    from mmrl.trainers import trainer_of

    more = [*SHORT, *TASK, *policy(), f"rollouts={trees}", f"run.output={tmp_path}", "rewards=[{name: shapes_answer}]"]
    trainer = trainer_of(load_config(CONFIGS / "shapes_propa.yaml", more))
    tree = trainer.run.rollout(0).tree
    assert bool(tree.tags["open"].any()) and torch.equal(tree.is_finished, tree.is_leaf & ~tree.tags["open"])
    assert bool((tree.outcome[tree.is_finished] == 0).all())


@pytest.mark.parametrize(
    "change, told",
    [
        ("policy.temperature=0.5", "temperature: 1.0 stored, 0.5 here"),
        ("task.train=1", "stored prompts are none of the task's 1 training prompts"),
    ],
)
def test_another_recipe_is_refused(trees, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        train("shapes_propa.yaml", tmp_path, f"rollouts={trees}", change)


@pytest.mark.parametrize(
    "method", ["{name: monte_carlo, solutions: 2, k: 2}", "{name: omega, k: 3, searches: 3, min_words: 0}"]
)
def test_an_annotation_trains_as_well(cache, tmp_path, method):
    """Completions of prefixes with their counts: a value model, pairs by value, and GRPO on what was sampled."""
    trees = tmp_path / "trees"
    run_verb(
        "annotate", CONFIGS / "shapes_annotate.yaml", *TASK, *policy(), f"method={method}", "prompts=4", "batch=2",
        "cpu=true", "verifier={name: 'vision_tiny:odd', timeout_s: 0}", f"output={tmp_path / 'annotated'}",
        f"rollouts={trees}", "inject=null",
    )  # fmt: skip
    stored = rollouts(trees)
    assert all(r.about["grown_by"] in ("montecarlo", "omega") and not r.tree.is_chains for r in stored)
    assert all("token" in r.actions.payload and not bool(r.tree.tags["open"].any()) for r in stored)
    rewards = "rewards=[{name: 'vision_tiny:odd', timeout_s: 0}]"
    told = train(
        "shapes_step_dpo.yaml", tmp_path / "dpo", f"rollouts={trees}", "step_rewards=[]", "loss={name: svpo}",
        "pairs={name: siblings, by: outcome, threshold: 0.01}", rewards,
    )  # fmt: skip
    assert told["preference/pairs"] > 0
    told = train("shapes_propa.yaml", tmp_path / "r", f"rollouts={trees}", "imitation.weight=0", rewards)
    assert told["policy/ratio_dev_max"] < 1e-4 and told["credit/adv_abs_max"] > 0


def test_a_search_at_a_temperature_of_its_own(cache, tmp_path):
    """Log-probs are those of the temperature that was used, and training has to be at it."""
    trees = tmp_path / "trees"
    run_verb(
        *documented()["mcts"], *TASK, *policy(), "method={name: beam, n: 4, width: 2, temperature: 0.7}", "prompts=2",
        "cpu=true", "scorer=vision_tiny:step_digits", f"verifier={DIGITS}", f"output={tmp_path / 'search'}",
        f"rollouts={trees}",
    )  # fmt: skip
    assert [r.about["temperature"] for r in rollouts(trees)] == [0.7]
    with pytest.raises(ValueError, match="temperature: 0.7 stored, 1.0 here"):
        train("propa", tmp_path / "a", f"rollouts={trees}", "policy.temperature=1.0")
    told = train("propa", tmp_path / "b", f"rollouts={trees}", "policy.temperature=0.7")
    assert told["policy/ratio_dev_max"] < 1e-4
