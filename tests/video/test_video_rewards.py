"""Rewards of video agents as pure functions: the worked numbers of the methods, and properties."""

import json
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from mmrl.credit.norm import Norm, norm
from mmrl.credit.steps import ui_s1
from mmrl.rollout import Prompt, Sample
from mmrl.tree import StepTree
from video.rewards.answers import (
    VideoAnswer,
    answer_score,
    common_length,
    deep_eyes,
    interval,
    interval_iou,
    number,
    option_letter,
    rouge,
)
from video.rewards.calls import Call, Truth, TurnCalls
from video.rewards.coverage import coverage_credit
from video.rewards.groups import curiosity, temporal_bonus
from video.rewards.manipulations import (
    Hits,
    count_repeats,
    f1_score,
    match_kinds,
    step_values,
    videocom_counts,
    videocom_score,
)
from video.rewards.plans import Skill, ordered_match, parse_plan, plan_score, similarity
from video.rewards.recorded import ScreenAction, agreement, written_action
from video.rewards.turns import count_calls, last_answer, turns_of
from vision.rewards import iou

# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, want", [
    ("<answer>B</answer>", 1), ("<answer>\\boxed{B}</answer>", 1), ("<answer>\\boxed{\\text{B}}</answer>", 1),
    ("<think><answer>A</answer></think><answer>B</answer>", 1), ("<think><answer>B</answer></think>", 0),
    ("<answer>B</answer> as said </answer>", 1), ("<answer>A</answer> no, <answer>B</answer>", 1), ("<think><answer>B</answer>", 0),
    ("◁think▷<answer>A</answer>◁/think▷<answer>B</answer>", 1), ("B", 0),
])  # fmt: skip
def test_the_answer_of_a_reply(text, want):
    prompt = Prompt("p", {"question": "?", "options": ["red", "blue"]}, {"answer": "B"})
    assert VideoAnswer()([Sample(prompt, text, 0)]) == [want]


@pytest.mark.parametrize("syntax, call, answer", [
    ("videocom", "FIND_FRAME(dog) = 5", "FINAL_ANSWER: B"),
    ("tool_call", '<tool_call>{"name": "find_frame", "arguments": {"frame": 5}}</tool_call>', "<answer>B</answer>"),
])  # fmt: skip
def test_a_thinking_of_several_lines_neither_calls_nor_answers(syntax, call, answer):
    text = f"<think>\n{call}\n{answer}\n</think>\n{call}\n{answer}"
    turns = turns_of(Sample(Prompt("p", {}), text, 0), syntax)
    assert count_calls(turns, syntax) == 1
    assert last_answer(turns, syntax) == "B"
    cut = turns_of(Sample(Prompt("p", {}), f"<think>\n{call}\n{answer}\n", 0), syntax)
    assert (count_calls(cut, syntax), last_answer(cut, syntax)) == (0, None)


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, want",
    [("B", "B"), ("(B)", "B"), ("B. a cat", "B"), ("B) a", "B"), ("B: a", "B"), (" C ", "C"), ("\\text{B}", "B"), ("\\textbf{(B)} x", "B"), ("Ｂ", "B"), ("（Ｂ）", "B"), ("Because it", None),
     ("b", None), ("the B", None), ("", None), ("AB", None), ("(D) x", "D")],
)  # fmt: skip
def test_option_letter_is_strict(text, want):
    assert option_letter(text) == want


