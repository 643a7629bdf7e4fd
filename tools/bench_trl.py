"""TRL's GRPOTrainer and mmrl side by side: same model, pictures, questions, reward, group size and optimizer.

    python tools/bench_trl.py                        # the built-in shapes model, 3 seeds
    python tools/bench_trl.py --seeds 0 --steps 10 --model FOLDER

Both sides take their numbers from configs/vision/shapes_outcome.yaml. Every run has a process of its own with one
thread; TRL and mmrl take turns. Seconds are CPU seconds of the whole process from the end of the first optimisation
step to the end of the last: loading and warm-up are left out, data loading and logging are not. Held-out accuracy is
greedy, of the saved models, by one evaluator. Needs `pip install trl`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl.config import load_config
from mmrl.demo import recipe_path
from mmrl.trainers.branch_grpo import BranchGrpoConfig

SIDES = ("trl", "mmrl")
NEVER = 10**9

Step = dict[str, float]  # end, rollout_s: CPU seconds; reward, flat: means; samples, tokens: counts


def main() -> None:
    """Run all seeds and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="optimisation steps of a run; the first is not timed")
    parser.add_argument("--prompts", type=int, default=8, help="questions a step")
    parser.add_argument("--group", type=int, default=8, help="completions a question")
    parser.add_argument("--held-out", type=int, default=256, help="questions of the evaluation")
    parser.add_argument("--model", default="shapes", help="a Qwen2.5-VL folder instead of the built-in model")
    parser.add_argument("--json", type=Path, help="write all runs to this file")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "SEED"), help="measure one run and print JSON")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step is not timed, give 2 or more")
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return
    base = _child(args, "base", 0)
    args.model, before = base["model"], base["accuracy"]
    runs: list[dict[str, Any]] = []
    for i, seed in enumerate(args.seeds):
        for side in SIDES if i % 2 == 0 else SIDES[::-1]:
            runs.append({"side": side, "seed": seed, **_child(args, side, seed)})
    if args.json:
        args.json.write_text(json.dumps({"before": before, "runs": runs}, indent=1) + "\n")
    print(table(runs, before))


