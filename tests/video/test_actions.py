"""Manipulations of a video: segment table, both syntaxes, every error code, a manipulation of one's own."""

import math
import pickle

import numpy as np
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
    frame_range,
    manipulation,
    parse_turn,
    pixel_box,
    problem_text,
    render,
    tool_specs,
)
from video.acting.segments import frame_at, segment_count, segment_table


def clip(frames=300, fps=10.0, size=(280, 560), **options):
    """30 s at 10 frames/s by default: 3 segments of 100 frames."""
    return VideoState.start(np.arange(frames) / fps, frames / fps, size, **options)


def did(state, text, syntax="videocom", **options):
    return act(state, parse_turn(text, syntax), **options)


def call(name, **arguments):
    """One tool call as text."""
    return render(VideoAction(name, arguments), "tool_call")


# ---- segments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duration, count",
    [(5, 1), (19.9, 1), (20, 2), (60, 6), (95, 9), (100, 10), (200, 10), (300, 10), (301, 11), (600, 20), (3600, 120)],
)
def test_segment_count(duration, count):
    assert segment_count(duration) == count


@given(st.floats(1e-3, 1e5))
def test_segment_count_is_the_published_loop(duration):
    count = 10
    while duration / count < 10 and count > 1:
        count -= 1
    while duration / count > 30:
        count += 1
    assert segment_count(duration) == count


def test_segment_table_worked_example():
    table = segment_table([i / 29.97 for i in range(2003)], 2003 / 29.97)
    assert len(table) == 6
    assert (table[2].first, table[2].last) == (666, 998) and table[2][:2] == pytest.approx((22.22, 33.33), abs=0.005)
    assert (table[5].first, table[5].last) == (1665, 2002) and table[5][:2] == pytest.approx((55.56, 66.83), abs=0.005)


def test_segments_of_variable_rate_and_of_few_frames():
    starts = [0.0, 1.0, 2.0, 20.0, 30.0]  # 40 s: 4 segments of one frame, the last has two
    assert segment_table(starts, 40.0) == ((0, 1, 0, 0), (1, 2, 1, 1), (2, 20, 2, 2), (20, 40, 3, 4))
    assert segment_table([0.0, 50.0], 100.0) == ((0, 50, 0, 0), (50, 100, 1, 1))  # 10 by time, 2 by frames
    assert segment_table([0.0], 0.04) == ((0, 0.04, 0, 0),)


def test_frame_at_a_time():
    starts = [i * 0.1 for i in range(50)]  # 3 * 0.1 is a little above 0.3
    assert [frame_at(starts, t) for t in (-1, 0, 0.05, 0.3, 4.9, 99)] == [0, 0, 0, 3, 49, 49]


# ---- Video-CoM text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, name, args",
    [
        ("FIND_SEGMENT(the dog) = [3, 4]", "find_segment", {"segments": (3, 4)}),
        ("FIND_SEGMENT(the dog)=3", "find_segment", {"segments": (3,)}),
        ("find_segment ( the dog ) = [ 3 4 ]", "find_segment", {"segments": (3, 4)}),
        ("FIND_SEGMENT(dog) = 3, 4", "find_segment", {"segments": (3, 4)}),
        ("FIND_SEGMENT(dog) = 3 ,4;5 and 6, and 7 & 8, then", "find_segment", {"segments": (3, 4, 5, 6, 7, 8)}),
        ("FIND_SEGMENT(dog) = 3.\n4. is next", "find_segment", {"segments": (3,)}),
        ("FIND_SEGMENT(dog) = 3, the 4th", "find_segment", {"segments": (3,)}),
        ("<think>FINAL_ANSWER: A? FIND_FRAME(cat) = 1</think>FIND_FRAME(dog) = 5", "find_frame", {"frame": 5}),
        ("I look. Find_Frame() = 57, then on", "find_frame", {"frame": 57}),
        ("FIND_FRAME(f(x) = 3 (on the board)) = [57, 60]", "find_frame", {"frame": 57}),
        ("FIND_FRAME(smile :) or :( ) = 57", "find_frame", {"frame": 57}),
        ("SPATIAL_ZOOM(sign) = [ 250 , 0 , 500 , 250 ]", "spatial_zoom", {"bbox": (250, 0, 500, 250)}),
        ("SPATIAL_ZOOM(sign) = [0.25 0 0.5 0.25]", "spatial_zoom", {"bbox": (0.25, 0, 0.5, 0.25)}),
        ('FIND_SEGMENT(a) = {"start": 2.5, "end": 4}', "find_segment", {"start": 2.5, "end": 4}),
        ('SPATIAL_ZOOM(a) = {"bbox": [0, 0, 9, 9], "frame": 3}', "spatial_zoom", {"bbox": (0, 0, 9, 9), "frame": 3}),
        ("I will use FIND_FRAME(dog) now. FIND_FRAME(dog) = 5", "find_frame", {"frame": 5}),
        ("SPATIAL_ZOOM(FIND_FRAME(x) = 3) = [1, 2, 3, 4]", "spatial_zoom", {"bbox": (1, 2, 3, 4)}),
    ],
)
def test_videocom_call(text, name, args):
    turn = parse_turn(text, "videocom")
    assert turn == Turn((VideoAction(name, args),))


