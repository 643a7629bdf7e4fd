"""Rewards of video agents as recipes name them, on samples and rollouts."""

import math

import pytest
import torch

from mmrl.registry import ComponentError, build
from mmrl.rewards.steps import score_steps
from mmrl.rollout import Actions, Prompt, Rollout, Sample
from mmrl.tree import StepTree
from video.rewards import (
    Curiosity,
    DeepEyes,
    LcsProgress,
    Manipulations,
    PlanOverlap,
    TemporalContrast,
    VideoAnswer,
    VideoAnswerStep,
    VideoComReward,
    VideoFormat,
    VideoViRL,
    manipulation_f1,
)

# a clip of 60 s in 600 frames, 280 x 280 pixels: six segments of 10 s; frame 56 of a policy is frame 55 here
REFERENCE = {
    "answer": "B", "answer_type": "multiple choice", "segment_ids": [2, 3], "frames": [[50, 60]],
    "boxes": [{"frame": 55, "box": [0, 0, 100 / 280, 100 / 280]}], "frame_count": 600, "duration": 60.0,
    "size": [280, 280],
}  # fmt: skip
SEGMENT, FRAME, ZOOM = "FIND_SEGMENT(cup) = [2, 5]", "FIND_FRAME(cup) = 56", "SPATIAL_ZOOM(cup) = [20, 20, 80, 80]"
RIGHT, WRONG = "FINAL_ANSWER: B. red", "FINAL_ANSWER: A. blue"


def prompt(name="q", inputs=None, **changes):
    return Prompt(name, {"question": "?", "videos": ["clip.mp4"], **(inputs or {})}, {**REFERENCE, **changes})


def sample(*turns, of=None):
    return Sample(of or prompt(), list(turns), 0)


def rollout(parents, texts, prompts=None, groups=None, tags=None):
    inner = [i in parents for i in range(len(parents))]
    tree = StepTree(
        parent=parents, group=groups or [0] * len(parents), status=[0 if x else 1 for x in inner],
        outcome=[math.nan if x else 0.0 for x in inner], tags=tags,
    )  # fmt: skip
    n = len(parents)
    return Rollout(prompts or [prompt()], tree, Actions(torch.zeros(n), torch.ones(n, dtype=torch.bool)), texts=texts)


def check_same(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-4, rtol=0, equal_nan=True)


# ---- answers --------------------------------------------------------------------------------------------------------


def test_type_is_each_sample_s_own():
    prompts = [
        prompt("a"),
        prompt("b", answer="10", answer_type="regression"),
        prompt("c", answer="2-6", answer_type="interval"),
    ]
    samples = [
        Sample(p, f"<answer>{a}</answer>", i) for i, (p, a) in enumerate(zip(prompts, ("B", "9", "4-8"), strict=True))
    ]
    assert VideoAnswer()(samples) == pytest.approx([1.0, 0.9, 1 / 3])
    assert VideoAnswer()(samples[::-1]) == pytest.approx([1 / 3, 0.9, 1.0])


@pytest.mark.parametrize(
    "syntax, output, want",
    [
        ("tags", "<think>x</think> <answer>B</answer>", 1.0),
        ("tags", "<answer>A</answer> no, <answer>B</answer>", 1.0),  # the last
        ("tags", "B", 0.0),
        ("videocom", f"{FRAME}\nlooks red\n{RIGHT}", 1.0),
        ("videocom", [FRAME, RIGHT], 1.0),
        ("videocom", f"{FRAME}\n{RIGHT}\nas the cup shows", 1.0),
        ("videocom", [FRAME, "red"], 0.0),
        (
            "tool_call",
            '<tool_call>\n{"name": "find_frame", "arguments": {"frame": 3}}\n</tool_call>\n<answer>B</answer>',
            1.0,
        ),
    ],
)
def test_where_the_answer_stands(syntax, output, want):
    assert VideoAnswer(syntax)([Sample(prompt(), output, 0)]) == [want]


def test_answers_that_cannot_be_scored():
    bare = Prompt("p", {"question": "?"}, {"answer_type": "text"})
    assert VideoAnswer()([Sample(bare, "<answer>x</answer>", 0)]) == [None]
    guessed = Prompt("p", {"question": "?", "options": ["A. x", "B. y"]}, {"answer": "B"})
    assert VideoAnswer()([Sample(guessed, "<answer>(B) y</answer>", 0)]) == [1.0]
    with pytest.raises(ValueError, match=r"prompt 'q'.*essay"):
        VideoAnswer()([Sample(prompt(answer_type="essay"), "x", 0)])
    with pytest.raises(ValueError, match=r"prompt 'q'.*Tensor"):
        VideoAnswer()([Sample(prompt(), torch.zeros(1), 0)])


