"""Estimators on the digits alignment of the demo, equal CPU time each, one run of this file.

python tools/compare_credit.py [--seconds 15] [--estimators branch_depth tree_rpo grpo child_minus_parent]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmrl.cli import DEMO, recipe_path
from mmrl.config import load_config
from mmrl.trainers.branch_grpo import BranchGrpo


def main() -> None:
    """Train with each estimator and print the evaluation at the same CPU time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--iterations", type=int, default=30, help="enough to fill the seconds")
    names = ["branch_depth", "tree_rpo", "grpo", "child_minus_parent", "rloo", "reinforce_pp_baseline"]
    parser.add_argument("--estimators", nargs="+", default=names)
    args = parser.parse_args()
    table = Table(
        "estimator", "reward", "judge", "diversity", "iterations", title=f"after {args.seconds:.0f} CPU seconds"
    )
    for name in args.estimators:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            # the command line's own overrides: nothing else differs from the demo
            changes = [
                f"credit.estimators=[{{name: {name}}}]", f"run.output={out}", f"run.iterations={args.iterations}",
                "run.eval_every=2", "run.checkpoint_every=1000", "run.trackers=[]",
            ]  # fmt: skip
            BranchGrpo(load_config(recipe_path(DEMO), changes)).train()
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        cpu, last = 0.0, rows[0]
        for r in rows:
            cpu = r.get("time/cpu_s", cpu)
            if cpu > args.seconds:
                break
            last = r if "eval/reward" in r else last
        table.add_row(
            name, *(f"{last[f'eval/{k}']:.3f}" for k in ("reward", "judge", "diversity")), str(last["iteration"])
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
