"""The video demo as a user runs it: figures of docs/guides/video_agent.md."""

import json

import pytest

from mmrl.demo import run_demo


def evaluations(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(r.get("policy/ratio_dev_max", 0.0) for r in rows) < 1e-3
    return [r for r in rows if "eval/accuracy" in r]


@pytest.mark.slow
def test_rewarded_manipulations_lift_more_than_the_answer_alone(tmp_path):
    report = run_demo("video", tmp_path, ["run.trackers=[]", "run.cpu=true"])
    ahead = 0.0
    for seed in ("", "_seed1"):
        steps, answer = (evaluations(tmp_path / f"clips_{kind}{seed}") for kind in ("steps", "answer"))
        assert steps[0]["eval/accuracy"] < 0.25 and steps[-1]["eval/accuracy"] >= 0.32
        assert steps[-1]["eval/manipulation_f1"] >= max(0.6, answer[-1]["eval/manipulation_f1"] + 0.1)
        ahead += steps[-1]["eval/accuracy"] - answer[-1]["eval/accuracy"]
    assert ahead / 2 > 0.03
    html = report.read_text()
    assert "clips_answer_seed1" in html and "FIND_SEGMENT" in html and html.count("data:image") > 20
