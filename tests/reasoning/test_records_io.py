import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrl.jsonl import RowError, count_reasons, entries
from mmrl.reasoning.records import Counts, SolutionRecord, Step
from mmrl.reasoning.records_io import check_record, read_records, record_from_json, record_to_json, write_records

GOOD = {"id": "a", "question": "Q?", "steps": ["one", {"text": "two", "kind": "reasoning"}], "labels": [1, 0]}
FULL = SolutionRecord(
    "x", "Which?", (Step("see", "perception"), Step("so")), ("p.png",), ("1", "2"), "1", (0.25, None), "soft", "prefix",
    1, False, (Counts(1, 4), Counts(0, 0)), ({"verdict": "no"},), "test", {"k": [1]},
)  # fmt: skip


def write(file, rows):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return file


@pytest.fixture
def media(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "sub").mkdir()
    return tmp_path


def test_a_record_comes_back():
    row = record_to_json(FULL)
    assert row["mc"] == [{"value": 0.25, "correct": 1, "total": 4}, {"value": None, "correct": 0, "total": 0}]
    assert record_from_json(json.loads(json.dumps(row))) == FULL


labels = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.tuples(st.text(min_size=1).filter(str.strip), labels), min_size=1), st.booleans())
def test_any_sound_record_comes_back(pairs, prefix):
    record = SolutionRecord(
        "i", "q", tuple(Step(t) for t, _ in pairs), labels=tuple(y for _, y in pairs), label_kind="soft",
        scope="prefix" if prefix else "local",
    )  # fmt: skip
    assert record_from_json(json.loads(json.dumps(record_to_json(record))), unlabelled=True) == record


@pytest.mark.parametrize("change, reason", [
    ({"labels": [1]}, "labels and steps differ: 1 labels for 2 steps"),
    ({"labels": [1, 2]}, "label outside [0, 1]: step 1 has 2.0"),
    ({"labels": [1, -0.1]}, "label outside [0, 1]: step 1 has -0.1"),
    ({"labels": [1, 0.5]}, "soft label in a hard record: step 1 has 0.5"),
    ({"labels": [1, "+"]}, "bad label: step 1 has '+'"),
    ({"labels": [None, None]}, "all labels null"),
    ({"labels": None}, "all labels null"),
    ({"labels": "+-"}, "bad labels: '+-' is str"),
    ({"steps": []}, "no step"),
    ({"steps": None}, "no step"),
    ({"steps": ["one", " "]}, "empty step: step 1 of 2"),
    ({"steps": ["one", {"kind": "answer"}]}, "bad step: step 1"),
    ({"steps": ["one", {"text": "t", "kind": "guess"}]}, "bad step kind: step 1 has 'guess'"),
    ({"id": ""}, "no id"),
    ({"question": " "}, "no question"),
    ({"question": 7}, "bad question: '7' is int"),
    ({"scope": "global"}, "bad scope"),
    ({"label_kind": "firm"}, "bad label_kind"),
    ({"first_error": 2}, "first_error outside the steps: 2 for 2 steps"),
    ({"mc": [{"correct": 1, "total": 4}]}, "counts and steps differ: 1 counts for 2 steps"),
    ({"mc": [{"correct": 5, "total": 4}, {"correct": 0, "total": 4}]}, "impossible counts: step 0 has 5 correct of 4"),
    ({"mc": [{"value": 0.5}, {}]}, "bad counts: step 0"),
    ({"label": [1, 0]}, "unknown keys: ['label']"),
])  # fmt: skip
def test_what_is_wrong_with_a_row_is_said(change, reason):
    with pytest.raises(RowError, match=re.escape(reason)):
        record_from_json(GOOD | change)


def test_unlabelled_records_when_asked_for():
    record = record_from_json({k: v for k, v in GOOD.items() if k != "labels"}, unlabelled=True)
    assert record.labels is None and record.texts == ("one", "two")


