"""The study of reward models: its arithmetic by hand, and a run of a few steps from end to end."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrl.reasoning.records import SolutionRecord, Step

TOOL = Path(__file__).parents[2] / "tools" / "prm_study.py"
spec = importlib.util.spec_from_file_location("prm_study", TOOL)
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def record(name, labels, first_error=None, picture="a.png", kinds=None):
    kinds = kinds or ["perception"] * len(labels)
    steps = tuple(Step(f"{name} {t}", k) for t, k in enumerate(kinds))
    return SolutionRecord(name, "q", steps, (picture,), labels=tuple(labels), first_error=first_error)


def test_labels_are_compared_up_to_the_first_true_error():
    raw = [record("x", [0.9, 0.4, 1.0]), record("y", [1.0, 1.0], picture="b.png")]
    truth = {"x": (1.0, 0.0, None), "y": (1.0, 0.0)}
    rows = study.label_rows(raw, raw[:1], truth)
    assert [v for _, v in rows["steps"]] == [1.0, 1.0]  # the step after the error does not count
    assert [v for _, v in rows["first_error"]] == [1.0]
    assert [v for _, v in rows["kept"]] == [1.0, 0.0]
    found = study.means([study.label_rows(raw, raw, truth)], resamples=20)
    assert found["steps"]["value"] == pytest.approx(3 / 4)  # `y`'s second step is wrong and called right
    assert found["first_error"]["value"] == pytest.approx(1 / 2)


def test_value_is_the_mean_over_seeds_and_the_interval_draws_questions_of_all_seeds_together():
    columns, questions = [[0.0, 1.0, 1.0], [1.0]], [["a", "b", "b"], ["b"]]
    found = study.mean_of(columns, questions, 200)
    assert found["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["seeds"] == pytest.approx([2 / 3, 1.0])
    assert 0 <= found["low"] <= found["value"] <= found["high"] <= 1


def test_measures_of_a_reward_model_by_hand():
    test = [
        record("x", [1.0, 0.0], 1),
        record("y", [1.0, 1.0], -1, "b.png"),
        record("z", [1.0, 1.0], -1, "c.png", ["reasoning", "answer"]),
    ]
    good = study.Scored([[0.9, 0.4], [0.8, 0.7], [0.9, 0.9]], 0.75)
    bad = study.Scored([[0.4, 0.9], [0.8, 0.3], [0.9, 0.9]], 0.75)
    found = {k: f(0, np.arange(len(q))) for k, (f, q) in study.measures(test, [good]).items()}
    assert found["auc"] == found["auc/perception"] == 1.0
    assert found["auc/answer"] != found["auc/answer"]  # one class: no AUC
    assert found["f1"] == 1.0
    assert found["f1_tuned"] == pytest.approx(
        2 / 3
    )  # at .75 one of two right solutions is called wrong: 2 (1)(.5)/1.5
    gap = study.gaps(test, [good, good], [bad, good], 20)
    assert gap["auc"]["seeds"] == pytest.approx([0.8, 0.0])  # of bad: two ties among five right steps, AUC .2
    assert gap["auc"]["value"] == pytest.approx(0.4)


def scorer_of(scores):
    import torch

    return lambda rollout: torch.tensor([scores[t] for t in rollout.texts], dtype=torch.float64)


def test_padding_pays_under_the_sum_and_not_under_clip_and_delta():
    scores = {"x 0": 0.9, "x 1": 0.2, "x 2": 0.7}
    right = [record("x", [1.0, 1.0, 1.0])]
    longer = [study.replace(right[0], labels=None, steps=study._repeated(right[0].steps, 2))]
    scorer = scorer_of(scores)
    assert study.step_returns(scorer, right, []) == pytest.approx([1.8])
    assert study.step_returns(scorer, longer, []) == pytest.approx([1.8 + 4 * 0.7])
    shaped = study.SHAPING["clip + delta"]  # the sum telescopes to the clipped first step, min(.9 - .5, 0) = 0
    assert study.step_returns(scorer, right, shaped) == study.step_returns(scorer, longer, shaped) == [0.0]
    low = scorer_of(scores | {"x 0": 0.1})
    assert study.step_returns(low, longer, shaped) == pytest.approx([-0.4])


def test_blank_pictures_have_the_size_of_the_old_ones_and_a_file_each(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 32), "red").save(tmp_path / name)
    records = [record("x", [1.0], picture=str(tmp_path / n)) for n in ("a.png", "b.png")]
    images = [r.images[0] for r in study.blank(records, tmp_path / "blank")]
    assert len(set(images)) == 2
    for file in images:
        with Image.open(file) as picture:
            assert picture.size == (16, 32) and picture.getextrema() == ((0, 0),) * 3


def test_growth_is_the_last_tenth_less_the_first():
    drawn = [{"iteration": i, "id": f"q{i}", "tokens": 10.0 + i, "steps": 4.0, "right": 1.0, "score": 0.5}
             for i in range(20)]  # fmt: skip
    greedy = [{"iteration": i, "id": "t", "steps": 4.0, "right": float(i > 0)} for i in (0, 20)]
    found = study.rl_numbers([{"drawn": drawn, "greedy": greedy}], 50)
    assert found["tokens"]["change"]["value"] == pytest.approx(18.0)  # mean of 28, 29 less mean of 10, 11
    assert found["tokens"]["curve"][0][:2] == [10.5, 12.5]
    assert [v["value"] for v in found["greedy right"].values()] == [0.0, 1.0]


def test_a_folder_of_other_settings_is_refused(tmp_path):
    args = argparse.Namespace(iterations=2, seeds=[0], folder=tmp_path)
    study.check_folder(args, tmp_path)
    args.seeds = [0, 1]  # more seeds go on in the same folder
    study.check_folder(args, tmp_path)
    args.iterations = 3
    with pytest.raises(SystemExit, match="another study"):
        study.check_folder(args, tmp_path)


@pytest.mark.slow
def test_quick_study_from_end_to_end(tmp_path):
    out = tmp_path / "study.json"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, TOOL, "--quick", "--folder", tmp_path, "--out", out]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert set(result["labels"]) == {"soft", "hard", "consensus", "scan"}
    assert set(result["models"]) == {"untrained", "judge", *result["labels"], "no perception labels", "blind"}
    assert result["labels"]["soft"]["kept"]["value"] == 1.0
    assert result["best_of_8"]["random"]["value"] <= result["best_of_8"]["any"]["value"]
    assert all(0 <= m["auc"]["low"] <= m["auc"]["high"] <= 1 for m in result["models"].values())
    assert all(row["steps"]["first"]["value"] >= 1 for row in result["rl"].values())
    assert done.stdout.count("\n|---") == 7  # tables