def test_videocom_phrase_is_kept():
    actions = parse_turn("FIND_FRAME( a (red) car ) = 57", "videocom").actions
    assert [a.phrase for a in actions] == ["a (red) car"]


def test_videocom_runs_the_first_kind_and_all_its_calls():
    text = "SPATIAL_ZOOM(a) = [0,0,9,9] FIND_FRAME(b) = 2 SPATIAL_ZOOM(c) = [1,1,9,9] FIND_FRAME(d) = 4"
    assert [a.args for a in parse_turn(text, "videocom").actions] == [{"frame": 2}, {"frame": 4}]
    zooms = parse_turn(text.replace("FIND_FRAME", "LOOKED_AT"), "videocom").actions
    assert [a.args["bbox"] for a in zooms] == [(0, 0, 9, 9), (1, 1, 9, 9)]


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so FINAL_ANSWER: B. the red car ", "B. the red car"),
        ("final_answer : B .\nmore", "B ."),
        ("FINAL_ANSWER:\n C", "C"),
        ("FINAL_ANSWER: A, no: FINAL_ANSWER: B", "B"),
        ("<think>FINAL_ANSWER: A</think>\nFINAL_ANSWER: B", "B"),
        ("so FINAL_ANSWER: A</think>FINAL_ANSWER: B", "B"),  # the template opened the thinking
        ("FINAL_ANSWER: B\nFIND_FRAME(x) = 3", "B"),  # an answer ends the episode, calls beside it are not run
    ],
)
def test_videocom_answer(text, answer):
    assert parse_turn(text, "videocom") == Turn(answer=answer)


@pytest.mark.parametrize(
    "text, code",
    [
        ("", "parse_error"),
        ("the dog runs", "parse_error"),
        ("FINAL_ANSWER: ", "parse_error"),
        ("FIND_FRAME(dog)", "parse_error"),
        ("FIND_FRAME(dog = 3", "parse_error"),
        ("FIND_FRAME(dog) = [", "parse_error"),
        ("FIND_FRAME(dog) = []", "parse_error"),
        ("FIND_FRAME(dog) = five", "parse_error"),
        ("FIND_FRAME(dog) = ٣", "parse_error"),
        ("FIND_FRAME(dog) = 5.5", "parse_error"),
        ("FIND_FRAME(dog) = [3-4]", "parse_error"),
        ("FIND_FRAME(dog) = " + "9" * 5000, "out_of_range"),
        ("FIND_FRAME(dog) = 1e999", "out_of_range"),
        ("FIND_SEGMENT(dog) = [[3]]", "parse_error"),
        ("FIND_SEGMENT(dog) = 3 4", "parse_error"),
        ("FIND_SEGMENT(dog) = 3-4", "parse_error"),
        ("FIND_SEGMENT(dog) = 3 to 4", "parse_error"),
        ("FIND_SEGMENT(dog) = 3..4", "parse_error"),
        ("FIND_SEGMENT(dog) = 3, 4.5", "parse_error"),
        ("<think>FINAL_ANSWER: B</think>", "parse_error"),
        ("<think>it is FINAL_ANSWER: B", "parse_error"),  # cut while thinking
        ("SPATIAL_ZOOM(dog) = [1, 2, 3]", "parse_error"),
        ("SPATIAL_ZOOM(dog) = 1, 2, 3, 4", "parse_error"),
        ("SPATIAL_ZOOM(a) = [1,2,3,4] SPATIAL_ZOOM(b) = [1,2,3]", "parse_error"),  # whole or not at all
        ('FIND_SEGMENT(a) = {"start": 1}', "parse_error"),
        ('FIND_SEGMENT(a) = {"start": 1, "end": 2', "parse_error"),
        ('FIND_SEGMENT(a) = {"start": true, "end": 2}', "parse_error"),
        ("TRACK_OBJECT(dog) = 3", "unknown_action"),
        ("FIND_FRAME(a) = 3 " * 17, "budget_exceeded"),
    ],
)
def test_videocom_problem(text, code):
    turn = parse_turn(text, "videocom")
    assert turn.problem.code == code and not turn.actions and turn.answer is None


