"""The vision demo as a user runs it: figures of docs/vision_policy.md."""

import json

import pytest

from mmrl.demo import run_demo


@pytest.mark.slow
def test_demo_lifts_accuracy_with_verified_steps(tmp_path):
    report = run_demo("vision", tmp_path, ["run.trackers=[]", "run.cpu=true"])
    rows = [json.loads(x) for x in (tmp_path / "shapes_steps" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [r["eval/accuracy"] for r in rows if "eval/accuracy" in r]
    assert 0.35 <= accuracy[0] <= 0.65 and accuracy[-1] >= 0.75
    assert max(r.get("policy/ratio_dev_max", 0.0) for r in rows) < 1e-3
    html = report.read_text()
    assert "last, shapes_outcome" in html and html.count("<svg") > 5 and "step reward 1" in html
