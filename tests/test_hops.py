"""From the command line to the loss in few steps: a reader who follows a call gets there."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from mmrl import cli
from mmrl.losses.policy import clipped_surrogate

ROOT = Path(__file__).resolve().parents[1]
RECIPE = {
    "trainer": "branch_grpo",
    "task": "walks:WalkTask",
    "policy": "walks:WalkPolicy",
    "plan": {0: 4},
    "rewards": [{"name": "walks:near_goal", "timeout_s": 0}],
    "run": {"iterations": 1, "prompts_per_iteration": 2, "trackers": [], "report": False, "cpu": True},
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(file, function) of every function of the packages that is on the stack where the loss is computed."""
    folder = tmp_path_factory.mktemp("hops")
    recipe = RECIPE | {"run": RECIPE["run"] | {"output": str(folder / "run")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stacks = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code is clipped_surrogate.__code__:
            stack = []
            while frame is not None and frame.f_code is not cli.train.__code__:
                stack.append(frame)
                frame = frame.f_back
            stacks.append([*stack, frame])

    sys.setprofile(profile)
    try:
        cli.train(folder / "recipe.yaml")
    finally:
        sys.setprofile(None)
    assert stacks and stacks[0][-1] is not None
    packages = [ROOT / name for name in ("mmrl", "vision", "video", "diffusion")]
    places = []
    for frame in reversed(stacks[0]):
        # a module may have been found by way of another folder, such as tests/..
        file = Path(frame.f_code.co_filename).resolve()
        if any(file.is_relative_to(package) for package in packages):
            places.append((str(file.relative_to(ROOT)), frame.f_code.co_qualname))
    return places


def test_eight_functions_in_five_files(walk):
    assert walk[0] == ("mmrl/cli.py", "train") and walk[-1] == ("mmrl/losses/policy.py", "clipped_surrogate")
    assert len(walk) <= 8 and len({file for file, _ in walk}) <= 5, walk


def test_the_walk_is_told_as_it_is(walk):
    """The table of ARCHITECTURE.md."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    section = page[page.index("## From the command line to the loss") :].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w/.]+)` \|", section, flags=re.MULTILINE)
    assert [(file, function) for function, file in rows] == walk