def test_format_and_deep_eyes():
    well, bad = "<think>a</think>\n<answer>B</answer>", "a <answer>B</answer>"
    assert VideoFormat()([sample(well), sample(bad), sample("x", well)]) == [1.0, 0.0, 1.0]
    tool = '<tool_call>{"name": "find_frame", "arguments": {"frame": 3}}</tool_call>'
    outputs = [[tool, well], [well], [tool, "</think>" + bad], [tool, "<answer>A</answer>"], ["</think> B"]]
    got = DeepEyes()([sample(*turns) for turns in outputs])
    assert got == pytest.approx([2.0, 0.8, 1.8, 0.0, -0.2])
    assert DeepEyes()([sample("<answer>B " + "x" * 1000 + "</answer>")]) == [0.0]


# ---- manipulations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [list, "\n".join])
def test_video_com_reward(cut):
    found = [SEGMENT, FRAME, ZOOM]
    outputs = [[*found, RIGHT], [*found, WRONG], ["so", RIGHT], ["so", WRONG]]
    samples = [Sample(prompt(), cut(o), 0) for o in outputs]
    assert VideoComReward()(samples) == pytest.approx([1.75, 0.75, 1.0, 0.0])
    assert VideoComReward(gate="answer")(samples) == pytest.approx([1.75, 0.0, 1.0, 0.0])
    assert VideoComReward(mode="f1")(samples[:1]) == pytest.approx([1 + 2.5 / 3])
    assert VideoComReward(mode="f1", weights={"segment": 0.0})(samples[:1]) == [2.0]
    assert VideoComReward(iou_threshold=0.4)(samples[:1]) == [1.5]
    again = [Sample(prompt(), cut([*found, FRAME, RIGHT]), 0)]
    assert VideoComReward(repeat_penalty=0.1)(again) == pytest.approx([1.65])


def test_boxes_in_every_unit():
    zooms = {
        "unit": [20 / 280] * 2 + [80 / 280] * 2,
        "norm1000": [1000 / 14] * 2 + [4000 / 14] * 2,
        "pixels": [20, 20, 80, 80],
    }
    for coords, box in zooms.items():
        turns = [FRAME, f"SPATIAL_ZOOM(cup) = {[round(x, 5) for x in box]}"]
        check_same(Manipulations(coords=coords, overlap=True)(rollout([-1, 0], turns)), [1.0, 0.36])
    shown = prompt(size=[1080, 1920])  # a still of 100352 pixels is seen at 224 x 420
    whole = rollout([-1, 0], [FRAME, "SPATIAL_ZOOM(cup) = [0, 0, 150, 80]"], [shown])
    check_same(Manipulations()(whole), [1.0, 1.0])


def test_step_rewards_along_a_tree():
    # 0 segment; 1 frame -> 3 zoom -> 5 answer; 2 the same segment again -> 4 answer
    texts = [SEGMENT, FRAME, SEGMENT, ZOOM, RIGHT, RIGHT]
    tree = rollout([-1, 0, 0, 1, 2, 3], texts)
    check_same(Manipulations()(tree), [0.5, 1.0, 0.0, 1.0, math.nan, math.nan])
    check_same(Manipulations(repeat_penalty=0.2)(tree), [0.5, 1.0, -0.2, 1.0, math.nan, math.nan])
    check_same(VideoAnswerStep("videocom")(tree), [math.nan] * 4 + [1.0, 1.0])
    both, _ = score_steps(tree, {"m": (Manipulations(), 1.0), "a": (VideoAnswerStep("videocom"), 1.0)})
    check_same(both.tree.step_reward, [0.5, 1.0, 0.0, 1.0, 1.0, 1.0])


def test_refused_turns():
    texts = [ZOOM, "FIND_FRAME(x) = 601", "hm", "FIND_SEGMENT(x) = [1, 2, 3, 4, 5, 6]"]
    chain = rollout([-1, 0, 1, 2], texts)  # no frame yet, out of range, nothing there, the whole video
    check_same(Manipulations()(chain), [0.0] * 4)
    check_same(Manipulations(error_penalty=0.25)(chain), [-0.25] * 4)
    marked = rollout([-1, 0], [SEGMENT, FRAME], tags={"error": torch.tensor([True, False])})
    check_same(Manipulations(error_penalty=0.25)(marked), [-0.25, 1.0])


