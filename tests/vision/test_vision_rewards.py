import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.rewards import RewardError, score, score_steps, step_views
from mmrl.rollout import Actions, Prompt, Rollout, Sample
from mmrl.tree import StepTree
from vision.rewards import (
    Format,
    KeyStepMatch,
    LavCot,
    LengthPenalty,
    RepeatedSteps,
    StepRAR,
    StepRVR,
    ViRLAction,
    ViRLStep,
    action_credit,
    cos_structure,
    count_score,
    edit_similarity,
    iou,
    is_valid_reasoning,
    key_step_share,
    overlong,
    parse_boxes,
    repeated_share,
    step_bodies,
)


def sample(text, **reference):
    return Sample(Prompt("p0", {}, reference), text, 0)


def one(reward, text, **reference):
    (value,) = reward([sample(text, **reference)])
    return value


# ---- structure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>a\nb</think>\n\n<answer>c</answer> ", 1.0),
        ("<think>a</think><answer>b</answer> and more", 0.0),
        ("<think>a</think>and<answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think><answer>b</answer><answer>b</answer>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think>a", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer(text, want):
    assert one(Format(), text) == want


@pytest.mark.parametrize(
    "kind, text, want",
    [
        ("boxed", "so \\boxed{\\frac{1}{2}}", 1.0),
        ("boxed", "\\boxed{1} \\boxed{2}", 0.0),
        ("boxed", "\\boxed{ }", 0.0),
        ("boxed", "\\boxed{1", 0.0),
        ("boxed", "<think>\\boxed{1}</think>\\boxed{2}", 1.0),
        ("boxed", "<think>\\boxed{1}</think>so 2", 0.0),
        ("lines", "two red\nthree blue\nanswer 5", 1.0),
        ("lines", "two red\n\nAnswer: 5\n", 1.0),
        ("lines", "answer 5", 0.0),
        ("lines", "answer 5\nanswer 5", 0.0),
        ("lines", "two red\nanswer", 0.0),
        ("lines", "two red\nanswers vary", 0.0),
    ],
)
def test_boxed_and_lines(kind, text, want):
    assert one(Format(kind), text) == want


def cos_step(name="look", thought="a car", reflection="fine"):
    parts = {"name": name, "thought": thought, "reflection": reflection}
    inside = "".join(f"<|reasoning_step_{k}_start|>{v}<|reasoning_step_{k}_end|>" for k, v in parts.items())
    return f"<|reasoning_step_start|>{inside}<|reasoning_step_end|>"


def cos(*steps, answer="red"):
    chain = "<|reasoning_proceed|>".join(steps)
    return f"<|reasoning_start|>{chain}<|reasoning_end|>\n<|answer_start|>{answer}<|answer_end|>"


@pytest.mark.parametrize(
    "text, want",
    [
        (cos(cos_step()), 1.0),
        (cos(cos_step(), cos_step(reflection=" "), cos_step()), 1.0),
        (cos(cos_step(), cos_step(thought="")), 0.0),
        (cos(cos_step(), answer=""), 0.0),
        (cos(), 0.0),
        (cos(cos_step() + cos_step()), 0.0),  # no proceed between
        (cos(cos_step()) + cos(cos_step()), 0.0),
        (cos(cos_step()) + "more", 0.0),
        (cos(cos_step()).replace("<|reasoning_end|>", ""), 0.0),
        (cos(cos_step()).replace("_name_", "_thought_"), 0.0),
        ("red", 0.0),
        ("", 0.0),
    ],
)
def test_chain_of_step(text, want):
    assert one(cos_structure, text) == one(Format("chain_of_step"), text) == want


# ---- StepGRPO -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, want", [([["area", "surface"], "r = 3", "missing"], 2 / 3), (["PI R^2"], 1.0), ([], 0.0)]
)
def test_key_step_share_by_hand(keys, want):
    assert key_step_share("use area = pi r^2. substitute r = 3 to get 9 pi.", keys) == pytest.approx(want)


def r1vl(
    *numbers, first="### Image Description: a disc\n### Rationales: geometry\n", last="### The final answer is: 9"
):
    return first + "".join(f"### Step {k}: body of {k}\n" for k in numbers) + last


