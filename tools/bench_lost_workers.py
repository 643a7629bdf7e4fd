"""What samples cost that end or hang the worker of their reward: one training iteration each, side by side.

    python tools/bench_lost_workers.py [--limit 1] [--endings exit segfault hang raise]

Diffusion on digits, 4 prompts x 8 leaves, of which 4 are bad; the limit of a batch is `--limit` seconds. Prints for
every way to end the seconds of the second iteration (the first imports), those of its rewards, the samples without a
reward, and the ratio to an iteration without bad samples.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmrl.config import parse_config
from mmrl.rollout import Sample
from mmrl.trainers.branch_grpo import BranchGrpo

LEAVES = 8


class Brightness:
    """The mean of a picture; every eighth sample ends the process as `ending` says."""

    def __init__(self, ending: str = "never") -> None:
        self.ending = ending

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """See `OutcomeReward`."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> float:
        if sample.step % LEAVES == 0:
            match self.ending:
                case "exit":
                    os._exit(3)
                case "segfault":
                    ctypes.string_at(0)
                case "hang":
                    time.sleep(3600)
                case "raise":
                    raise KeyError("answer")
        return float(sample.output.mean())


def run(ending: str, limit: float) -> dict[str, Any]:
    """Metrics of the second iteration."""
    with tempfile.TemporaryDirectory() as folder:
        config = parse_config({
            "task": {"name": "digits"},
            "policy": {"name": "diffusion", "steps": 40},
            "plan": {0: LEAVES},
            "rewards": [{"name": "bench_lost_workers:Brightness", "ending": ending, "timeout_s": limit}],
            "run": {"output": folder + "/run", "iterations": 2, "prompts_per_iteration": 4, "eval_every": 10,
                    "checkpoint_every": 10_000, "trackers": [], "cpu": True},
        })  # fmt: skip
        BranchGrpo(config).train()
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return next(r for r in reversed(rows) if "reward/mean" in r)


def main() -> None:
    """Run all endings and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=1.0)
    parser.add_argument("--endings", nargs="+", default=["exit", "segfault", "hang", "raise"])
    args = parser.parse_args()
    # the worker finds this file by its name
    sys.path.insert(0, str(Path(__file__).parent))
    table = Table(title=f"4 bad samples of {4 * LEAVES}, limit {args.limit:g} s")
    for column in ("bad samples", "iteration, s", "its rewards, s", "without a reward", "against none"):
        table.add_column(column, justify="left" if column == "bad samples" else "right")
    clean: float | None = None
    for ending in ["never", *args.endings]:
        row = run(ending, args.limit)
        seconds = row["time/iteration_s"]
        clean = clean or seconds
        table.add_row(
            "none" if ending == "never" else ending,
            f"{seconds:.2f}",
            f"{row['time/reward_s']:.2f}",
            f"{row['reward/unscored_frac']:.3f}",
            f"{seconds / clean:.2f}x",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