def test_prompts_without_manipulations_have_no_opinion():
    plain = Prompt("p", {"question": "?"}, {"answer": "B"})
    both = rollout([-1, -1], [FRAME, FRAME], [plain, prompt()], [0, 1])
    for reward in (Manipulations(), VideoViRL(), LcsProgress()):
        assert reward(both).isnan().tolist() == [True, False]
    picture = Prompt("p", {"question": "?", "images": ["a.png"]}, {"answer": "B", "boxes": REFERENCE["boxes"]})
    assert VideoComReward()([sample("FINAL_ANSWER: B", of=picture)]) == [1.0]
    assert VideoComReward()([sample(FRAME, "FINAL_ANSWER: B", of=plain)]) == [1.0]  # the answer alone


def test_a_reference_needs_the_clip():
    with pytest.raises(ValueError, match=r"prompt 'q'.*frame_count, size"):
        Manipulations()(rollout([-1], [FRAME], [prompt(frame_count=None, size=None)]))
    with pytest.raises(ValueError, match="0 texts for 1 steps"):
        Manipulations()(rollout([-1], ()))


def test_seconds_and_tool_calls():
    truth = prompt(segments=[[12.0, 18.0]], segment_ids=None, frames=None, boxes=None)
    calls = [
        '<tool_call>{"name": "find_segment", "arguments": {"start": 12, "end": 17}}</tool_call>',
        '<tool_call>{"name": "find_segment", "arguments": {"segments": [2]}}</tool_call>',  # 10 to 20 s
        '<tool_call>{"name": "find_segment", "arguments": {"start": 40, "end": 50}}</tool_call>',
    ]
    got = Manipulations(syntax="tool_call", coords="norm1000", overlap=True)(rollout([-1, -1, -1], calls, [truth]))
    check_same(got, [5 / 6, 0.6, 0.0])


def test_virl_for_video():
    boxes = [{"frame": 55, "box": [0, 0, 0.5, 0.5]}, {"frame": 99, "box": [0, 0, 0.5, 0.5]}]
    two = prompt(boxes=boxes, segment_ids=None, frames=None)
    zoom = 'SPATIAL_ZOOM(cup) = {{"frame": {}, "bbox": [{}]}}'.format
    texts = [
        zoom(56, "0, 0, 140, 140"),
        zoom(56, "0, 0, 140, 140"),
        zoom(56, "200, 200, 280, 280"),
        zoom(100, "0, 0, 140, 140"),
        RIGHT,
    ]
    check_same(VideoViRL()(rollout([-1, 0, 1, 2, 3], texts, [two])), [0.5, -0.05, -0.1, 0.5, math.nan])
    check_same(VideoViRL()(rollout([-1, 0], [FRAME, texts[0]], [two])), [0.0, 0.5])  # finding the frame is no error
    check_same(VideoViRL(redundant=0.2)(rollout([-1, 0, 0], [texts[0], texts[0], texts[3]], [two])), [0.5, -0.2, 0.5])


def test_lcs_progress():
    texts = [FRAME, SEGMENT, FRAME.replace("56", "58"), ZOOM.replace("(cup)", "(x)"), RIGHT]
    one = prompt(segment_ids=[2], boxes=[{"frame": 57, "box": [0, 0, 100 / 280, 100 / 280]}])
    chain = rollout([-1, 0, 1, 2, 3], texts, [one])
    check_same(LcsProgress(increments=False)(chain), [1 / 3, 1 / 3, 2 / 3, 1.0, math.nan])
    check_same(LcsProgress()(chain), [1 / 3, 0.0, 1 / 3, 1 / 3, 0.0])


def test_manipulation_f1():
    samples = [sample(SEGMENT, FRAME, ZOOM, RIGHT), sample(FRAME), Sample(Prompt("p", {}, None), "x", 0)]
    got = manipulation_f1(samples)
    assert got["manipulation_f1"] == pytest.approx((2.5 / 3 + 1 / 3) / 2)
    assert got["segment_precision"] == got["segment_recall"] == 0.25 and got["frame_recall"] == 1.0
    assert manipulation_f1(samples[2:]) == {}


# ---- groups ---------------------------------------------------------------------------------------------------------

GOOD, BAD = "<think>a</think><answer>B</answer>", "<think>a</think><answer>A</answer>"


def of(prompt, *texts):
    return [Sample(prompt, t, i) for i, t in enumerate(texts)]


