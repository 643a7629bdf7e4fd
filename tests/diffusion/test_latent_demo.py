"""The latent reward demo as a user runs it: figures of docs/guides/latent_reward.md and docs/guides/lpo.md."""

import json
from itertools import pairwise

import pytest

from mmrl.demo import run_demo

LEVELS = ("0.00", "0.10", "0.30", "0.50", "0.70", "0.80", "0.90")


def evaluations(run, name):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if name in r]


@pytest.mark.slow
def test_a_latent_reward_orders_noisy_latents_and_lifts_the_policy(tmp_path):
    report = run_demo("latent", tmp_path, ["run.trackers=[]", "run.cpu=true"])
    last = evaluations(tmp_path / "digits_latent_reward", "eval/pair_acc")[-1]
    own, pixel = ([last[f"eval/{kind}pair_acc/s{s}"] for s in LEVELS] for kind in ("", "pixel_"))
    assert all(b <= a + 0.03 for a, b in pairwise(own))
    assert min(own[:3]) > 0.7
    assert all(a > b for a, b in zip(own[2:], pixel[2:], strict=True))
    steps = evaluations(tmp_path / "digits_lpo", "eval/reward")
    assert steps[-1]["eval/reward"] >= steps[0]["eval/reward"] + 0.04
    assert steps[-1]["eval/judge"] > 0.93
    assert "By noise level" in report.read_text()
