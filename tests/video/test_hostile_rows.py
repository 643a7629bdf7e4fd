"""Rows that nobody meant to write: every reader sets them aside or reads them, and none takes more than linear time."""

import json
import time
from contextlib import suppress

import pytest
from PIL import Image

from mmrl.jsonl import entries, split_entries
from video.formats import read_format
from video.formats._values import without_marks
from video.formats.ui_s1 import read_trajectories
from video.formats.videocom import split_options
from video.records import VideoSample, check_sample, to_prompt, with_seen

GOOD = {
    "canonical": {
        "question": "What?", "video": "a.mp4", "options": ["red", "blue"], "answer": "A", "answer_type": "multiple choice",
        "segments": [[0, 1]], "segment_ids": [1], "frames": [[0, 1]], "boxes": [{"frame": 0, "box": [0, 0, 1, 1]}],
        "turns": ["FINAL_ANSWER: A"], "turn_boxes": "seen", "frame_count": 9, "duration": 2.0, "size": [4, 4], "meta": {},
    },
    "video_r1": {
        "problem_id": 7, "problem": "What?", "data_type": "video", "problem_type": "free-form", "options": [],
        "path": "a.mp4", "solution": "<answer>red</answer>", "process": "<think>hm</think>",
    },
    "videocom": {
        "id": "x", "video": "a.mp4", "conversations": [
            {"from": "human", "value": "<video>\nWhat? Options: A. red, B. blue"},
            {"from": "gpt", "value": "FINAL_ANSWER: A. red"},
        ],
        "valid_segments": [1], "valid_frames": [[1, 2]], "valid_bounding_box": [[1, [0, 0, 9, 9]]],
    },
    "videochat_r1": {"duration": 3.0, "timestamps": [[0, 1]], "sentences": ["a door opens."]},
    "ui_s1": {
        "goal": "g", "steps": [{"action_content": {"action": "click", "coordinate": [1, 2], "bbox": [0, 0, 9, 9]},
                                "screenshot": "good.png", "thought": "t", "annotation": "a"}],
    },
}  # fmt: skip