# ---- tool calls -----------------------------------------------------------------------------------------------------


def wrap(body):
    return f"<tool_call>\n{body}\n</tool_call>"


def test_tool_calls_in_order():
    text = (
        "I look. "
        + wrap('{"name": "find_frame", "arguments": {"frame": 57.0, "label": " dog "}}')
        + wrap('{"name": "spatial_zoom", "arguments": {"bbox": [250, 0, 500, 250]}}')
    )
    turn = parse_turn(text, "tool_call")
    wanted = (VideoAction("find_frame", {"frame": 57}), VideoAction("spatial_zoom", {"bbox": (250, 0, 500, 250)}))
    assert turn == Turn(wanted) and turn.actions[0].phrase == "dog"
    assert type(turn.actions[0].args["frame"]) is int


@pytest.mark.parametrize(
    "thought", ["perhaps <answer>A</answer>", "a <tool_call> might do", wrap('{"name": "x", "arguments": {}}')]
)
@pytest.mark.parametrize("tag", ["think", "thinking", "Reasoning"])
def test_thinking_calls_nothing(thought, tag):
    said = f"<{tag}>{thought}</{tag}>" + call("find_frame", frame=57)
    assert parse_turn(said, "tool_call") == Turn((VideoAction("find_frame", {"frame": 57}),))


def test_a_mention_of_the_tag_is_no_call():
    said = "I could use <tool_call> here. " + call("find_frame", frame=57)
    assert parse_turn(said, "tool_call") == Turn((VideoAction("find_frame", {"frame": 57}),))
    two = "<tool_call>" * 20 + said
    assert parse_turn(two, "tool_call") == parse_turn(said, "tool_call")
    cut = '<tool_call>{"name": "find_frame", ' + call("find_frame", frame=57)
    assert parse_turn(cut, "tool_call").problem.code == "parse_error"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<think>hm</think><answer> B. red </answer>", "B. red"),
        ("<think>perhaps <answer>A</answer></think><answer>B</answer>", "B"),
        ("<think>I could <tool_call> once more</think><answer>B</answer>", "B"),
        ("<answer>A</answer> no <answer>B\nC</answer> <answer>", "B\nC"),
        (wrap('{"name": "answer", "arguments": {"text": "B"}}'), "B"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2}}') + "<answer>B</answer>", "B"),
        (wrap("broken") + wrap('{"name": "answer", "arguments": {"text": "B"}}'), "B"),
    ],
)
def test_tool_call_answer(text, answer):
    assert parse_turn(text, "tool_call") == Turn(answer=answer)


@pytest.mark.parametrize(
    "text, code",
    [
        ("the dog", "parse_error"),
        ("<answer>B", "parse_error"),
        ("<answer> </answer>", "parse_error"),
        ("<think>perhaps <answer>A</answer></think>", "parse_error"),
        ("<tool_call>" + '{"name": "find_frame", "arguments": {"frame": 2}}', "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2, "frame": 3}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": true}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": "2"}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": null}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2.5}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": NaN}}'), "out_of_range"),
        (wrap('{"name": "find_frame", "arguments": {"frame": -Infinity}}'), "out_of_range"),
        (wrap('{"name": "find_frame", "arguments": {"frame": %s}}' % ("1" * 9999)), "out_of_range"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2, "time": 1.0}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"number": 2}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": [2]}'), "parse_error"),
        (wrap('{"name": "find_frame"}'), "parse_error"),
        (wrap('{"name": ["find_frame"], "arguments": {}}'), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2, "label": 3}}'), "parse_error"),
        (wrap('{"name": "find_segment", "arguments": {"segments": []}}'), "parse_error"),
        (wrap('{"name": "find_segment", "arguments": {"segments": [[1]]}}'), "parse_error"),
        (wrap('{"name": "find_segment", "arguments": {"segments": [true]}}'), "parse_error"),
        (wrap('{"name": "find_segment", "arguments": ' + '{"a":' * 50000), "parse_error"),
        (wrap("[" * 50000), "parse_error"),
        (wrap("[" * 50 + "]" * 50), "parse_error"),
        (wrap('{"name": "find_frame", "arguments": {"frame": 2}}') * 17, "budget_exceeded"),
        (wrap('{"name": "find_frames", "arguments": {"frame": 2}}'), "unknown_action"),
    ],
)
def test_tool_call_problem(text, code):
    turn = parse_turn(text, "tool_call")
    assert turn.problem.code == code and not turn.actions and turn.answer is None


