"""Nothing a policy writes makes `parse_turn` or `act` raise, hang, or show what is not in the video."""

import json
import math
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video.acting.actions import (
    MANIPULATIONS,
    Look,
    Problem,
    Turn,
    VideoAction,
    VideoState,
    act,
    parse_turn,
    problem_text,
)

SYNTAXES = ("videocom", "tool_call")


def variable(frames):
    """Timestamps of a clip whose frames stay between 10 ms and 3 s, with one shown for no time at all."""
    rng = random.Random(frames)
    starts = [0.0]
    while len(starts) < frames:
        starts.append(starts[-1] + (0.0 if len(starts) == 5 else rng.choice([0.01, 0.04, 0.5, 3.0])))
    return starts


CLIPS = [
    VideoState.start([0.0], 0.04, (480, 640), turns=99),
    VideoState.start([0.0, 0.04], 0.08, (20, 20), turns=99, coords="unit"),
    VideoState.start([i / 29.97 for i in range(2003)], 2003 / 29.97, (720, 1280), turns=99),
    VideoState.start(variable(200), variable(200)[-1] + 3, (90, 160), turns=99, coords="pixels", seen=(56, 112)),
    VideoState.start([0.5, 80.0, 80.5], 400.0, (8, 4000), turns=99, pad=0.1),
]


def check_look(state, look):
    """All indices and times inside the video, boxes inside the frame and not empty."""
    assert isinstance(look, Look)
    assert 0 <= look.start <= look.end <= state.duration
    if look.kind == "segment":
        assert look.frame is None and look.box is None and look.start < look.end
    else:
        assert type(look.frame) is int and 0 <= look.frame < len(state.starts)
    if look.kind == "crop":
        x1, y1, x2, y2 = look.box
        assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1


def check_run(state, turn):
    """One turn: the state after it if something was shown (else the one before), the looks, the problem."""
    after, looks, problem = act(state, turn)
    assert (problem is not None) + bool(looks) + (turn.answer is not None) == 1
    for look in looks:
        check_look(state, look)
    if problem is not None:
        told = problem_text(problem)
        assert isinstance(problem, Problem) and len(told) < 500 and told.isascii() and "<|" not in told
    return (after if looks else state), looks, problem


def check_read(text, syntax):
    turn = parse_turn(text, syntax)
    assert isinstance(turn, Turn) and bool(turn.actions) + (turn.answer is not None) + (turn.problem is not None) == 1
    if turn.answer is not None:
        turn.answer.encode()  # no lone surrogates
    return turn


# ---- 10,000 calls from a seeded generator ---------------------------------------------------------------------------

NUMBERS = [
    "0", "1", "2", "3", "7", "57", "200", "2003", "2004", "-1", "-0", "0.5", "1.0", "250", "500", "1000", "1001", "1e3",
    "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "nan", "inf", "true", "false", "null", "٣", "３", "²", "0x10", "1_0",
    "9" * 19, "-" + "9" * 400, "9" * 5000, "0." + "3" * 5000, "4e-324", "--1", "1.", ".5", '"3"', "[3]", "{}", "1 2", "",
    "9007199254740993", "0.04", "66.83", "[[[[3]]]]",
]  # fmt: skip
PHRASES = [
    "",
    "dog",
    "a (b) c",
    ")",
    "(",
    ") = 3",
    "((((",
    "\0",
    "\ud800",
    "é (ü)",
    "FIND_FRAME(x) = 2",
    "<|image_pad|>",
    "\n",
]
NAMES = [
    "FIND_SEGMENT",
    "find_frame",
    "Spatial_Zoom",
    "answer",
    "FINAL_ANSWER",
    "JUMP_TO",
    "find_ſegment",
    "",
    "__class__",
]
KEYS = ["start", "end", "segments", "frame", "time", "bbox", "text", "label", "x", "", "\0"]
NOISE = [
    "",
    " ",
    "<tool_call>",
    "</tool_call>",
    "<answer>",
    "</answer>",
    "FINAL_ANSWER:",
    "{",
    "}",
    "=",
    "]",
    "\ud800",
    "\0",
]


def good_value(rng):
    """Four numbers that are often a box, or fewer that are often ids."""
    top = rng.choice([1, 10, 100, 1000, 2003])
    numbers = [rng.randint(0, top) if top > 1 else round(rng.random(), 3) for _ in range(rng.choice([1, 2, 4, 4]))]
    return json.dumps(sorted(numbers) if rng.random() < 0.8 else numbers)


