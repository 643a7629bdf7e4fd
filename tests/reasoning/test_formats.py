import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from verbs import run_verb

from mmrl.jsonl import RowError
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.records import Counts, SolutionRecord, Step
from mmrl.reasoning.records_io import check_record
from mmrl.registry import build, find, rows

DATA = Path(__file__).parents[1] / "data" / "prm"


def read(name, row, **options):
    return build("formats", "format", name, options)(row, "f:1")


def export(name, record):
    return find("exporters", name).target(record)


def chat(*turns, first="### Question:\nQ?\n\n### Solution Process:\n"):
    said = [{"from": "system", "value": "judge"}]
    for i, (step, verdict) in enumerate(turns):
        said += [{"from": "human", "value": (first if i == 0 else "") + step}, {"from": "gpt", "value": verdict}]
    return said


def test_visualprm_conversations():
    row = {"id": 7, "image": "a.png", "conversations": chat(("one\n\nmore", "+"), ("two", "-"), ("three", "-"))}
    (r,) = read("visualprm", row)
    assert (r.id, r.question, r.images, r.texts) == ("7", "Q?", ("a.png",), ("one\n\nmore", "two", "three"))
    assert (r.labels, r.label_kind, r.scope, r.first_error) == ((1, 0, 0), "hard", "prefix", 1)


@pytest.mark.parametrize("turns, reason", [
    ([("one", "+"), ("two", "maybe")], "bad verdict: turn 3 says 'maybe'"),
    ([], "no pairs of step and verdict"),
])  # fmt: skip
def test_conversations_that_cannot_be_read(turns, reason):
    with pytest.raises(RowError, match=reason):
        read("visualprm", {"conversations": chat(*turns)})
    with pytest.raises(RowError, match="no question"):
        read("visualprm", {"conversations": chat(("one", "+"), first="")})


def test_visualprm_raw_steps_after_the_early_stop_are_unlabelled():
    steps = [
        {"step": "a", "score": 0.3125, "num_mc_correct": 5, "num_mc_total": 16},
        {"step": "b", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 16},
        {"step": "c", "score": 0.0, "num_mc_correct": 0, "num_mc_total": 0},
    ]
    row = {"image": ["a.png"], "question": "<image>\nQ? Think.", "question_orig": "Q?", "answer": 5, "response": "abc"}
    (r,) = read("visualprm_raw", {**row, "num_mc_sequences": 16, "steps_with_score": steps})
    assert (r.id, r.question, r.answer, r.labels, r.label_kind) == ("f:1", "Q?", "5", (0.3125, 0.0, None), "soft")
    assert r.mc == (Counts(5, 16), Counts(0, 16), Counts(0, 0)) and r.meta == {
        "response": "abc",
        "num_mc_sequences": 16,
    }
    steps[0]["score"] = 0.5
    with pytest.raises(RowError, match="score and counts differ: step 0"):
        read("visualprm_raw", {**row, "steps_with_score": steps})


VL = chat(
    ("[Visual Elements]\n<step_1>\nA red dot.\n</step_1>", "+"), ("<step_2>\nTwo dots.\n</step_2>", "+"),
    ("[Reasoning]\n<step_1>\nSo two.\n</step_1>", "-"),
)  # fmt: skip


def test_vlprm_first_error_counts_within_its_section():
    row = {"id": "u", "image": "a.png", "conversations": VL, "first_incorrect_step": "['Reasoning', 0]", "source": "s"}
    (r,) = read("vlprm", row)
    assert [s.kind for s in r.steps] == ["perception", "perception", "reasoning"]
    assert r.texts == ("A red dot.", "Two dots.", "So two.") and (r.first_error, r.labels) == (2, (1, 1, 0))
    assert r.meta["first_incorrect_step"] == "['Reasoning', 0]" and r.meta["source"] == "s"


def test_vlprm_with_no_error_and_with_disagreement():
    right = {"conversations": [*VL[:-1], {"from": "gpt", "value": "+"}], "first_incorrect_step": None}
    assert read("vlprm", right)[0].first_error == -1
    for bad, reason in [
        (("Visual Elements", 0), "first errors differ: the turns say 2, first_incorrect_step says 0"),
        ("[oops", "bad first_incorrect_step"),
        (["Answer", 0], "unknown section"),
    ]:
        with pytest.raises(RowError, match=reason):
            read("vlprm", {"conversations": VL, "first_incorrect_step": bad})


def test_rlhflow():
    said = [("user", "2+2? Step 1: add"), ("assistant", "+"), ("user", "Step 2: 5 ки"), ("assistant", "-")]
    (r,) = read("rlhflow", {"conversations": [{"role": w, "content": c} for w, c in said]})
    assert (r.question, r.texts, r.labels) == ("2+2?", ("Step 1: add", "Step 2: 5 ки"), (1, 0))


