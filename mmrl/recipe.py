"""Sections that recipes of several verbs share: components with a weight, the optimizer, the run.

What belongs to one component alone lies with it: credit, losses, and each trainer's own recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from mmrl.config import Component, Section


class RewardConfig(Component):
    """One outcome reward. Its worker process is described in `mmrl.rewards.isolation`."""

    weight: float = Field(1.0, allow_inf_nan=False)
    # Of a batch in a killable process, waits for a free processor aside; 0 = in this process; null = 60 for a dotted
    # path (a user's own code), 0 for a registered name.
    timeout_s: float | None = Field(None, ge=0, allow_inf_nan=False)


class StepRewardConfig(Component):
    """One step reward."""

    weight: float = Field(1.0, allow_inf_nan=False)


class ReadingConfig(Component):
    """One reading: fills fields of the tree between its rewards and its credit (`mmrl list readings`)."""


class OptimConfig(Section):
    """AdamW."""

    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    warmup: NonNegativeInt = 0  # iterations of linear warm-up
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    updates_per_rollout: PositiveInt = 1
    ema: float | None = Field(None, gt=0, lt=1)  # decay; evaluation and the saved model use the average


class RunConfig(Section):
    """How long, where, how often."""

    output: Path = Path("runs/run")
    iterations: PositiveInt = 50
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
