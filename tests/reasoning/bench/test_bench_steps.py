import json
import math
from pathlib import Path

import numpy as np
import pytest
from bench_tiny import by_label, constant, scripted, write

from mmrl.reasoning.bench import hard2verify, prmbench, processbench, visualprocessbench
from mmrl.reasoning.bench.base import Item, Scored, remembered, score_items, thresholds, tune
from mmrl.reasoning.records import SolutionRecord, Step

DATA = Path(__file__).parents[2] / "data" / "prm"


def record(own, n, **more):
    return SolutionRecord(own, "Q", tuple(Step(f"s{i}") for i in range(n)), **more)


# ---- ProcessBench -----------------------------------------------------------------------------------------------


def pb_row(own, label, n=4):
    steps = [f"s{i}" for i in range(n)]
    return {
        "id": own,
        "generator": "g",
        "problem": "P",
        "steps": steps,
        "final_answer_correct": label < 0,
        "label": label,
    }


def test_processbench_by_hand():
    s = processbench.percent([-1, 2, 1, 0, None], [-1, 2, 0, -1, 3])
    assert s == pytest.approx({"error_acc": 100 / 3, "correct_acc": 50, "f1": 40})


def test_processbench_prediction_rule(tmp_path):
    file = write(tmp_path / "math.jsonl", [pb_row("a", 2), pb_row("b", -1, 2), pb_row("c", -1, 2), pb_row("d", 1)])
    items, _ = processbench.BENCH.read(file)
    scores = scripted([0.9, 0.7, 0.4, 0.6], [0.9, 0.7], [0.5, 0.5], [math.nan, 0.1, 0.1, 0.1])
    result = processbench.BENCH.evaluate(items, scores)  # 2 and -1 found, 0.5 is no error, no prediction for d
    assert result.groups == {"math": pytest.approx({"error_acc": 50, "correct_acc": 100, "f1": 200 / 3, "items": 4})}


def test_processbench_means_the_splits(tmp_path):
    write(tmp_path / "gsm8k.json", [pb_row("gsm8k-0", 0), pb_row("gsm8k-1", -1)])
    write(
        tmp_path / "omnimath.json", [pb_row("omnimath-0", 0)] * 1 + [pb_row("omnimath-1", -1), pb_row("omnimath-2", 1)]
    )
    items, bad = processbench.BENCH.read(tmp_path)
    assert len(items) == 5 and bad == []
    assert processbench.BENCH.evaluate(items, by_label).metrics == {"f1": 100, "error_acc": 100, "correct_acc": 100}
    half = processbench.BENCH.evaluate(items, constant(0.2))  # every first step is called wrong
    assert half.metrics == {"f1": 0, "error_acc": 75, "correct_acc": 0}
    assert {k: v["error_acc"] for k, v in half.groups.items()} == {"gsm8k": 100, "omnimath": 50}


# ---- PRMBench ---------------------------------------------------------------------------------------------------


def prm_item(kind, own, n, errors=()):
    meta = {"idx": own, "classification": kind, "error_steps": list(errors)}
    return Item((record(f"{kind}_{own}", n, meta=meta),), kind, own)


def test_prmbench_by_hand():
    items = [
        prm_item("step_contradiction", "a", 5, [3, 4]), prm_item("multi_solutions", "b", 4), prm_item("correct", "a", 4),
    ]  # fmt: skip
    valid = [[1, 1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0]]
    result = prmbench.measure_valid(items, [[bool(v) for v in row] for row in valid])
    a, b = result.groups["step_contradiction"], result.groups["multi_solutions"]
    assert prmbench.count([True, True, False, True, True], [3, 4]) == (3, 1, 1, 0)
    assert (a["f1"], a["negative_f1"], a["prmscore"]) == pytest.approx((0.857142857, 0.666666667, 0.761904762))
    assert a["first_error_acc"] == 1 and a["similarity"] == pytest.approx(0.95)
    assert b["prmscore"] == pytest.approx(0.857142857) and b["negative_f1"] == 0 and b["first_error_acc"] == -1
    m = result.metrics
    assert (m["f1"], m["negative_f1"], m["prmscore"]) == pytest.approx((0.857142857, 0.5, 0.678571429))
    assert math.isnan(m["soundness"]) and m["validity"] == 1 and m["items"] == 2


