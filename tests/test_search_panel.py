import json

import pytest

from mmrl import demo
from mmrl.registry import rows
from mmrl.report.search_panel import search_panel


def test_search_panel_shows_intervals_and_curves(tmp_path):
    point = {"mean": 0.5, "low": 0.4, "high": 0.6}
    names = ["random", "majority", "pass", "answer", "best_of_n/min", "weighted/min", "hmr/min"]
    report = {
        "prompts": 500, "candidates": {"max": 8}, "rules": "Ties go to the first.",
        "accuracy": {n: point | {"mean": 0.4 + i / 10} for i, n in enumerate(names)},
        "over_majority": {n: {"mean": -0.1, "low": -0.2, "high": 0.0} for n in names},
        "curves": {"k": [1, 2, 4, 8], "values": {"pass": [point] * 4, "best_of_n/min": [point] * 4}},
    }  # fmt: skip
    assert search_panel(tmp_path / "search.json") is None
    (tmp_path / "search.json").write_text(json.dumps(report))
    panel = search_panel(tmp_path / "search.json")
    assert [r["name"] for r in panel["rows"]][:2] == ["a random candidate", "majority vote"]
    assert panel["rows"][0]["accuracy"] == "0.400 [0.400, 0.600]" and panel["rows"][0]["over"].startswith("-0.100")
    assert not any("hmr" in r["name"] for r in panel["rows"])
    assert panel["svg"].startswith("<svg") and "candidates" in panel["svg"]


def test_a_demo_waits_for_the_one_it_starts_from(tmp_path, monkeypatch):
    started = []

    class Job:
        def __init__(self, name):
            started.append(name)
            self.name = name

        def wait(self):
            started.append(f"{self.name} done")
            return int(self.name == "vision")

    monkeypatch.setattr(demo, "_start", lambda name, folder, overrides: Job(name))
    with pytest.raises(demo.DemoError, match="prm, vision failed"):
        demo.run_all(tmp_path)
    alone = [row.name for row in rows("demos") if row.target.after is None]
    assert started[: len(alone) + 1] == [*alone, "vision done"] and "prm" not in started
