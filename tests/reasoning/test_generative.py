"""The generative process reward model: what it asks, how verdicts become scores (vl_prm.md, 4.2; prm.md, C5)."""

import math
import sys
from pathlib import Path

import pytest
import torch

from mmrl.reasoning.generative import CHOICES, VERDICT, GenerativePrm, stated_verdict
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.solutions import score_records
from mmrl.rollout import Continuation, Prompt, State
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.scoring import load_scorer, score_solutions

sys.path.insert(0, str(Path(__file__).parents[1] / "vision"))
from families import family_folder, picture

P = Prompt("p", {"question": "how {many}?", "images": []}, "2")

NAME = "mmrl.reasoning.generative:GenerativePrm.build"


class Judge:
    """p(Yes), p(No) by a table on the last word of what is asked; analyses by a script."""

    def __init__(self, table=None, script=()):
        self.table, self.script, self.asked, self.seeds = table or {}, script, [], []

    def admit(self, prompts):
        return [p for p in prompts if "unfit" not in p.inputs["question"]]

    def choice_logps(self, states, choices):
        if self.script:
            assert tuple(choices) in CHOICES
        else:
            assert tuple(choices) == ("Yes", "No") and all(s.text.endswith(VERDICT) for s in states)
        self.asked += states
        steps = [s.prompt.inputs["question"].split("\n\nIs the last")[0].split("\n\n")[-1] for s in states]
        return torch.tensor([self.table.get(t, (0.5, 0.5)) for t in steps]).log()

    def extend(self, states, n, *, seed, steps=None, temperature=None):
        self.seeds.append((seed, n))
        return [[Continuation((text,), ((0.0,),), True) for text in self.script[:n]] for _ in states]


def one(judge, texts, **options):
    return score_solutions(GenerativePrm(judge, **options), [P], [[texts]])[0][0]


@pytest.mark.parametrize(
    "yes, no, p", [(0.6, 0.2, 0.75), (0.25, 0.75, 0.25), (math.exp(-0.2), math.exp(-1.9), 0.8455347)]
)
def test_the_score_is_the_softmax_of_two_verdicts(yes, no, p):
    """prm.md C5: .6 and .2 -> .75; vl_prm.md 10.18: log-probs -.2 and -1.9 -> .8455347."""
    assert one(Judge({"a": (yes, no)}), ["a"]) == [pytest.approx(p, abs=1e-6)]


def test_each_step_is_asked_with_those_before_it_and_the_question_as_it_is():
    judge = Judge()
    one(judge, ["one {x}", "two", " three\n"])
    asked = [s.prompt.inputs["question"] for s in judge.asked]
    assert all(a.startswith("how {many}?") for a in asked)
    assert ["one {x}" in a for a in asked] == [True] * 3 and ["three" in a for a in asked] == [False, False, True]
    assert "one {x}\n\ntwo\n\nthree\n\nIs the last step right" in asked[2]
    assert judge.asked[0].prompt.inputs["images"] == [] and judge.asked[0].text == VERDICT


def test_shared_prefixes_are_asked_once():
    judge = Judge()
    score_solutions(GenerativePrm(judge), [P], [[["a", "b"], ["a", "c"], ["a", "b"]]])
    assert len(judge.asked) == 3


def test_blank_steps_have_no_score():
    assert [math.isnan(s) for s in one(Judge(), ["a", " \n", "b"])] == [False, True, False]


@pytest.mark.parametrize(
    "said, counted",
    [("fine, \\boxed{Yes}", True), ("\\boxed{No}.", True), ("nonsense", False), ("\\boxed{maybe}", False),
     ("\\boxed{Yes} or \\boxed{No}", False), ("\\boxed{Yes} \\boxed{2}", False), ("", False), ("\\boxed{", False),
     ("\\boxed{ Yes }", True), ("\\boxed {\\text{No}}", True), ("\\boxed{yes}", True), ("\\boxed{Yes", False),
     ("<think>\\boxed{No}</think>\\boxed{Yes}", True), ("<think>\\boxed{Yes} and cut off", False),
     ("<conclusion>\nIncorrect\n</conclusion>", True), ("<conclusion>Correct</conclusion> \\boxed{Yes}", False)],
)  # fmt: skip
def test_an_analysis_without_one_verdict_counts_as_wrong(said, counted):
    """Never as missing, or a broken form would be rewarded (prm.md, C5)."""
    judge = Judge({"a": (0.8, 0.2)}, script=[said])
    assert one(judge, ["a"], samples=1) == [pytest.approx(0.8 if counted else 0.0)]
    assert len(judge.asked) == counted


@pytest.mark.parametrize("said, before, choices", [
    ("<think>\\boxed{No}</think>so \\boxed{ Yes }", "<think>\\boxed{No}</think>so \\boxed{ ", ("Yes", "No")),
    ("\\boxed{\\text{no}}", "\\boxed{\\text{", ("yes", "no")),
    ("a <conclusion>\nIncorrect\n</conclusion>", "a <conclusion>\n", ("Correct", "Incorrect")),
])  # fmt: skip
def test_a_verdict_is_read_where_it_stands_between_the_words_of_its_form(said, before, choices):
    start, words = stated_verdict(said)
    assert (said[:start], words) == (before, choices)