@pytest.mark.parametrize(
    "text, want",
    [
        (r1vl(1, 2, 3), 1.0),
        (r1vl(1), 1.0),
        (r1vl(1, 3), 0.0),
        (r1vl(2, 1), 0.0),
        (r1vl(1, 1), 0.0),
        (r1vl(), 0.0),
        ("### The final answer is: 9\n" + r1vl(1, 2, last=""), 0.0),
        (r1vl(1, 2, last=""), 0.0),
        (r1vl(1, 2, first="### Rationales: geometry\n"), 0.0),
        (r1vl(1, 2, first="### Image Description: a disc\n"), 0.0),
        ("no steps at all", 0.0),
        (r1vl(1, 2).replace("\n", " "), 1.0),
        (r1vl(1, 2).replace("### Step 1", "### Let's think step by step.\n### Step 1"), 1.0),
        (r1vl(1, 2) + "\n### The final answer is: 10", 0.0),
        (r1vl(1, 2).replace("\n", " ") + " ### The final answer is: 9", 0.0),
        (r1vl(1, 2, last="### The final answer is: "), 0.0),
        (r1vl(1, 2).replace("body of 2", ""), 0.0),
        (r1vl(1, 2, first="### Rationales: geometry\n### Image Description: a disc\n"), 0.0),
        (r1vl(1, 2) + "\n### Step 3: more", 0.0),
        ("<think>" + r1vl(1, 2) + "</think>", 0.0),
        ("<think>### Step 1: a draft</think>" + r1vl(1, 2), 1.0),
        ("#" + r1vl(1, 2), 0.0),
    ],
)
def test_valid_reasoning(text, want):
    assert is_valid_reasoning(text) == bool(want) and one(StepRVR(), text) == want


def test_key_steps_are_looked_for_in_the_steps_alone():
    text = r1vl(1, 2).replace("body of 2", "Substitute\nr = 3")
    assert step_bodies(text) == ["body of 1", "Substitute\nr = 3"]
    assert one(StepRAR(), text, key_steps=["substitute", "disc"]) == 0.5
    assert one(KeyStepMatch(), text, key_steps=["substitute", "disc"]) == 1.0
    assert step_bodies(text.replace("\n", " ")) == ["body of 1", "Substitute r = 3"]
    assert step_bodies("<think>### Step 1: draft</think>" + text) == step_bodies(text)
    assert one(StepRAR(), text, key_steps=[]) == 0.0 and one(StepRAR(), text) is None


def test_step_grpo_is_a_weighted_list():
    """Right with k = 1, v = 1; right, .5, 0; wrong, .5, 1; wrong, 0, 0: 2.1, 1.05, 1.05, 0."""
    keys = ["body", "missing"]
    texts = [r1vl(1), r1vl(2), r1vl(1), "no steps"]

    def right(samples):
        return [1.0, 1.0, 0.0, 0.0]

    samples = [sample(t, key_steps=keys[:1] if i == 0 else keys) for i, t in enumerate(texts)]
    total = score(samples, {"a": (right, 1.0), "rar": (StepRAR(), 0.1), "rvr": (StepRVR(), 1.0)}).total
    torch.testing.assert_close(total, torch.tensor([2.1, 1.05, 1.05, 0.0], dtype=torch.float64))
    advantage = (total - total.mean()) / (total.std() + 1e-4)
    assert float(total.std()) == pytest.approx(0.8573214, abs=1e-7)
    want = torch.tensor([1.224602, 0.0, 0.0, -1.224602], dtype=torch.float64)
    torch.testing.assert_close(advantage, want, atol=1e-6, rtol=0)


# ---- LaV-CoT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "predicted, true, want", [(3, 4, 0.75), (9, 4, 0.0), (4, 4, 1.0), (1, 0, 0.0), (0, 0, 1.0), (None, 4, 0.0)]
)
def test_count_score(predicted, true, want):
    assert count_score(predicted, true) == want


@pytest.mark.parametrize(
    "a, b, want", [("sitting", "kitten", 1 - 3 / 7), ("", "", 1.0), ("", "ab", 0.0), ("ab", "ab", 1.0)]
)
def test_edit_similarity(a, b, want):
    assert edit_similarity(a, b) == pytest.approx(want)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_similarity_is_symmetric_and_bounded(a, b):
    assert 0 <= edit_similarity(a, b) <= 1 and edit_similarity(a, b) == pytest.approx(edit_similarity(b, a))


def test_lav_cot_aspects():
    text = "<think><language>German</language><count>3</count></think><answer>sitting</answer>"
    assert one(LavCot(), text, answer="kitten", count=4) == pytest.approx((1 + 0.75 + 1 + 4 / 7) / 4)
    assert one(LavCot(), text, answer="kitten") == pytest.approx((1 + 1 + 4 / 7) / 3)
    assert one(LavCot(count_tag="n"), text, answer="sitting", count=4) == pytest.approx(3 / 4)
    assert one(LavCot(), "<count>many</count>", answer="x", count=1) == 0.0
    assert one(LavCot(), text, count=4) is None


