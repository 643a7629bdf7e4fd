"""Readings of what steps say: events and evidence by hand, and the recipes whose estimators need them."""

import math
import sys
from pathlib import Path

import pytest
import torch
from vision_tiny import vision_recipe

from mmrl.config import parse_config
from mmrl.credit.estimate import apply_transform
from mmrl.readings import ReadingContext, fill
from mmrl.reasoning.readings.texts import Events, Evidence
from mmrl.rollout import Prompt
from mmrl.scorers.labelled import solution_forest
from mmrl.trainers.branch_grpo import BranchGrpo

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder

CONTEXT = ReadingContext(policy=None, outcome=lambda samples: torch.zeros(len(samples)))
PATTERNS = {"search": r"^search\(", "shown": r"<document", "answer": r"(?i)\banswer:"}
MACHINE = {
    "events": list(PATTERNS), "start": "begin",
    "edges": [["begin", "search", "asked"], ["asked", "shown & !answer", "read"], ["read", "answer", "accept"]],
}  # fmt: skip


def ended(rollout, outcomes):
    leaves = rollout.tree.is_leaf.nonzero().flatten()
    return rollout.with_tree(rollout.tree.with_outcomes(leaves, torch.tensor(outcomes, dtype=torch.float64)))


def test_events_and_the_machine_that_reads_them():
    paths = [["search(a)", "<document id=1> cats", "Answer: 3"], ["search(a)", "answer: 3"], ["so search(a)"]]
    rollout = ended(solution_forest([Prompt("p", {})], [paths])[0], [1.0, 0.0, 0.0])
    got = Events(PATTERNS)(rollout, CONTEXT)["tags.events"]
    assert rollout.texts == ["search(a)", "<document id=1> cats", "Answer: 3", "answer: 3", "so search(a)"]
    assert got.tolist() == [[True, False, False], [False, True, False], [False, False, True], [False, False, True],
                            [False, False, False]]  # fmt: skip
    tree = rollout.tree.replace(tags={"events": got})
    out = apply_transform(tree, {"name": "reward_machine", "machine": MACHINE, "state_key": True})
    assert out.step_reward.tolist() == [0, 0, 1, 0, 0]  # the protocol was followed to its end once
    # states before each step: begin, asked, read, asked (answered too early), begin
    assert out.state_key[[0, 4]].unique().numel() == 1 == out.state_key[[1, 3]].unique().numel()
    assert out.state_key[[0, 1, 2]].unique().numel() == 3
    assert torch.equal(apply_transform(tree, {"name": "reward_machine", "machine": MACHINE}).state_key, tree.state_key)


def test_evidence_by_hand():
    golds = ["red cats sleep", "blue dogs"]
    prompts = [Prompt("p", {}, {"evidence": golds}), Prompt("q", {}, {"evidence": golds[:1]}), Prompt("r", {}, "x")]
    one = ["Red cats! <document id=a>", "dogs dogs <document id=a> <document id=b>", "nothing"]
    rollout = solution_forest(prompts, [[one], [["cats <document id=b>"]], [["cats"]]])[0]
    got = Evidence(max_golds=2, max_items=3)(rollout, CONTEXT)
    # words of the first step: red cats document id a; of the second dogs 2, document 2, id 2, a, b
    first, second = 2 / math.sqrt(5 * 3), 2 / math.sqrt((3 * 4 + 2) * 2)
    fourth = 1 / math.sqrt(4 * 3)  # cats document id b
    want = [[first, 0], [0, second], [0, 0], [fourth, math.nan], [math.nan, math.nan]]
    torch.testing.assert_close(got["tags.similarity"], torch.tensor(want, dtype=torch.float64), equal_nan=True)
    shown = [[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]]  # columns are the prompt's own items
    assert got["tags.documents"].long().tolist() == shown