def test_math_shepherd_is_aligned():
    row = {
        "input": "2-1+3? Step 1: 2-1=1 ки\nStep 2: 1+3 = 5 ки",
        "label": "2-1+3? Step 1: 2-1=1 +\nStep 2: 1+3 = 5 -", "task": "GSM8K",
    }  # fmt: skip
    (r,) = read("math_shepherd", row)
    assert (r.question, r.texts, r.labels) == ("2-1+3?", ("Step 1: 2-1=1", "Step 2: 1+3 = 5"), (1, 0))
    assert r.meta == {"task": "GSM8K"} and r.first_error == 1


@pytest.mark.parametrize("change, reason", [
    ({"label": "Q Step 1: a +\nStep 2: c -"}, "input and label differ: at step 1"),
    ({"label": "Q Step 1: a *\nStep 2: b -"}, "bad verdict: '\\*' where step 0"),
    ({"input": "Q Step 1: a", "label": "Q Step 1: a"}, "no step"),
    ({"input": "Q a ки", "label": "Q a +"}, "no first step"),
    ({"input": "Q Step 1: a ки tail", "label": "Q Step 1: a + tail"}, "text after the last marker"),
])  # fmt: skip
def test_math_shepherd_that_does_not_align(change, reason):
    row = {"input": "Q Step 1: a ки\nStep 2: b ки", "label": "Q Step 1: a +\nStep 2: b -"}
    with pytest.raises(RowError, match=reason):
        read("math_shepherd", row | change)


def prm_rows():
    return [json.loads(line) for line in (DATA / "prm800k.jsonl").read_text("utf-8").splitlines()]


def test_prm800k_expands_into_solutions():
    records = read("prm800k", prm_rows()[0])  # ratings 1 | 5 x -1, then a human step | 1 | 1 | 1 | 0 1 1 1 [1]
    assert [len(r.steps) for r in records] == [2] * 5 + [6] * 4 + [6]
    assert [r.labels[-1] for r in records] == [0] * 5 + [1, 1, 1, 1, 1] and records[0].first_error == 1
    assert records[-1].labels == (1,) * 6 and records[-1].first_error == -1 and records[-1].answer == "29"
    assert records[5].steps[1].text.startswith("We have $3p+e=1.24$") and len({r.id for r in records}) == 10


@pytest.mark.parametrize("neutral, label", [("positive", 1.0), ("negative", 0.0), ("drop", None)])
def test_prm800k_neutral(neutral, label):
    assert read("prm800k", prm_rows()[0], neutral=neutral)[5].labels[-1] == label
    with pytest.raises(ValueError, match="neutral='maybe'"):
        read("prm800k", prm_rows()[0], neutral="maybe")


def test_prm800k_that_was_given_up_keeps_its_last_prefix():
    records = read("prm800k", prm_rows()[2])
    assert [len(r.steps) for r in records] == [8] * 6 + [8] and records[-1].meta == {"finish_reason": "give_up"}
    assert records[-1].labels == (1,) * 8 and records[0].labels == (1,) * 7 + (0,)


def test_trl_comes_back():
    row = {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}
    (r,) = read("trl", row)
    assert r.labels == (1, 0) and r.first_error == 1 and export("trl", r) == row
    (soft,) = read("trl", {**row, "labels": [1, 0.9]})
    assert soft.label_kind == "soft"
    with pytest.raises(RowError, match="soft labels"):
        export("trl", soft)
    with pytest.raises(RowError, match="unlabelled steps"):
        export("trl", replace(r, labels=(1.0, None)))
    with pytest.raises(RowError, match="1 labels for 2 steps"):
        read("trl", {**row, "labels": [True]})


def test_mm_prm_rows_come_back():
    row = {
        "id": "i", "image": "a.png",
        "conversations": [
            {"from": "human", "value": "Question: Q\nProcess: one\n\nmore<prm>\n\ntwo<prm>"},
            {"from": "gpt", "value": [0.75, 0.0]},
        ],
    }  # fmt: skip
    (r,) = read("mm_prm", row)
    assert (r.question, r.texts, r.labels) == ("Q", ("one\n\nmore", "two"), (0.75, 0.0))
    assert export("mm_prm", r) == row
    for bad, reason in [
        (replace(r, labels=(0.5, None)), "unlabelled"),
        (replace(r, steps=(Step("a<prm>"), Step("b"))), "marker in the text: '<prm>' in step 0"),
        (replace(r, question="a\nProcess: b"), "marker in the text: the question"),
    ]:
        with pytest.raises(RowError, match=reason):
            export("mm_prm", bad)
    row["conversations"][1]["value"].append(1.0)
    with pytest.raises(RowError, match="3 labels for 2 steps"):
        read("mm_prm", row)