@pytest.mark.parametrize(
    "kind, answer, reference, want",
    [
        ("multiple choice", "B. a cat", "B", 1.0),
        ("multiple choice", "Because of A", "B", 0.0),  # the released parser reads this as option B
        ("multiple choice", None, "B", 0.0),
        ("numerical", "3.14", "3.141", 1.0),
        ("numerical", "3", "3.0", 0.0),  # one has a point, the other not
        ("numerical", "1,200", "1200.0", 1.0),
        ("numerical", "12", "12", 1.0),
        ("numerical", "twelve", "12", 0.0),
        ("OCR", "STOP AHEAD now", "STOP now", 0.5),
        ("OCR", "STOP now", "STOP AHEAD now", 2 / 3),
        ("OCR", "a b c d e", "x", 0.0),  # clipped
        ("regression", "9", "10", 0.9),
        ("regression", "25", "10", 0.0),
        ("regression", "ten", "10", 0.0),
        ("regression", "0", "0", 1.0),
        ("regression", "1", "0", 0.0),
        ("free-form", "the cat sat", "the cat sat", 1.0),
        ("free-form", "", "the cat", 0.0),
        ("text", " The Cat. ", "the cat", 1.0),
        ("interval", "from 10 to 20 s", "[15, 30]", 0.25),
        ("interval", "[12, 18]", "10-20", 0.6),
        ("interval", "never", "10-20", 0.0),
    ],
)
def test_answers_by_type(kind, answer, reference, want):
    assert answer_score(answer, reference, kind) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    "kind, reference, told",
    [("multiple choice", "a cat", "letter"), ("numerical", "many", "number"), ("regression", "", "number"),
     ("interval", "noon", "start and an end"), ("essay", "x", "unknown answer type 'essay'"), ("os:getcwd", "x", "no registered name")],
)  # fmt: skip
def test_a_reference_that_is_none_of_its_type_is_refused(kind, reference, told):
    with pytest.raises(ValueError, match=told):
        answer_score("A", reference, kind)


def test_rouge_by_hand():
    # ROUGE-1: 3 shared of 4 and 3 words, 6/7; ROUGE-2: 1 of 3 and 2 pairs, 2/5; ROUGE-L: "the cat sat" 3, 6/7
    assert rouge("The cat then sat", "the cat sat") == pytest.approx((6 / 7 + 2 / 5 + 6 / 7) / 3)
    assert rouge("a a a", "a") == pytest.approx((2 / 4 + 0 + 2 / 4) / 3)  # counts are clipped
    assert rouge("слово дело", "слово дело") == 1.0  # any script


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_rouge_is_symmetric_and_bounded(a, b):
    x, y = " ".join(a), " ".join(b)
    assert 0 <= rouge(x, y) <= 1 + 1e-12
    assert rouge(x, y) == pytest.approx(rouge(y, x))


@pytest.mark.parametrize(
    "text, want", [("7", 7.0), ("-1.5", -1.5), ("1,234.5", 1234.5), ("1,23", None), ("7 apples", None), ("", None)]
)
def test_number(text, want):
    assert number(text) == want


@pytest.mark.parametrize(
    "a, b, want",
    [((10, 20), (15, 30), 0.25), ((10, 20), (12, 18), 0.6), ((2, 6), (4, 8), 1 / 3), ((0, 1), (2, 3), 0.0),
     ((1, 1), (1, 1), 0.0)],
)  # fmt: skip
def test_interval_iou(a, b, want):
    assert interval_iou(a, b) == pytest.approx(want)
    assert interval_iou(b, a) == pytest.approx(want)


def test_interval_is_two_numbers_in_order():
    assert interval("2.5 to 4") == (2.5, 4.0)
    assert interval("[4, 2]") is None and interval("1, 2, 3") is None


@pytest.mark.parametrize(
    "a, b, want",
    [([10, 10, 110, 110], [60, 60, 160, 160], 0.142857), ([0, 0, 100, 100], [0, 0, 100, 50], 0.5),
     ([20, 20, 80, 80], [0, 0, 100, 100], 0.36)],
)  # fmt: skip
def test_box_iou(a, b, want):
    assert iou(a, b) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "accuracy, well_formed, tool, want",
    [(1, True, True, 2.0), (1, True, False, 0.8), (1, False, True, 1.8), (0, True, True, 0.0), (0, False, True, -0.2)],
)
def test_deep_eyes(accuracy, well_formed, tool, want):
    assert deep_eyes(accuracy, well_formed=well_formed, tool=tool) == pytest.approx(want)