# ---- length ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, want", [(0, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (100, -1.0), (500, -1.0)])
def test_soft_budget_by_hand(length, want):
    assert overlong(length, limit=100, buffer=20) == want


@pytest.mark.parametrize("unit, want", [("words", -0.5), ("characters", -1.0), ("steps", 0.0)])
def test_length_units(unit, want):
    assert one(LengthPenalty(4, 2, unit), "one two\nthree") == want  # 3 words, 13 characters, 2 steps


@pytest.mark.parametrize("limit, buffer", [(4, 0), (4, 5), (0, 1)])
def test_wrong_budget(limit, buffer):
    with pytest.raises(ValueError, match="must lie in 1..limit"):
        LengthPenalty(limit, buffer)


def test_repeated_steps():
    assert repeated_share(["a  b", "A b", "c", "a b"]) == 0.5 and repeated_share([]) == 0.0
    assert one(RepeatedSteps(), "look\n\nlook\nanswer 5\nLook ") == -0.5
    assert one(RepeatedSteps(), "") == 0.0


# ---- visual actions -------------------------------------------------------------------------------------------------


def test_boxes_are_found_in_any_action_syntax():
    text = (
        'crop(0, 0, 10, 10) {"bbox_2d": [1, 2.5, 3, 4]} <box>[-1,0,5,5]</box> zoom_in(box=[1,1,2,2]) points (1,2,3,4)'
    )
    assert parse_boxes(text) == [(0, 0, 10, 10), (1, 2.5, 3, 4), (-1, 0, 5, 5), (1, 1, 2, 2)]
    assert parse_boxes("crop(1, 2, 3)") == []


def test_iou():
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(2 / 6)
    assert iou((0, 0, 2, 2), (2, 2, 3, 3)) == 0.0 == iou((3, 3, 1, 1), (0, 0, 4, 4))


REGIONS = [[0, 0, 10, 10], [20, 20, 30, 30]]


def test_action_credit_by_hand():
    boxes = [(0, 0, 10, 8), (0, 0, 10, 10), (50, 50, 60, 60), (20, 20, 30, 30), (5, 5, 5, 5)]
    # a hit of IoU .8, the same region again, a miss, the other region exactly, a box without area
    assert action_credit(boxes, REGIONS) == [0.8, 0.0, -0.5, 1.0, -0.5]
    assert action_credit(boxes, REGIONS, threshold=0.9, miss=-1.0) == [-1.0, 1.0, -1.0, 1.0, -1.0]
    assert action_credit(boxes, REGIONS, hit=2.0, repeat=-0.1)[:2] == [1.6, -0.1]
    assert action_credit([], REGIONS) == [] and action_credit(boxes[:1], []) == [-0.5]


def test_overlapping_regions_are_found_one_by_one():
    regions = [(0, 0, 10, 10), (0, 0, 10, 9)]
    assert action_credit([(0, 0, 10, 10)] * 3, regions) == [1.0, 0.9, 0.0]


def test_virl_outcome():
    text = "crop(0,0,10,8) then crop(0,0,10,10), crop(50,50,60,60)"
    assert one(ViRLAction(), text, regions=REGIONS) == pytest.approx(0.3)
    assert one(ViRLAction(), "no action", regions=REGIONS) == 0.0 and one(ViRLAction(), text) is None
    with pytest.raises(ValueError, match=r"prompt 'p0': region \[1, 2\] must be"):
        one(ViRLAction(), text, regions=[[1, 2]])
    with pytest.raises(ValueError, match="threshold=0"):
        ViRLAction(threshold=0)


# ---- step rewards ---------------------------------------------------------------------------------------------------


def tree_rollout(texts, regions=REGIONS):
    """Prompt p0: 0 -> (1, 2), 2 -> 3; prompt p1: 4."""
    n = math.nan
    tree = StepTree([-1, 0, 0, 2, -1], [0, 0, 0, 0, 1], [0, 1, 0, 2, 1], [n, 1.0, n, n, 0.0])
    prompts = [Prompt("p0", {}, {"regions": regions}), Prompt("p1", {}, {})]
    return Rollout(prompts, tree, Actions(torch.zeros(5), torch.ones(5, dtype=torch.bool)), texts=texts)


def test_step_views():
    views = step_views(tree_rollout(list("abcde")))
    assert [v.before for v in views] == [[], ["a"], ["a"], ["a", "c"], []]
    assert [v.text for v in views] == list("abcde")
    assert [v.is_last for v in views] == [False, True, False, True, True]
    assert [v.prompt.id for v in views] == ["p0"] * 4 + ["p1"]
    assert views[1].before is views[2].before  # shared by siblings
    with pytest.raises(ValueError, match="0 texts for 5 steps"):
        step_views(tree_rollout([]))


