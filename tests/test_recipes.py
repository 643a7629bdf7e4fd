"""Every file in configs/ runs one iteration."""

import json
import math
import shlex

import pytest
import yaml
from sandbox import RECIPES_OF_FAMILIES, ROOT

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
CREDIT = [f for f in CONFIGS if f.parent.name == "credit"]
ANNOTATION = ("monte_carlo", "omega", "scorer", "judge", "outcome")
# Sections that are pasted into a recipe. An untrained model is never right, so the rewards are ones that it meets.
MET = ("rewards=[{name: 'vision_tiny:digits', timeout_s: 0}]", "step_rewards=[{name: 'vision_tiny:step_digits'}]")
READ = {"clip_delta_gae": "readings=[{name: tree_value}]", "potential_process_grpo": "readings=[{name: tree_value}]"}


def verb_of(tree):
    if "trainer" in tree:
        return "train"
    return "annotate" if tree["method"]["name"] in ANNOTATION else "search"


def recipes():
    """Recipes of whole runs; pipelines with text encoders take ten seconds each."""
    for file in CONFIGS:
        if file.parent.name in ("vision", "diffusion", "video"):
            whole_pipeline = file.stem.startswith("lpo_sd") or file.stem in RECIPES_OF_FAMILIES
            marks = [pytest.mark.slow] if whole_pipeline else []
            yield pytest.param(file, id=file.stem, marks=marks)


@pytest.mark.parametrize("file", recipes())
def test_a_recipe_runs(file, sandbox):
    if file.stem.startswith("lpo_sd"):
        sandbox.add_pipelines()
    small = sandbox.add_family(file.stem) if file.stem in RECIPES_OF_FAMILIES else []
    told = sandbox.run(f"mmrl {verb_of(yaml.safe_load(file.read_text()))} {file.relative_to(ROOT)}", *small)
    assert told and told.get("policy/skipped_updates", 0) == 0
    assert ("imitation/unsolved_frac" in told) == ("propa" in file.stem)


@pytest.mark.parametrize("file", CREDIT, ids=lambda f: f.stem)
def test_a_credit_section_runs(file, sandbox):
    recipe = "video/clips_steps" if file.stem.startswith("video") else "vision/shapes_steps"
    credit = json.dumps(yaml.safe_load(file.read_text())["credit"])
    more = [READ[file.stem]] if file.stem in READ else []
    told = sandbox.run(
        f"mmrl train configs/{recipe}.yaml {shlex.join([f'credit={credit}', *more])}", *MET, "plan={0: 3, 1: 2}"
    )
    assert 0 < told["credit/adv_abs_max"] < math.inf and told["policy/grad_norm"] > 0
