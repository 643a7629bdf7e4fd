"""Scores of records, states and texts by any step reward, forests of solutions, and loading a scorer by name."""

import json
import math
from pathlib import Path

import pytest
import torch

from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import StepRecords, labelled_forest, score_records
from mmrl.registry import ComponentError
from mmrl.rewards.steps import step_views
from mmrl.rollout import Prompt, State
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import aggregate_of, load_scorer, score_solutions, score_states


class Lengths:
    """A step's score is 1 / (1 + characters so far); NaN for a step that says NaN, exactly 0 for one that says zero."""

    def __init__(self, refused=()):
        self.calls, self.steps, self.refused = 0, 0, refused

    def admit(self, prompts):
        return [p for p in prompts if p.inputs["question"] not in self.refused]

    def __call__(self, rollout):
        self.calls += 1
        self.steps += len(rollout.tree)
        said = {"NaN": math.nan, "zero": 0.0}
        return torch.tensor(
            [said.get(v.text, 1 / (1 + len("".join(v.before) + v.text))) for v in step_views(rollout)],
            dtype=torch.float64,
        )


def record(name, question, *texts, labels=None, **more):
    return SolutionRecord(name, question, tuple(Step(t) for t in texts), labels=labels, **more)


P, Q = (Prompt(i, {"question": i}) for i in "PQ")


# ---- forests ---------------------------------------------------------------------------------------------------


def test_equal_prefixes_are_one_step():
    rollout, paths = solution_forest([P, Q], [[["a", "b", "c"], ["a", "b"], ["a", "c"], []], [["a", "b"]]])
    assert rollout.texts == ["a", "b", "c", "c", "a", "b"]
    assert rollout.tree.parent.tolist() == [-1, 0, 1, 0, -1, 4]
    assert paths == [[[0, 1, 2], [0, 1], [0, 3], []], [[4, 5]]]
    assert rollout.tree.group.tolist() == [0, 0, 0, 0, 1, 1]


def test_a_repeated_step_is_a_step_of_its_own():
    _, paths = solution_forest([P], [[["a", "a", "a"]]])
    assert paths == [[[0, 1, 2]]]


def test_prompts_without_steps_have_no_place():
    rollout, paths = solution_forest([P, Q], [[[]], [["a"]]])
    assert rollout.prompts == [Q] and paths == [[[]], [[0]]]


@pytest.mark.parametrize("prompts, solutions", [([], []), ([P], [[]]), ([P, Q], [[[]], [[], []]])])
def test_nothing_to_score_is_no_error(prompts, solutions):
    rollout, _ = solution_forest(prompts, solutions)
    assert len(rollout.tree) == 0 and rollout.prompts == []
    scorer = Lengths()
    assert score_solutions(scorer, prompts, solutions) == [[[] for _ in own] for own in solutions]
    assert scorer.calls == 0
    assert len(labelled_forest(prompts, [[record("r", "q") for _ in own] for own in solutions]).node) == 0


def test_labels_survive_as_floats():
    """Soft labels cut by int(), -100 as True in a bool column, None as 0 (vl_prm.md, 11.3 and 11.4)."""
    data = labelled_forest([P], [[record("1", "P", "a", "b", "c", labels=(True, 0.9, None)),
                                  record("2", "P", "a", "b", labels=(False, 0)), record("3", "P", "a", "z")]])  # fmt: skip
    assert data.label.dtype == torch.float32
    assert data.label[[0, 1, 3, 4]].tolist() == pytest.approx([1.0, 0.9, 0.0, 0.0])
    assert data.label.isnan().tolist() == [False, False, True, False, False, True, True]
    assert data.node.tolist() == [0, 1, 2, 0, 1, 0, 3]  # contradicting labels stay apart, on one step
    assert data.solution.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert [p.tolist() for p in data.paths] == [[0, 1, 2], [3, 4], [5, 6]]


# ---- scores ----------------------------------------------------------------------------------------------------


def test_scores_stay_with_their_steps():
    """One list per solution in its order, common prefixes scored once, all in one call."""
    scorer = Lengths()
    got = score_solutions(scorer, [P, Q], [[["a", "bc"], ["a"], []], [["bc"]]])
    assert got == [[[1 / 2, 1 / 4], [1 / 2], []], [[1 / 3]]]
    assert (scorer.calls, scorer.steps) == (1, 3)