def test_gain_and_redundancy_of_evidence():
    """StepSearch's step reward by a slow second computation, a prompt with fewer gold texts beside another."""
    golds = ["red cats sleep", "blue dogs"]
    prompts = [Prompt("p", {}, {"evidence": golds}), Prompt("q", {}, {"evidence": golds[:1]})]
    paths = [["red cats", "blue dogs <document id=1>", "red cats <document id=1>"]]
    rollout = ended(solution_forest(prompts, [paths, [["cats", "red cats sleep"]]])[0], [1.0, 0.0])
    values = Evidence(max_golds=3)(rollout, CONTEXT)
    tree = rollout.tree.replace(tags={k.removeprefix("tags."): v for k, v in values.items()})
    gain = apply_transform(tree, {"name": "info_gain"}).step_reward
    sim, want = values["tags.similarity"].tolist(), []
    for v, parent in enumerate(tree.parent.tolist()):
        best, at = [0.0] * 3, parent
        while at >= 0:
            best = [max(b, s) for b, s in zip(best, sim[at], strict=True)]
            at = int(tree.parent[at])
        terms = [max(s - b, 0) for s, b in zip(sim[v], best, strict=True) if s == s]
        want.append(sum(terms) / len(terms))
    torch.testing.assert_close(gain, torch.tensor(want, dtype=torch.float64))
    assert gain[3] > 0 and apply_transform(tree, {"name": "redundancy"}).step_reward.tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: Events({"a": "("}), "patterns.a='\\('.*no regular expression"),
        (lambda: Evidence(item="["), "item='\\['.*no regular expression"),
        (lambda: Evidence()(bad_golds("cats"), CONTEXT), "is no list of texts"),
        (lambda: Evidence(max_golds=1)(bad_golds(["a", "b"]), CONTEXT), "2 gold texts; raise max_golds=1"),
        (
            lambda: Evidence(item="cat|dog", max_items=1)(bad_golds([]), CONTEXT),
            "2 different items; raise max_items=1",
        ),
    ],
)
def test_what_does_not_fit_is_told(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def bad_golds(golds):
    return solution_forest([Prompt("p", {}, {"evidence": golds})], [[["cat dog"]]])[0]


def test_a_prompt_with_too_many_gold_texts_is_set_aside_alone():
    prompts = [Prompt("p", {}, {"evidence": ["a", "b"]}), Prompt("q", {}, {"evidence": ["cats"]})]
    rollout = ended(solution_forest(prompts, [[["a"]], [["cats"]]])[0], [1.0, 1.0])
    writes = ("tags.similarity", "tags.documents")
    filled, records = fill(rollout, {"evidence": (Evidence(max_golds=1), writes)}, CONTEXT, limit=0.5)
    assert records["evidence"].failed_prompts == 1 and filled.tree.valid.tolist() == [False, True]
    assert filled.tree.tags["similarity"][1].tolist() == [1.0]


# ---- recipes ---------------------------------------------------------------------------------------------------------


class Golden:
    """Questions whose gold texts are single letters, which even a random model comes across."""

    rewards = ("vision_tiny:digits",)

    def __init__(self, folder: str = "", pictures: int = 0):
        golds = ["e t a o", "1 2 3"]
        self.prompts = [
            Prompt(f"q{i}", {"question": "?" * (i + 1)}, {"evidence": golds[: 1 + i % 2]}) for i in range(4)
        ]
        self.eval_prompts = self.prompts[:1]


RECIPES = {
    "stepsearch": (
        [{"name": "tree_value"}, {"name": "evidence", "item": "[a-z]"}],
        {"estimators": [{"name": "stepsearch"}]},
    ),
    "reward_machine": (
        [{"name": "events", "patterns": {"digit": "[0-9]", "line": "\\n$"}}],
        {
            "transforms": [
                {"name": "reward_machine", "gamma": 1.0, "state_key": True,
                 "machine": {"events": ["digit", "line"], "start": "a",
                             "edges": [["a", "digit & line", "b"], ["b", "digit", "accept"]]}}
            ],
            "estimators": [{"name": "process_grpo"}, {"name": "gigpo", "gamma": 1.0}],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", RECIPES)
def test_methods_that_read_texts(tmp_path, method):
    readings, credit = RECIPES[method]
    tree = vision_recipe(
        family_folder("text"), tmp_path, tmp_path / "run", readings=readings, credit=credit, run={"iterations": 1}
    )
    tree["task"] = {"name": "test_text_readings:Golden"}
    tree["policy"]["max_new_tokens"] = 60
    trainer = BranchGrpo(parse_config(tree))
    assert trainer.train()["policy/grad_norm"] > 0