def test_unknown_syntax_is_the_callers_mistake():
    with pytest.raises(ValueError, match="videocom or tool_call"):
        parse_turn("x", "xml")


# ---- writing --------------------------------------------------------------------------------------------------------

SECONDS = st.floats(0, 1e6)
UNITS = st.floats(0, 1e6) | st.integers(0, 1000)
ACTIONS = st.one_of(
    st.builds(
        lambda s: VideoAction("find_segment", {"segments": tuple(s)}), st.lists(st.integers(-9, 999), min_size=1)
    ),
    st.builds(lambda a, b: VideoAction("find_segment", {"start": a, "end": b}), SECONDS, SECONDS),
    st.builds(lambda f: VideoAction("find_frame", {"frame": f}), st.integers(-(2**53), 2**53)),
    st.builds(lambda t: VideoAction("find_frame", {"time": t}), SECONDS),
    st.builds(lambda b: VideoAction("spatial_zoom", {"bbox": b}), st.tuples(UNITS, UNITS, UNITS, UNITS)),
    st.builds(
        lambda b, f: VideoAction("spatial_zoom", {"bbox": b, "frame": f}), st.tuples(*[UNITS] * 4), st.integers(1, 9)
    ),
)
PHRASES = st.recursive(
    st.text(st.characters(codec="utf-8", exclude_characters="()"), max_size=20),
    lambda inner: st.builds("{}({}){}".format, inner, inner, inner),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(ACTIONS, PHRASES, st.sampled_from(["videocom", "tool_call"]))
def test_what_is_written_is_read_back(action, phrase, syntax):
    turn = parse_turn(render(action, syntax, phrase), syntax)
    assert turn.actions == (action,) and turn.answer is None and turn.problem is None
    assert turn.actions[0].phrase == phrase.strip()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1), st.sampled_from(["videocom", "tool_call"]))
def test_an_answer_is_read_back_or_refused(text, syntax):
    action = VideoAction("answer", {"text": text})
    try:
        written = render(action, syntax)
    except ValueError:
        assert text != text.strip() or "\n" in text
    else:
        assert parse_turn(written, syntax) == Turn(answer=text)


@pytest.mark.parametrize(
    "action, syntax, text",
    [
        (VideoAction("find_segment", {"segments": [3, 4]}), "videocom", "FIND_SEGMENT(a dog) = [3, 4]"),
        (VideoAction("find_frame", {"frame": 57}, "a dog"), "videocom", "FIND_FRAME(a dog) = 57"),
        (VideoAction("find_frame", {"time": 1.5}), "videocom", 'FIND_FRAME(a dog) = {"time": 1.5}'),
        (VideoAction("answer", {"text": "B. red"}), "videocom", "FINAL_ANSWER: B. red"),
        (VideoAction("answer", {"text": "B. red"}), "tool_call", "<answer>B. red</answer>"),
        (
            VideoAction("find_frame", {"frame": 57}),
            "tool_call",
            '<tool_call>{"name": "find_frame", "arguments": {"frame": 57, "label": "a dog"}}</tool_call>',
        ),
    ],
)
def test_written_forms(action, syntax, text):
    assert render(action, syntax, "a dog") == text


@pytest.mark.parametrize(
    "action, phrase",
    [
        (VideoAction("find_frame", {"frame": 57}), "x) = 3"),
        (VideoAction("find_frame", {"frame": 57}), "FINAL_ANSWER: B"),
        (VideoAction("find_frame", {"frame": "57"}), ""),
        (VideoAction("answer", {"text": "two\nlines"}), ""),
        (VideoAction("fly", {}), ""),
    ],
)
def test_what_would_be_misread_is_not_written(action, phrase):
    with pytest.raises(ValueError, match="cannot be written|would not be read back"):
        render(action, "videocom", phrase)


def test_tags_in_a_phrase_do_no_harm_in_json():
    action = VideoAction("find_frame", {"frame": 57})
    phrase = "</tool_call><answer>A</answer>"
    assert parse_turn(render(action, "tool_call", phrase), "tool_call").actions[0].phrase == phrase


# ---- looks ----------------------------------------------------------------------------------------------------------


def test_segments_become_seconds():
    state, looks, problem = did(clip(), "FIND_SEGMENT(a) = [2]")
    assert problem is None and looks == (Look("segment", 10.0, 20.0),)
    assert frame_range(state, looks[0]) == (100, 199)


