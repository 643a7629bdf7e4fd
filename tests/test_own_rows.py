"""The file of docs/guides/own_components.md beside a recipe: its functions by dotted path, each through the verb that runs it."""

import json
import sys
from pathlib import Path

import pytest
import torch
import vision_tiny  # noqa: F401 - its folder of model families
import yaml
from tiny import recipe
from verbs import run_verb

from mmrl.rollout import Rollout

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "own_components.md"
OWN = PAGE.read_text().partition("```python\n")[2].partition("```")[0]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the file; a process of mmrl begins with its own sys.path and modules."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rows", raising=False)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "my_rows.py").write_text(OWN)
    return tmp_path


def write(folder, tree):
    file = folder / "recipes" / "r.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {k: v for row in rows for k, v in row.items()}


def test_an_estimator_and_the_reading_it_needs(tiny_model, folder):
    tree = recipe(
        tiny_model, folder / "run", run={"iterations": 1}, readings=[{"name": "my_rows:brightest"}],
        credit={"estimators": [{"name": "my_rows:above", "scale": 2.0}]},
    )  # fmt: skip
    run_verb("train", write(folder, tree))
    told = metrics(folder)
    assert told["policy/grad_norm"] > 0 and told["reading/my_rows:brightest/tags.brightest"] > told["reward/mean"]
    del tree["readings"]
    tree["run"]["output"] = str(folder / "refused")
    with pytest.raises(ValueError, match="'my_rows:above' reads tags.brightest, which nothing in this recipe writes"):
        run_verb("train", write(folder, tree))
    with pytest.raises(ValueError, match=r"unknown key .*scal=2 \(did you mean scale\?\)"):
        run_verb("train", write(folder, tree), "readings=[{name: 'my_rows:brightest'}]",
            "credit.estimators=[{name: 'my_rows:above', scal: 2}]")  # fmt: skip


def test_a_kernel_and_a_model_family(tiny_model, folder):
    tree = recipe(tiny_model, folder / "run", run={"iterations": 1}, policy={"noise": "all"})
    usual = Rollout.load(_stored(folder, tree, "usual"))
    tree["policy"] |= {"kernel": "my_rows:quiet", "adapter": "my_rows:Mine"}
    quiet = Rollout.load(_stored(folder, tree, "quiet"))
    std = usual.tree.tags["std"]
    drawn = ~std.isnan()
    torch.testing.assert_close(quiet.tree.tags["std"][drawn], std[drawn] / 2)
    run_verb("train", write(folder, tree))
    assert metrics(folder)["policy/ratio_dev_max"] < 1e-5  # the update replays the same kernel


def _stored(folder, tree, name):
    run_verb("rollouts", write(folder, tree), "--out", folder / name)
    return next(f.parent for f in (folder / name).glob("*/rollout.json"))


def test_a_record_format_and_an_exporter(folder, monkeypatch):
    rows = [{"ask": "1 + 1?", "text": "1 + 1 = 2\n2", "good": 2}, {"ask": "2 + 2?", "text": "2 + 2 = 5\n5", "good": 0}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(folder / "recipes")  # verbs without a recipe look into the working directory
    run_verb("convert", folder / "mine.jsonl", folder / "trl.jsonl", "--format", "my_rows:lines", "--to", "trl")
    trl = [json.loads(line) for line in (folder / "trl.jsonl").read_text().splitlines()]
    assert [(r["completions"], r["labels"]) for r in trl] == [
        (["1 + 1 = 2", "2"], [True, True]), (["2 + 2 = 5", "5"], [False, False])
    ]  # fmt: skip
    run_verb("convert", folder / "trl.jsonl", folder / "back.jsonl", "--format", "trl", "--to", "my_rows:as_lines")
    back = [json.loads(line) for line in (folder / "back.jsonl").read_text().splitlines()]
    assert back == [{k: r[k] for k in ("ask", "text")} for r in rows]


def test_pairs_and_a_preference_loss(tiny_model, folder):
    tree = recipe(tiny_model, folder / "run", run={"iterations": 1, "prompts_per_iteration": 1})
    tree |= {"trainer": "step_preference", "loss": {"name": "my_rows:steep", "beta": 5.0}}
    with pytest.raises(ValueError, match="loss 'my_rows:steep' names no pair builder of its own; set pairs.name"):
        run_verb("train", write(folder, tree))
    run_verb("train", write(folder, tree | {"pairs": {"name": "my_rows:first_two"}}))
    assert metrics(folder)["preference/pairs"] == 1 and metrics(folder)["policy/grad_norm"] > 0


def test_a_loss_of_steps_and_a_format_in_a_recipe(folder):
    from families import family_folder

    rows = [{"ask": f"{i} + 1?", "text": f"{i} + 1\n{i + 1}", "good": i % 3} for i in range(6)]
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {name: str(folder / f"{name}.jsonl") for name in ("train", "eval")} | {"format": "my_rows:lines"}
    tree = {
        "trainer": "step_reward", "task": {"name": "step_records", **data},
        "scorer": {"name": "vision_prm", "model": str(family_folder("text"))},
        "loss": {"name": "my_rows:sharp", "power": 1.0},
        "run": {"output": str(folder / "run"), "iterations": 1, "prompts_per_iteration": 4, "trackers": [], "report": False, "cpu": True},
    }  # fmt: skip
    run_verb("train", write(folder, tree))
    assert metrics(folder)["data/labelled_steps"] == 8 and metrics(folder)["policy/grad_norm"] > 0
    with pytest.raises(ValueError, match=r"unknown key loss.pow=1 \(did you mean power\?\)"):
        run_verb(
            "train",
            write(folder, tree | {"loss": {"name": "my_rows:sharp", "pow": 1}}),
            f"run.output={folder / 'other'}",
        )