def node(text, value, *children, **more):
    base = {"partial_solution": [text] if text else [], "mc_value": value, "visit_count": 0}
    return {**base, "correct_rollouts": [], "incorrect_rollouts": [], "children": list(children), **more}


def test_paths_of_an_mm_prm_tree():
    tree = node("", 0.5, node("a", 0.5, node("b", 1.0), node("c", 0.0)), node("d", 1.0))
    tree |= {"question": "Q", "answer": "4", "image_path": "a.png", "id": "t"}
    records = read("mm_prm_tree", tree)
    assert [(r.id, r.texts, r.labels) for r in records] == [
        ("t#0", ("a", "b"), (0.5, 1.0)), ("t#1", ("a", "c"), (0.5, 0.0)), ("t#2", ("d",), (1.0,)),
    ]  # fmt: skip
    assert records[0].images == ("a.png",) and records[0].answer == "4"


def test_mm_prm_paths_end_at_value_0_and_carry_counts():
    below = node("never", 1.0, counts=[4, 4])
    tree = node("", 0.5, node("a", 0.5, node("b", 0.0, below, counts=[0, 4]), counts=[2, 4])) | {"question": "Q"}
    (r,) = read("mm_prm_tree", tree)
    assert r.texts == ("a", "b") and r.mc == (Counts(2, 4), Counts(0, 4))
    with pytest.raises(RowError, match="no step"):
        read("mm_prm_tree", node("", 1.0) | {"question": "Q"})


def test_math_aps_tree_sample():
    row = json.loads((DATA / "math_aps_tree.jsonl").read_text("utf-8"))
    records = read("math_aps_tree", row)

    def leaves(n):
        return sum(map(leaves, n["children"])) if n["children"] and n["mc_value"] > 0 else 1

    assert len(records) == leaves(row["reasoning_steps"]) and {r.answer for r in records} == {"3"}
    assert all(y > 0 for r in records for y in r.labels[:-1]) and min(r.labels[-1] for r in records) == 0
    assert records[0].labels == (1.0,) and max(len(r.steps) for r in records) == 4


def test_math_aps_flat_sample():
    row = json.loads((DATA / "math_aps_flat.jsonl").read_text("utf-8"))
    records = read("math_aps_flat", row)
    assert sorted(r.labels for r in records) == [(0.046875, 0.0), (1.0,), (1.0,)]  # 1/32 and 2/32: estimated twice
    wrong = next(r for r in records if len(r.steps) == 2)
    whole = next(e["solution_prefix"] for e in row["reasoning_steps"] if e["mc_value"] == 0)
    assert whole.startswith(row["question"] + "\n\n " + wrong.texts[0]) and wrong.meta == {"root_value": 0.1875}


def test_processbench_comes_back():
    row = {
        "id": "gsm8k-0",
        "generator": "m",
        "problem": "P",
        "steps": ["a", "b", "c"],
        "final_answer_correct": False,
        "label": 1,
    }
    (r,) = read("processbench", row)
    assert (r.labels, r.first_error, r.final_correct, r.scope) == ((1, 0, None), 1, False, "prefix")
    assert export("processbench", r) == row
    assert read("processbench", {**row, "label": -1})[0].labels == (1, 1, 1)
    with pytest.raises(RowError, match="3 for 3 steps"):
        read("processbench", {**row, "label": 3})


def test_prmbench_sample():
    records, bad = read_format(DATA / "prmbench.jsonl", "prmbench")
    assert len(records) == 28 and bad == [] and len({r.meta["classification"] for r in records}) == 9
    last = records[-1]  # 10 steps, error_steps 10 to 13
    assert last.labels == (1,) * 9 + (0,) and last.first_error == 9 and last.meta["error_steps"] == [10, 11, 12, 13]
    assert all(r.first_error == -1 for r in records if r.meta["classification"] == "multi_solutions")
    row = {
        "idx": "i",
        "classification": "circular",
        "question": "Q",
        "modified_process": ["1. a", "2.5 b"],
        "error_steps": [3],
    }
    with pytest.raises(RowError, match="error_steps outside the steps"):
        read("prmbench", row)
    assert read("prmbench", {**row, "error_steps": [2]})[0].texts == ("a", "2.5 b")