# ---- manipulations --------------------------------------------------------------------------------------------------

UNIT = (0.0, 0.0, 0.5, 0.5)
INNER = (0.1, 0.1, 0.4, 0.4)  # IoU 0.36 with UNIT
TRUTH = Truth(ids=(2, 3), frames=((50, 60),), boxes=((55, UNIT),))
FOUND = [
    Call("segment", segment=2),
    Call("segment", segment=5),
    Call("frame", frame=55),
    Call("box", frame=55, box=INNER),
]


def test_video_com_by_hand():
    assert videocom_counts(FOUND, TRUTH) == {"segment": (1, 2), "frame": (1, 1), "box": (1, 1)}
    assert videocom_score(FOUND, TRUTH) == 0.75
    assert videocom_score([], TRUTH) == 0.0
    assert videocom_score(FOUND[2:3], TRUTH) == 1.0  # precision only: one right call is enough
    assert videocom_score(FOUND + FOUND[:3], TRUTH) == 0.75  # repeats are free
    assert videocom_score([*FOUND, Call("box", frame=7, box=UNIT)], TRUTH) == 0.75  # no box there: not counted
    assert videocom_score(FOUND, TRUTH, Hits(iou_threshold=0.4)) == 0.5
    assert videocom_score(FOUND, Truth(frames=((50, 60),))) == 1.0  # kinds without ground truth are (0, 0)


@pytest.mark.parametrize(
    "rewards, want",
    [([1.75, 0.75, 1, 0], [1.2123, -0.1732, 0.1732, -1.2123]), ([1, 0, 1, 0], [0.8659, -0.8659, 0.8659, -0.8659])],
)
def test_video_com_group(rewards, want):
    z = norm(torch.tensor(rewards, dtype=torch.float64), torch.zeros(4, dtype=torch.long), Norm(eps=1e-4)).z
    torch.testing.assert_close(z, torch.tensor(want, dtype=torch.float64), atol=1e-4, rtol=0)


def test_f1_by_hand():
    matches = match_kinds(FOUND, TRUTH)
    assert (matches["segment"].precision, matches["segment"].recall, matches["segment"].f1) == (0.5, 0.5, 0.5)
    assert matches["frame"].f1 == matches["box"].f1 == 1.0
    assert f1_score(FOUND, TRUTH) == pytest.approx(2.5 / 3)
    assert f1_score(FOUND, TRUTH, weights={"segment": 2.0}) == pytest.approx(3 / 4)
    assert f1_score(FOUND[2:3], TRUTH) == pytest.approx(1 / 3)  # what is missing costs
    assert f1_score(FOUND + FOUND, TRUTH) == pytest.approx(2.5 / 3)
    assert match_kinds([], Truth(frames=((0, 1),)))["frame"].f1 == 0.0
    assert f1_score(FOUND, TRUTH, weights={"segment": 0.0, "frame": 0.0, "box": 0.0}) == 0.0


def test_segments_in_seconds():
    table = tuple((10.0 * i, 10.0 * (i + 1)) for i in range(6))
    truth = Truth(ids=(2,), spans=((12.0, 18.0),), table=table)
    by_id, close, far = (
        Call("segment", segment=2),
        Call("segment", span=(12.0, 17.0)),
        Call("segment", span=(40.0, 50.0)),
    )
    assert truth.beside([by_id]).overlaps(by_id) == {0: 1.0}
    assert truth.beside([close]).overlaps(close) == {0: pytest.approx(5 / 6)}  # against the reference's seconds
    assert videocom_score([close, far], truth) == 0.5
    assert Truth(spans=((12.0, 18.0),), table=table).overlaps(by_id) == {0: pytest.approx(0.6)}  # id 2 is 10 to 20 s
    assert Truth(ids=(2,), table=table).overlaps(close) == {0: pytest.approx(0.5)}
    assert Truth(spans=((12.0, 18.0),), table=table).overlaps(Call("segment", segment=9)) == {}


