import json
from pathlib import Path

import pytest
from bench_tiny import by_label, constant, write

from mmrl.reasoning.bench.prmbench import CLASSES
from mmrl.reasoning.bench.run import run_bench

DATA = Path(__file__).parents[2] / "data" / "prm"


def row(own, label, n=2):
    return {"id": own, "problem": own, "steps": ["a"] * n, "final_answer_correct": label < 0, "label": label}


@pytest.fixture
def split(tmp_path):
    return write(tmp_path / "math.jsonl", [row("a", 1), row("b", -1), row("c", 5), row("d", -1), row("e", 0)])


def test_a_report_names_every_setting(split, tmp_path, capsys):
    out = tmp_path / "out" / "report.json"
    report = run_bench("processbench", split, by_label, max_bad=0.3, out=out, resamples=20)
    assert json.loads(out.read_text()) == report
    assert report["metrics"] == {"f1": 100, "error_acc": 100, "correct_acc": 100} and report["items"] == 4
    assert report["settings"] == {"aggregate": "min", "threshold": 0.5, "threshold_source": "given"}
    assert report["quarantined"] == [
        {"file": str(split), "row": 3, "reason": "first_error outside the steps: 5 for 2 steps (0-based, -1 = none)"}
    ]
    assert report["reasons"] == {"first_error outside the steps": 1}
    assert (report["interval"]["low"], report["interval"]["high"]) == (100, 100)
    assert report["steps"]["auc"] == 1 and report["steps"]["ece"] == 0 and "early/auc" in report["steps"]
    shown = capsys.readouterr().out
    assert "processbench" in shown and "math" in shown and "set aside: 1 x first_error outside the steps" in shown


def test_undefined_numbers_are_null(tmp_path):
    file = write(tmp_path / "math.jsonl", [row("a", -1)])
    report = run_bench("processbench", file, constant(0.9), resamples=0, out=tmp_path / "r.json")
    assert report["metrics"] == {"f1": None, "error_acc": None, "correct_acc": 100}


def test_the_threshold_comes_from_elsewhere(split, tmp_path):
    def score(records):
        return [[0.3 if y is None else 0.2 + 0.1 * y for y in r.labels] for r in records]

    tuning = write(tmp_path / "gsm8k.jsonl", [row("x", 0), row("y", -1)])
    report = run_bench("processbench", split, score, tune_on=tuning, max_bad=0.3, resamples=0)
    assert report["settings"]["threshold"] == pytest.approx(0.3)
    assert report["settings"]["threshold_source"] == f"tuned on {tuning}" and report["metrics"]["f1"] == 100
    (tmp_path / "both").mkdir()
    for file in (tuning, split):
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    inside = tmp_path / "both" / "gsm8k.jsonl"
    notes = run_bench("processbench", inside.parent, score, tune_on=inside, max_bad=0.3, resamples=0)["notes"]
    assert notes == [f"{inside}, where the threshold was tuned, is part of the data"]
    with pytest.raises(ValueError, match="is the test data"):
        run_bench("processbench", split, score, tune_on=split)


def test_benchmarks_without_a_threshold_state_their_ties(tmp_path):
    file = write(
        tmp_path / "r.jsonl", [{"id": 1, "prompt": "Q", "chosen": "a", "rejected": "b", "subset": "donotanswer"}]
    )
    report = run_bench("rewardbench", file, constant(0.5), aggregate="mean", resamples=0)
    assert report["settings"] == {"aggregate": "mean", "ties": "count one half"} and report["steps"] == {}
    with pytest.raises(ValueError, match="no threshold to tune"):
        run_bench("rewardbench", file, constant(0.5), tune_on=tmp_path / "s.jsonl")


def test_prmbench_sample_from_file_to_report(tmp_path):
    report = run_bench("prmbench", DATA / "prmbench.jsonl", by_label, resamples=20, out=tmp_path / "r.json")
    assert report["items"] == 31 and report["metrics"]["prmscore"] == 1 and report["interval"]["low"] == 1
    assert set(report["groups"]) == {"correct", *CLASSES}
    assert report["quarantined"] == []


def test_scores_that_are_no_probabilities_are_not_calibrated(split):
    report = run_bench("processbench", split, constant(2.0), max_bad=0.3, resamples=0, threshold=1.0)
    assert report["steps"] == {} and report["metrics"]["correct_acc"] == 100


def test_an_unknown_benchmark():
    with pytest.raises(ValueError, match="did you mean prmbench"):
        run_bench("prmbenh", DATA, by_label)
