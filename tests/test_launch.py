"""tools/launch.sh as the documentation says it, with the recipes that are shipped: two processes on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "tools" / "launch.sh"
LINES = [
    line
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for line in re.findall(r"^tools/launch\.sh 2 .*$", page.read_text(), re.MULTILINE)
]


def launch(*arguments, **variables):
    return subprocess.run(
        ["bash", LAUNCH, *arguments], env=os.environ | {"MMRL_PYTHON": sys.executable} | variables,
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_the_documentation_launches_training_and_annotation():
    assert {line.split()[2] for line in LINES} == {"train", "annotate"}


@pytest.mark.slow
@pytest.mark.multiproc
@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_documentation_starts_two_processes(sandbox, line):
    verb, recipe = line.split()[2:4]
    shortened, output = sandbox.shortened(f"mmrl {verb} {recipe}")
    arguments = [a for a in shortened if not a.startswith(("cpu=", "run.cpu="))]
    done = launch("2", *arguments, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert done.returncode == 0, done.stderr[-3000:]
    if verb == "train":
        assert "2 process(es), MULTI_CPU" in done.stderr
        iterations = [json.loads(row)["iteration"] for row in (output / "metrics.jsonl").read_text().splitlines()]
        assert iterations == [0, 1, 1]
    else:
        assert {p.name for p in output.glob("store*")} >= {"store.sqlite", "store.jsonl"}
        assert json.loads((output / "report.json").read_text())["records"] > 0


def test_verbs_of_one_process_are_not_launched():
    done = launch("2", "search", "configs/vision/shapes_search.yaml")
    assert done.returncode == 2 and "mmrl search runs in one process: leave tools/launch.sh out" in done.stderr


def test_deepspeed_is_refused_before_it_is_asked_to_be_installed(tmp_path):
    config = tmp_path / "deepspeed.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\n")
    done = launch("2", "train", "configs/vision/shapes_steps.yaml", ACCELERATE_CONFIG=str(config))
    assert done.returncode == 2 and "DeepSpeed is not supported" in done.stderr and "fsdp2.yaml" in done.stderr