def test_neighbouring_segments_are_one_look_and_repeats_count_once():
    looks = did(clip(frames=600), "FIND_SEGMENT(a) = [5, 1, 2, 5]")[1]  # 6 segments of 10 s
    assert looks == (Look("segment", 0.0, 20.0), Look("segment", 40.0, 50.0))
    assert did(clip(), "FIND_SEGMENT(a) = [1, 1, 1]")[2] is None  # three numbers, but not all three segments


def test_seconds():
    state, looks, problem = did(clip(), 'FIND_SEGMENT(a) = {"start": 3, "end": 5}')
    assert problem is None and looks == (Look("segment", 3.0, 5.0),) and frame_range(state, looks[0]) == (30, 49)


def test_first_and_last_frame():
    state, looks, _ = did(clip(), "FIND_FRAME(a) = 300")
    assert looks == (Look("frame", 29.9, 29.9, 299),) and state.frame == 299
    assert did(clip(), "FIND_FRAME(a) = 1")[1][0].frame == 0


def test_frame_by_time_uses_the_timestamps():
    state = VideoState.start([0.0, 1.0, 1.1, 8.0], 12.0, (90, 160))
    assert [did(state, call("find_frame", time=t), "tool_call")[1][0].frame for t in (0, 1.05, 7.9, 12.0)] == [
        0,
        1,
        2,
        3,
    ]


@pytest.mark.parametrize(
    "coords, seen, bbox",
    [
        ("norm1000", None, [250, 0, 500, 500]),
        ("unit", None, [0.25, 0, 0.5, 0.5]),
        ("pixels", (140, 280), [70, 0, 140, 70]),
    ],
)
def test_boxes_in_every_unit(coords, seen, bbox):
    state = did(clip(coords=coords, seen=seen), "FIND_FRAME(a) = 8")[0]
    look = did(state, f"SPATIAL_ZOOM(a) = {bbox}")[1][0]
    assert look == Look("crop", 0.7, 0.7, 7, (0.25, 0.0, 0.5, 0.5))
    assert pixel_box(look.box, (280, 560)) == (140, 0, 280, 140)


def test_zooms_refer_to_the_last_frame_or_name_one():
    state = did(clip(), "FIND_FRAME(a) = 8")[0]
    state, looks, _ = did(state, "SPATIAL_ZOOM(a) = [0,0,500,500] SPATIAL_ZOOM(b) = [500,500,1000,1000]")
    assert [look.frame for look in looks] == [7, 7]
    state, looks, _ = did(state, call("spatial_zoom", bbox=[0, 0, 500, 500], frame=9), "tool_call")
    assert looks[0].frame == 8 and state.frame == 8


def test_a_call_may_use_the_frame_of_the_call_before():
    text = call("find_frame", frame=4) + call("spatial_zoom", bbox=[0, 0, 500, 500])
    assert [look.kind for look in did(clip(), text, "tool_call")[1]] == ["frame", "crop"]


def test_padding_after_the_checks():
    state = did(clip(pad=0.1), "FIND_FRAME(a) = 8")[0]
    assert did(state, "SPATIAL_ZOOM(a) = [50,200,500,1000]")[1][0].box == pytest.approx((0, 0.1, 0.6, 1))
    assert did(state, "SPATIAL_ZOOM(a) = [50,200,60,1000]")[2].code == "box_too_small"


def test_pixel_box_is_never_empty():
    assert pixel_box((0.05, 0.05, 0.15, 0.15), (10, 10)) == (1, 1, 2, 2)  # round() gives 0..2 and 0..2
    assert pixel_box((0.999, 0.0, 1.0, 0.001), (10, 10)) == (9, 0, 10, 1)