def turns(*groups):
    return [TurnCalls(tuple(g)) for g in groups]


def test_step_values_by_hand():
    path = turns(FOUND[:2], FOUND[2:3], FOUND[3:], FOUND[2:3])
    assert step_values(path, TRUTH) == [0.5, 1.0, 1.0, 0.0]  # a repeat earns nothing
    assert step_values(path, TRUTH, repeat_penalty=0.2)[3] == -0.2
    assert step_values(path, TRUTH, overlap=True)[2] == pytest.approx(0.36)
    refused = [TurnCalls(problem="out_of_range"), TurnCalls(problem="duplicate_action"), TurnCalls(answered=True)]
    values = step_values(refused, TRUTH, error_penalty=0.3, repeat_penalty=0.1)
    assert values[:2] == [-0.3, -0.1] and math.isnan(values[2])
    assert step_values(refused[:1], TRUTH) == [0.0]
    bare = turns([Call("box", frame=7, box=UNIT)])
    assert step_values(bare, TRUTH) == [0.0] and math.isnan(step_values(bare, TRUTH, mode="videocom")[0])
    assert math.isnan(step_values(turns(FOUND[:1]), Truth(frames=((0, 1),)))[0])  # no ground truth of that kind


def test_near_repeats():
    near = (0.1, 0.1, 0.4, 0.405)
    assert Call("box", frame=5, box=INNER).repeats(Call("box", frame=5, box=near))
    assert not Call("box", frame=6, box=INNER).repeats(Call("box", frame=5, box=near))
    assert Call("segment", span=(0.0, 10.0)).repeats(Call("segment", span=(0.0, 9.5)))
    assert not Call("segment", segment=1).repeats(Call("segment", segment=2))
    assert count_repeats(FOUND + FOUND) == 4 and count_repeats(FOUND) == 0


def test_coverage_credit_by_hand():
    truth = Truth(boxes=((5, UNIT), (9, INNER)))
    first, miss, second = Call("box", frame=5, box=UNIT), Call("box", frame=5, box=(0.6, 0.6, 0.9, 0.9)), Call(
        "box", frame=9, box=INNER
    )  # fmt: skip
    credit = coverage_credit(turns([first], [first], [miss], [second]), truth)
    assert credit == pytest.approx([0.5, -0.05, -0.1, 0.5])
    again = Call("box", frame=5, box=(0.0, 0.0, 0.5, 0.4))  # another box on a covered item
    assert coverage_credit(turns([first], [again]), truth)[1] == pytest.approx(-0.05)
    refused = [TurnCalls(problem="parse_error"), TurnCalls(problem="duplicate_action"), TurnCalls(answered=True)]
    values = coverage_credit(refused, truth)
    assert values[:2] == pytest.approx([-0.1, -0.05]) and math.isnan(values[2])


def test_coverage_total_is_clipped():
    truth = Truth(boxes=((5, UNIT),))
    misses = [Call("box", frame=5, box=(0.6, 0.6, 0.7 + 0.02 * i, 0.9)) for i in range(7)]
    values = coverage_credit(turns(*[[m] for m in misses]), truth)
    assert values[:5] == pytest.approx([-0.1] * 5) and values[5:] == pytest.approx([0.0, 0.0])
    assert sum(coverage_credit(turns([Call("box", frame=5, box=UNIT)]), truth, correct=3.0)) == 1.0


# ---- groups ---------------------------------------------------------------------------------------------------------


def test_bonuses_at_their_borders():
    assert temporal_bonus([1.0, 0.1], []) == [0.0, 0.0]  # a picture
    assert temporal_bonus([0.0, 0.0], [0.0]) == [0.0, 0.0]  # 0 >= 0 passes and nobody has accuracy
    assert temporal_bonus([0.8, 0.8], [1.0]) == [0.3, 0.3]


