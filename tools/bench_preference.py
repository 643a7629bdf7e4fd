"""Step preference on the digits model: a latent reward as judge (LPO), the pixel reward, and Diffusion-DPO.

    python tools/bench_preference.py [--latent-reward runs/digits_latent_reward/model] [--seeds 0 1] [--json FILE]

lpo            configs/diffusion/digits_lpo.yaml: the latent reward picks best and worst candidate of every step.
pixel          digits_spo.yaml with LPO's plan and on all of LPO's steps: the digits reward of the clean picture
               predicted after every candidate picks them. Loss, threshold and learning rate are the recipe's own.
diffusion_dpo  digits_diffusion_dpo.yaml: best against worst of 16 finished samples.

Same base model, prompts and first noise per iteration; methods take turns in one process and one thread. Seconds are
CPU seconds of iterations; evaluation (after every --eval-every) is left out, and figures at a reward are interpolated
between two evaluations. Rows are counted by hooks: network rows of the denoiser while sampling, for clean estimates,
in the update and in the reference; of the latent reward; pictures decoded; pictures scored. LPO and pixel also decode
and score their finished samples, for the log alone: these are `logged`, and part of the seconds.

Without --latent-reward one is trained first. What it cost is told apart: training as logged in its run folder, its
samples by drawing some of them anew.

Break-even: at e seconds per picture decoded and scored beyond what it takes here, a method costs seconds + e * scored;
the e at which two of them cost the same at the last target is (difference of seconds) / (difference of pictures).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from diffusion.clean_reward import CleanReward
from mmrl.config import load_config
from mmrl.demo import recipe_path
from mmrl.recipe import TrainingConfig
from mmrl.trainers import trainer_of

JUDGE_RECIPE = "diffusion/digits_latent_reward.yaml"
METHODS: dict[str, tuple[str, list[str]]] = {  # recipe, changes
    "lpo": ("diffusion/digits_lpo.yaml", []),
    "pixel": (
        "diffusion/digits_spo.yaml",
        ["plan={0: 4}", "pairs.first_depth=0", "step_rewards.0.first_depth=0", "step_rewards.0.last_depth=8"],
    ),
    "diffusion_dpo": ("diffusion/digits_diffusion_dpo.yaml", []),
}
SHARED_BY = (1, 20)  # runs that one latent reward serves
KINDS = ("sampling", "clean", "update", "reference", "latent_reward", "decoded", "scored", "logged")
QUIET = ["run.trackers=[]", "run.report=false", "run.cpu=true", "run.checkpoint_every=1000000"]

Point = dict[
    str, float
]  # at an evaluation: iteration, cpu_s, reward, judge, diversity, and all KINDS from the start on


def main() -> None:
    """Run all methods on all seeds and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latent-reward", type=Path, metavar="FOLDER", help="a trained one; else one is trained")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--eval-every", type=int, default=2)
    parser.add_argument("--targets", type=float, nargs="+", default=[0.58, 0.60], help="evaluation rewards")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = args.latent_reward or train_judge(Path(folder) / "judge")
        judge = judge_cost(model)
        runs = [
            {"method": method, "seed": seed, "points": measure(
                load(method, model, args.iterations, args.eval_every, seed, Path(folder) / f"{method}-{seed}")
            )}
            for i, seed in enumerate(args.seeds)
            for method in (args.methods if i % 2 == 0 else args.methods[::-1])
        ]  # fmt: skip
    found = {m: summary([r["points"] for r in runs if r["method"] == m], args.targets) for m in args.methods}
    even = break_evens(found, judge, args.targets[-1])
    if args.json:
        told = {"targets": args.targets, "judge": judge, "methods": found, "break_even_s": even, "runs": runs}
        args.json.write_text(json.dumps(told, indent=1) + "\n")
    show(found, judge, even, args.targets)


def load(method: str, judge: Path, iterations: int, eval_every: int, seed: int, output: Path) -> TrainingConfig:
    """The recipe of a method with this run's size."""
    recipe, changes = METHODS[method]
    own = [f"step_rewards.0.model={judge}"] if method == "lpo" else []
    size = [f"run.iterations={iterations}", f"run.eval_every={eval_every}", f"run.seed={seed}", f"run.output={output}"]
    return load_config(recipe_path(recipe), [*changes, *own, *size, *QUIET])


# ---- one run ----------------------------------------------------------------------------------------------------


