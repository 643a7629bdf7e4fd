"""Sections that recipes of several commands share: components with a weight, the optimizer, the run.

Sections of one component lie in its module: credit, losses, and the recipe of each trainer.
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


# Learning-rate schedules, by their names in transformers.
Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]


class OptimConfig(Section):
    """The optimizer, its learning rate over the run, and how often it steps."""

    # A row of `mmrl list optimizers`, and its further options.
    name: str = "adamw"
    options: dict[str, Any] = Field(default_factory=dict)
    lr: PositiveFloat = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: PositiveFloat = 1.0
    # Length of the linear warm-up: iterations, or below 1 a share of the run.
    warmup: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0, lt=1)] = 0
    # The schedule after the warm-up, and its options, such as {min_lr_rate: 0.1}.
    schedule: Schedule = "constant"
    schedule_options: dict[str, Any] = Field(default_factory=dict)
    updates_per_rollout: PositiveInt = 1
    # Parts of a rollout, by its prompts, with an update each; behind the first the ratio is no longer 1.
    minibatches: PositiveInt = 1
    # Decay of an average of the weights, which evaluation and the saved model use.
    ema: float | None = Field(None, gt=0, lt=1)

    def warmup_iterations(self, iterations: int) -> int:
        """Number of warm-up iterations in a run of `iterations`."""
        if isinstance(self.warmup, int):
            return self.warmup
        return math.ceil(self.warmup * iterations)


class RunConfig(Section):
    """Length and folder of a run, evaluation and checkpoints, limits, and the hardware that it uses."""

    output: Path = Path("runs/run")
    iterations: PositiveInt = 50
    # Passes over the task's prompts, in place of `iterations`.
    epochs: PositiveFloat | None = None
    # Over all processes.
    prompts_per_iteration: PositiveInt = 8
    seed: int = 0
    eval_every: PositiveInt = 5
    checkpoint_every: PositiveInt = 10
    keep_checkpoints: PositiveInt = 2
    # Rounds in which further prompts are sampled in place of those whose rewards do not differ (DAPO).
    refill: NonNegativeInt = 0
    # Continue from the newest checkpoint in `output`, or start anew when there is none.
    resume: bool = False
    # The run stops above these shares: of samples without reward, of prompts that the policy cannot take.
    max_unscored: float = Field(0.2, ge=0, le=1)
    max_unusable: float = Field(0.1, ge=0, le=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    # Stay on the CPU even where there is a GPU.
    cpu: bool = False
    # Per process on CPU. With several processes, spinning OpenMP threads would compete for the cores.
    threads: PositiveInt = 1
    # Stop with an error when the launcher started another number of processes.
    processes: PositiveInt | None = None
    # Names of accelerate's trackers.
    trackers: list[str] = Field(default_factory=lambda: ["tensorboard"])
    # Write report.html at the end.
    report: bool = True

    def count_epochs(self, prompts: int) -> None:
        """Set `iterations` by `epochs`, if given: passes over `prompts` prompts."""
        if self.epochs is not None:
            self.iterations = math.ceil(self.epochs * max(prompts // self.prompts_per_iteration, 1))


class TrainingConfig(Section):
    """Sections of every training recipe."""

    trainer: str
    task: Component
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()
    # Callbacks beside those that every run has (`mmrl list callbacks`).
    callbacks: list[Component] = Field(default_factory=list)

    def dump(self) -> str:
        """YAML of every value, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class PolicyConfig(TrainingConfig):
    """Sections of every recipe that trains a policy."""

    policy: Component
    # Number of children of a step by depth, such as {0: 8}.
    plan: dict[int, int]
    # Empty: the rewards that the task names.
    rewards: list[RewardConfig] = Field(default_factory=list)
    # `group`: each reward is normalised among the samples of a prompt before they are added (GDPO, MixGRPO)
    reward_scale: Literal["none", "group"] = "none"
    # Step rewards for the estimators or pair builders that read them.
    step_rewards: list[StepRewardConfig] = Field(default_factory=list)
    # Readings that fill further fields, in this order.
    readings: list[ReadingConfig] = Field(default_factory=list)


class JobConfig(Section):
    """Sections that annotation and search share: a policy that writes, a task with a verifier, the output."""

    policy: Component
    task: Component
    # null: the task's first reward.
    verifier: RewardConfig | None = None
    split: Literal["train", "eval"] = "train"
    # Number of prompts, from the first one on; null: all.
    prompts: PositiveInt | None = None
    method: Component
    output: Path
    # Folder for the trees, which training recipes read by `rollouts: DIR`; null: they are not kept.
    rollouts: Path | None = None
    seed: int = 0
    # States or prompts that are worked on side by side.
    batch: PositiveInt = 64
    # Stay on the CPU even where there is a GPU.
    cpu: bool = False
    # Threads per process on CPU.
    threads: PositiveInt = 1
