"""Rewards with TRL's signature run as they are: in process, in a worker, from a recipe."""

import json

import pytest
import trl_rewards
import yaml
from verbs import run_verb
from vision_tiny import vision_recipe

from mmrl.registry import build, find
from mmrl.rewards import Isolated, score
from mmrl.rollout import Prompt, Sample

from families import family_folder  # isort: skip  # its folder is put on the path by vision_tiny


def samples(*outputs):
    prompts = [
        Prompt(f"p{i}", {"question": "1 + 1?", "images": ["a.png"]}, {"answer": "2"}) for i in range(len(outputs))
    ]
    return [Sample(prompt, output, i) for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))]


def reward(name, **options):
    return build("rewards", "rewards.0", f"trl_rewards:{name}", options)


def test_columns_and_texts_arrive_as_trl_gives_them():
    assert reward("correct")(samples("it is 2", "3")) == [1.0, 0.0]
    assert reward("short")(samples("two", "the number two", "")) == [1.0, 0.0, None]
    assert reward("short", limit=20)(samples("the number two")) == [1.0]
    assert reward("slow")(samples("two", "")) == [3.0, 0.0]
    assert reward("looks")(samples("two")) == [1.0]


def test_trl_itself_gives_the_same():
    """The same function on the same data, called with keyword arguments as GRPOTrainer calls it."""
    batch = samples("it is 2", "3")
    theirs = trl_rewards.correct(
        prompts=[[{"role": "user", "content": s.prompt.inputs["question"]}] for s in batch],
        completions=[[{"role": "assistant", "content": s.output}] for s in batch],
        answer=[s.prompt.reference["answer"] for s in batch],
    )
    assert reward("correct")(batch) == theirs


def test_a_parameter_with_a_default_is_an_option():
    assert list(find("rewards", "trl_rewards:short").options) == ["limit"]
    assert list(find("rewards", "trl_rewards:correct").options) == []
    with pytest.raises(ValueError, match=r"unknown key rewards.0.limt=3 \(did you mean limit\?\)"):
        reward("short", limt=3)


def test_a_missing_column_is_told_by_name():
    why = find("rewards", "trl_rewards:needs_solution").target.refusal(samples("2")[0].prompt)
    assert why == "prompt 'p0' has no column 'solution', which needs_solution() takes; it has question, images, answer"
    with pytest.raises(Exception, match="no column 'solution'"):
        score(samples("2"), {"r": (reward("needs_solution"), 1.0)})


def test_in_a_worker():
    isolated = Isolated("trl_rewards:correct")
    assert isolated(samples("it is 2", "3")) == [1.0, 0.0]
    assert isolated.refusal(samples("2")[0].prompt) is None
    isolated.close()


def test_from_a_recipe(tmp_path):
    tree = vision_recipe(
        family_folder("qwen2_5_vl"), tmp_path, tmp_path / "run", run={"iterations": 1},
        rewards=[{"name": "trl_rewards:short", "limit": 40}],
    )  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tree))
    run_verb("train", tmp_path / "r.yaml")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("reward/mean", 0.0) for row in rows) > 0.5
    with pytest.raises(ValueError, match=r"prompts can never be rewarded .* has no column 'solution'"):
        run_verb(
            "train", tmp_path / "r.yaml", "rewards=[trl_rewards:needs_solution]", f"run.output={tmp_path / 'other'}"
        )