def test_the_mean_of_probabilities_over_the_analyses():
    judge = Judge({"a": (0.9, 0.3)}, script=["x \\boxed{Yes}", "y", "z \\boxed{No}", "\\boxed{Yes}"])
    assert one(judge, ["a"], samples=4, seed=7) == [pytest.approx(3 * 0.75 / 4)]
    assert [s.text for s in judge.asked] == ["x \\boxed{", "z \\boxed{", "\\boxed{"]  # read where the verdict stands
    assert judge.seeds == [(7, 4)]


def test_stop_takes_the_scores_after_the_first_wrong_step_away():
    table = {"a": (0.9, 0.1), "bad": (0.1, 0.9), "half": (0.5, 0.5)}
    got = one(Judge(table), ["a", "half", "bad", "a", "bad"], stop=True)
    assert got[:3] == pytest.approx([0.9, 0.5, 0.1]) and all(map(math.isnan, got[3:]))
    tree = score_solutions(GenerativePrm(Judge(table), stop=True), [P], [[["bad", " ", "a"], ["a", "a"]]])[0]
    assert [math.isnan(s) for s in tree[0]] == [False, True, True] and not any(map(math.isnan, tree[1]))


def test_questions_the_judge_cannot_take_have_no_score():
    got = one(Judge(), ["a", "unfit", "b"])
    assert [math.isnan(s) for s in got] == [False, True, True]  # later ones quote it
    records = [SolutionRecord("1", "unfit", (Step("a"),)), SolutionRecord("2", "?", (Step("a"),))]
    assert score_records(GenerativePrm(Judge()), records) == [None, [0.5]]


# ---- on a model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["text", "qwen2_5_vl"])
def test_the_verdict_is_read_from_the_next_token_of_the_model(family, tmp_path):
    picture(0).save(tmp_path / "0.png")
    images = [] if family == "text" else [str(tmp_path / "0.png")]
    p = Prompt("p", {"question": "how?", "images": images})
    policy = {"name": "vision", "model": str(family_folder(family)), "temperature": 0.5}
    prm = load_scorer(NAME, {"policy": policy})
    got = score_solutions(prm, [p], [[["1 + 1", "= 3"], ["1 + 1", "= 2"]]])[0]
    for texts, scores in zip([["1 + 1", "= 3"], ["1 + 1", "= 2"]], got, strict=True):
        for t, score in enumerate(scores):
            judge = prm.policy
            tokens = judge.encode(prm._prompt(p, texts[: t + 1])).followed_by(judge._rollouts.ids_of(VERDICT))
            inputs = {"input_ids": tokens.ids[None], "position_ids": tokens.positions[..., None, :]}
            if images:
                inputs |= tokens.pixels.tensors
            with torch.no_grad():
                logits = judge.model.hf(**inputs).logits[0, -1]
            ids = [judge.tokenizer.encode(v, add_special_tokens=False)[0] for v in ("Yes", "No")]
            assert score == pytest.approx(float(logits[ids].softmax(0)[0]), abs=1e-5)  # at temperature 1


def test_too_long_and_broken_questions_on_a_model(tmp_path, caplog):
    policy = {"name": "vision", "model": str(family_folder("gemma3")), "max_prompt_tokens": 300}
    prm = load_scorer(NAME, {"policy": policy})
    got = score_solutions(
        prm, [Prompt("p", {"question": "?"})], [[["a", "b" * 200, "c"], ["a", "<image_soft_token>"]]]
    )[0]
    assert [[math.isnan(s) for s in own] for own in got] == [[False, True, True], [False, True]]
    records = [SolutionRecord(str(i), "?", (Step("a"),), images=(str(tmp_path / "none.png"),) * i) for i in range(2)]
    scored = score_records(prm, records)
    assert scored[1] is None and 0 <= scored[0][0] <= 1
    assert "none.png" in caplog.text and "limit is" in caplog.text


def test_sampled_analyses_depend_on_the_seed_alone():
    policy = {"name": "vision", "model": str(family_folder("text")), "max_new_tokens": 5}
    one, two = (load_scorer(NAME, {"policy": policy, "samples": 2, "seed": s}) for s in (0, 0))
    assert one.policy.extend([State(P)], 2, seed=0) == two.policy.extend([State(P)], 2, seed=0)
    assert one(solution_forest([P], [[["a"]]])[0]).tolist() == [0.0]  # a random model gives no verdict


def test_choices_that_begin_alike_are_refused():
    policy = load_scorer(NAME, {"policy": {"name": "vision", "model": str(family_folder("text"))}}).policy
    with pytest.raises(ValueError, match="begin with the same token"):
        policy.choice_logps([State(P)], ("Yes", "Yet"))


def test_a_saved_one_is_read_back_with_its_options(tmp_path):
    policy = {"name": "vision", "model": str(family_folder("text"))}
    prm = load_scorer({"name": NAME, "policy": policy, "stop": True, "seed": 3})
    with torch.no_grad():
        for p in prm.model.parameters():
            p.mul_(1.1)
    prm.save(tmp_path / "judge")
    again = load_scorer(tmp_path / "judge")
    assert (again.stop, again.seed, again.samples) == (True, 3, 0)
    assert load_scorer({"name": str(tmp_path / "judge"), "stop": False}).stop is False
    rollout = solution_forest([P], [[["1 + 1", "= 3"], ["2"]]])[0]
    torch.testing.assert_close(again(rollout), prm(rollout), equal_nan=True)
    assert not torch.allclose(load_scorer({"name": NAME, "policy": policy})(rollout), prm(rollout), equal_nan=True)
    with pytest.raises(ValueError, match="give `policy`"):
        load_scorer({"name": NAME})