def test_bad_rows_are_set_aside_with_file_row_and_reason(media):
    rows = [
        GOOD, {**GOOD, "id": "b", "labels": [1]}, {**GOOD, "id": "c", "labels": [1, 0, 1]}, {**GOOD, "id": "d", "images": ["no.png"]},
        {**GOOD, "id": "e", "images": ["broken.png"]}, {**GOOD, "id": "f", "images": ["text.png"]},
        {**GOOD, "id": "g", "question": "a <prm> b"}, {**GOOD, "id": "h", "steps": [], "labels": []},
        {**GOOD, "id": "i", "labels": [None, None]}, GOOD, "{oops", {**GOOD, "id": "j", "images": [""]},
        {**GOOD, "id": "k", "images": ["a.png"]}, {**GOOD, "id": "l", "steps": ["a <prm>", "b"]},
    ]  # fmt: skip
    records, bad = read_records(write(media / "r.jsonl", rows), markers=["<prm>"], max_bad=0.9)
    assert [r.id for r in records] == ["a", "k"] and records[1].images == (str((media / "a.png").resolve()),)
    assert [b.row for b in bad] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14]
    assert {Path(b.file).name for b in bad} == {"r.jsonl"}
    assert count_reasons(bad) == {
        "labels and steps differ": 2, "bad image": 2, "marker in the text": 2, "image missing": 1, "no step": 1,
        "all labels null": 1, "id used twice": 1, "no JSON": 1,
        "bad image path": 1,
    }  # fmt: skip


def test_too_many_bad_rows_stop_the_load(tmp_path):
    file = write(tmp_path / "r.jsonl", [GOOD, {**GOOD, "id": "b", "labels": [1]}])
    with pytest.raises(
        ValueError, match=r"1 of 2 rows are bad, more than max_bad=0.05; line 2: labels and steps differ"
    ):
        read_records(file)


def test_pictures_stay_below_the_media_root(media):
    file = write(media / "sub" / "r.jsonl", [{**GOOD, "images": ["../a.png"]}])
    assert read_records(file)[0][0].images == (str(media / "a.png"),)
    with pytest.raises(ValueError, match="image outside the media root"):
        read_records(file, media_root=media / "sub")


def test_written_records_are_read_again(media):
    record = replace(FULL, images=(str(media / "a.png"),))
    assert (
        write_records(media / "out" / "w.jsonl", [record, replace(record, id="y", labels=None)], media_root=media) == 2
    )
    assert json.loads((media / "out" / "w.jsonl").read_text().splitlines()[0])["images"] == ["a.png"]
    records, bad = read_records(media / "out" / "w.jsonl", media_root=media, unlabelled=True)
    assert [records[0], records[1].labels, bad] == [record, None, []]


def test_an_unsound_record_is_not_written(tmp_path):
    with pytest.raises(RowError, match="3 labels for 2 steps"):
        write_records(tmp_path / "w.jsonl", [replace(FULL, labels=(1.0, 1.0, 1.0))])
    assert not (tmp_path / "w.jsonl").exists()
    with pytest.raises(RowError, match="no step"):
        check_record(replace(FULL, steps=()))


def test_json_arrays_and_parquet_are_read_too(tmp_path):
    array = tmp_path / "r.json"
    array.write_text(json.dumps([GOOD, 3, {**GOOD, "id": "b"}]))
    records, bad = read_records(array, max_bad=0.5)
    assert [r.id for r in records] == ["a", "b"] and (bad[0].row, bad[0].reason) == (2, "no JSON object but int")
    lines = write(tmp_path / "lines.json", [GOOD, {**GOOD, "id": "b"}])
    assert len(read_records(lines)[0]) == 2
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{"id": "a", "n": [1, 2]}])
    parquet.write_table(table, tmp_path / "r.parquet")
    assert list(entries(tmp_path / "r.parquet")) == [(1, {"id": "a", "n": [1, 2]})]