@pytest.mark.parametrize(
    "calls, z, want",
    [([1, *[0] * 7], 1.5, 0.2333), ([1, *[0] * 7], 2.0, 0.175), ([2, 0, 0, 0], 1.5, -0.0167), ([3, 0], 1.5, -0.1)],
)
def test_curiosity(calls, z, want):
    got = curiosity(calls, z=z)
    assert got[0] == pytest.approx(want, abs=1e-4) and not any(got[1:])


# ---- progress -------------------------------------------------------------------------------------------------------

T = ["open", "home", "open", "search", "type", "swipe", "tap"]
FIVE = ["open", "search", "type", "tap", "save"]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=5))
def test_common_length_by_definition(a, b):
    """The longest of all subsequences of `a` that `b` holds in order."""
    subsequences = [s for k in range(len(a) + 1) for s in combinations(a, k)]
    longest = max(len(s) for s in subsequences if is_subsequence(s, b))
    assert common_length(a, b) == longest
    assert common_length(a, b, lambda x, y: x == y and x != "c") == common_length([x for x in a if x != "c"], b)


def is_subsequence(short, long):
    rest = iter(long)
    return all(x in rest for x in short)


def test_progress_by_hand():
    done = [common_length(T[: t + 1], FIVE) / 5 for t in range(len(T))]
    assert done == pytest.approx([0.2, 0.2, 0.2, 0.4, 0.6, 0.6, 0.8])


# ---- plans ----------------------------------------------------------------------------------------------------------

REFERENCE = "pick(cup), place(cup,tray), open(drawer), pick(spoon)"


@pytest.mark.parametrize(
    "plan, ordered, unordered, score, share",
    [
        (REFERENCE, 4, 4, 1.0, 1.0),
        ("open(drawer), pick(cup), place(cup,tray)", 2, 3, 0.5714, 0.5),
        ("pick(cup), place(cup,table), open(drawer)", 2.6667, 2.6667, 0.7619, 0.6667),
        ("pick(spoon), open(drawer), place(cup,tray), pick(cup)", 2.0, 4.0, 0.5, 0.5),
        (REFERENCE + ", pick(spoon)" * 4, 4, 4, 0.6667, 1.0),
    ],
)
def test_ordered_matching(plan, ordered, unordered, score, share):
    mine, right = parse_plan(plan), parse_plan(REFERENCE)
    assert ordered_match(mine, right) == pytest.approx(ordered, abs=1e-4)
    table = torch.tensor([[similarity(a, b) for b in right] for a in mine], dtype=torch.float64).numpy()
    assert table[linear_sum_assignment(table, maximize=True)].sum() == pytest.approx(unordered, abs=1e-4)
    assert plan_score(mine, right) == pytest.approx(score, abs=1e-4)
    assert plan_score(right, mine) == pytest.approx(score, abs=1e-4)
    assert ordered_match(mine, right) / len(right) == pytest.approx(share, abs=1e-4)


def test_parse_plan():
    assert parse_plan("First Pick(cup), then place( cup , tray ) and wait()") == [
        Skill("pick", ("cup",)), Skill("place", ("cup", "tray")), Skill("wait"),
    ]  # fmt: skip
    assert similarity(Skill("wait"), Skill("wait")) == 1.0
    with pytest.raises(ValueError, match="at least one"):
        plan_score([], [])


# ---- recorded trajectories ------------------------------------------------------------------------------------------

CLICK = {"action": "click", "coordinate": [0.5, 0.5]}
BOXES = [[0.0, 0.0, 0.1, 0.1], [0.4, 0.4, 0.6, 0.6]]
STEP = Prompt("p", {"question": "touch it"}, {"expert": CLICK, "boxes": BOXES})


def screen_action(said, think="<think>there</think>", prompt=STEP, **options):
    text = said if isinstance(said, str) else json.dumps(said)
    return ScreenAction(**options)([Sample(prompt, f"{think}<answer>{text}</answer>", 0)])[0]