def measure(config: TrainingConfig) -> list[Point]:
    """Train; what had been spent and reached at every evaluation."""
    trainer, meter = trainer_of(config), Meter()
    attach(trainer, meter)
    trainer.train()
    rows = [json.loads(line) for line in (config.run.output / "metrics.jsonl").read_text().splitlines()]
    cpu = {0: 0.0} | {r["iteration"]: r["time/cpu_s"] for r in rows if "time/cpu_s" in r}
    return [
        {"iteration": i, "cpu_s": cpu[i], "reward": r["eval/reward"], "judge": r["eval/judge"],
         "diversity": r["eval/diversity"], **{k: meter.after[i][k] for k in KINDS}}
        for r in rows if "eval/reward" in r for i in [r["iteration"]]
    ]  # fmt: skip


class Meter:
    """Rows by kind since training began, also as they stood after each iteration; none while `off`."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.after = [Counter[str]()]
        self._off = self._logging = False

    def add(self, kind: str, rows: int) -> None:
        """Count; pictures that only the log needs are `logged` when scored, and not counted when decoded."""
        if self._off or (self._logging and kind == "decoded"):
            return
        self.rows["logged" if self._logging else kind] += rows

    @contextmanager
    def off(self) -> Iterator[None]:
        """Evaluation."""
        self._off = True
        yield
        self._off = False

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Rewards of finished samples from which nothing is learned."""
        self._logging = True
        yield
        self._logging = False

    @contextmanager
    def iteration(self) -> Iterator[None]:
        """Note the sums at its end."""
        yield
        self.after.append(self.rows.copy())


def attach(trainer: Any, meter: Meter) -> None:
    """Count what a trainer's networks, decoder and rewards are given; its pictures for the report are not made."""
    rewarder, policy = trainer.run.rewarder, trainer.policy
    trainer.learned_from = lambda *args: None
    within(trainer, "evaluate", meter.off)
    within(trainer, "iterate", meter.iteration)
    policy.model.register_forward_hook(
        lambda m, args, out: meter.add("update" if torch.is_grad_enabled() else "sampling", len(args[0]))
    )
    policy._reference._copy.register_forward_hook(lambda m, args, out: meter.add("reference", len(args[0])))
    count(policy.adapter, "decode", meter, "decoded")
    for name, (reward, weight) in rewarder.rewards.items():
        rewarder.rewards[name] = (counted(reward, meter, "scored"), weight)
    for reward, _ in rewarder.step_rewards.values():
        within(rewarder, "reward_leaves", meter.logging)
        kind = "clean" if isinstance(reward, CleanReward) else "latent_reward"
        reward.model.register_forward_hook(lambda m, args, out, kind=kind: meter.add(kind, len(args[0])))
        if kind == "clean":
            count(reward._policy.adapter, "decode", meter, "decoded")
            reward._reward = counted(reward._reward, meter, "scored")


def counted(f: Callable[[Any], Any], meter: Meter, kind: str) -> Callable[[Any], Any]:
    """`f` of one batch, its rows counted."""

    def call(batch: Any) -> Any:
        meter.add(kind, len(batch))
        return f(batch)

    return call


def count(owner: Any, name: str, meter: Meter, kind: str) -> None:
    """Count the rows of a method's one argument."""
    setattr(owner, name, counted(getattr(owner, name), meter, kind))


def within(owner: Any, name: str, context: Callable[[], Any]) -> None:
    """Run a method inside a context."""
    inner = getattr(owner, name)

    def call(*args: Any) -> Any:
        with context():
            return inner(*args)

    setattr(owner, name, call)


# ---- the latent reward -------------------------------------------------------------------------------------------


def train_judge(output: Path) -> Path:
    """Train a latent reward; its model folder."""
    trainer_of(load_config(recipe_path(JUDGE_RECIPE), [f"run.output={output}", *QUIET])).train()
    return output / "model"


def judge_cost(model: Path) -> dict[str, float] | None:
    """CPU seconds of its training and of drawing its samples, pictures scored for it; None without its run folder."""
    config, log = model.parent / "config.yaml", model.parent / "metrics.jsonl"
    if not (config.exists() and log.exists()):
        return None
    task = yaml.safe_load(config.read_text())["task"]
    pictures = 10 * task["sets_per_class"] * task["set_size"]
    train = max(json.loads(line).get("time/cpu_s", 0.0) for line in log.read_text().splitlines())
    return {"train_s": train, "samples_s": pictures * seconds_per_sample(), "scored": pictures}