def test_prmbench_undefined_ratios_are_as_official():
    c = prmbench.Counts
    assert prmbench.f1(c(tp=0, fp=2, fn=3)) == -1  # precision and recall both 0
    assert prmbench.f1(c()) == -1 and prmbench.f1(c(fn=2)) == 0  # one of them undefined
    assert prmbench.ratio(1, 0) == -1


@pytest.fixture(scope="module")
def prm_items():
    items, bad = prmbench.BENCH.read(DATA / "prmbench.jsonl")
    assert bad == [] and len(items) == 28 + 3
    return items


def test_prmbench_end_to_end_perfect(prm_items):
    result = prmbench.BENCH.evaluate(prm_items, by_label)
    assert set(result.groups) == {*prmbench.CLASSES, "correct"}
    assert all(result.groups[c]["prmscore"] == 1 for c in prmbench.CLASSES)
    keys = (
        "prmscore",
        "simplicity",
        "soundness",
        "sensitivity",
        "first_error_acc",
        "step_acc",
        "wrong_step_acc",
        "validity",
    )
    assert all(result.metrics[k] == 1 for k in keys) and result.metrics["items"] == 28
    assert result.notes == ("2 items name error steps beyond the last step; those are ignored, as officially",)


def test_prmbench_end_to_end_constant(prm_items):
    result = prmbench.BENCH.evaluate(prm_items, constant(1.0))
    steps = sum(len(i.records[0].steps) for i in prm_items if i.group != "correct")
    wrong = sum(y == 0 for i in prm_items for y in i.records[0].labels)
    f1 = 2 * (steps - wrong) / (2 * (steps - wrong) + wrong)  # every step valid: negative F1 is 0
    assert result.metrics["prmscore"] == pytest.approx(f1 / 2) and result.metrics["similarity"] == 1
    assert result.metrics["wrong_step_acc"] == 0 and result.groups["multi_solutions"]["prmscore"] == 1


def test_prmbench_threshold_is_strict_and_unscored_solutions_lower_validity(prm_items):
    at = prmbench.BENCH.evaluate(prm_items, constant(0.5)).metrics
    assert at["correct_step_acc"] == 0 and at["wrong_step_acc"] == 1
    partial = prmbench.BENCH.evaluate(
        prm_items, lambda records: [[] if i % 2 else s for i, s in enumerate(by_label(records))]
    )
    assert 0 < partial.metrics["validity"] < 1 and partial.metrics["prmscore"] == 1


# ---- VisualProcessBench -----------------------------------------------------------------------------------------


def vpb(own, verdicts, source="MMMU"):
    response = {"steps": [f"s{i}" for i in range(len(verdicts))], "process_correctness": verdicts}
    return {"id": own, "image": [], "question": own, "answer": "", "response": response, "data_source": source}


def test_visualprocessbench_by_hand(tmp_path):
    items, _ = visualprocessbench.BENCH.read(write(tmp_path / "t.jsonl", [vpb("a", [1, 1, -1, 0, 1, -1])]))
    score = scripted([0.9, 0.6, 0.55, 0.1, 0.4, 0.2])  # the neutral step drops out
    m = visualprocessbench.BENCH.evaluate(items, score).metrics
    assert (m["f1_right"], m["f1_wrong"], m["macro_f1"]) == pytest.approx((0.666666667, 0.5, 0.583333333))
    assert m["auc"] == pytest.approx(5 / 6) and m["steps"] == 5 and m["micro_f1"] == m["macro_f1"]
    m = visualprocessbench.BENCH.evaluate(items, score, threshold=0.6).metrics
    assert (m["f1_right"], m["f1_wrong"], m["macro_f1"]) == pytest.approx((0.8, 0.8, 0.8))
    assert m["macro_f1_at_half"] == pytest.approx(0.583333333)
    assert (m["oracle_threshold"], m["oracle_micro_f1"]) == pytest.approx((0.6, 0.8))