def test_a_score_of_zero_or_none_does_not_shift_later_steps():
    """Scores gathered by `tensor != 0` drop exact zeros, and all later steps move up (vl_prm.md, 11.7)."""
    ((got,),) = score_solutions(Lengths(), [P], [[["zero", "a", "NaN", "b"]]])
    assert got[0] == 0.0 and got[1] == 1 / 6 and math.isnan(got[2]) and got[3] == 1 / 10


def test_records_keep_their_order_and_refused_questions_are_none():
    records = [record("1", "q", "a"), record("2", "bad", "b"), record("3", "q", "a", "cc"), record("4", "s"),
               record("5", "q", "a", images=("other.png",))]  # fmt: skip
    scorer = Lengths(refused=("bad",))
    assert score_records(scorer, records) == [[1 / 2], None, [1 / 2, 1 / 4], [], [1 / 2]]
    assert scorer.steps == 3  # another picture is another question
    assert score_records(scorer, []) == []
    assert score_records(Lengths(refused=("q",)), records[:1]) == [None]


def test_options_make_another_question():
    one = record("1", "q", "a", options=("x", "y"))
    scorer = Lengths()
    score_records(scorer, [one, record("2", "q", "a", options=("x", "z"))])
    assert scorer.steps == 2


def test_states_have_a_score_per_written_step():
    states = [State(P, ("a\n", "b\n")), State(Q), State(P, ("a\n", "\n", "c")), State(P, ("a\n",), done=True)]
    got = score_states(Lengths(), states)
    assert got == [[1 / 3, 1 / 5], [], [1 / 3, 1 / 4], [1 / 3]]
    assert score_states(Lengths(), []) == []


# ---- loading ---------------------------------------------------------------------------------------------------


def plain(rollout):
    return torch.zeros(len(rollout.tree))


def test_scorers_by_name(tmp_path):
    import test_scoring

    assert load_scorer("test_scoring:plain") is test_scoring.plain
    with pytest.raises(ComponentError, match="did you mean vision_prm"):
        load_scorer("vision_prn")
    with pytest.raises(ValueError, match="is no saved scorer"):
        load_scorer(tmp_path)
    (tmp_path / "step_format.json").write_text("{}")
    with pytest.raises(ValueError, match="is no saved scorer"):
        load_scorer(tmp_path)


def test_the_saved_record_names_the_aggregation(tmp_path):
    assert aggregate_of("vision_prm") == "min" and aggregate_of(tmp_path, "last") == "last"
    (tmp_path / "step_format.json").write_text(json.dumps({"scorer": "vision_prm", "format": {"aggregate": "mean"}}))
    assert aggregate_of(tmp_path) == "mean"


# ---- the task --------------------------------------------------------------------------------------------------


def test_records_of_a_question_are_one_prompt(tmp_path):
    from mmrl.reasoning.records_io import write_records

    rows = [
        record("1", "q", "a", labels=(1,)),
        record("2", "other", "b", labels=(0,)),
        record("3", "q", "c", labels=(0.5,), label_kind="soft"),
    ]
    for name, part in (("train", rows), ("eval", [record("9", "q", "a", labels=(0,))])):
        write_records(Path(tmp_path / f"{name}.jsonl"), part)
    task = StepRecords(str(tmp_path / "train.jsonl"), str(tmp_path / "eval.jsonl"))
    assert [p.id for p in task.prompts] == ["1", "2"] and [p.id for p in task.eval_prompts] == ["9"]
    data = task.labelled(task.prompts[::-1])
    assert data.rollout.texts == ["b", "a", "c"] and data.label.tolist() == [0.0, 1.0, 0.5]
    assert task.labelled(task.eval_prompts).label.tolist() == [0.0]


def test_labels_of_ignored_kinds_are_not_trained_on(tmp_path):
    from mmrl.reasoning.records import SolutionRecord, Step
    from mmrl.reasoning.records_io import write_records
    from mmrl.reasoning.solutions import StepRecords

    steps = (Step("red = 3", "perception"), Step("3 + 1 = 4", "reasoning"))
    for name in ("train", "eval"):
        records = [SolutionRecord(f"{name}{i}", "q?", steps, labels=(1.0, 0.0)) for i in range(2)]
        write_records(tmp_path / name, records)
    task = StepRecords(str(tmp_path / "train"), str(tmp_path / "eval"), ignore_kinds=["perception"])
    assert [y != y for y in task.labelled(task.prompts).label.tolist()] == [True, False] * 2
    assert task.labelled(task.eval_prompts).label.tolist() == [1.0, 0.0] * 2