@pytest.mark.parametrize(
    "said, how, score",
    [
        ({"action": "click", "coordinate": [500, 500]}, "exact", 1.0),
        ({"action": "click", "coordinate": [610, 500]}, "exact", 1.0),  # inside the box enlarged by 1.2
        ({"action": "click", "coordinate": [50, 50]}, "exact", 1.0),  # the other box
        ({"action": "click", "coordinate": [700, 500]}, "type", 0.55),
        ({"action": "click"}, "type", 0.55),
        ({"action": "type", "text": "x"}, "readable", 0.19),
        ({"action": "click", "coordinate": [True, 5]}, "none", 0.1),
        ("[" * 5000, "none", 0.1), ("click 500 500", "none", 0.1), ('{"coordinate": [1, 2]}', "none", 0.1),
    ],
)  # fmt: skip
def test_ui_s1_step_scores(said, how, score):
    text = said if isinstance(said, str) else json.dumps(said)
    assert agreement(written_action(f"<answer>{text}</answer>"), CLICK, BOXES) == how
    assert screen_action(said) == pytest.approx(score)
    assert screen_action(said, think="") == pytest.approx(score - 0.1)


def test_points_and_texts():
    assert agreement({"action": "click", "coordinate": [0.53, 0.5]}, CLICK) == "exact"  # within .04 of the expert's
    assert agreement({"action": "click", "coordinate": [0.55, 0.5]}, CLICK) == "type"
    typed = {"action": "type", "text": "Hello"}
    assert agreement({"action": "type", "text": " hello "}, typed) == "exact"
    assert agreement({"action": "type", "text": "bye"}, typed) == "type"
    assert screen_action(CLICK, scale=1.0) == 1.0
    assert screen_action(CLICK, prompt=Prompt("q", {}, {"answer": "x"})) is None


@pytest.mark.parametrize(
    "point, think, want",
    [([550, 500], "<think>a</think>", 2), ([610, 500], "<think>a</think>", 1), ([610, 500], "", 0)],
)
def test_mobile_r1(point, think, want):
    assert screen_action({"action": "click", "coordinate": point}, think, style="mobile_r1") == want


RETURNS = [
    ([1, 1, 0.55, 1, 1], [1, 1, 0, 1, 1], [1.5, 1.0, 0.55, 1.5, 1.0]),
    ([1, 1, 1, 1], [1, 1, 1, 1], [1.875, 1.75, 1.5, 1]),
    ([1, 0.19, 1], [1, 0, 1], [1, 0.19, 1]),
]


@pytest.mark.parametrize("rewards, matches, want", RETURNS)
def test_returns_cut_at_errors(rewards, matches, want):
    ok = [bool(m) for m in matches]
    # beside a chain of zeros, A = G - G/2
    n = len(rewards)
    tree = StepTree(
        parent=[*range(-1, n - 1), -1, *range(n, 2 * n - 1)], group=[0] * 2 * n, status=([0] * (n - 1) + [1]) * 2,
        outcome=([math.nan] * (n - 1) + [0.0]) * 2, step_reward=[*rewards, *[0.0] * n], ok=[*ok, *[True] * n],
    )  # fmt: skip
    adv = ui_s1(tree, w_episode=0.0, how=Norm(scale="none")).adv
    torch.testing.assert_close(2 * adv[:n], torch.tensor(want, dtype=torch.float64))


def test_ui_s1_groups():
    g = torch.tensor([1.875, 1, 0.55, 1.5], dtype=torch.float64)
    one = torch.zeros(4, dtype=torch.long)
    for scale, want in (("std", [1.1127, -0.3997, -1.1775, 0.4645]), ("none", [0.6438, -0.2312, -0.6812, 0.2688])):
        z = norm(g, one, Norm(scale=scale)).z
        torch.testing.assert_close(z, torch.tensor(want, dtype=torch.float64), atol=1e-4, rtol=0)