# ---- every code -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code, valid",
    [
        ("FIND_FRAME(a) = 0", "out_of_range", {"frame": (1, 300)}),
        ("FIND_FRAME(a) = -3", "out_of_range", {"frame": (1, 300)}),
        ("FIND_FRAME(a) = 301", "out_of_range", {"frame": (1, 300)}),
        ('FIND_FRAME(a) = {"time": 30.5}', "out_of_range", {"time": (0.0, 30.0)}),
        ("FIND_SEGMENT(a) = 0", "out_of_range", {"segments": (1, 3)}),
        ("FIND_SEGMENT(a) = [1, 4]", "out_of_range", {"segments": (1, 3)}),
        ("FIND_SEGMENT(a) = [3, 2, 1]", "whole_video", {"seconds": (0.0, 30.0)}),
        ('FIND_SEGMENT(a) = {"start": 0, "end": 30}', "whole_video", {"seconds": (0.0, 30.0)}),
        ('FIND_SEGMENT(a) = {"start": 5, "end": 5}', "empty_range", {"seconds": (0.0, 30.0)}),
        ('FIND_SEGMENT(a) = {"start": 6, "end": 5}', "empty_range", {"seconds": (0.0, 30.0)}),
        ('FIND_SEGMENT(a) = {"start": -1, "end": 5}', "out_of_range", {"seconds": (0.0, 30.0)}),
        ('FIND_SEGMENT(a) = {"start": 1, "end": 31}', "out_of_range", {"seconds": (0.0, 30.0)}),
        ("SPATIAL_ZOOM(a) = [0, 0, 500, 500]", "no_frame_selected", {"frame": (1, 300)}),
    ],
)
def test_codes_of_time(text, code, valid):
    state = clip()
    after, looks, problem = did(state, text)
    assert (problem.code, problem.valid, looks) == (code, valid, ())
    assert after.turns_left == state.turns_left - 1 and after.done == ()


@pytest.mark.parametrize(
    "box, code",
    [
        ([500, 0, 250, 500], "inverted_box"),
        ([250, 500, 500, 500], "inverted_box"),
        ([0, 0, 1001, 500], "out_of_range"),
        ([-1, 0, 500, 500], "out_of_range"),
        ([0, 0, 49, 500], "box_too_small"),  # 28 of 560 pixels are 50 thousandths
        ([0, 0, 50, 99], "box_too_small"),  # 28 of 280 are 100
    ],
)
def test_codes_of_boxes(box, code):
    state = did(clip(), "FIND_FRAME(a) = 8")[0]
    problem = did(state, f"SPATIAL_ZOOM(a) = {box}")[2]
    assert problem.code == code
    assert did(state, "SPATIAL_ZOOM(a) = [0, 0, 50, 100]")[2] is None


def test_least_box_of_large_and_of_tiny_frames():
    large = did(clip(size=(2800, 5600)), "FIND_FRAME(a) = 8")[0]
    assert did(large, "SPATIAL_ZOOM(a) = [120,0,140,20]")[2] is None  # 2 % of a side, as floats 0.01999..
    assert did(large, "SPATIAL_ZOOM(a) = [120,0,139,20]")[2].valid == {"least width": 20, "least height": 20}
    tiny = did(clip(size=(20, 20)), "FIND_FRAME(a) = 8")[0]
    assert did(tiny, "SPATIAL_ZOOM(a) = [0,0,1000,1000]")[2] is None  # smaller than min_side: all of it


def test_duplicates_are_told_by_what_they_show():
    state = did(clip(), "FIND_FRAME(a) = 8")[0]
    assert did(state, 'FIND_FRAME(b) = {"time": 0.75}')[2].code == "duplicate_action"
    assert did(state, "FIND_FRAME(b) = 9")[2] is None
    segment = did(state, "FIND_SEGMENT(a) = 2")[0]
    assert did(segment, 'FIND_SEGMENT(a) = {"start": 10, "end": 20}')[2].code == "duplicate_action"
    twice = "SPATIAL_ZOOM(a) = [0,0,500,500] SPATIAL_ZOOM(b) = [0, 0, 500.0, 500]"
    assert did(state, twice)[2].code == "duplicate_action"


def test_a_refused_turn_leaves_no_trace_but_its_turn():
    state = clip()
    text = call("find_frame", frame=4) + call("spatial_zoom", bbox=[5, 0, 0, 500])
    after, looks, problem = did(state, text, "tool_call")
    assert problem.code == "inverted_box" and looks == () and (after.frame, after.done) == (None, ())


def test_the_last_turn_has_to_be_the_answer():
    state = did(clip(turns=2), "FIND_FRAME(a) = 4")[0]
    after, looks, problem = did(state, "FIND_FRAME(a) = 5")
    assert problem.code == "budget_exceeded" and looks == () and after.turns_left == 0
    assert did(after, "FINAL_ANSWER: B") == (after, (), None)  # a forced answer is taken


def test_tokens_are_counted_by_the_caller():
    cost = {"segment": 100, "frame": 10, "crop": 5}
    state = clip(tokens=105)
    state, _, problem = did(state, "FIND_SEGMENT(a) = 2", cost=lambda look: cost[look.kind])
    assert problem is None and state.tokens_left == 5
    after, looks, problem = did(state, "FIND_FRAME(a) = 2", cost=lambda look: cost[look.kind])
    assert problem.code == "budget_exceeded" and looks == () and after.frame is None and after.tokens_left == 5


