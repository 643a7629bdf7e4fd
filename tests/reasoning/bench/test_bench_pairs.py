import math

import pytest
from bench_tiny import constant, write
from PIL import Image

from mmrl.reasoning.bench import mpbench, pairs


def by_text(records):
    """Paragraphs that say "good" are good."""
    return [[0.9 if "good" in s.text else 0.1 for s in r.steps] for r in records]


def vl(own, source, ranking=(0, 1), responses=("good\n\ngood", "good\n\nbad")):
    return {
        "id": own,
        "query": f"<image>\n{own}",
        "response": list(responses),
        "human_ranking": list(ranking),
        "query_source": source,
    }


def test_vl_rewardbench(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [
        {**vl("a", "WildVision"), "image": "a.png"}, vl("b", "RLAIF-V"), vl("c", "mmmu"),
        vl("d", "MathVerse", (1, 0)), vl("e", "povid", (1, 0), ("bad", "good")),
    ]  # fmt: skip
    items, bad = pairs.VL_REWARDBENCH.read(write(tmp_path / "t.jsonl", rows))
    assert bad == [] and [i.group for i in items] == [
        "general",
        "hallucination",
        "reasoning",
        "reasoning",
        "hallucination",
    ]
    assert items[0].records[0].question == "a" and len(items[0].records[0].images) == 1
    result = pairs.VL_REWARDBENCH.evaluate(items, by_text)
    assert result.metrics == pytest.approx({"overall": 0.8, "macro": 2.5 / 3})  # d is ranked the other way round
    assert pairs.VL_REWARDBENCH.evaluate(items, by_text, aggregate="max").metrics["overall"] == pytest.approx(3 / 5)
    assert pairs.VL_REWARDBENCH.evaluate(items, constant(0.3)).metrics == pytest.approx({"overall": 0.5, "macro": 0.5})


@pytest.mark.parametrize("change, reason", [
    ({"response": ["good", " "]}, "empty candidate: rejected has no text"),
    ({"response": ["good", None]}, "empty candidate: rejected"),
    ({"response": ["good"]}, "no pair"),
    ({"human_ranking": [0, 0]}, "no pair"),
    ({"human_ranking": "[0, 1]"}, "no pair"),
    ({"query_source": "elsewhere"}, "unknown source: 'elsewhere'"),
    ({"image": "none.png"}, "image missing"),
    ({"query": ""}, "no text in column 'query'"),
])  # fmt: skip
def test_pairs_that_cannot_be_read(tmp_path, change, reason):
    file = write(tmp_path / "t.jsonl", [vl("a", "povid"), vl("b", "povid") | change])
    _, (bad,) = pairs.VL_REWARDBENCH.read(file, max_bad=0.5)
    assert bad.row == 2 and bad.file == str(file) and reason in bad.reason


def test_aggregates_that_are_no_number_are_refused(tmp_path):
    items, _ = pairs.VL_REWARDBENCH.read(write(tmp_path / "t.jsonl", [vl("a", "povid")]))
    with pytest.raises(ValueError, match="min_then_last"):
        pairs.VL_REWARDBENCH.evaluate(items, by_text, aggregate="min_then_last")


def test_rewardbench_sections_by_hand():
    subsets = {"a": {"accuracy": 0.8, "items": 100}, "b": {"accuracy": 0.6, "items": 300}}
    assert pairs.section(subsets) == pytest.approx(0.65)
    # mathematics weighs 984 however many pairs there are, as much as six languages of 164
    reasoning = {"math-prm": {"accuracy": 1.0, "items": 447}, "hep-go": {"accuracy": 0.0, "items": 164}}
    assert pairs.section(reasoning) == pytest.approx(984 / (984 + 164))
    assert math.isnan(pairs.section({}))


def test_rewardbench_end_to_end(tmp_path):
    subsets = [s for members in pairs.SECTIONS.values() for s in members]
    assert len(subsets) == 23
    rows = [{"id": 1, "prompt": "Q", "chosen": "good", "rejected": "bad", "subset": s} for s in subsets]
    items, bad = pairs.REWARDBENCH.read(write(tmp_path / "filtered.json", rows))
    assert bad == [] and len(items) == 23
    assert set(pairs.REWARDBENCH.evaluate(items, by_text).metrics.values()) == {1.0}
    result = pairs.REWARDBENCH.evaluate(items, constant(0.5))
    assert result.metrics == {"score": 0.5, "chat": 0.5, "chat_hard": 0.5, "safety": 0.5, "reasoning": 0.5}
    worse = pairs.REWARDBENCH.evaluate(items, lambda rs: [[0.9 if r.id.endswith("rejected") else 0.1] for r in rs])
    assert worse.metrics["score"] == 0


# ---- MPBench ----------------------------------------------------------------------------------------------------


def mp_files(folder):
    write(folder / "step_correctness.json", [
        {"id": 1, "question": "Q", "steps": ["a", "b", "c"], "labels": [1, 0, 1]},
        {"id": 2, "question": "R", "steps": ["a", "b"], "labels": [1, 1]},
    ])  # fmt: skip
    write(folder / "answer_aggregation.json", [{"id": 1, "question": "Q", "candidates": [
        {"steps": ["x good"], "answer": "7", "correct": True}, {"steps": ["x", "y"], "answer": "4.0", "correct": False},
        {"steps": ["z"], "answer": "4", "correct": False},
    ]}])  # fmt: skip
    write(folder / "reasoning_process_search.json", [{"id": 1, "question": "Q", "prefix": ["p"], "candidates": [
        {"step": "good", "correct": True}, {"step": "bad", "correct": False},
    ]}])  # fmt: skip
    return folder


def test_mpbench_paradigms(tmp_path):
    items, bad = mpbench.BENCH.read(mp_files(tmp_path / "mp"))
    assert bad == [] and [len(i.records) for i in items] == [3, 2, 1, 1]

    def score(records):
        return [list(r.labels) if r.labels else s for r, s in zip(records, by_text(records), strict=True)]

    result = mpbench.BENCH.evaluate(items, score)
    assert result.groups["step_correctness"] == {"average": 1, "fei": 1, "aei": 1, "items": 2}
    assert result.groups["answer_aggregation"] == {"average": 1, "best_of_n": 1, "weighted_vote": 1, "items": 1}
    assert result.groups["reasoning_process_search"] == {"average": 1, "f1": 1, "mcc": 1, "selected": 1, "items": 1}
    assert result.metrics["overall"] == 1 and result.notes == ()


def test_mpbench_constant_scorer(tmp_path):
    items, _ = mpbench.BENCH.read(mp_files(tmp_path / "mp"))
    groups = mpbench.BENCH.evaluate(items, constant(0.5)).groups
    assert groups["step_correctness"]["fei"] == 0.5  # only the solution without an error
    assert groups["step_correctness"]["aei"] == pytest.approx(0.5 * 8 / 9)  # 4 of 5 right: F1 8/9, and 0
    assert (groups["answer_aggregation"]["best_of_n"], groups["answer_aggregation"]["weighted_vote"]) == (1, 0)
    assert groups["reasoning_process_search"]["mcc"] == 0
    assert groups["reasoning_process_search"]["f1"] == pytest.approx(2 / 3)


def test_mpbench_rows_that_cannot_be_used(tmp_path):
    good = {"id": 1, "question": "Q", "candidates": [{"steps": ["x"], "answer": "7", "correct": True}]}
    empty = {**good, "id": 2, "candidates": [{"steps": [], "answer": "7", "correct": True}]}
    none = {**good, "id": 3, "candidates": []}
    file = write(tmp_path / "answer_aggregation.json", [good, empty, none])
    items, bad = mpbench.BENCH.read(file, max_bad=0.9)
    assert [(b.row, b.reason.partition(":")[0]) for b in bad] == [(2, "empty candidate"), (3, "bad candidates")]
    result = mpbench.BENCH.evaluate(items, constant(0.5))
    assert result.notes == ("overall leaves out step_correctness, reasoning_process_search: no such file",)
    with pytest.raises(ValueError, match="unknown paradigm: file 'other'"):
        mpbench.BENCH.read(write(tmp_path / "other.json", [good]))