def test_visualprocessbench_comes_back():
    row = {
        "id": "v", "image": ["a.png"], "question": "Q", "answer": "4",
        "response": {"steps": ["a", "b", "c"], "process_correctness": [1, 0, -1]}, "policy_model": "m", "data_source": "MMMU",
    }  # fmt: skip
    (r,) = read("visualprocessbench", row)
    assert r.labels == (1, None, 0) and r.scope == "local" and export("visualprocessbench", r) == row
    as_text = {**row, "question": "<image>\nQ", "response": json.dumps(row["response"])}
    assert read("visualprocessbench", as_text) == [r]
    row["response"]["process_correctness"] = [1, 0]
    with pytest.raises(RowError, match="2 labels for 3 steps"):
        read("visualprocessbench", row)
    with pytest.raises(RowError, match="bad image path: column 'image' holds bytes as text"):
        read("visualprocessbench", {**row, "response": json.loads(as_text["response"]), "image": {"bytes": "x"}})


def test_puzzlevqa_steps_sample():
    records, bad = read_format(DATA / "puzzlevqa_steps.jsonl", "puzzlevqa_steps")
    assert len(records) == 12 and bad == [] and all(Path(r.images[0]).is_file() for r in records)
    assert {s.kind for r in records for s in r.steps} == {"perception", "reasoning"}
    for r in records:
        assert r.first_error == next((i for i, y in enumerate(r.labels) if y == 0), -1)
        assert r.answer in r.options


def test_records_are_a_format_of_their_own():
    r = SolutionRecord("i", "Q", (Step("a", "answer"),), labels=(1.0,))
    assert read("records", export("records", r)) == [r]


def test_reading_a_file_of_a_format(tmp_path):
    good = {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}
    rows = [good, {**good, "labels": [True]}, {**good, "completions": ["", "b"]}, {**good, "prompt": "<prm>"}]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    records, bad = read_format(file, "trl", markers=["<prm>"], max_bad=0.9)
    assert [r.id for r in records] == ["t.jsonl:1"]
    assert [(b.row, b.reason.partition(":")[0]) for b in bad] == [
        (2, "labels and steps differ"), (3, "empty step"), (4, "marker in the text"),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"did you mean trl"):
        read_format(file, "trll")


@pytest.mark.parametrize("name", [row.name for row in rows("formats") if "read" not in row.facts])
@pytest.mark.parametrize("row", [{}, {"conversations": 3, "steps": "a", "completions": [1], "label": 1, "input": []}])
def test_a_row_of_another_format_is_an_error_of_that_row(name, row):
    with pytest.raises(RowError):
        read(name, row)


@pytest.mark.parametrize("name, file", [
    ("prmbench", "prmbench"), ("puzzlevqa_steps", "puzzlevqa_steps"), ("prm800k", "prm800k"),
    ("math_aps_tree", "math_aps_tree"), ("math_aps_flat", "math_aps_flat"),
])  # fmt: skip
def test_a_sample_with_any_column_missing_or_odd_is_sound_or_refused(name, file):
    row = json.loads((DATA / f"{file}.jsonl").read_text("utf-8").splitlines()[0])
    whole = read(name, copy.deepcopy(row))
    used, refused = {}, {}
    for key in row:
        for i, value in enumerate((None, 3, "x", [], {}, [None])):
            try:
                records = read(name, copy.deepcopy({**row, key: value}))
                used[key, i] = [check_record(r, unlabelled=True) for r in records]
            except RowError as error:
                refused[key, i] = str(error)
    assert len(used) + len(refused) == 6 * len(row)
    assert all(used.values()) and all(refused.values())
    # a column that no value of is refused is read by nobody, and changes nothing but what is kept of it
    read_columns = {key for key, _ in refused}
    assert read_columns
    for (key, _), records in used.items():
        if key not in read_columns:
            assert [r.texts for r in records] == [r.texts for r in whole]


def test_solutions_are_converted_from_one_format_to_another(tmp_path):
    """What the other format cannot hold is set aside like a row that cannot be read."""
    good = {"prompt": "Q", "completions": ["a", "b"], "labels": [True, False]}
    rows = [good, {**good, "labels": [True, True], "prompt": "R"}, {**good, "labels": [0.5, 0.2]}, {"prompt": "Q"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    there, back = tmp_path / "there.jsonl", tmp_path / "back.jsonl"

    out = run_verb(
        "convert", tmp_path / "t.jsonl", there, "--format", "trl", "--to", "processbench", "--max-bad", "0.6"
    )
    assert out.startswith("2 rows, 2 set aside")
    table = [json.loads(line) for line in there.read_text().splitlines()]
    assert [(r["problem"], r["steps"], r["label"]) for r in table] == [("Q", ["a", "b"], 1), ("R", ["a", "b"], -1)]
    run_verb("convert", there, back, "--format", "processbench", "--to", "records")
    assert [r["labels"] for r in map(json.loads, back.read_text().splitlines())] == [[1.0, 0.0], [1.0, 1.0]]