def test_an_unreadable_turn_passes_its_problem_on():
    assert did(clip(), "hm")[2].code == "parse_error"
    assert act(clip(), Turn())[2].code == "parse_error"
    assert act(clip(), Turn((VideoAction("fly", {}),)))[2].code == "unknown_action"
    assert act(clip(), Turn((VideoAction("find_frame", {"frame": math.nan}),)))[2].code == "out_of_range"


@pytest.mark.parametrize(
    "text, told",
    [
        ("FIND_FRAME(a) = 301", "Error out_of_range: frame 301 is not in the video. Valid: frame 1 to 300."),
        ("FIND_SEGMENT(a) = 9", "Error out_of_range: there is no segment 9. Valid: segments 1 to 3."),
        (
            "TRACK_FRAME(a) = 3",
            "Error unknown_action: there is no action 'track_frame'. "
            "Valid: actions find_segment, find_frame, spatial_zoom, answer.",
        ),
        (
            'FIND_FRAME(a) = {"<|image_pad|>": 3}',
            "Error parse_error: find_frame was given the arguments '??image_pad??'. Valid: arguments frame, time.",
        ),
    ],
)
def test_problem_text(text, told):
    assert problem_text(did(clip(), text)[2]) == told


# ---- states ---------------------------------------------------------------------------------------------------------


def test_states_fork_and_can_be_pickled_and_hashed():
    state = clip(coords="pixels", seen=(140, 280), tokens=500)
    first, second = did(state, "FIND_FRAME(a) = 4")[0], did(state, "FIND_FRAME(a) = 5")[0]
    assert (state.frame, first.frame, second.frame) == (None, 3, 4)
    turn = parse_turn("FIND_SEGMENT(a) = [1, 2]", "videocom")
    for value in (first, turn, parse_turn("x", "videocom"), turn.actions[0]):
        copy = pickle.loads(pickle.dumps(value))
        assert copy == value and hash(copy) == hash(value)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (([], 1.0, (9, 9)), "starts"),
        (([0.0, math.nan], 1.0, (9, 9)), "starts"),
        (([0.5, 0.2], 1.0, (9, 9)), "starts"),
        (([-1.0, 0.2], 1.0, (9, 9)), "starts"),
        (([0.0, 1.0], 1.0, (9, 9)), "duration"),
        (([0.0], math.inf, (9, 9)), "duration"),
        (([0.0], 1.0, (0, 9)), "size"),
    ],
)
def test_clips_that_cannot_be(arguments, told):
    with pytest.raises(ValueError, match=told):
        VideoState.start(*arguments)


@pytest.mark.parametrize(
    "options", [{"coords": "inches"}, {"coords": "pixels"}, {"turns": 0}, {"pad": 1.0}, {"tokens": -1}]
)
def test_options_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        clip(**options)


# ---- a manipulation of one's own ------------------------------------------------------------------------------------


@pytest.fixture
def slow_motion():
    properties = {"start": {"type": "number"}, "seconds": {"type": "number", "minimum": 0.1, "maximum": 2}}

    @manipulation("slow_motion", {"properties": properties, "required": ["start"]})
    def slow_motion(state, args):
        """Watch up to two seconds
        with every frame."""
        look = state.segment(args["start"], args["start"] + args.get("seconds", 1))
        first, last = frame_range(state, look)
        return (state.segment(look.start, look.end, frames=last - first + 1),)

    yield
    del MANIPULATIONS["slow_motion"]


@pytest.mark.parametrize("syntax", ["videocom", "tool_call"])
def test_own_manipulation_in_both_syntaxes(slow_motion, syntax):
    action = VideoAction("slow_motion", {"start": 3, "seconds": 1.5})
    state, looks, problem = did(clip(), render(action, syntax, "the jump"), syntax)
    assert problem is None and looks == (Look("segment", 3.0, 4.5, frames=15),)
    assert did(state, render(action, syntax), syntax)[2].code == "duplicate_action"
    assert did(state, render(VideoAction("slow_motion", {"start": 3}), syntax), syntax)[1][0].end == 4.0


def test_looks_of_own_manipulations_are_checked(slow_motion):
    assert did(clip(), call("slow_motion", start=29.5), "tool_call")[2].code == "out_of_range"
    far = parse_turn('SLOW_MOTION(a) = {"start": 3, "seconds": 5}', "videocom").problem
    assert far.code == "out_of_range" and far.valid == {"seconds of slow_motion": (0.1, 2)}
    assert parse_turn("SLOW_MOTION(a) = 3", "videocom").problem.code == "parse_error"


