"""What a recipe will cost, whether it holds together and whether it can learn, before it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mmrl.config import Component, Section, declared_defaults
from mmrl.recipe import PolicyConfig, TrainingConfig
from mmrl.rewards.scoring import Scored
from mmrl.trainers import trainer_of
from mmrl.trainers.base import PolicyTrainer
from mmrl.trainers.branch_grpo import BranchGrpo, BranchGrpoConfig
from mmrl.trainers.imitation import ImitationConfig
from mmrl.trainers.loop import Loop
from mmrl.trainers.policy_update import current_logp
from mmrl.trainers.verdicts import verdicts


class Line(NamedTuple):
    """One line of a check-up. hopeless: it says that the run cannot learn."""

    topic: str
    text: str
    hopeless: bool = False

    def __str__(self) -> str:
        return f"{self.topic:<10} {self.text}"


def examine(config: TrainingConfig) -> Iterator[Line]:
    """Lines of a check-up: world, defaults, forecast, memory, one whole iteration in memory, the verdicts on it.

    Nothing is written into `run.output`.

    Raises:
        ValueError, RuntimeError: whatever would stop the run itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = config.run.model_copy(update={"output": Path(folder)})
        trainer = trainer_of(config.model_copy(update={"run": run}))
        yield Line("world", trainer.loop.world)
        yield Line("defaults", _defaults(config))
        samples = isinstance(config, PolicyConfig) and _samples(config)
        if samples:
            yield from _cost(trainer)
        yield Line("memory", _memory(trainer.loop, kl=isinstance(config, BranchGrpoConfig) and config.loss.kl > 0))
        metrics = trainer.iterate(0)
        if samples:
            yield from _rewards(trainer.run.meter.scores[-1])
            yield from _rollout(trainer, metrics)
        if isinstance(trainer, BranchGrpo):
            yield from _credit(trainer, metrics)
        yield from _update(metrics)
    found = verdicts(metrics)
    for verdict in found:
        yield Line("verdict", ("CANNOT LEARN: " if verdict.hopeless else "warning: ") + verdict.text, verdict.hopeless)
    if not found:
        yield Line("verdict", "fine")


def _samples(config: PolicyConfig) -> bool:
    """The iterations sample: they read neither rollouts from disk nor references."""
    if isinstance(config, ImitationConfig) and not config.samples:
        return False
    return config.model_dump().get("rollouts") is None


def _defaults(config: TrainingConfig) -> str:
    """The settings whose defaults hang on the modality: their values, and whose they are."""
    told = []
    for key, (raw, who) in declared_defaults(config.model_dump(), type(config)).items():
        section, name = key.split(".")
        own = dict(config).get(section)
        if not isinstance(own, Section) or name not in dict(own):
            continue
        value, default = dict(own)[name], dict(type(own).model_validate({name: raw}))[name]
        origin = f"default of {who}" if value == default else f"the recipe's; {who} has {_short(default)}"
        told.append(f"{key} {_short(value)} ({origin})")
    return ", ".join(told) or "none that hang on the policy"


def _short(value: object) -> str:
    """A setting in a line; of components their names."""
    if isinstance(value, list):
        return "+".join(x.name if isinstance(x, Component) else str(x) for x in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cost(trainer: PolicyTrainer) -> Iterator[Line]:
    run, plan = trainer.config.run, trainer.run.plan
    forecast = trainer.policy.forecast(plan)
    yield Line("plan", f"{dict(plan.factors)}: {forecast}")
    prompts = run.prompts_per_iteration
    yield Line(
        "cost",
        f"{prompts} prompts: {forecast.leaves * prompts} samples, {forecast.calls * prompts} network calls, "
        f"{forecast.trained_states * prompts} trained states per iteration; {run.iterations} iterations",
    )


def _memory(loop: Loop, *, kl: bool) -> str:
    total = sum(p.numel() * p.element_size() for p in loop.model.parameters())
    trained = sum(p.numel() for p in loop.parameters)
    need = total + trained * 4 * 3 + (total if kl and trained * 4 >= total else 0)
    return (
        f"{trained / 1e6:.2f} M trained parameters; {need / 2**20:.0f} MiB for weights, gradients, AdamW "
        "and reference, without activations"
    )


def _rewards(scored: Scored) -> Iterator[Line]:
    for name, part in scored.parts.items():
        bad = int(part.isnan().sum())
        known = part[~part.isnan()]
        yield Line(
            "reward",
            f"{name}: mean {known.mean():.3f}, std {known.std():.3f}, {bad} of {len(part)} unscored, "
            f"{scored.seconds[name]:.2f} s",
        )


def _rollout(trainer: PolicyTrainer, metrics: Mapping[str, float]) -> Iterator[Line]:
    forecast = trainer.policy.forecast(trainer.run.plan)
    calls, bound = metrics["rollout/calls_per_leaf"], forecast.calls / forecast.leaves
    # the bound is reached unless completions may end early
    agrees = (
        "as forecast" if abs(calls - bound) < 1e-9 else "at most as forecast" if calls < bound else "NOT as forecast"
    )
    cut = ""
    if "rollout/truncated_per_leaf" in metrics:
        cut = (
            f"; {metrics['rollout/tokens_per_leaf']:.1f} tokens per leaf, "
            f"{metrics['rollout/truncated_per_leaf']:.0%} of the completions cut at the longest length"
        )
    yield Line("rollout", f"{calls:.3f} calls per leaf, {agrees}{cut}")


def _credit(trainer: BranchGrpo, metrics: Mapping[str, float]) -> Iterator[Line]:
    config = trainer.config
    names = ", ".join(e.name for e in config.credit.estimators)
    yield Line(
        "credit",
        f"{names}: |advantage| max {metrics['credit/adv_abs_max']:.3f}; "
        f"{metrics['reward/zero_spread_frac']:.0%} of the groups without spread",
    )
    # where nothing is trained, no ratio was taken; the weights are still those that sampled
    worst = metrics["policy/ratio_dev_max"] if metrics["credit/adv_abs_max"] else _ratio_deviation(trainer)
    limit = min(config.loss.clip_low, config.loss.clip_high) / 2
    verdict = "fine" if worst <= limit else "TOO LARGE: set loss.recompute_old_logp=true"
    yield Line(
        "ratio", f"deviates from 1 by at most {worst:.1e} before the first update (limit {limit:.1e}): {verdict}"
    )


def _ratio_deviation(trainer: BranchGrpo) -> float:
    """How far ratios lie from 1 on the rollout of the first iteration, whatever its advantages."""
    rollout = trainer.sample(0)
    old, trainable = rollout.actions.logp, rollout.actions.trainable
    steps = torch.unique(rollout.tree.step_of_action(old.numel())[trainable])
    new = current_logp(trainer.policy, rollout, steps)
    return float(((new - old)[trainable].exp() - 1).abs().max())


_LEARNT = ("policy/grad_norm", "reward/mean", "policy/clip_frac", "preference/pairs", "sample_loss/rows",
           "imitation/actions", "imitation/nll", "data/labelled_steps", "loss/mean", "policy/loss", "preference/loss",
           "sample_loss/loss")  # fmt: skip


def _update(metrics: Mapping[str, float]) -> Iterator[Line]:
    """What the trial iteration learnt from, and how long it took."""
    yield Line("update", ", ".join(f"{name} {metrics[name]:.4g}" for name in _LEARNT if name in metrics))
    seconds = {k.removeprefix("time/").removesuffix("_s"): v for k, v in metrics.items() if k.startswith("time/")}
    peak = f"; {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most" if torch.cuda.is_available() else ""
    yield Line("time", ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()) + peak)
