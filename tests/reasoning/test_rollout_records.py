"""Stored trees as solutions and back: records are a view of their paths."""

import json

import pytest
import torch
from toy_extender import ToyExtender, chain, verify

from mmrl.growth import ROOT, GrowingTree, rollout_of
from mmrl.reasoning.annotate.monte_carlo import MonteCarlo
from mmrl.reasoning.annotate.run import LabelRule, annotate
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.formats.rollouts import solutions_of
from mmrl.reasoning.records import Counts
from mmrl.reasoning.records_io import read_records
from mmrl.reasoning.solutions import StepRecords
from mmrl.rollout import Prompt
from mmrl.rollout_folder import RolloutFolder

PROMPTS = [chain(f"q{i}", 4) for i in range(3)]


@pytest.fixture
def annotated(tmp_path):
    annotate(
        ToyExtender(slips=0.5), verify, PROMPTS, MonteCarlo(k=4, solutions=3), tmp_path / "a",
        rule=LabelRule("soft", "keep"), rollouts=RolloutFolder(tmp_path / "trees", {}), progress=False, batch=2,
    )  # fmt: skip
    return tmp_path


def test_the_records_of_an_annotation_are_paths_of_its_trees(annotated):
    """Every record is there with its labels, its counts and its verdict; completions of prefixes are solutions too."""
    records, _ = read_records(annotated / "a" / "records.jsonl")
    views, bad = read_format(annotated / "trees", "rollouts")
    assert not bad and len(views) > len(records)
    by_text = {(v.question, v.texts): v for v in views}
    assert len(by_text) == len(views)
    for record in records:
        view = by_text[record.question, record.texts]
        assert (view.labels, view.final_correct, view.mc) == (record.labels, record.final_correct, record.mc)
        assert view.answer == record.answer and view.meta["question_id"] == record.meta["question_id"]
    assert (
        sum(v.meta["draws"] for v in views)
        == json.loads((annotated / "a/report.json").read_text())["cost"]["run"]["completions"]
    )


def test_they_go_wherever_records_go(annotated):
    task = StepRecords(str(annotated / "trees"), str(annotated / "trees"), format="rollouts")
    assert len(task.prompts) == 3
    data = task.labelled(task.prompts)
    assert not bool(data.label.isnan().all()) and len(data.paths) > 6


def test_a_path_by_hand():
    """Blank steps are no steps; equal paths are one record; without values the mean outcome below is the label."""
    tree = GrowingTree(Prompt("p", {"question": "?", "images": []}, {"answer": "7", "level": 1}))
    a = tree.add(ROOT, "a\n")
    for text, outcome in (("x", 1), ("x ", 1), ("y", 0)):
        node = tree.add(tree.add(a, "\n"), text)
        tree.ended[node], tree.numbers["outcome"][node] = True, outcome
    tree.add(ROOT, "open\n")
    (_, x), (_, y), (_, other) = solutions_of(rollout_of([tree]), "n")
    assert x.texts == ("a", "x") and x.labels == (pytest.approx(2 / 3), 1) and x.final_correct is True
    assert x.mc == (Counts(2, 3), Counts(1, 1)) and x.meta == {"level": 1, "question_id": "p", "draws": 2}
    assert y.labels == (pytest.approx(2 / 3), 0) and y.final_correct is False and y.scope == "prefix"
    assert other.texts == ("open",) and other.labels == (None,) and other.final_correct is None
    assert x.id.startswith("n/p/") and x.answer == "7"


def test_what_is_no_solution(tmp_path):
    with pytest.raises(ValueError, match="no rollout in .*mmrl rollouts"):
        read_format(tmp_path, "rollouts")
    with pytest.raises(ValueError, match="did you mean rollouts"):
        read_format(tmp_path, "rollout")
    tree = GrowingTree(Prompt("p", {"question": "?"}))
    tree.numbers["value"][tree.add(ROOT, "a")] = 1.5
    rollout_of([tree]).save(tmp_path / "0")
    with pytest.raises(ValueError, match="1 of 1 rows are bad.*label outside"):
        read_format(tmp_path, "rollouts")
    rollout = rollout_of([tree])
    with pytest.raises(ValueError, match="'n' has no texts"):
        solutions_of(type(rollout)(rollout.prompts, rollout.tree, rollout.actions), "n")
    assert torch.equal(rollout.tree.value, torch.tensor([1.5], dtype=torch.float64))
