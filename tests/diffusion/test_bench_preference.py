"""The comparison of preference methods: its arithmetic by hand, its counts on a tiny model, and what it relies on."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from tiny import TinyTask

from diffusion.clean_reward import CleanReward
from diffusion.latent.reward import LatentReward
from diffusion.policy import DiffusionPolicy
from diffusion.tasks.digits import LegibleSymmetric
from mmrl.rollout import BranchPlan, Prompt, Sample

TOOL = Path(__file__).parents[2] / "tools" / "bench_preference.py"
spec = importlib.util.spec_from_file_location("bench_preference", TOOL)
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


def point(iteration, cpu_s, reward, scored=0.0, judge=0.9):
    return {"iteration": iteration, "cpu_s": cpu_s, "reward": reward, "judge": judge, "scored": scored}


# --- figures -----------------------------------------------------------------------------------------------------


def test_figures_at_a_reward_lie_between_two_evaluations():
    points = [point(0, 0.0, 0.5), point(2, 4.0, 0.56, 200), point(4, 8.0, 0.64, 400), point(6, 12.0, 0.6, 600)]
    at = bench.at_target(points, 0.58)
    assert (at["iteration"], at["cpu_s"], at["scored"]) == pytest.approx((2.5, 5.0, 250.0))
    assert bench.at_target(points, 0.5)["cpu_s"] == 0.0  # reached before the first iteration
    assert bench.at_target(points, 0.7) is None


def test_summary_is_the_mean_over_seeds_and_says_when_one_failed():
    runs = [[point(0, 0.0, 0.5), point(2, 4.0, r)] for r in (0.6, 0.7)]
    found = bench.summary(runs, [0.6, 0.65])
    assert found["0.6"]["cpu_s"] == pytest.approx((4.0 + 2.0) / 2) and found["0.65"] is None
    assert found["end"]["reward"] == pytest.approx(0.65)


@pytest.mark.parametrize(
    "lpo, other, paid, want",
    [
        ((20, 0), (12, 800), None, 0.01),  # 8 s more, 800 pictures fewer
        ((10, 0), (12, 800), None, 0.0),
        ((20, 0), (12, 0), None, None),
        ((20, 0), (12, 800), {"train_s": 50, "samples_s": 30, "scored": 600}, 0.44),  # 88 s more, 200 fewer
        ((20, 0), (12, 800), {"train_s": 50, "samples_s": 30, "scored": 6000}, None),
    ],
)
def test_break_even_by_hand(lpo, other, paid, want):
    a, b = (point(0, cpu, 0.6, scored) for cpu, scored in (lpo, other))
    got = bench.break_even(a, b, paid)
    assert got == want if want is None else got == pytest.approx(want)


# --- counts ------------------------------------------------------------------------------------------------------


def tiny_changes(method, model):
    """What puts a method on the tiny model and task, with 4 steps and a pair at every fork."""
    changes = [
        "task={name: tiny:TinyTask}", f"policy.model={model}", "policy.steps=4", "run.prompts_per_iteration=8",
        "rewards=[{name: tiny:brightness, timeout_s: 0}]",
    ]  # fmt: skip
    if method != "diffusion_dpo":
        changes.append("pairs.threshold=0")
    if method == "pixel":
        own = {"model": model, "reward": "tiny:brightness", "last_depth": 2}
        changes += [f"step_rewards.0.{k}={v}" for k, v in own.items()]
    return changes


@pytest.fixture(scope="module")
def judge(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    LatentReward.build(str(tiny_model)).save(folder)
    return folder


STEPWISE = {"sampling": 13, "update": 9, "reference": 9}  # 1 + 3 x 4 states; those before a draw are 1 + 2 x 4
COUNTS = {  # per prompt and iteration; judged are the four courses' first states and 2 x 4 x 4 candidates
    "lpo": STEPWISE | {"latent_reward": 36, "logged": 4},
    "pixel": STEPWISE | {"clean": 36, "decoded": 36, "scored": 36, "logged": 4},
    # 1 + 3 x 16 states; both samples of the pair at four levels
    "diffusion_dpo": {"sampling": 49, "update": 8, "reference": 8, "decoded": 16, "scored": 16},
}


@pytest.mark.parametrize("method", list(bench.METHODS))
def test_rows_are_those_worked_out_by_hand(method, tiny_model, judge, tmp_path, monkeypatch):
    recipe, changes = bench.METHODS[method]
    monkeypatch.setitem(bench.METHODS, method, (recipe, [*changes, *tiny_changes(method, tiny_model)]))
    points = bench.measure(bench.load(method, judge, 2, 1, 0, tmp_path / "run"))
    assert [p["iteration"] for p in points] == [0, 1, 2]
    assert points[0]["cpu_s"] == 0 < points[1]["cpu_s"] < points[2]["cpu_s"]
    for p in points:
        want = {k: 8 * p["iteration"] * COUNTS[method].get(k, 0) for k in bench.KINDS}
        assert {k: p[k] for k in bench.KINDS} == want


# --- what it relies on --------------------------------------------------------------------------------------------


def test_clean_reward_judges_the_steps_it_is_told(tiny_model):
    policy = DiffusionPolicy.build(str(tiny_model), steps=5)
    rollout = policy.rollout(TinyTask().prompts[:2], BranchPlan({0: 2}), seed=0)
    depth, whole = rollout.tree.depth, CleanReward("tiny:brightness", str(tiny_model))(rollout)
    some = CleanReward("tiny:brightness", str(tiny_model), first_depth=1, last_depth=3)(rollout)
    inside = (depth >= 1) & (depth <= 3)
    assert bool(some[~inside].isnan().all()) and not bool(whole.isnan().any())
    torch.testing.assert_close(some[inside], whole[inside], atol=1e-6, rtol=1e-6)


def test_the_digits_reward_has_a_gradient():
    """ReFL needs one. With a classifier that knows nothing: 1/10 minus the asymmetry, by hand."""

    class Base:
        """Ten equal logits."""

        classifier = staticmethod(lambda x: x.flatten(1)[:, :1].expand(-1, 10))

    picture = torch.full((1, 8, 8), 0.5)
    picture[0, 3, 0] = 1.0  # 1 against 0 of its mirror in [-1, 1], twice in 64 pixels
    picture.requires_grad_()
    reward, samples = LegibleSymmetric(Base()), [Sample(Prompt("digit-0", {"label": 0}), picture, 0)]
    value = reward.values(samples)
    assert float(value.detach()) == pytest.approx(0.1 - 2 / 64)
    assert reward(samples) == pytest.approx([0.1 - 2 / 64])
    value.sum().backward()
    assert float(picture.grad[0, 3, 0]) == pytest.approx(-2 * 2 / 64) and math.isfinite(float(picture.grad.sum()))