def test_visualprocessbench_sources_weigh_by_their_steps(tmp_path):
    rows = [vpb("a", [1, -1]), vpb("b", [1, -1, 1, -1, 1, -1], "WeMath")]
    items, _ = visualprocessbench.BENCH.read(write(tmp_path / "t.jsonl", rows))
    result = visualprocessbench.BENCH.evaluate(items, lambda records: [[1, 0], [1] * 6])
    assert result.groups["MMMU"]["macro_f1"] == 1
    assert result.groups["WeMath"]["macro_f1"] == pytest.approx(1 / 3)  # F1 of right 2/3, of wrong 0
    assert result.metrics["micro_f1"] == pytest.approx((2 * 1 + 6 / 3) / 8)
    assert visualprocessbench.BENCH.evaluate(items, by_label).metrics["micro_f1"] == 1
    assert visualprocessbench.BENCH.evaluate(items, constant(0.5)).metrics["auc"] == 0.5
    assert "upper bound" in result.notes[0]


def test_resamples_are_measured_quickly_and_alike(tmp_path, prm_items):
    rows = [vpb(str(i), [(1, -1, 0)[(i + j) % 3] for j in range(i % 4 + 1)], "ab"[i % 2]) for i in range(12)]
    visual, _ = visualprocessbench.BENCH.read(write(tmp_path / "t.jsonl", rows))
    for bench, items in ((visualprocessbench.BENCH, visual), (prmbench.BENCH, prm_items)):
        scored = score_items(
            items, lambda rs: [[(7 * i + 3 * j) % 10 / 10 for j in range(len(r.steps))] for i, r in enumerate(rs)]
        )
        quick = bench.quick(scored, 0.4)
        for index in ([*range(len(items))], [0, 3, 3, 5, 5, 5, 7]):
            slow = bench.measure([scored[i] for i in index], 0.4, "min").metrics[bench.headline]
            assert quick(np.array(index)) == pytest.approx(slow)


# ---- Hard2Verify ------------------------------------------------------------------------------------------------


def h2v(own, labels):
    return {
        "unique_id": own,
        "question": own,
        "model_response_by_step": [f"s{i}" for i in range(len(labels))],
        "human_labels": labels,
    }


def test_hard2verify_by_hand():
    hits = [(True, True)] * 4 + [(False, True)] + [(True, False)] * 2 + [(False, False)] * 3
    assert hard2verify.balanced(hits) == pytest.approx(
        {"tpr": 0.8, "tnr": 0.4, "balanced_acc": 0.6, "balanced_f1": 0.5333333333}
    )


def test_hard2verify_carries_errors_forward_on_all_levels(tmp_path):
    rows = [h2v("a", [1, 0, 1]), h2v("b", [True, True])]
    items, _ = hard2verify.BENCH.read(write(tmp_path / "t.jsonl", rows))
    assert items[0].records[0].labels == (1, 0, 0) and [i.truth for i in items] == [1, -1]
    m = hard2verify.BENCH.evaluate(items, by_label).metrics
    assert all(v == 1 for v in m.values()) and len(m) == 12
    m = hard2verify.BENCH.evaluate(items, scripted([0.9, 0.9, 0.1], [0.9, 0.9])).metrics
    assert (m["step_tpr"], m["step_tnr"]) == (1, 0.5)  # of steps 1, 2 of a, which are wrong, only 2 is found
    assert (m["response_balanced_acc"], m["first_error_tnr"], m["first_error_balanced_f1"]) == (1, 0, 0)
    m = hard2verify.BENCH.evaluate(items, constant(1.0)).metrics
    assert (m["step_balanced_acc"], m["step_balanced_f1"]) == (0.5, 0)
    m = hard2verify.BENCH.evaluate(items, lambda records: [[] for _ in records]).metrics
    assert set(m.values()) == {0}


