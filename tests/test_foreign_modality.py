"""A modality in a package of its own plugs in by entry points: no change in the core, the command line trains it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

TESTS = Path(__file__).parent
ENTRY_POINTS = """\
[mmrl.policies]
walk = walks:WalkPolicy
[mmrl.tasks]
goals = walks:WalkTask
[mmrl.rewards]
near_goal = walks:near_goal
[mmrl.readings]
distance = walks:distance
[mmrl.estimators]
nearer = walks:nearer
[mmrl.panels]
distances = walks:distances
[mmrl.callbacks]
longest = walks:Longest
"""
RECIPE = {
    "trainer": "branch_grpo",
    "task": "goals",
    "policy": {"name": "walk", "spread": 0.2},
    "plan": {0: 4, 2: 2},
    "readings": [{"name": "distance"}],
    "credit": {"estimators": [{"name": "grpo"}, {"name": "nearer", "weight": 0.2}]},
    "callbacks": [{"name": "longest", "among": 3}, {"name": "early_stop", "metric": "eval/accuracy", "patience": 9}],
    "loss": {"clip_low": 0.2, "clip_high": 0.2},
    "optim": {"lr": 0.1},
    "run": {"output": "run", "iterations": 30, "prompts_per_iteration": 9, "eval_every": 30, "trackers": [], "cpu": True},
}  # fmt: skip


def test_a_package_of_another_modality_trains(tmp_path):
    shutil.copy(TESTS / "walks.py", tmp_path)
    (tmp_path / "walks-1.0.dist-info").mkdir()
    (tmp_path / "walks-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: walks\nVersion: 1.0\n")
    (tmp_path / "walks-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "mmrl", "train", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": path}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    accuracy = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert accuracy[0] < 0.5 and accuracy[-1] > 0.8
    assert max(row["policy/ratio_dev_max"] for row in rows if "policy/ratio_dev_max" in row) < 1e-5
    assert all("walks/longest" in row for row in rows if "reward/mean" in row)
    assert "Distance from the goal" in (tmp_path / "run" / "report.html").read_text()
