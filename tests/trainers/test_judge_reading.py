"""The judge's reading: verdicts of a scripted judge by hand, replies that say nothing, the recipes, a real model."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from vision_tiny import vision_recipe

from mmrl.config import parse_config
from mmrl.readings import ReadingContext
from mmrl.reasoning.annotate.judge import SEVERITIES, judge_prompt, parse_grade, parse_severities
from mmrl.reasoning.readings.judge import JudgeReading
from mmrl.registry import ComponentError
from mmrl.rollout import Continuation, Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.trainers.branch_grpo import BranchGrpo

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder

NAN = math.nan


class Judge:
    """Says of every step what its text says: "bad" is wrong, "minor" has a minor error, "7" deserves grade 7. Its
    second reading of a solution finds "doubtful" steps wrong as well; of a solution with "mumble" it says nothing."""

    def __init__(self):
        self.asked = []

    def extend(self, states, n, *, seed, steps=None, temperature=None):
        self.asked += [(s.prompt.id, seed) for s in states]
        return [[Continuation((self.reply(s.prompt.inputs["question"], i),), ((0.0,),), True) for i in range(n)]
                for s in states]  # fmt: skip

    def reply(self, question, reading):
        steps = re.findall(r"<paragraph_\d+>\n(.*?)\n</paragraph_\d+>", question, re.DOTALL)
        if "mumble" in question:
            return "hm"
        if "Judge one aspect" in question:
            return f"so \\boxed{{{re.findall('[0-9]+', steps[-1])[-1]}}}"
        if "How bad" in question:
            words = [next((w for w in SEVERITIES if w in t), "none") for t in steps]
        else:
            wrong = ["bad"] + ["doubtful"] * (reading == 1)
            words = ["incorrect" if any(w in t for w in wrong) else "correct" for t in steps]
        if "index of the first paragraph" in question:
            return f"\\boxed{{{words.index('incorrect') if 'incorrect' in words else -1}}}"
        parts = [f"<analysis_{i}>\\boxed{{{w}}}</analysis_{i}>" for i, w in enumerate(words)]
        overall = "incorrect" if "incorrect" in words else "correct"
        return "\n".join([*parts, f"\\boxed{{{overall}}}"])


SOLUTIONS = [["ok", "bad 3", "ok 4"], ["ok", "doubtful", "minor 9"], ["ok", "mumble"], ["major", "critical 0"]]
CONTEXT = ReadingContext(policy=Judge(), outcome=lambda samples: torch.zeros(len(samples)))


def rollout_of(solutions=SOLUTIONS):
    rollout, _ = solution_forest([Prompt("p", {"question": "?"})], [solutions])
    return rollout


def read(ask, rollout=None, context=CONTEXT, **options):
    context.cost.clear()
    return JudgeReading(ask, {"name": "test_judge_reading:Judge"}, **options)(rollout or rollout_of(), context)


@pytest.mark.parametrize(
    "options, want",
    [
        # steps: ok, bad 3, ok 4, doubtful, minor 9, mumble, major, critical 0
        ({}, [0, 1, 0, 0, 0, NAN, 0, 0]),
        ({"votes": 2, "rule": "majority"}, [0, 1, 0, 0, 0, NAN, 0, 0]),  # one of two is no majority
        ({"votes": 3, "rule": "majority"}, [0, 1, 0, 0, 0, NAN, 0, 0]),
        ({"votes": 2, "rule": "intersection"}, [0, 1, 0, 0, 0, NAN, 0, 0]),
        ({"form": "first_error"}, [0, 1, NAN, 0, 0, NAN, 0, 0]),  # nothing is said of what follows the first error
    ],
)
def test_wrong_steps(options, want):
    got = read("wrong", **options)["tags.wrong"]
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), equal_nan=True)


def test_every_vote_counts_once_and_every_solution_has_its_say():
    """The doubtful step is wrong for one of two readings; shared by two solutions, for two of four."""
    doubtful = [["ok", "doubtful", "a"], ["ok", "doubtful", "b"], ["ok", "doubtful", "bad"]]
    rollout = rollout_of(doubtful)
    assert read("wrong", rollout, votes=2)["tags.wrong"].tolist() == [0, 0, 0, 0, 1]
    assert read("wrong", rollout, votes=2, rule="intersection")["tags.wrong"].tolist() == [0, 0, 0, 0, 1]
    only = JudgeReading("wrong", {"name": "test_judge_reading:Doubter"}, votes=1)
    assert only(rollout, CONTEXT)["tags.wrong"].tolist() == [0, 1, 0, 0, 1]


class Doubter(Judge):
    def reply(self, question, reading):
        return super().reply(question, 1)


def test_severities_and_grades():
    got = read("severity")["tags.severity"]
    torch.testing.assert_close(got, torch.tensor([0, 0, 0, 0, 1, NAN, 2, 3], dtype=torch.float64), equal_nan=True)
    got = read("aspect", aspect="brevity")["tags.aspect"]
    want = torch.tensor([NAN, NAN, -1, NAN, 4, NAN, NAN, -5], dtype=torch.float64)  # leaves alone, grade less 5
    torch.testing.assert_close(got, want, equal_nan=True)


def test_what_cannot_be_read_is_counted_and_no_opinion():
    read("wrong", votes=2)
    assert dict(CONTEXT.cost) == {"judge_readings": 8, "judge_unread": 2}
    got = read("wrong", rollout_of([["ok"], [" ", ""], ["<paragraph_0>"]]))["tags.wrong"]
    assert got[0] == 0 and bool(got[1:].isnan().all())  # nothing written, and the judge's own tags inside
    assert CONTEXT.cost["judge_unread"] == 2


@pytest.mark.parametrize(
    "text, steps, want",
    [
        ("<analysis_0>\\boxed{none}</analysis_0><analysis_1>x \\boxed{Critical}</analysis_1>", 2, (0, 3)),
        ("<analysis_0>\\boxed{bad}</analysis_0><analysis_1>\\boxed{minor}</analysis_1>", 2, (None, 1)),
        ("<analysis_0>\\boxed{minor}</analysis_0><analysis_0>\\boxed{minor}</analysis_0>", 1, None),  # two analyses
        ("<analysis_7>\\boxed{minor}</analysis_7>", 2, None),
        ("\\boxed{minor}", 1, None),
    ],
)
def test_severities_are_read_by_index(text, steps, want):
    assert parse_severities(text, steps) == want


def test_grades_are_whole_numbers_in_range():
    assert [parse_grade(f"\\boxed{{{x}}}") for x in ("0", " 10 ", "11", "7.5", "-1", "good", "\\frac{1}{2}")] == [
        0, 10, None, None, None, None, None,
    ]  # fmt: skip
    assert parse_grade("nothing") is None and parse_grade("\\boxed{3} no, \\boxed{4}") == 4
    with pytest.raises(ValueError, match="grades an aspect"):
        judge_prompt("?", ["a"], "aspect")
    with pytest.raises(ValueError, match="name the aspect"):
        JudgeReading("wrong", aspect="brevity")


# ---- recipes ---------------------------------------------------------------------------------------------------------


class LetterJudge(Judge):
    """Finds wrong what holds an odd number of capital letters, and the worse the more of them."""

    def reply(self, question, reading):
        steps = re.findall(r"<paragraph_\d+>\n(.*?)\n</paragraph_\d+>", question, re.DOTALL)
        capitals = [sum(c.isupper() for c in t) for t in steps]
        if "Judge one aspect" in question:
            return f"\\boxed{{{min(10, capitals[-1])}}}"
        if "How bad" in question:
            words = [SEVERITIES[n % 4] for n in capitals]
        else:
            words = ["incorrect" if n % 2 else "correct" for n in capitals]
        parts = [f"<analysis_{i}>\\boxed{{{w}}}</analysis_{i}>" for i, w in enumerate(words)]
        return "\n".join([*parts, "\\boxed{incorrect}" if "incorrect" in words else "\\boxed{correct}"])


JUDGE = {"name": "judge", "policy": {"name": "test_judge_reading:LetterJudge"}}
RECIPES = {
    "capo": (JUDGE, {"estimators": [{"name": "capo"}]}),
    "tp_grpo": (JUDGE, {"estimators": [{"name": "tp_grpo"}]}),
    "severity": (
        JUDGE | {"ask": "severity"},
        {"transforms": ["severity"], "estimators": [{"name": "process_grpo"}]},
    ),
    "alarm": (
        JUDGE | {"ask": "aspect", "aspect": "coherence"},
        {"transforms": [{"name": "alarm", "threshold": 0.0}], "estimators": [{"name": "grpo"}]},
    ),
}


def trainer_of(tmp_path, reading, credit):
    tree = vision_recipe(
        family_folder("text"), tmp_path, tmp_path / "run", readings=[reading], credit=credit, run={"iterations": 1}
    )
    tree["task"]["pictures"] = 0
    tree["policy"]["max_new_tokens"] = 40
    return BranchGrpo(parse_config(tree))


@pytest.mark.parametrize("method", RECIPES)
def test_methods_that_read_verdicts(tmp_path, method):
    metrics = trainer_of(tmp_path, *RECIPES[method]).train()
    assert metrics["policy/grad_norm"] > 0 and metrics["reading/judge/failed_prompts"] == 0
    assert metrics["rollout/judge_readings_per_leaf"] == 1


def test_the_policy_itself_judges_and_says_nothing_readable(tmp_path):
    """A random model: every reading is counted as unread, and nothing is called wrong."""
    trainer = trainer_of(tmp_path, {"name": "judge", "votes": 2}, {"estimators": [{"name": "grpo"}]})
    rollout = trainer.sample(0)
    metrics = trainer.run.metrics()
    assert metrics["rollout/judge_unread_per_leaf"] == metrics["rollout/judge_readings_per_leaf"] == 2
    assert bool(rollout.tree.tags["wrong"].isnan().all())


def test_a_policy_that_cannot_judge_is_refused(tiny_model, tmp_path):
    from tiny import recipe

    tree = recipe(tiny_model, tmp_path, readings=[{"name": "judge", "policy": {"name": "diffusion"}}])
    with pytest.raises(ComponentError, match=r"readings.0.policy=.* needs .*Extender.*vision"):
        BranchGrpo(parse_config(tree))
    with pytest.raises(ComponentError, match=r"reads tags.severity.*judge.*score"):
        trainer_of(tmp_path, JUDGE, {"transforms": ["severity"], "estimators": [{"name": "process_grpo"}]})
