"""A run is one YAML file. Each section is a typed model; unknown keys are refused with the nearest valid name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from mmrl.registry import explain


class ConfigError(ValueError):
    """The recipe cannot be used; the message says which key, which value and what would do."""


class Section(BaseModel):
    """A closed section: every key is known."""

    model_config = ConfigDict(extra="forbid")


class Component(BaseModel):
    """An open section: `name` picks the component, every other key is one of its options, checked when it is made."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


class RewardConfig(Component):
    """One outcome reward. Its worker process is described in `mmrl.rewards.isolation`."""

    weight: float = 1.0
    timeout_s: float | None = Field(
        None, ge=0, allow_inf_nan=False
    )  # of a batch in a killable process; 0 = in this process;
    # null = 60 for a dotted path (a user's own code), 0 for a registered name


class StepRewardConfig(Component):
    """One step reward."""

    weight: float = 1.0


class ReadingConfig(Component):
    """One reading: fills fields of the tree between its rewards and its credit (`mmrl list readings`)."""


class EstimatorConfig(Component):
    """One estimator of a weighted sum: weight and its own options beside the name."""

    weight: float = 1.0

    @property
    def spec(self) -> dict[str, Any]:
        """As `mmrl.credit.compose` takes it."""
        return {"name": self.name, "weight": self.weight, **self.options}


class CreditConfig(Section):
    """Transforms, then a weighted sum of estimators, then the clip. `mmrl list estimators` prints what there is."""

    transforms: list[str | dict[str, Any]] | None = None  # null = none; with a trained scorer as step reward, clip (at
    # 1/2) and delta, so that writing more steps never pays (Clip/Delta, Designing Effective RL Reward)
    estimators: list[EstimatorConfig] = Field(
        default_factory=lambda: [EstimatorConfig(name="branch_depth")], min_length=1
    )
    counting: Literal["node", "leaf"] = "node"
    step_reward_kind: Literal["reward", "value"] = "reward"  # a value scores the state and must be differenced
    whiten: bool = False  # centre and scale the sum over the whole batch
    allow_double_norm: bool = False
    clip: PositiveFloat | None = 5.0  # advantages are clamped to +-clip (every public diffusion trainer: 5)


class PruneConfig(Section):
    """Which steps get no gradient; the rollout and its rewards are untouched (BranchGRPO)."""

    width: Literal["none", "top", "extreme"] = "none"
    keep: float = Field(0.5, gt=0, le=1)  # share of leaves kept by `extreme`
    depth_first: PositiveInt | None = None  # drop steps at this depth and beyond ...
    depth_stop: NonNegativeInt = 0  # ... sliding down to this one
    depth_every: PositiveInt = 30  # ... by one step every so many iterations
    until: float = Field(1.0, ge=0, le=1)  # share of iterations during which pruning is on


class LossConfig(Section):
    """The policy loss."""

    ratio: Literal["action", "step", "trajectory"] = "action"  # step and trajectory: the GSPO form
    surrogate: Literal["clip", "cispo", "sapo"] = "clip"
    guard: bool = False  # GRPO-Guard ratio normalisation, for latent steps; needs policy.keep_mean
    clip_low: PositiveFloat = 1e-3
    clip_high: PositiveFloat = 1e-3
    dual_clip: float | None = Field(None, gt=1)
    kl: float = Field(0.0, ge=0)  # weight of the divergence from the initial model
    kl_form: Literal["exact", "k1", "k2", "k3"] = "exact"
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "step-mean"] = (
        "token-mean"
    )
    max_len: PositiveInt | None = None  # for `constant`
    drop_zero_spread: bool = False  # leave groups with equal rewards out of the denominator as well
    recompute_old_logp: bool = False  # one extra pass; for engines whose log-probs differ from the trainer's
    importance_cap: PositiveFloat | None = None  # with it: weight actions by min(trainer / engine probability, cap)