def seconds_per_sample(number: int = 512) -> float:
    """CPU seconds per sample of the digits base."""
    from diffusion.policy import DiffusionPolicy
    from mmrl.rollout import Prompt

    policy = DiffusionPolicy.build("digits")
    prompts = [Prompt(f"timed/{i}", {"label": i % 10}) for i in range(number)]
    start = time.process_time()
    policy.generate(prompts, seed=0)
    return (time.process_time() - start) / number


# ---- figures -----------------------------------------------------------------------------------------------------


def at_target(points: Sequence[Point], target: float) -> Point | None:
    """All figures where the reward first reaches `target`, on the line between two evaluations; None if never."""
    for a, b in itertools.pairwise(points):
        if b["reward"] >= target:
            share = max(0.0, (target - a["reward"]) / (b["reward"] - a["reward"]))
            return {k: a[k] + share * (b[k] - a[k]) for k in a}
    return None


def summary(runs: Sequence[Sequence[Point]], targets: Sequence[float]) -> dict[str, Any]:
    """Means over seeds: at the end, and at each target (None where a seed does not reach it)."""
    reached = {str(t): [at_target(points, t) for points in runs] for t in targets}
    return {"end": mean([points[-1] for points in runs])} | {
        t: None if None in found else mean([p for p in found if p is not None]) for t, found in reached.items()
    }


def mean(points: Sequence[Point]) -> Point:
    """Of every figure."""
    return {k: statistics.mean(p[k] for p in points) for k in points[0]}


def break_even(a: Point, b: Point, paid: dict[str, float] | None = None) -> float | None:
    """Seconds per picture scored from which on `a` (and what was `paid` for its judge) costs less than `b`.

    0 when it costs less already, None when it never does.
    """
    spent = paid or {"train_s": 0.0, "samples_s": 0.0, "scored": 0.0}
    more_s = a["cpu_s"] + spent["train_s"] + spent["samples_s"] - b["cpu_s"]
    fewer = b["scored"] - a["scored"] - spent["scored"]
    if fewer <= 0:
        return None
    return max(0.0, more_s / fewer)


def break_evens(
    found: dict[str, dict[str, Any]], judge: dict[str, float] | None, target: float
) -> dict[str, dict[str, float | None]]:
    """LPO against each other method: with a latent reward that is there, and with its cost shared by so many runs."""
    at = {m: figures[str(target)] for m, figures in found.items() if figures[str(target)] is not None}
    if "lpo" not in at:
        return {}
    ways: dict[str, dict[str, float] | None] = {"given": None}
    if judge:
        ways |= {f"trained for {n} run{'s' * (n > 1)}": {k: v / n for k, v in judge.items()} for n in SHARED_BY}
    return {
        m: {way: break_even(at["lpo"], p, paid) for way, paid in ways.items()} for m, p in at.items() if m != "lpo"
    }


def show(
    found: dict[str, dict[str, Any]], judge: dict[str, float] | None, even: dict[str, Any], targets: Sequence[float]
) -> None:
    """Two tables and two kinds of lines."""
    console, last = Console(width=130), str(targets[-1])
    end = next(iter(found.values()))["end"]
    table = Table(title=f"CPU seconds; the end is after {end['iteration']:.0f} iterations")
    for column in ("method", "s / iteration", *(f"s to {t}" for t in targets), "reward", "judge", "diversity"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = Table(title=f"rows until reward {last}")
    for column in ("method", "iterations", *KINDS):
        rows.add_column(column.replace("_", " "), justify="left" if column == "method" else "right")
    for method, f in found.items():
        e, to = f["end"], [f[str(t)] for t in targets]
        times = ["not reached" if p is None else f"{p['cpu_s']:.1f}" for p in to]
        quality = [f"{e[k]:.3f}" for k in ("reward", "judge", "diversity")]
        table.add_row(method, f"{e['cpu_s'] / e['iteration']:.2f}", *times, *quality)
        if to[-1] is not None:
            rows.add_row(method, f"{to[-1]['iteration']:.1f}", *(f"{to[-1][k]:.0f}" for k in KINDS))
    console.print(table, rows)
    if judge:
        console.print(
            f"latent reward: {judge['train_s']:.0f} s of training, {judge['samples_s']:.0f} s for its samples, "
            f"{judge['scored']:.0f} pictures scored"
        )
    for other, ways in even.items():
        for way, e in ways.items():
            told = "never, whatever a picture costs" if e is None else f"from {1000 * e:.1f} ms per picture on"
            console.print(f"lpo costs less than {other} to {last}: {told} (latent reward {way})")


if __name__ == "__main__":
    main()