def _child(args: argparse.Namespace, side: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", side, str(seed), "--model", args.model]
    for name in ("steps", "prompts", "group", "held_out"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"{side}, seed {seed} failed:\n{done.stderr[-4000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


# ---- one run ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, side: str, seed: int) -> dict[str, Any]:
    """Train one side and evaluate what it saved; `base` evaluates the untrained model and names its folder."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = recipe(args, seed, Path(folder) / "run")
        if side == "base":
            model = config.policy.options["model"]
            return {"model": model, "accuracy": accuracy(config, model)}
        steps = {"trl": train_trl, "mmrl": train_mmrl}[side](config)
        return summary(steps) | {"accuracy": accuracy(config, str(config.run.output / "model"))}


def recipe(args: argparse.Namespace, seed: int, output: Path) -> BranchGrpoConfig:
    """The shapes recipe with this run's size; nothing is evaluated or written while it is timed."""
    from vision.tasks.shapes_base import shapes_base

    model = str(shapes_base()) if args.model == "shapes" else args.model
    changes = {
        "plan": {0: args.group}, "policy.model": model, "task.held_out": args.held_out, "run.output": str(output),
        "run.seed": seed, "run.iterations": args.steps, "run.prompts_per_iteration": args.prompts, "run.cpu": True,
        "run.eval_every": NEVER, "run.checkpoint_every": NEVER, "run.trackers": [], "run.report": False,
    }  # fmt: skip
    return load_config(recipe_path("vision/shapes_outcome.yaml"), [f"{k}={v}" for k, v in changes.items()])


def summary(steps: Sequence[Step]) -> dict[str, float]:
    """Means over the run; seconds per step without the first; late_reward is that of the last third."""
    out = {k: statistics.mean(s[k] for s in steps) for k in ("reward", "flat", "samples", "tokens")}
    timed = len(steps) - 1
    out["late_reward"] = statistics.mean(s["reward"] for s in steps[-max(len(steps) // 3, 1) :])
    out["step_s"] = (steps[-1]["end"] - steps[0]["end"]) / timed
    out["rollout_s"] = sum(s["rollout_s"] for s in steps[1:]) / timed
    return out


def accuracy(config: BranchGrpoConfig, model: str) -> float:
    """Share of held-out questions that the model in a folder answers right, greedily."""
    from mmrl.registry import build
    from vision.tasks.shapes import ShapesAnswer

    task = build("tasks", "task", config.task.name, config.task.options)
    policy = build("policies", "policy", config.policy.name, config.policy.options | {"model": model})
    return statistics.mean(ShapesAnswer()(policy.generate(task.eval_prompts, seed=0)))


def train_mmrl(config: BranchGrpoConfig) -> list[Step]:
    """Run the recipe; the model is left in `run.output`/model."""
    from mmrl.trainers.branch_grpo import BranchGrpo

    steps: list[Step] = []

    class Timed(BranchGrpo):
        def sample(self, iteration: int) -> Any:
            start = time.process_time()
            rollout = super().sample(iteration)
            spent, counts = time.process_time() - start, rollout.counts
            steps.append({"rollout_s": spent, "samples": counts["leaves"], "tokens": counts["tokens"]})
            return rollout

        def iterate(self, iteration: int) -> dict[str, float]:
            metrics = super().iterate(iteration)
            reward, flat = metrics["reward/mean"], metrics["reward/zero_spread_frac"]
            steps[-1] |= {"reward": reward, "flat": flat, "end": time.process_time()}
            return metrics

        def evaluate(self, iteration: int) -> dict[str, float]:
            return {}  # both sides are evaluated afterwards, by the same function

    Timed(config).train()
    return steps


def train_trl(config: BranchGrpoConfig) -> list[Step]:
    """The same run by TRL; the model is left in `run.output`/model."""
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from mmrl.registry import build
    from vision.inputs.loading import load_model, load_processor, save_model

    steps: list[Step] = []

    class Timed(GRPOTrainer):
        def _prepare_inputs(self, generation_batch: Any) -> Any:
            start = time.process_time()
            inputs = super()._prepare_inputs(generation_batch)
            steps[-1]["rollout_s"] = time.process_time() - start
            return inputs

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps[-1]["end"] = time.process_time()

    task = build("tasks", "task", config.task.name, config.task.options)
    model, processor = (load(config.policy.options["model"]) for load in (load_model, load_processor))
    processor.tokenizer.padding_side = "left"
    trainer = Timed(
        model=model, processing_class=processor, reward_funcs=reward_function(task.prompts, config.plan[0], steps),
        args=trl_arguments(config, model, processor), train_dataset=trl_rows(config, task.prompts),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    save_model(model, processor, config.run.output / "model")
    return steps


def trl_arguments(config: BranchGrpoConfig, model: Any, processor: Any) -> Any:
    """The recipe in TRL's words: one generation and one optimisation step per batch, all of it at once."""
    from trl import GRPOConfig

    from vision.inputs.loading import banned_ids, eos_ids

    o, loss, run, policy = config.optim, config.loss, config.run, config.policy.options
    banned = banned_ids(model.config, processor.tokenizer, keep=eos_ids(model, processor.tokenizer))
    return GRPOConfig(
        output_dir=str(run.output), seed=run.seed, max_steps=run.iterations, use_cpu=True, bf16=False,
        per_device_train_batch_size=run.prompts_per_iteration * config.plan[0], gradient_accumulation_steps=1,
        num_generations=config.plan[0], num_iterations=1, gradient_checkpointing=False, shuffle_dataset=False,
        max_completion_length=policy["max_new_tokens"], temperature=policy["temperature"],
        generation_kwargs={"suppress_tokens": banned},  # as mmrl; TRL itself leaves out the image token
        learning_rate=o.lr, adam_beta1=o.betas[0], adam_beta2=o.betas[1], adam_epsilon=o.eps,
        weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm, lr_scheduler_type="constant",
        loss_type="dapo", scale_rewards="group", beta=0.0, epsilon=loss.clip_low, epsilon_high=loss.clip_high,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, log_completions=False,
        dataloader_num_workers=0, dataloader_pin_memory=False,
    )  # fmt: skip


def trl_rows(config: BranchGrpoConfig, prompts: Sequence[Any]) -> Any:
    """A dataset of exactly the questions that mmrl's run of this seed asks, in its order."""
    from datasets import Dataset, Image

    from mmrl.trainers.data import prompt_batch

    run, place = config.run, {p.id: i for i, p in enumerate(prompts)}
    asked = [
        p
        for iteration in range(run.iterations)
        for p in prompt_batch(prompts, run.prompts_per_iteration, iteration, run.seed)
    ]
    rows = {
        "prompt": [[{"role": "user", "content": p.inputs["question"]}] for p in asked],
        "image": [p.inputs["images"][0] for p in asked],
        "index": [place[p.id] for p in asked],
    }
    return Dataset.from_dict(rows).cast_column("image", Image())


def reward_function(prompts: Sequence[Any], group: int, steps: list[Step]) -> Any:
    """TRL's form of the task's reward; opens the record of a step."""
    from mmrl.rollout import Sample
    from vision.tasks.shapes import ShapesAnswer

    judge = ShapesAnswer()

    def shapes_answer(completions: Any, completion_ids: Any, index: Sequence[int], **_: Any) -> list[float]:
        texts = [c[0]["content"] for c in completions]
        rewards = judge([Sample(prompts[i], text, 0) for i, text in zip(index, texts, strict=True)])
        flat = [len(set(rewards[a : a + group])) == 1 for a in range(0, len(rewards), group)]
        tokens = sum(len(ids) for ids in completion_ids)
        steps.append({
            "reward": statistics.mean(rewards), "flat": statistics.mean(flat), "samples": len(rewards),
            "tokens": tokens,
        })  # fmt: skip
        return rewards

    return shapes_answer


# ---- the table --------------------------------------------------------------------------------------------------


def table(runs: Sequence[dict[str, Any]], before: float) -> str:
    """Every run, the medians, and TRL's seconds over mmrl's.

    Raises:
        SystemExit: the two sides did not train on equally many samples.
    """
    by_seed = {seed: {r["side"]: r for r in runs if r["seed"] == seed} for seed in {r["seed"]: 0 for r in runs}}
    for seed, pair in by_seed.items():
        if pair["trl"]["samples"] != pair["mmrl"]["samples"]:
            raise SystemExit(f"seed {seed}: TRL and mmrl saw unequal numbers of samples, the comparison is void")
    keys = [k for k in runs[0] if k not in ("side", "seed")]
    middle = [
        {"side": s, "seed": "median"} | {k: statistics.median(r[k] for r in runs if r["side"] == s) for k in keys}
        for s in SIDES
    ]
    ratios = {seed: pair["trl"]["step_s"] / pair["mmrl"]["step_s"] for seed, pair in by_seed.items()}
    head = f"{'seed':>7} {'trainer':8}{'s/step':>8}{'rollout':>9}{'update':>8}{'samples':>9}{'tokens':>8}"
    lines = [f"held-out accuracy before: {before:.3f}",
             head + f"{'reward':>8}{'late':>7}{'flat':>6}{'held-out':>10}"]  # fmt: skip
    lines += [_line(r) for r in [*runs, *middle]]
    lines.append("TRL's seconds per step over mmrl's: "
                 + ", ".join(f"seed {s} {x:.2f}x" for s, x in ratios.items())
                 + f"; median {statistics.median(ratios.values()):.2f}x")  # fmt: skip
    return "\n".join(lines)


def _line(r: dict[str, Any]) -> str:
    return (
        f"{r['seed']:>7} {r['side']:8}{r['step_s']:8.3f}{r['rollout_s']:9.3f}{r['step_s'] - r['rollout_s']:8.3f}"
        f"{r['samples']:9.0f}{r['tokens']:8.0f}{r['reward']:8.3f}{r['late_reward']:7.3f}{r['flat']:6.2f}"
        f"{r['accuracy']:10.3f}"
    )


if __name__ == "__main__":
    main()