def test_virl_steps_know_their_own_path_alone():
    texts = ["crop(0,0,10,10)", "crop(0,0,10,10)", "crop(20,20,30,30) crop(1,1,2,2)", "look", "crop(0,0,10,10)"]
    values = ViRLStep()(tree_rollout(texts))
    # found; found again; the other region and a miss; no action; a prompt without regions
    assert values[:3].tolist() == [1.0, 0.0, 0.5] and values[3:].isnan().all()
    along = sum(values[[0, 2]].tolist())
    assert along == one(ViRLAction(), "\n".join([texts[0], texts[2], texts[3]]), regions=REGIONS)


def test_step_rewards_are_weighed_and_nan_is_no_opinion():
    n = math.nan
    a, b = torch.tensor([1.0, n, 2.0, n, 0.0]), [0.5, 0.5, n, n, 1.0]
    rollout, record = score_steps(tree_rollout(list("abcde")), {"a": (lambda r: a, 2.0), "b": (lambda r: b, 1.0)})
    want = torch.tensor([2.5, 0.5, 4.0, n, 1.0], dtype=torch.float64)
    torch.testing.assert_close(rollout.tree.step_reward, want, equal_nan=True)
    assert record.unscored == {"a": 2, "b": 2} and not record.failed and set(record.seconds) == {"a", "b"}
    torch.testing.assert_close(record.parts["a"], a.double(), equal_nan=True)


@pytest.mark.parametrize("error", [KeyError("x"), SystemExit(2)])
def test_a_raising_step_reward_is_counted_and_the_others_stand(error, caplog):
    def bad(rollout):
        raise error

    rewards = {"good": (lambda r: torch.ones(5), 1.0), "bad": (bad, 1.0)}
    rollout, record = score_steps(tree_rollout(list("abcde")), rewards)
    assert rollout.tree.step_reward.tolist() == [1.0] * 5
    assert record.unscored == {"good": 0, "bad": 5} and list(record.failed) == ["bad"]
    assert "step reward 'bad' raised on 5 steps" in caplog.text
    with pytest.raises(RewardError, match="every step reward raised"):
        score_steps(tree_rollout(list("abcde")), {"bad": (bad, 1.0)})


def test_a_prompt_on_which_a_step_reward_raises_leaves_its_neighbours_alone():
    def picky(rollout):
        if any(prompt.id == "p1" for prompt in rollout.prompts):
            raise ValueError("a film that nobody here sees")
        return torch.arange(float(len(rollout.tree)))

    rollout, record = score_steps(tree_rollout(list("abcde")), {"picky": (picky, 1.0)})
    assert rollout.tree.step_reward[:4].tolist() == [0.0, 1.0, 2.0, 3.0] and rollout.tree.step_reward[4].isnan()
    assert record.unscored == {"picky": 1} and not record.failed


@pytest.mark.parametrize(
    "raw, message",
    [
        (torch.ones(4), r"'r' returned shape \(4,\) for 5 steps"),
        (1.0, r"returned shape \(\) for 5 steps"),
        (None, "returned NoneType, no numbers"),
        (["a"] * 5, "returned list, no numbers"),
        (b"abcde", "returned bytes, no numbers"),
        (bytearray(b"abcde"), "returned bytearray, no numbers"),
        (dict.fromkeys(range(5), 1.0), "returned dict, no numbers"),
        ([10**400] * 5, "returned list, no numbers"),
        (torch.tensor([0, 0, math.inf, 0, 0]), "step 2 is infinite"),
        ([0.0, 1e308, 0.0, 0.0, 0.0], r"step 1 is 1e\+308, beyond 1e\+15"),
    ],
)
def test_broken_step_rewards(raw, message):
    with pytest.raises(RewardError, match=message):
        score_steps(tree_rollout(list("abcde")), {"r": (lambda r: raw, 1.0)})


@pytest.mark.parametrize("name, options", [("Format", {"kind": "boxed"}), ("StepRAR", {}), ("cos_structure", {}), ("LavCot", {}), ("LengthPenalty", {"limit": 9, "buffer": 3}), ("ViRLAction", {"miss": -1.0})])  # fmt: skip
def test_recipes_can_make_them(name, options):
    from mmrl.registry import ComponentError, build

    reward = build("rewards", "rewards.0", f"vision.rewards:{name}", options)
    assert len(reward([sample("text", answer="a", key_steps=[], regions=[])])) == 1
    with pytest.raises(ComponentError):
        build("rewards", "rewards.0", f"vision.rewards:{name}", {"nonsense": 1})