def one_value(rng):
    kind = rng.random()
    if kind < 0.3:
        return good_value(rng)
    if kind < 0.5:
        return rng.choice(NUMBERS)
    if kind < 0.75:
        joined = rng.choice([",", " ", ", ", ";"]).join(rng.choice(NUMBERS) for _ in range(rng.randint(0, 5)))
        return rng.choice(["[{}]", "[ {} ]", "[{}", "{}]", "({})"]).format(joined)
    return one_object(rng)


def one_object(rng):
    pairs = (
        f"{json.dumps(rng.choice(KEYS))}: {rng.choice([good_value, lambda r: r.choice(NUMBERS)])(rng)}"
        for _ in range(3)
    )
    return "{" + ", ".join(list(pairs)[: rng.randint(0, 3)]) + "}"


def good_call(rng, syntax):
    start = rng.uniform(0, 70)
    box = sorted(rng.sample(range(1001), 2)), sorted(rng.sample(range(1001), 2))
    name, args = rng.choice([
        ("find_frame", {"frame": rng.randint(0, 210)}),
        ("find_frame", {"time": rng.uniform(-1, 70)}),
        ("find_segment", {"start": start, "end": start + rng.uniform(-1, 9)}),
        ("find_segment", {"segments": [rng.randint(0, 8) for _ in range(3)]}),
        ("spatial_zoom", {"bbox": [box[0][0], box[1][0], box[0][1], box[1][1]]}),
        ("spatial_zoom", {"bbox": [0.1, 0.2, rng.random(), rng.random()], "frame": rng.randint(1, 3)}),
        ("spatial_zoom", {"bbox": [0, 0, *rng.choices([1, 40, 56, 112, 700, 1000], k=2)], "frame": rng.randint(1, 3)}),
    ])  # fmt: skip
    if syntax == "videocom":
        return f"{name.upper()}({rng.choice(PHRASES)}) = {json.dumps(args)}"
    return f"<tool_call>{json.dumps({'name': name, 'arguments': args})}</tool_call>"


def one_call(rng, syntax):
    if rng.random() < 0.4:
        text = good_call(rng, syntax)
    elif syntax == "videocom":
        text = f"{rng.choice(NAMES)}({rng.choice(PHRASES)}) = {one_value(rng)}"
    else:
        text = f'<tool_call>{{"name": {json.dumps(rng.choice(NAMES).lower())}, "arguments": {one_object(rng)}}}</tool_call>'
    if rng.random() < 0.15:
        text = text[: rng.randint(0, len(text))]
    return rng.choice(NOISE) * (rng.random() < 0.2) + text


def test_ten_thousand_calls():
    rng = random.Random(20)
    shown = dict.fromkeys(("segment", "frame", "crop"), 0)
    codes: set[str] = set()
    for i in range(10_000):
        syntax = SYNTAXES[i % 2]
        if i % 20 == 0:
            state = rng.choice(CLIPS)
        turn = check_read("".join(one_call(rng, syntax) for _ in range(rng.choice([1, 1, 1, 2, 3]))), syntax)
        state, looks, problem = check_run(state, turn)
        for look in looks:
            shown[look.kind] += 1
        codes |= {problem.code} if problem else set()
    assert min(shown.values()) > 100, shown  # the generator is not so wild that nothing gets through
    assert codes == {
        "parse_error", "unknown_action", "out_of_range", "empty_range", "inverted_box", "box_too_small",
        "no_frame_selected", "whole_video", "duplicate_action",
    }  # fmt: skip


# ---- hypothesis -----------------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=60)  # surrogates and NUL included
PIECES = st.sampled_from([*NAMES, *NUMBERS, *PHRASES, *NOISE, "(", ")", "[", ",", ") = [", '{"name": "find_frame"'])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES | ANY_TEXT, max_size=12).map("".join), st.sampled_from(SYNTAXES), st.sampled_from(CLIPS))
def test_any_text(text, syntax, state):
    check_run(state, check_read(text, syntax))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*MANIPULATIONS, "fly", None, 3]), JSON, st.sampled_from(CLIPS))
def test_any_arguments(name, args, state):
    call = json.dumps({"name": name, "arguments": args})
    check_run(state, check_read(f"<tool_call>{call}</tool_call>", "tool_call"))
    check_run(state, check_read(f"{name}(x) = {json.dumps(args)}", "videocom"))


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["find_segment", "find_frame", "spatial_zoom", "fly"]),
    st.dictionaries(st.sampled_from(KEYS), JSON),
    st.sampled_from(CLIPS),
)
def test_any_action_made_by_hand(name, args, state):
    check_run(state, Turn((VideoAction(name, args),)))