# ---- common -----------------------------------------------------------------------------------------------------


def test_bad_rows_of_a_benchmark_are_set_aside(tmp_path):
    rows = [
        pb_row("a", -1),
        {**pb_row("b", 0), "steps": []},
        {**pb_row("c", 0), "steps": ["a", ""]},
        pb_row("d", 9),
        3,
    ]
    items, bad = processbench.BENCH.read(write(tmp_path / "math.jsonl", rows), max_bad=0.9)
    assert len(items) == 1
    assert [(b.row, b.reason.partition(":")[0]) for b in bad] == [
        (2, "first_error outside the steps"), (3, "empty step"), (4, "first_error outside the steps"),
        (5, "no JSON object but int"),
    ]  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no data in"):
        processbench.BENCH.read(tmp_path / "empty")


@pytest.mark.parametrize("scores, reason", [
    ([[0.1, 0.2]], "1 lists for 2 solutions"),
    ([[0.1, 0.2], [0.1]], r"solution 'b': scores \[0.1\] for 2 steps"),
    ([[0.1, 0.2], []], r"solution 'b': scores \[\] for 2 steps"),
    ([[0.1, math.nan], [0.1, 0.2]], "solution 'a'"),
])  # fmt: skip
def test_scores_must_fit_the_steps(scores, reason):
    items = [Item((record("a", 2),)), Item((record("b", 2),))]
    with pytest.raises(ValueError, match=reason):
        score_items(items, scripted(*scores))
    with pytest.raises(ValueError, match="no items"):
        score_items([], scripted())


def test_a_remembered_scorer_is_asked_once():
    asked = []

    def score(records):
        asked.append(len(records))
        return constant(0.5)(records)

    once, records = remembered(score), [record("a", 2), record("b", 1)]
    assert once(records[:1]) == [[0.5, 0.5]] and once(records) == [[0.5, 0.5], [0.5]] and once(records)
    assert asked == [1, 1]


def test_a_record_in_the_memory_of_one_that_is_gone_is_scored_anew():
    asked = []

    def score(records):
        asked.extend(r.id for r in records)
        return [[0.5] for _ in records]

    once = remembered(score)
    for i in range(100):
        once([record(str(i), 1)])
    assert asked == [str(i) for i in range(100)]


def test_threshold_candidates_are_thinned():
    assert thresholds([[0.1, 0.30001], [0.3, 0.2]], 10) == [0.1, 0.2, 0.3]
    assert thresholds([[i / 10 for i in range(10)]], 4) == [0.0, 0.3, 0.6, 0.9]


def test_tuning_takes_the_lowest_best_threshold(tmp_path):
    items, _ = processbench.BENCH.read(write(tmp_path / "math.jsonl", [pb_row("a", 1, 2), pb_row("b", -1, 2)]))
    assert tune(processbench.BENCH, items, scripted([0.8, 0.3], [0.7, 0.6])) == 0.6  # 0.7 finds an error in b
    only_right = items[1:]
    with pytest.raises(ValueError, match="f1 is undefined on the tuning items"):
        tune(processbench.BENCH, only_right, scripted([0.7, 0.6]))


def test_measures_of_a_scored_item_do_not_depend_on_order(prm_items):
    scored = score_items(
        prm_items, lambda rs: [[(i * 7 + j * 3) % 10 / 10 for j in range(len(r.steps))] for i, r in enumerate(rs)]
    )
    forward, backward = prmbench.measure(scored, 0.5, "min"), prmbench.measure(scored[::-1], 0.5, "min")
    assert forward.metrics == pytest.approx(backward.metrics)
    assert json.dumps(forward.groups["circular"]) and isinstance(scored[0], Scored)
