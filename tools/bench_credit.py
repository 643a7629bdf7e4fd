"""Speed of the credit estimators, one thread, against a per-row implementation kept below.

    python tools/bench_credit.py [--large 1000000]

Prints, for 20,480 steps in 1,024 trajectories and for `--large` steps in a branching forest: seconds per estimator
(median of 3), its ratio to gigpo, and the peak memory in arrays of length N. `per row` is gigpo written as published
code does it: for every step a search through the batch for equal anchors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmrl.credit import estimate
from mmrl.registry import names
from mmrl.tree import StepTree
from mmrl.tree_ops import returns

CHAINS_ONLY = ("prime", "vsrm")


def extras(n: int, g: torch.Generator) -> dict[str, object]:
    """Everything any estimator may ask for."""
    return {
        "step_reward": torch.rand(n, generator=g), "value": torch.rand(n, generator=g),
        "logp": -torch.rand(n, generator=g),
        "state_key": torch.randint(0, 200, (n,), generator=g), "edge_key": torch.randint(0, 400, (n,), generator=g),
        "ok": torch.rand(n, generator=g) < 0.7,
        "tags": {
            "wrong": torch.rand(n, generator=g) < 0.3, "implicit": torch.randn(n, generator=g),
            "similarity": torch.rand((n, 2), generator=g), "documents": torch.rand((n, 4), generator=g) < 0.5,
        },
    }  # fmt: skip


def chains(trajectories: int, length: int, per_prompt: int = 8) -> StepTree:
    """Independent rollouts."""
    n, g = trajectories * length, torch.Generator().manual_seed(0)
    index = torch.arange(n)
    last = index % length == length - 1
    groups = trajectories // per_prompt
    outcome = torch.where(last, (torch.rand(n, generator=g) < 0.5).float(), torch.nan)
    return StepTree(
        torch.where(index % length == 0, -1, index - 1), index // (length * per_prompt), last.long(), outcome,
        root_value=torch.rand(groups, generator=g), **extras(n, g),
    )  # fmt: skip


def forest(n: int, steps_per_prompt: int = 100) -> StepTree:
    """Trees of two children per split, one split in four steps, about 14 levels."""
    g = torch.Generator().manual_seed(0)
    local = torch.arange(n) % steps_per_prompt
    base = torch.arange(n) - local
    parent = torch.where(local < 2, -1, base + (local - 2) // 2)
    has_child = torch.zeros(n, dtype=torch.bool)
    has_child[parent[parent >= 0]] = True
    outcome = torch.where(has_child, torch.nan, (torch.rand(n, generator=g) < 0.5).float())
    group = base // steps_per_prompt
    root_value = torch.rand(int(group.max()) + 1, generator=g)
    return StepTree(parent, group, (~has_child).long(), outcome, root_value=root_value, **extras(n, g))


def gigpo_per_row(tree: StepTree, gamma: float = 0.95, eps: float = 1e-6) -> torch.Tensor:
    """gigpo on chains, step by step: the search for equal anchors is quadratic in the batch."""
    returned, group, key = returns(tree, gamma).tolist(), tree.group.tolist(), tree.state_key.tolist()
    outcome, parent, status = tree.outcome.tolist(), tree.parent.tolist(), tree.status.tolist()
    by_group: dict[int, list[float]] = {}
    for g, s, r in zip(group, status, outcome, strict=True):
        if s == 1:
            by_group.setdefault(g, []).append(r)
    episode = {g: (statistics.mean(r), statistics.stdev(r)) for g, r in by_group.items()}
    out, leaf_reward = [0.0] * len(tree), [0.0] * len(tree)
    for i in reversed(range(len(tree))):
        leaf_reward[i] = outcome[i] if status[i] == 1 else leaf_reward[i]
        if parent[i] >= 0:
            leaf_reward[parent[i]] = leaf_reward[i]
    for i in range(len(tree)):
        mates = [returned[j] for j in range(len(tree)) if group[j] == group[i] and key[j] == key[i]]
        mean, std = episode[group[i]]
        step = 0.0
        if len(mates) > 1:
            step = (returned[i] - statistics.mean(mates)) / (statistics.stdev(mates) + eps)
        out[i] = (leaf_reward[i] - mean) / (std + eps) + step
    return torch.tensor(out, dtype=torch.float64)


def timed(function: Callable[[], object], repeat: int = 3) -> float:
    """Median seconds."""
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def peak_arrays(function: Callable[[], object], n: int) -> float:
    """Peak resident memory during the call above that before it, in float64 arrays of length n (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = memory_kib("VmRSS")
    function()
    return (memory_kib("VmHWM") - before) * 1024 / (8 * n)


def memory_kib(field: str) -> int:
    """A field of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1])


def main() -> None:
    """Print the table; exit 1 when a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=1_000_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    small, big, big_chains = chains(1024, 20), forest(args.large), chains(args.large // 20, 20)
    arrays = peak_arrays(lambda: estimate(big.replace(), "gigpo"), args.large)
    limit_small, limit_big = 0.050, 3.0 * args.large / 1_000_000
    table = Table(
        "estimator", "20,480 steps, ms", "to gigpo", f"{args.large:,} steps, s", "to gigpo", title="credit, one thread"
    )
    broken, base = [], (0.0, 0.0)
    for name in ["gigpo", *sorted(set(names("estimators")) - {"gigpo"})]:
        tree = big_chains if name in CHAINS_ONLY else big
        # replace() drops the cached m, as a fresh rollout would
        a = timed(lambda name=name: estimate(small.replace(), name))
        b = timed(lambda name=name, tree=tree: estimate(tree.replace(), name))
        base = base if name != "gigpo" else (a, b)
        factor = 1 if name == "gigpo" else 3
        if a > factor * limit_small or b > factor * limit_big:
            broken.append(name)
        table.add_row(name, f"{1e3 * a:.1f}", f"{a / base[0]:.2f}", f"{b:.2f}", f"{b / base[1]:.2f}")
    console = Console(width=110)
    console.print(table)
    few = chains(128, 20)
    ours, rows = timed(lambda: estimate(few.replace(), "gigpo")), timed(lambda: gigpo_per_row(few), 1)
    gap = float((estimate(few, "gigpo").adv - gigpo_per_row(few)).abs().max())
    console.print(
        f"gigpo, 2,560 steps: per row {rows:.2f} s, here {1e3 * ours:.1f} ms ({rows / ours:.0f}x); same to {gap:.0e}"
    )
    console.print(f"gigpo, {args.large:,} steps: peak memory grew by {arrays:.0f} arrays of length N (limit 40)")
    if broken or arrays > 40 or gap > 1e-6:
        raise SystemExit(f"over the bounds: {broken}, {arrays:.0f} arrays, difference {gap:.0e}")


if __name__ == "__main__":
    main()
