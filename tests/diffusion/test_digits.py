"""The built-in task. A short recipe keeps the default run quick; the full demo is the slow test at the end."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from diffusion.adapters.dit import DiTAdapter
from diffusion.digits_base import Recipe, digits_base, digits_halves
from diffusion.policy import DiffusionPolicy
from diffusion.schedule import SamplingConfig
from diffusion.tasks.digits import DigitsTask, LegibleSymmetric, diversity

SHORT = Recipe(steps=20, width=32, layers=1, batch=32, classifier_steps=250)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield digits_base(SHORT)


def test_halves_do_not_overlap():
    (a, la), (b, lb) = digits_halves()
    assert a.shape == (900, 1, 8, 8) and b.shape == (897, 1, 8, 8) and float(a.min()) == -1 and float(a.max()) == 1
    rows = {tuple(x.flatten().tolist()) for x in a}
    assert not any(tuple(x.flatten().tolist()) in rows for x in b)
    assert set(la.tolist()) == set(lb.tolist()) == set(range(10))


def test_classifiers_read_the_half_they_did_not_see(base):
    (a, la), (b, lb) = digits_halves()
    assert float((base.classifier(a).argmax(1) == la).float().mean()) > 0.93
    assert float((base.judge(b).argmax(1) == lb).float().mean()) > 0.93


def test_cache_is_reused_and_keyed_by_recipe(base):
    written = [f.stat().st_mtime_ns for f in sorted(base.folder.rglob("*"))]
    again = digits_base(SHORT)
    assert again.folder == base.folder
    assert [f.stat().st_mtime_ns for f in sorted(base.folder.rglob("*"))] == written
    assert dataclasses.replace(SHORT, seed=1).key != SHORT.key


def test_a_damaged_cache_file_says_how_to_mend_it(base):
    """One of another size is made anew; this damage is found when the file is read."""
    file = base.folder / "judge.safetensors"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(RuntimeError, match=r"is damaged .*delete that folder and run again"):
        digits_base(SHORT)
    file.write_bytes(whole)


def test_reward_prefers_symmetry_and_legibility(base):
    task, reward = DigitsTask(base=base), LegibleSymmetric(base)
    x = digits_halves()[0]
    real = [task_sample(task, int(y), p) for p, y in zip(x[0][:50], x[1][:50], strict=True)]
    wrong = [task_sample(task, (int(y) + 1) % 10, p) for p, y in zip(x[0][:50], x[1][:50], strict=True)]
    blank = [task_sample(task, 0, torch.full((1, 8, 8), -1.0))]
    mean = lambda s: sum(reward(s)) / len(s)  # noqa: E731
    assert mean(real) > mean(wrong) + 0.7
    assert task.judges(real)["judge"] > 0.85 > 0.2 > task.judges(wrong)["judge"]
    assert 0 <= reward(blank)[0] <= 1  # symmetric: nothing is taken off its p(class)
    half = torch.full((1, 8, 8), -1.0)
    half[:, :, :4] = 1.0  # every pixel differs from its mirror image by 2
    assert -2 <= reward([task_sample(task, 0, half)])[0] <= -1


def task_sample(task, label, pixels):
    from mmrl.rollout import Sample

    return Sample(task.prompts[label], (pixels + 1) / 2, 0)


def test_diversity_of_copies_is_zero():
    x = torch.rand(1, 1, 8, 8).expand(4, 1, 8, 8)
    assert diversity(x, torch.zeros(4)) == pytest.approx(0, abs=1e-6)
    assert diversity(torch.stack([torch.zeros(1, 8, 8), torch.ones(1, 8, 8)]), torch.zeros(2)) == pytest.approx(1)


def test_policy_on_the_real_base(base):
    policy = DiffusionPolicy(DiTAdapter.from_pretrained(base.folder), SamplingConfig())
    task = DigitsTask(eval_per_class=2, base=base)
    samples = policy.generate(task.eval_prompts, seed=0)
    assert len(samples) == 20 and samples[0].output.shape == (1, 8, 8)
    assert {"judge", "diversity"} == set(task.judges(samples))


@pytest.mark.slow
def test_the_demo_reaches_its_figures(tmp_path):
    """Reward from about .54 to at least .68 with the judge at .92 or more (the base comes from the cache or is made)."""
    command = [sys.executable, "-m", "mmrl", "demo", "diffusion", "--folder", tmp_path]
    subprocess.run(command, check=True, timeout=900)
    run = tmp_path / "digits_branch"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evals = [r for r in rows if "eval/reward" in r]
    assert 0.48 < evals[0]["eval/reward"] < 0.58
    assert evals[-1]["eval/reward"] >= 0.68 and evals[-1]["eval/judge"] >= 0.92
    assert (run / "report.html").exists()
