"""Branch rollouts against independent ones on the digits task: same base model, same leaves, one run of this file.

    python tools/bench_branch.py [--iterations 60] [--target 0.70] [--methods split split+tail]

Prints, per method: network calls and trained states per leaf (counted, and equal to the forecast), CPU seconds per
iteration at T=10 and at T=20 (the authors' splits), CPU seconds until the evaluation reward reaches the target, judge
and diversity there. One thread; evaluation is not timed; no KL, as published. Ratios are to `independent`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmrl.config import parse_config
from mmrl.trainers.branch_grpo import BranchGrpo

T10, T20 = {0: 2, 2: 2, 4: 2, 6: 2}, {0: 2, 3: 2, 6: 2, 9: 2}
METHODS: dict[str, tuple[bool, dict[str, Any]]] = {  # branching?, policy options
    "independent": (False, {"noise": "all"}),
    "branch": (True, {"noise": "all"}),
    "mix": (True, {"noise": "window", "window_size": 4, "window_every": 25}),
    "split": (True, {"noise": "split"}),
    "split+tail": (True, {"noise": "split", "tail": 2}),
}


def run(method: str, steps: int, iterations: int, prompts: int, seed: int, eval_every: int) -> tuple[Any, list[dict]]:
    """Train; returns the forecast and the metric rows."""
    branching, options = METHODS[method]
    plan = (T10 if steps == 10 else T20) if branching else {0: 16}
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config({
            "task": {"name": "digits"},
            "policy": {"name": "diffusion", "steps": steps, **options},
            "plan": plan,
            "run": {"output": folder + "/run", "iterations": iterations, "prompts_per_iteration": prompts,
                    "seed": seed, "eval_every": eval_every, "checkpoint_every": 10_000, "trackers": [], "cpu": True},
        })  # fmt: skip
        trainer = BranchGrpo(config)
        trainer.train()
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return trainer.forecast, rows


def seconds_per_iteration(rows: list[dict]) -> float:
    """Median over iterations of the process time, first one left out."""
    cpu = [r["time/cpu_s"] for r in rows if "time/cpu_s" in r]
    return statistics.median(b - a for a, b in itertools.pairwise(cpu))


def at_target(rows: list[dict], target: float) -> tuple[float, float, float] | None:
    """(CPU seconds, judge, diversity) at the first evaluation that reaches `target`."""
    cpu = 0.0
    for r in rows:
        cpu = r.get("time/cpu_s", cpu)
        if r.get("eval/reward", -1.0) >= target:
            return cpu, r["eval/judge"], r["eval/diversity"]
    return None


def counted(rows: list[dict], forecast: Any) -> str:
    """Calls and trained states per leaf as logged; stops when they differ from the forecast."""
    row = next(r for r in rows if "rollout/calls_per_leaf" in r)
    calls, states = row["rollout/calls_per_leaf"], row["rollout/trained_states_per_leaf"]
    if (
        abs(calls - forecast.calls / forecast.leaves) > 1e-9
        or states > forecast.trained_states / forecast.leaves + 1e-9
    ):
        raise SystemExit(f"counted {calls}, {states} per leaf; forecast {forecast}")
    return f"{calls:.2f} / {states:.2f}"


def main() -> None:
    """Run all methods and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--target", type=float, default=0.70)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    table = Table(title=f"16 leaves, 8 prompts (T=10) or 4 (T=20); target reward {args.target}")
    for column in ("method", "calls / trained\nper leaf, T=10", "s / iteration\nT=10", "s / iteration\nT=20",
                   "s to target", "judge", "diversity", "best reward"):  # fmt: skip
        table.add_column(column, justify="left" if column == "method" else "right")
    base: tuple[float, float, float | None] | None = None
    for method in args.methods:
        forecast, rows = run(method, 10, args.iterations, 8, args.seed, eval_every=1)
        _, long = run(method, 20, 10, 4, args.seed, eval_every=10)
        ten, twenty, hit = seconds_per_iteration(rows), seconds_per_iteration(long), at_target(rows, args.target)
        base = base or (ten, twenty, hit[0] if hit else None)
        reach = "not reached" if hit is None else f"{hit[0]:.1f}" + (f" ({base[2] / hit[0]:.1f}x)" if base[2] else "")
        best = max(r["eval/reward"] for r in rows if "eval/reward" in r)
        table.add_row(
            method,
            counted(rows, forecast),
            f"{ten:.2f} ({base[0] / ten:.1f}x)",
            f"{twenty:.2f} ({base[1] / twenty:.1f}x)",
            reach,
            f"{hit[1]:.3f}" if hit else "-",
            f"{hit[2]:.3f}" if hit else "-",
            f"{best:.3f}",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