def test_own_manipulation_in_the_tools_of_a_template(slow_motion):
    function = tool_specs()[-1]["function"]
    assert function["description"] == "Watch up to two seconds with every frame."
    assert function["parameters"]["type"] == "object" and function["parameters"]["required"] == ["start"]
    assert [spec["function"]["name"] for spec in tool_specs()][:4] == [
        "find_segment",
        "find_frame",
        "spatial_zoom",
        "answer",
    ]


def test_own_looks_and_problems():
    made = {}

    @manipulation("odd", {"properties": {}})
    def odd(state, args):
        return made["value"]

    try:
        for made["value"], code in [
            ((Look("frame", 0, 0, 300),), "out_of_range"),
            ((Look("frame", 0, 0),), "out_of_range"),
            ((Look("crop", 0, 0, 3),), "out_of_range"),
            ((Look("crop", 0, 0, 3, (0.0, 0.0, math.nan, 1.0)),), "out_of_range"),
            ((Look("segment", math.nan, 3.0),), "out_of_range"),
            ((Look("segment", 1.0, 2.0, frames=11),), "out_of_range"),
            (Problem("whole_video", "no."), "whole_video"),
        ]:
            assert did(clip(), call("odd"), "tool_call")[2].code == code
    finally:
        del MANIPULATIONS["odd"]


@pytest.fixture
def own_result():
    """A manipulation `odd` that returns, or raises, what stands in the dictionary."""
    result = {}

    @manipulation("odd", {"properties": {}})
    def odd(state, args):
        if isinstance(result["value"], Exception):
            raise result["value"]
        return result["value"]

    yield result
    del MANIPULATIONS["odd"]


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        (None,),
        (),
        "",
        (" \n",),
        Look("gif", 0.0, 0.0, 3),
        Look("frame", 0.0, 0.0, 2.5),
        Look("segment", "a", 3.0),
        Look("crop", 0.0, 0.0, 3, (0.1,)),
        Look("frame", 0.0, 0.0, 3).changed(np.rot90, [1]),
        np.zeros((4, 4, 3), np.uint8),
        RuntimeError("out of order"),
        SystemError("deep inside"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_manipulation_that_fails_or_returns_nonsense_costs_its_turn_alone(own_result, value):
    own_result["value"] = value
    state, looks, problem = did(clip(), call("odd"), "tool_call")
    assert problem.code == "failed_action" and looks == () and state.turns_left == clip().turns_left - 1
    own_result["value"] = clip().still(3)
    assert did(state, call("odd"), "tool_call")[1] == (clip().still(3),)


def test_the_first_failure_of_a_manipulation_is_logged_with_its_traceback(own_result, caplog):
    own_result["value"] = ZeroDivisionError("by the first of two")
    for _ in range(2):
        did(clip(), call("odd"), "tool_call")
    (record,) = [r for r in caplog.records if "odd failed (ZeroDivisionError)" in r.getMessage()]
    assert record.exc_info[1] is own_result["value"]


def test_texts_and_single_looks_of_own_manipulations(own_result):
    own_result["value"] = "A man says: stop."
    state, looks, problem = did(clip(), call("odd"), "tool_call")
    assert problem is None and looks == (Look("text", 0.0, 0.0, text="A man says: stop."),) and state.frame is None
    assert did(state, call("odd"), "tool_call")[2].code == "duplicate_action"
    own_result["value"] = [clip().still(3).changed(np.rot90, 1), "turned"]
    state, looks, problem = did(state, call("odd"), "tool_call")
    assert problem is None and [look.kind for look in looks] == ["frame", "text"] and state.frame == 3
    assert pickle.loads(pickle.dumps(state)) == state and hash(looks[0]) == hash(clip().still(3).changed(np.rot90, 1))


@pytest.mark.parametrize(
    "name, schema",
    [
        ("find_frame", {"properties": {}}),
        ("Zoom In", {"properties": {}}),
        ("final_answer", {"properties": {}}),
        ("own", {}),
        ("own", {"properties": {}, "needed": []}),
        ("own", {"properties": {"a": {"type": "object"}}}),
        ("own", {"properties": {"a": {"type": "array"}}}),
        ("own", {"properties": {"label": {"type": "string"}}}),
        ("own", {"properties": {}, "required": ["a"]}),
    ],
)
def test_manipulations_that_cannot_be(name, schema):
    with pytest.raises(ValueError, match=name):
        manipulation(name, schema)
