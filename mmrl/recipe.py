"""Sections that recipes of several verbs share: components with a weight, the optimizer, the run.

What belongs to one component alone lies with it: credit, losses, and each trainer's own recipe.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mmrl.config import Component, Section


class RewardConfig(Component):
    """One outcome reward. Its worker process is described in `mmrl.rewards.isolation`."""

    weight: float = Field(1.0, allow_inf_nan=False)
    # Of a batch in a killable process, waits for a free processor aside; 0 = in this process; null = 60 for a dotted
    # path (a user's own code), 0 for most registered names.
    timeout_s: float | None = Field(None, ge=0, allow_inf_nan=False)


class StepRewardConfig(Component):
    """One step reward."""

    weight: float = Field(1.0, allow_inf_nan=False)


class ReadingConfig(Component):
    """One reading: fills fields of the tree between its rewards and its credit (`mmrl list readings`)."""


Schedule = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr", "polynomial", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip


class OptimConfig(Section):
    """The optimizer, its learning rate over the run, and how often it steps."""

    name: str = "adamw"  # of `mmrl list optimizers`
    options: dict[str, Any] = Field(default_factory=dict)  # its further options
    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    # of linear warm-up: iterations, or below 1 a share of the run
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    schedule: Schedule = "constant"  # after it, by transformers' names
    schedule_options: dict[str, Any] = Field(default_factory=dict)  # such as {min_lr_rate: 0.1}
    updates_per_rollout: PositiveInt = 1
    # Parts of a rollout, by its prompts, with an update each; behind the first the ratio is no longer 1.
    minibatches: PositiveInt = 1
    ema: float | None = Field(None, gt=0, lt=1)  # decay; evaluation and the saved model use the average

    def warmup_iterations(self, iterations: int) -> int:
        """Iterations of warm-up in a run of so many."""
        return self.warmup if isinstance(self.warmup, int) else math.ceil(self.warmup * iterations)


class RunConfig(Section):
    """How long, where, how often."""

    output: Path = Path("runs/run")
    iterations: PositiveInt = 50
    epochs: PositiveFloat | None = None  # over the task's prompts, in place of `iterations`
    prompts_per_iteration: PositiveInt = 8  # over all processes
    seed: int = 0
    eval_every: PositiveInt = 5
    checkpoint_every: PositiveInt = 10
    keep_checkpoints: PositiveInt = 2
    refill: NonNegativeInt = 0  # rounds of sampling further prompts for those whose rewards do not differ (DAPO)
    resume: bool = False  # continue from the newest checkpoint in `output`; starts anew when there is none
    max_unscored: float = Field(0.2, ge=0, le=1)  # share of samples without reward at which the run stops
    max_unusable: float = Field(0.1, ge=0, le=1)  # share of prompts the policy cannot take at which the run stops
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    cpu: bool = False  # stay on the CPU even where there is a GPU
    threads: PositiveInt = 1  # per process on CPU: with several, spinning OpenMP threads fight for the cores
    processes: PositiveInt | None = None  # stop with an error when the launcher started another number
    trackers: list[str] = Field(default_factory=lambda: ["tensorboard"])  # accelerate trackers
    report: bool = True  # write report.html at the end

    def count_epochs(self, prompts: int) -> None:
        """Set `iterations` to what `epochs`, if there are any, take with so many prompts."""
        if self.epochs is not None:
            self.iterations = math.ceil(self.epochs * max(prompts // self.prompts_per_iteration, 1))


class TrainingConfig(Section):
    """What every training recipe has."""

    trainer: str
    task: Component
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    callbacks: list[Component] = Field(default_factory=list)  # beside those of every run (`mmrl list callbacks`)

    def dump(self) -> str:
        """YAML of every value, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class PolicyConfig(TrainingConfig):
    """What every recipe has that trains a policy."""

    policy: Component
    plan: dict[int, int]  # children of a live step by depth, such as {0: 8}
    rewards: list[RewardConfig] = Field(default_factory=list)  # empty = the task's own
    # `group`: each reward is normalised among the samples of a prompt before they are added (GDPO, MixGRPO)
    reward_scale: Literal["none", "group"] = "none"
    step_rewards: list[StepRewardConfig] = Field(default_factory=list)  # for what reads them: estimators, pairs
    readings: list[ReadingConfig] = Field(default_factory=list)  # further fields for what reads them, in this order


class JobConfig(Section):
    """What annotation and search share: a policy that writes, a task with a verifier, where the result goes."""

    policy: Component
    task: Component
    verifier: RewardConfig | None = None  # null = the task's first reward
    split: Literal["train", "eval"] = "train"
    prompts: PositiveInt | None = None  # the first so many, null = all
    method: Component
    output: Path
    rollouts: Path | None = None  # where the trees go, for `rollouts: DIR` of training recipes; null = not kept
    seed: int = 0
    batch: PositiveInt = 64  # states or prompts worked on side by side
    cpu: bool = False  # stay on the CPU even where there is a GPU
    threads: PositiveInt = 1  # per process on CPU