def test_temporal_contrast():
    reward = TemporalContrast()
    picture = Prompt("picture", {"question": "?", "images": ["a.png"]}, REFERENCE)
    (twin,) = reward.controls([prompt(), picture])
    assert twin.id == "q/shuffled" and twin.inputs["shuffled"] and twin.inputs["twin_of"] == "q"
    assert twin.inputs["videos"] == ["clip.mp4"] and twin.reference == REFERENCE
    mixed = of(twin, GOOD, BAD)  # half of them right
    assert reward(of(prompt(), GOOD, GOOD, BAD, BAD), mixed) == pytest.approx([2.3, 2.3, 1.0, 1.0])
    assert reward(of(prompt(), BAD, GOOD, BAD, BAD), mixed) == pytest.approx([1, 2, 1, 1])  # 0.25 < 0.8 * 0.5
    assert reward([*of(picture, GOOD), *of(prompt(), GOOD)], mixed) == pytest.approx([2.0, 2.3])
    assert reward(of(prompt(), GOOD)) == [2.0]  # evaluation has no twins
    assert reward(of(prompt(answer=None), GOOD), mixed) == [None]


def test_curiosity_per_group():
    call = '<tool_call>{"name": "find_frame", "arguments": {"frame": 3}}</tool_call>'
    other = prompt("other")
    samples = [sample(call, GOOD), *[sample(GOOD)] * 7, *[Sample(other, call + call, 0)] * 2]
    got = Curiosity()(samples)
    assert (
        got[0] == pytest.approx(0.2333, abs=1e-4) and got[1:8] == [0.0] * 7 and got[8:] == pytest.approx([-0.05] * 2)
    )


def test_plan_overlap():
    planned = Prompt("p", {"question": "?"}, {"plan": ["pick(cup)", "place(cup,tray)", "open(drawer)", "pick(spoon)"]})
    outputs = ["<answer>open(drawer), pick(cup), place(cup,tray)</answer>", "pick(cup)"]
    assert PlanOverlap()([Sample(planned, o, 0) for o in outputs]) == pytest.approx([0.5714, 0.0], abs=1e-4)
    assert PlanOverlap()([Sample(prompt(), "x", 0)]) == [None]


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_options_are_checked_by_name_and_type():
    made = build(
        "rewards",
        "rewards.0",
        "video.rewards:VideoComReward",
        {"syntax": "tool_call", "coords": "unit", "gate": "answer", "weights": {"box": 2.0}},
    )
    assert made.gate == "answer" and made.weights == {"box": 2.0}
    assert build("scorers", "s", "video.rewards:Manipulations", {"repeat_penalty": 0.1}).repeat_penalty == 0.1
    for name in (
        "VideoViRL",
        "LcsProgress",
        "Curiosity",
        "TemporalContrast",
        "DeepEyes",
        "VideoAnswer",
        "VideoAnswerStep",
    ):
        assert build("scorers", "s", f"video.rewards:{name}", {"syntax": "videocom"}).syntax == "videocom"
    with pytest.raises(ComponentError, match="iou_treshold.*did you mean"):
        build("scorers", "s", "video.rewards:Manipulations", {"iou_treshold": 0.5})
    with pytest.raises(ComponentError, match="syntax"):
        build("scorers", "s", "video.rewards:Manipulations", {"syntax": "xml"})


@pytest.mark.parametrize(
    "made, told",
    [
        (lambda: Manipulations(iou_threshold=0.0), "iou_threshold"),
        (lambda: Manipulations(error_penalty=-1.0), "error_penalty"),
        (lambda: VideoComReward(weights={"boxes": 1.0}), "the kinds are"),
        (lambda: VideoViRL(erroneous=-0.1), "sign is fixed"),
    ],
)
def test_impossible_options_are_refused(made, told):
    with pytest.raises(ValueError, match=told):
        made()


def test_a_policy_learns_the_segment():
    """A policy over four segments, trained by GRPO on the reward, names the right one in more than nine of ten."""
    from mmrl.credit.norm import Norm, norm

    ask = prompt(segment_ids=[3], frames=None, boxes=None)
    worth = torch.tensor(VideoComReward()([sample(f"FIND_SEGMENT(x) = {k}", WRONG, of=ask) for k in (1, 2, 3, 4)]))
    assert worth.tolist() == [0.0, 0.0, 1.0, 0.0]
    generator, logits = torch.Generator().manual_seed(0), torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.1)
    for _ in range(150):
        drawn = torch.multinomial(logits.detach().softmax(0), 8, replacement=True, generator=generator)
        adv = norm(worth[drawn], torch.zeros(8, dtype=torch.long), Norm(eps=1e-4)).z
        loss = -(adv * logits.log_softmax(0)[drawn]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(logits.detach().softmax(0)[2]) > 0.9
