"""Films and rows that nobody meant to write; `tests/test_hostile_rows.py` has the corpus of all readers."""

import json
import time
from contextlib import suppress

import pytest
from hostile_rows import FILMS, write_media

from mmrl.jsonl import entries, split_entries
from video.formats import read_format
from video.formats._values import without_media_marks
from video.formats.videocom import split_options
from video.records import VideoSample, check_sample, with_seen


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_media(folder)
    return folder


def read(name, path, root):
    return read_format(path, name, media_root=root, max_bad=1.0)


BROKEN = {
    "a key twice": ('{"question": "What?", "video": "a.mp4", "video": "b.mp4"}', "stands twice"),
    "a key twice inside": ('{"question": "What?", "video": "a.mp4", "meta": {"k": 1, "k": 2}}', "stands twice"),
    "too deep": ('{"question": "What?", "video": "a.mp4", "meta": ' + "[" * 5000 + "]" * 5000 + "}", "no JSON"),
    "many digits": ('{"question": "What?", "video": "a.mp4", "duration": ' + "9" * 5000 + "}", "no JSON"),
    "NaN": ('{"question": "What?", "video": "a.mp4", "duration": NaN}', "no JSON value"),
    "too large": ('{"question": "What?", "video": "a.mp4", "duration": 1e999}', "too large"),
    "half of a character": ('{"question": "What \\ud83d?", "video": "a.mp4"}', "half of a character"),
    "no object": ('["What?"]', "no JSON object"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("fault", list(BROKEN))
def test_one_broken_row_does_not_take_the_others_with_it(root, tmp_path, fault, suffix):
    row, reason = BROKEN[fault]
    path = tmp_path / f"rows{suffix}"
    good = '{"question": "What, \\"[really]\\"?", "video": "a.mp4"}'
    path.write_text(f"[{good}, {row}, {good}]" if suffix == ".json" else f"{good}\n{row}\n{good}")
    samples, (bad,) = read("canonical", path, root)
    assert [s.id for s in samples] == [f"rows{suffix}:1", f"rows{suffix}:3"]
    assert bad.row == 2
    assert reason in bad.reason


@pytest.mark.parametrize("fault", list(BROKEN))
def test_one_broken_entry_of_a_keyed_file(root, tmp_path, fault):
    row, reason = BROKEN[fault]
    (root / "c").touch()
    good = json.dumps(FILMS["videochat_r1"])
    path = tmp_path / "rows.json"
    path.write_text(f'{{"a": {good}, "b": {row}, "c": {good}}}')
    samples, (bad,) = read("videochat_r1", path, root)
    assert [s.id for s in samples] == ["a#0", "c#0"]
    assert bad.row == 2
    assert reason in bad.reason


def test_the_second_entry_of_a_film_is_set_aside(root, tmp_path):
    entry = json.dumps(FILMS["videochat_r1"])
    path = tmp_path / "rows.json"
    path.write_text(f'{{"a": {entry}, "a": {entry.replace("opens", "shuts")}}}')
    samples, (bad,) = read("videochat_r1", path, root)
    assert len(samples) == 1
    assert "opens" in samples[0].question
    assert bad.row == 2
    assert "has an entry before" in bad.reason


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
def test_long_texts_take_linear_time(name):
    text = LONG[name]
    for function in (without_media_marks, split_options, json_entries):
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
    assert without_media_marks(text) == plain


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
