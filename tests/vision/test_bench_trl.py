"""The comparison with TRL: its arithmetic by hand, and one seed of two steps on a tiny random model."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "bench_trl.py"
spec = importlib.util.spec_from_file_location("bench_trl", TOOL)
bench_trl = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_trl)


def run(side, seed, step_s, samples=64):
    return {"side": side, "seed": seed, "step_s": step_s, "rollout_s": step_s / 2, "samples": samples, "tokens": 1000,
            "reward": 0.5, "late_reward": 0.6, "flat": 0.25, "accuracy": 0.7}  # fmt: skip


# Settings that both have, by name: TRL's GRPOConfig, a recipe.
SHARED = {
    "learning_rate": "optim.lr", "weight_decay": "optim.weight_decay", "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.max_grad_norm", "warmup_steps": "optim.warmup", "lr_scheduler_type": "optim.schedule",
    "num_iterations": "optim.updates_per_rollout", "epsilon": "loss.clip_low", "beta": "loss.kl", "delta":
    "loss.dual_clip", "temperature": "policy.temperature", "max_completion_length": "policy.max_new_tokens",
    "seed": "run.seed", "save_steps": "run.checkpoint_every", "vllm_gpu_memory_utilization": "policy.engine_memory",
    "gradient_checkpointing": "policy.gradient_checkpointing",
}  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_every_default_that_differs_from_trl_is_in_the_table():
    from trl import GRPOConfig

    from mmrl.config import parse_config
    from mmrl.registry import find

    page = (Path(__file__).parents[2] / "docs" / "start" / "trl.md").read_text()
    table = page.partition("Defaults that differ")[2].split("\n\n")[1]
    theirs = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    config = parse_config({"task": "shapes", "policy": "vision", "plan": {0: 8}})
    options = find("policies", "vision").options
    different = set()
    for name, key in SHARED.items():
        section, option = key.split(".")
        ours = options[option].default if section == "policy" else getattr(getattr(config, section), option)
        if ours == theirs[name]:
            continue
        different.add(key)
        row = next((line for line in table.splitlines() if f"`{key}`" in line), "")
        assert row, f"{key}: {name} is {theirs[name]!r} in TRL, {ours!r} here"
        if not isinstance(ours, bool):
            them, here = row.split(" | ")[1:3]
            assert str(theirs[name]) in them and str(ours) in here, row
    assert {"optim.weight_decay", "optim.schedule", "run.seed", "policy.gradient_checkpointing"} <= different
    # what every public trainer of tokens has is the same here, whatever denoising takes
    assert not {"optim.lr", "loss.clip_low", "policy.temperature", "policy.max_new_tokens"} & different


def test_seconds_per_step_leave_out_the_first_step():
    ends, rewards = [10.0, 12.0, 15.0, 16.0], [0.0, 1.0, 0.5, 0.5]
    steps = [{"end": e, "rollout_s": 1.0, "reward": r, "flat": 0.0, "samples": 4, "tokens": 40}
             for e, r in zip(ends, rewards, strict=True)]  # fmt: skip
    steps[0]["rollout_s"] = 100.0
    found = bench_trl.summary(steps)
    assert found["step_s"] == 2.0  # (16 - 10) / 3
    assert found["rollout_s"] == 1.0
    assert (found["reward"], found["late_reward"]) == (0.5, 0.5)  # the last third of four steps is one


def test_ratio_is_the_median_over_seeds():
    pairs = [(0, 2.0, 1.0), (1, 6.0, 2.0), (2, 4.0, 1.0)]
    runs = [run(side, seed, s) for seed, a, b in pairs for side, s in (("trl", a), ("mmrl", b))]
    last = bench_trl.table(runs, 0.5).splitlines()[-1]
    assert last.endswith("seed 0 2.00x, seed 1 3.00x, seed 2 4.00x; median 3.00x")


def test_unequal_samples_void_the_comparison():
    with pytest.raises(SystemExit, match="seed 3.*unequal"):
        bench_trl.table([run("trl", 3, 1.0), run("mmrl", 3, 1.0, samples=32)], 0.5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_both_sides_run_on_a_tiny_random_model(tmp_path):
    from families import family_folder

    out = tmp_path / "runs.json"
    command = [sys.executable, TOOL, "--seeds", "0", "--steps", "2", "--prompts", "2", "--group", "4", "--held-out",
               "4", "--model", family_folder("qwen2_5_vl"), "--json", out]  # fmt: skip
    env = os.environ | {"MMRL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    runs = {r["side"]: r for r in json.loads(out.read_text())["runs"]}
    assert set(runs) == {"trl", "mmrl"}
    assert all(r["step_s"] > r["rollout_s"] > 0 for r in runs.values())
    assert all(r["samples"] == 8 and 0 < r["tokens"] <= 8 * 32 for r in runs.values())