class RewardLossConfig(Section):
    """The loss of a step reward model."""

    name: str = "bce"  # of mmrl.losses.reward.LOSSES
    options: dict[str, Any] = Field(default_factory=dict)
    balance: Literal["none", "class", "solution"] = "none"  # equal weight per labelled step, per class, per solution
    smoothing: float = Field(0.0, ge=0, lt=1)
    last_step_only: bool = False  # an outcome reward model


class ImitationConfig(Section):
    """After the policy update, prompts without a right answer learn their reference solution (PROPA)."""

    weight: float = Field(0.0, ge=0)  # of the negative log-likelihood per token; 0 = off
    solved_at: float = 1.0  # outcome from which an answer counts as right


class OnlineConfig(Section):
    """A step reward that learns along: after every rollout one update on its outcomes (PRIME)."""

    scorer: str  # name of the step reward
    lr: PositiveFloat = 1e-6  # PRIME
    spread: bool = False  # every step gets the mean outcome below it; false: the last step alone gets the outcome


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

    def dump(self) -> str:
        """YAML of every value, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class PolicyConfig(TrainingConfig):
    """What every recipe has that trains a policy."""

    policy: Component
    rewards: list[RewardConfig] = Field(default_factory=list)  # empty = the task's own
    step_rewards: list[StepRewardConfig] = Field(default_factory=list)  # for what reads them: estimators, pairs
    readings: list[ReadingConfig] = Field(default_factory=list)  # further fields for what reads them, in this order


class Config(PolicyConfig):
    """A recipe of branch GRPO."""

    trainer: Literal["branch_grpo"] = "branch_grpo"
    plan: dict[int, int]
    rollouts: Path | None = None  # stored ones (`mmrl rollouts`) in place of sampled ones
    online: OnlineConfig | None = None  # one of them learns along
    credit: CreditConfig = CreditConfig()
    prune: PruneConfig = PruneConfig()
    loss: LossConfig = LossConfig()
    imitation: ImitationConfig = ImitationConfig()


class RewardModelConfig(TrainingConfig):
    """A recipe of the step-reward trainer. `run.prompts_per_iteration` counts questions, with all their solutions."""

    trainer: Literal["step_reward"] = "step_reward"
    scorer: Component
    rollouts: Path | None = None  # stored ones to learn from: the option `train` of tasks that read them
    loss: RewardLossConfig = RewardLossConfig()


class SftConfig(PolicyConfig):
    """A recipe of imitation: the policy learns written solutions, or the best of its own samples."""

    trainer: Literal["imitation"] = "imitation"
    source: Literal["reference", "samples"] = "reference"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 4})  # of the samples
    rollouts: Path | None = None  # stored ones in place of samples (`mmrl rollouts`, search, annotate)
    keep_above: float = 0.0  # outcome above which a sample is learned
    per_prompt: PositiveInt = 1  # at most so many samples of a prompt, the best ones


class StepPreferenceConfig(PolicyConfig):
    """A recipe of step-level preference optimisation."""

    trainer: Literal["step_preference"] = "step_preference"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 4})  # of the rollouts
    rollouts: Path | None = None  # stored ones (`mmrl rollouts`) in place of sampled ones
    loss: Component = Component(name="dpo")  # of mmrl.losses.preference.PRESETS; other keys change its settings
    pairs: Component | None = None  # of mmrl.preference.BUILDERS; null = the builder that belongs to the loss
    guide: Component | None = None  # a policy trained by DPO whose log-ratios weight the actions (TGDPO)


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


class LabelConfig(Component):
    """How counts become labels: a rule of `mmrl.annotate.targets` with its numbers."""

    name: str = "hard_gt"
    after: Literal["mask", "zero", "keep"] = "mask"  # what becomes of the steps after the first error


class InjectConfig(Section):
    """Planted errors (URSA's misinterpretation insertion): their labels cost nothing and are exact."""

    copies: PositiveInt = 1  # per right solution, each with one value changed
    kinds: list[str] | None = None  # steps that may be changed, null = all
    values: tuple[Literal["number", "colour", "relation"], ...] = ("number",)


class AnnotateConfig(JobConfig):
    """A recipe of `mmrl annotate`.

    method.name: monte_carlo, omega (completions of prefixes); scorer (a step reward or saved scorer), judge (a policy
    that reads solutions), outcome (FreePRM's pseudo-labels).
    """

    records: Path | None = None  # solutions to label; null = the policy writes `method.solutions` per question
    format: str = "records"  # of `records`, one of mmrl.prm.formats
    label: LabelConfig = LabelConfig()  # for monte_carlo and omega
    refine: Component | None = None  # scan, or consensus with a scorer or judge
    inject: InjectConfig | None = None  # add copies of right solutions with one planted error


class SearchConfig(JobConfig):
    """A recipe of `mmrl search`.

    method.name is one of mmrl.search.run.METHODS, or best_of_k for policies whose steps are no texts (denoising).
    """

    split: Literal["train", "eval"] = "eval"
    scorer: str | None = None  # a saved scorer's folder, or a name of mmrl.scorers; null scores nothing
    aggregates: list[str] = Field(default_factory=lambda: ["min", "product", "last", "mean"], min_length=1)
    max_tokens: PositiveInt | None = None  # generated per prompt, by policies that write


class SampleLossConfig(PolicyConfig):
    """A recipe of a loss on whole samples."""

    trainer: Literal["sample_loss"] = "sample_loss"
    plan: dict[int, int] = Field(default_factory=lambda: {0: 8})  # of the rollouts
    loss: Component  # one that the policy knows; for diffusion, of diffusion.baselines.LOSSES
    old_decay: float = Field(0.0, ge=0, lt=1)  # samples are drawn by an average of the weights; 0 = the newest ones


TRAINERS: dict[str, type[TrainingConfig]] = {
    "branch_grpo": Config,
    "step_reward": RewardModelConfig,
    "imitation": SftConfig,
    "step_preference": StepPreferenceConfig,
    "sample_loss": SampleLossConfig,
}

C = TypeVar("C", bound=Section)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a training recipe and apply `key.path=value` overrides (values are YAML); `trainer:` picks its kind.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown trainer, an unknown or ill-typed key.
    """
    tree = _read(file, overrides)
    return parse_config(tree, str(file), trainer_config(tree, str(file)))


def trainer_config(tree: Mapping[str, Any], where: str = "config") -> type[TrainingConfig]:
    """The kind of recipe that `trainer:` names, branch_grpo by default."""
    name = tree.get("trainer", "branch_grpo")
    if name not in TRAINERS:
        raise ConfigError(f"{where}: trainer={name!r} is unknown; choose one of {', '.join(TRAINERS)}")
    return TRAINERS[name]


def load_section(file: str | Path, model: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a recipe of another kind, such as `AnnotateConfig`; see `load_config`."""
    return parse_config(_read(file, overrides), str(file), model)


def parse_config(tree: Mapping[str, Any], where: str = "config", model: type[C] | None = None) -> C:
    """Validate a mapping of sections; see `load_config`. model: default a branch GRPO recipe."""
    kind: Any = model or Config
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        unknown = [_unknown_key(kind, e) for e in error.errors() if e["type"] == "extra_forbidden"]
        if unknown:
            raise ConfigError(f"{where}: " + "\n".join(unknown)) from None
        raise ConfigError(f"{where}: {explain(error)}") from None


def _read(file: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}; recipes lie under configs/")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections ({', '.join(Config.model_fields)})")
    for item in overrides:
        _override(tree, item)
    return tree


def _override(tree: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"override {item!r} must be key.path=value, such as optim.lr=1e-4")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is no valid YAML ({error})") from error
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = parsed
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"override {item!r}: {key} leads nowhere; a part of it is a value or a missing entry"
        ) from error


def _unknown_key(model: Any, error: Any) -> str:
    *parents, key = error["loc"]
    for part in parents:
        model = model.model_fields[part].annotation
    near = get_close_matches(str(key), model.model_fields, 1, cutoff=0.5)
    hint = f" (did you mean {'.'.join([*map(str, parents), near[0]])}?)" if near else ""
    path = ".".join(map(str, error["loc"]))
    return f"unknown key {path}={error['input']!r}{hint}; known: {', '.join(model.model_fields)}"
