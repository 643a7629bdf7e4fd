import math

import pytest

from mmrl.reasoning.canonical import canonical_answer
from mmrl.rollout import Prompt
from mmrl.scorers.aggregate import aggregate
from mmrl.search.core import best
from mmrl.search.votes import best_of_n, hmr, majority, weighted, wrf, wrf_support

ANSWERS, SCORES = ["7", "7", "4", "4", "9"], [0.3, 0.2, 0.6, 0.4, 0.95]


@pytest.mark.parametrize(
    "name, want",
    [
        ("min", 0.6), ("last", 0.8), ("mean", 0.766667), ("product", 0.432), ("geometric", 0.755953),
        ("sum_logit", 3.988984), ("sum_logprob", -0.839330), ("softmin", 0.635442),
    ],
)  # fmt: skip
def test_aggregates_of_the_worked_solution(name, want):
    assert aggregate(name)([0.9, 0.6, 0.8]) == pytest.approx(want, abs=1e-6)


def test_worked_votes():
    assert best_of_n(ANSWERS, SCORES) == "9"
    assert majority(ANSWERS) == "7"  # 7 and 4 tie, 7 was seen first
    assert weighted(ANSWERS, SCORES) == "4"  # .5, 1.0, .95
    assert hmr(ANSWERS, SCORES) == "9"
    assert hmr(["7", "7", "7", "4", "9"], SCORES) == "7"


@pytest.mark.parametrize(
    "reward, want, chosen",
    [
        ("sum", [0.302041, 0.404082, 0.293878], "4"),
        ("max", [0.281081, 0.362162, 0.356757], "4"),
        ("mean", [0.273529, 0.347059, 0.379412], "9"),
    ],
)
def test_worked_wrf(reward, want, chosen):
    assert list(wrf_support(ANSWERS, SCORES, reward=reward).values()) == pytest.approx(want, abs=1e-6)
    assert wrf(ANSWERS, SCORES, reward=reward) == chosen


def test_vision_language_worked_vote():
    answers, scores = ["A", "B", "B", "C"], [0.9, 0.7, 0.6, 0.8]
    assert best_of_n(answers, scores) == "A"
    assert weighted(answers, scores) == "B"
    assert majority(answers) == "B"


def test_unreadable_answers_count_in_n_and_form_no_group():
    answers = [None, None, None, "2", "2", "1"]
    assert majority(answers) == "2"
    assert weighted(answers, [9, 9, 9, 0.1, 0.1, 0.3]) == "1"
    assert hmr(answers, [1, 0, 0, 0, 0, 0]) is None  # 2 of 6 is no majority, and the best candidate cannot be read
    assert wrf_support(answers, [1] * 6) == pytest.approx({"2": 0.5 * 2 / 6 + 0.5 * 2 / 3, "1": 0.5 / 6 + 0.5 / 3})
    assert majority([None, None]) is weighted([None], [1.0]) is wrf([None], [1.0]) is None
    assert wrf(["a", "a", "b"], [0.0, 0.0, 0.0]) == "a"


def test_errors_of_votes():
    with pytest.raises(ValueError, match="negative"):
        wrf(["1"], [-0.1])
    with pytest.raises(ValueError, match="2 answers for 1 scores"):
        weighted(["1", "2"], [0.1])
    with pytest.raises(ValueError, match="no candidate"):
        best([])
    with pytest.raises(ValueError, match="score 1 is NaN"):
        best([0.1, math.nan])
    assert best([0.2, 0.7, 0.7]) == 1


@pytest.mark.parametrize(
    "text, want",
    [
        ("so \\boxed{ 1,234.0 }", "1234"), ("<answer>1/2</answer>", "0.5"), ("answer: .50", "0.5"),
        ("\\boxed{\\frac{2}{4}}", "0.5"), ("\\boxed{X + y}", "x+y"), ("no idea", None), ("\\boxed{3/0}", "3/0"),
        ("\\boxed{0.33333333333}", "0.3333333333"), ("\\boxed{1/3}", "0.3333333333"), ("\\boxed{1e999999999}", "1e999999999"),
        ("\\boxed{12345678901234567890123}", "12345678901234567890123"),
    ],
)  # fmt: skip
def test_canonical_answer(text, want):
    assert canonical_answer(Prompt("p", {}), text) == want


def test_canonical_answer_of_a_choice_is_its_letter():
    prompt = Prompt("p", {"options": ["cat", "dog"]})
    assert [canonical_answer(prompt, t) for t in ("\\boxed{b}", "The answer is (B)", "answer: dog", "A or B")] == [
        "B", "B", "B", None,
    ]  # fmt: skip


@pytest.mark.parametrize("text, options, want", [
    ("<think>B</think>\nA", ["x", "y"], "A"), ("A\n<think>so it is\nB</think>", ["x", "y"], "A"), ("<think>hm\nB", ["x", "y"], None),
    ("\\boxed{\\text{B}}", ["x", "y"], "B"), ("<think>\\boxed{1}</think>\\boxed{0.50}", None, "0.5"), ("<think>\\boxed{1}", None, None),
])  # fmt: skip
def test_a_vote_counts_the_reply_alone(text, options, want):
    assert canonical_answer(Prompt("p", {"options": options} if options else {}), text) == want