HOSTILE = [
    None, True, "", " ", "\n", "x" * 300, "x" * 100_000, "a/" * 3000, "\0", "../../etc/passwd", "/etc/passwd", "\ud83d",
    10**400, -(10**400), 10**30, 2**63, -1, 0.5, 1e308, "9" * 400, "9" * 5000, "-" * 100_000 + "1", [], {}, [[]], [["a"]],
    [None], [10**400], [[10**400, 1]], {"a": {}}, "<image>", "<video>", "<|video_pad|>", "eps.png", "huge.png", "thin.png",
    "moving.gif", [["a"] * 3], "[" * 5000, "Options:", "FINAL_ANSWER:", "<answer>", "A.", [{"box": [10**400] * 4}],
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.mp4").write_bytes(b"only its name matters")
    Image.new("RGB", (16, 16)).save(folder / "good.png")
    (folder / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" * 9)
    Image.new("1", (9400, 9400)).save(folder / "huge.png")
    Image.new("L", (6000, 1)).save(folder / "thin.png")
    two = [Image.new("L", (4, 4), v) for v in (0, 255)]
    two[0].save(folder / "moving.gif", save_all=True, append_images=two[1:])
    return folder


def read(name, path, root):
    if name == "ui_s1":
        return read_trajectories(path, media_root=root, max_bad=1.0)
    return read_format(path, name, media_root=root, max_bad=1.0)


def write(path, name, rows):
    """The texts of rows as a file of the format; the first of them is a good one."""
    path.write_text("{" + ", ".join(f'"a{i or ""}": {row}' for i, row in enumerate(rows)) + "}" if name == "videochat_r1"
                    else "[" + ", ".join(rows) + "]" if path.suffix == ".json" else "\n".join(rows))  # fmt: skip


def mutated(value, put):
    """Copies of a row with `put` in the place of each value in it, however deep."""
    yield put
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for inner in mutated(part, put):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = inner
            yield copy


@pytest.mark.parametrize("name", list(GOOD))
def test_whatever_stands_in_a_field_the_row_is_read_or_set_aside(root, tmp_path, name):
    for put in HOSTILE:
        rows = [json.dumps(row) for row in mutated(GOOD[name], put)]
        path = tmp_path / ("rows.json" if name == "videochat_r1" else "rows.jsonl")
        if name == "videochat_r1":
            (root / "a").touch()
        write(path, name, [json.dumps(GOOD[name]), *rows])
        samples, bad = read(name, path, root)
        assert samples
        lines = {int(s.id.rpartition(":")[2]) for s in samples if s.id.startswith("rows.json")}
        if name in ("canonical", "ui_s1"):  # one sample a row, named by its line
            named = sum(not s.id.startswith("rows.json") for s in samples)
            assert len(lines) + named + len(bad) == len(rows) + 1
        for sample in samples:
            if isinstance(sample, VideoSample):
                json.dumps(sample.question + str(sample.answer)).encode()
                if sample.is_located:
                    to_prompt(sample)


BROKEN = {
    "a key twice": ('{"question": "What?", "video": "a.mp4", "video": "b.mp4"}', "stands twice"),
    "a key twice inside": ('{"question": "What?", "video": "a.mp4", "meta": {"k": 1, "k": 2}}', "stands twice"),
    "too deep": ('{"question": "What?", "video": "a.mp4", "meta": ' + "[" * 5000 + "]" * 5000 + "}", "no JSON"),
    "many digits": ('{"question": "What?", "video": "a.mp4", "duration": ' + "9" * 5000 + "}", "no JSON"),
    "NaN": ('{"question": "What?", "video": "a.mp4", "duration": NaN}', "no JSON value"),
    "half of a character": ('{"question": "What \\ud83d?", "video": "a.mp4"}', "half of a character"),
    "no object": ('["What?"]', "no JSON object"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("fault", list(BROKEN))
def test_one_broken_row_does_not_take_the_others_with_it(root, tmp_path, fault, suffix):
    row, reason = BROKEN[fault]
    path = tmp_path / f"rows{suffix}"
    good = '{"question": "What, \\"[really]\\"?", "video": "a.mp4"}'
    write(path, "canonical", [good, row, good])
    samples, (bad,) = read("canonical", path, root)
    assert [s.id for s in samples] == [f"rows{suffix}:1", f"rows{suffix}:3"]
    assert bad.row == 2
    assert reason in bad.reason


@pytest.mark.parametrize("fault", list(BROKEN))
def test_one_broken_entry_of_a_keyed_file(root, tmp_path, fault):
    row, reason = BROKEN[fault]
    (root / "a").touch()
    (root / "c").touch()
    good = json.dumps(GOOD["videochat_r1"])
    path = tmp_path / "rows.json"
    path.write_text(f'{{"a": {good}, "b": {row}, "c": {good}}}')
    samples, (bad,) = read("videochat_r1", path, root)
    assert [s.id for s in samples] == ["a#0", "c#0"]
    assert bad.row == 2
    assert reason in bad.reason


def test_the_second_entry_of_a_film_is_set_aside(root, tmp_path):
    (root / "a").touch()
    entry = json.dumps(GOOD["videochat_r1"])
    path = tmp_path / "rows.json"
    path.write_text(f'{{"a": {entry}, "a": {entry.replace("opens", "shuts")}}}')
    samples, (bad,) = read("videochat_r1", path, root)
    assert len(samples) == 1
    assert "opens" in samples[0].question
    assert bad.row == 2
    assert "has an entry before" in bad.reason


@pytest.mark.parametrize("picture", ["eps.png", "huge.png", "thin.png", "moving.gif"])
def test_pictures_that_no_policy_takes_are_set_aside(root, tmp_path, picture):
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "What?", "images": [p]} for p in ("good.png", picture)]
    path.write_text("\n".join(map(json.dumps, rows)))
    samples, (bad,) = read("canonical", path, root)
    assert len(samples) == 1
    assert picture in bad.reason


def test_an_infinite_answer_is_none(root, tmp_path):
    rows = [
        {"question": "How many?", "video": "a.mp4", "answer_type": "numerical", "answer": a} for a in ("3", "1e999")
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    samples, (bad,) = read("canonical", path, root)
    assert [s.answer for s in samples] == ["3"]
    assert "too large a number" in bad.reason


@pytest.mark.parametrize("text, parts", [
    ("[]", []), ("[1]", ["1"]), (' [ {"a": [1, 2]} , "],\\"" ,3 ] ', ['{"a": [1, 2]}', '"],\\""', "3"]),
    ("[[], {}]", ["[]", "{}"]), ("[1, NaN, [[[ ]]]]", ["1", "NaN", "[[[ ]]]"]),
])  # fmt: skip
def test_entries_are_told_apart_without_being_read(text, parts):
    assert split_entries(text, "[") == parts


@pytest.mark.parametrize("text", ["", "1", "{}", "[", "[1", "[1]]", "[1] 2", "x [1]", '["a', "[1}{2]]", '["\\'])
def test_what_is_no_array_has_no_entries(text):
    with pytest.raises(ValueError, match="no JSON value"):
        split_entries(text, "[")


def test_lines_in_a_file_with_another_name(tmp_path):
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n')
    assert len(list(entries(tmp_path / "rows.json"))) == 2


# ---- time -----------------------------------------------------------------------------------------------------------

N = 20_000
LONG = {
    "blanks": "a" + " " * N + "b",
    "line breaks": "a" + "\n" * N + "b",
    "blanks at the end": "a" + " " * N,
    "marks": "<video>" * N + "a" + "<image>" * N,
    "spaced marks": "<image> \n" * N + "a" + " <image>" * N,
    "options": "Options:" + " " * N + "x",
    "many options": "Options: A. " * N,
    "answers": "<answer>" * N,
    "ends": "</answer>" * N,
    "finals": "FINAL_ANSWER" * N,
    "final blanks": "FINAL_ANSWER" + " " * N,
    "zooms": "SPATIAL_ZOOM(" * N,
    "closed zooms": "SPATIAL_ZOOM(a)" * N,
    "boxes": ") = [1, 2, 3, 4]" * N,
    "words": "word " * N,
    "brackets": "[" * N,
    "minus": "-" * N,
    "quotes": '\\"' * N,
}


def cpu(function, *args):
    began = time.process_time()
    with suppress(ValueError):
        function(*args)
    return time.process_time() - began


@pytest.mark.parametrize("name", list(LONG))
def test_long_texts_take_linear_time(root, tmp_path, name):
    text = LONG[name]
    path = tmp_path / "rows.jsonl"
    for form, row in GOOD.items():
        rows = [json.dumps(row), *(json.dumps(r) for r in mutated(row, text))]
        path = tmp_path / ("rows.json" if form == "videochat_r1" else "rows.jsonl")
        (root / "a").touch()
        write(path, form, rows)
        assert cpu(read, form, path, root) < 0.05 * len(rows) + 1  # quadratic is seconds for one of them
    for function in (without_marks, split_options, json_entries):
        assert cpu(function, text) < 0.5
    told = VideoSample(
        "s", "What?", "a.mp4", answer=text, answer_type="free-form", turns=(text,), turn_boxes="pixels", size=(9, 9)
    )
    assert cpu(check_sample, told) < 0.5
    assert cpu(with_seen, told, (18, 18)) < 0.5


def json_entries(text):
    split_entries('["' + text, "[")


@pytest.mark.parametrize("text, plain", [
    ("<video>What?", "What?"), (" <video> <image>\nWhat?\n<image> ", "What?"), ("What <image> is?", "What <image> is?"),
    ("What?", "What?"), ("<image>", ""), ("<video> <video>", ""), ("<images>", "<images>"), ("a<video", "a<video"), ("", ""),
])  # fmt: skip
def test_marks_of_media_leave_the_ends_of_a_question(text, plain):
    assert without_marks(text) == plain


@pytest.mark.parametrize("turn, scaled", [
    ("SPATIAL_ZOOM(a) = [1, 2, 3, 4]", "SPATIAL_ZOOM(a) = [2, 4, 6, 8]"),
    ("spatial_zoom(a (b)) = 1,2 ,3,4 x", "spatial_zoom(a (b)) = 2, 4, 6, 8 x"),
    ("SPATIAL_ZOOM(a) = [1, 2, 3, 4] SPATIAL_ZOOM(b)=(5, 6, 7, 8)", "SPATIAL_ZOOM(a) = [2, 4, 6, 8] SPATIAL_ZOOM(b)=(10, 12, 14, 16)"),
    ("FIND(a) = [1, 2, 3, 4]", "FIND(a) = [1, 2, 3, 4]"),
    ("SPATIAL_ZOOM(a\nb) = [1, 2, 3, 4]", "SPATIAL_ZOOM(a\nb) = [1, 2, 3, 4]"),
    ("SPATIAL_ZOOM(a)\nSPATIAL_ZOOM(b) = [1, 2, 3, 4]", "SPATIAL_ZOOM(a)\nSPATIAL_ZOOM(b) = [2, 4, 6, 8]"),
    ("SPATIAL_ZOOM(a) = [1, 2, 3]", "SPATIAL_ZOOM(a) = [1, 2, 3]"),
    ("SPATIAL_ZOOM(a) = [" + "9" * 5000 + ", 2, 3, 4]", "SPATIAL_ZOOM(a) = [" + "9" * 5000 + ", 2, 3, 4]"),
])  # fmt: skip
def test_boxes_of_a_turn_are_rewritten_in_their_place(turn, scaled):
    told = VideoSample("s", "What?", "a.mp4", turns=(turn,), turn_boxes="pixels", size=(10, 10))
    assert with_seen(told, (20, 20)).turns == (scaled,)