NUMBER = st.floats() | st.integers(-(10**400), 10**400) | st.integers(-5, 2010) | st.floats(-1, 80)


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBER, min_size=4, max_size=4), st.sampled_from(CLIPS))
def test_any_numbers(numbers, state):
    for name, args in [
        ("find_frame", {"frame": numbers[0]}),
        ("find_frame", {"time": numbers[0]}),
        ("find_segment", {"segments": numbers}),
        ("find_segment", {"start": numbers[0], "end": numbers[1]}),
        ("spatial_zoom", {"bbox": numbers}),
        ("spatial_zoom", {"bbox": numbers, "frame": 1}),
        ("spatial_zoom", {"bbox": [0, 0, *numbers[2:]], "frame": 1}),
    ]:
        state, _, _ = check_run(state, Turn((VideoAction(name, args),)))


# ---- every frame, every segment -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", CLIPS, ids=["1 frame", "2 frames", "long", "variable", "sparse"])
def test_exactly_the_frames_and_segments_there_are(state):
    total, ids = len(state.starts), len(state.segments)
    for frame in (*range(-2, 8), total - 1, total, total + 1):
        _, looks, _ = act(state, parse_turn(f"FIND_FRAME() = {frame}", "videocom"))
        assert [look.frame for look in looks] == ([frame - 1] if 1 <= frame <= total else [])
    for segment in range(-2, ids + 3):
        _, looks, problem = act(state, parse_turn(f"FIND_SEGMENT() = {segment}", "videocom"))
        inside = 1 <= segment <= ids
        assert bool(looks) == (inside and ids > 1)
        assert problem is None or problem.code == ("whole_video" if inside else "out_of_range")


# ---- time -----------------------------------------------------------------------------------------------------------

LENGTH = 100_000
LIMIT_S = 0.2  # 0.05 on an idle machine; a quadratic reader takes many seconds
UNITS = [
    "(", ")", "()", ") =", ")  ", "FIND_FRAME(", "FIND_FRAME", "FIND_FRAME (", "FIND_FRAME()=", "FIND_FRAME()=[", "FIND_FRAME()=[1,",
    'FIND_FRAME()={"', "FIND_FRAME()={", 'FIND_FRAME()={"a":[[[[', "FIND_FRAME(x) = 3 ", "FIND_FRAME((((x", "A_", "AB_CD(", "AB_CD()=1",
    "FINAL_ANSWER", "FINAL_ANSWER ", "FINAL_ANSWER:", "<tool_call>", "<tool_call></tool_call>", "<tool_call>{}</tool_call>",
    "<tool_call>{", "</tool_call>", "<answer>", "</answer>", "<answer></answer>", "[", "[" + "]", '{"a":', "9", "1,", "\ud800", "\0", " ", "\n",
    '<tool_call>{"name": "find_frame", "arguments": {"frame": 3}}</tool_call>', "é",
]  # fmt: skip
WRAPS = {
    "videocom": ["{}", "FIND_FRAME({}", "FIND_FRAME({}) = 3", "FIND_SEGMENT(x) = [{}]", "SPATIAL_ZOOM(x) = {{\"bbox\": [{}]}}",
                 "FINAL_ANSWER: {}"],
    "tool_call": ["{}", "<answer>{}</answer>", "<tool_call>{}</tool_call>",
                  '<tool_call>{{"name": "find_segment", "arguments": {{"segments": [{}]}}}}</tool_call>',
                  '<tool_call>{{"name": "{}", "arguments": {{}}}}</tool_call>'],
}  # fmt: skip


def seconds(text, syntax):
    """CPU time of the shortest of up to three runs."""
    best = math.inf
    for _ in range(3):
        begin = time.process_time()
        turn = parse_turn(text, syntax)
        best = min(best, time.process_time() - begin)
        if best < LIMIT_S:
            break
    check_run(CLIPS[2], turn)
    return best


@pytest.mark.parametrize("unit", UNITS)
def test_long_turns_take_linear_time(unit):
    body = unit * (LENGTH // len(unit))
    times = {(wrap, s): seconds(wrap.format(body), s) for s in SYNTAXES for wrap in WRAPS[s]}
    assert {key: t for key, t in times.items() if t > LIMIT_S} == {}
