"""Task: prompts for training and evaluation, with the rewards that fit; rewards, readings and who fills what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

from mmrl.capabilities import ContrastReward, PolicyFollower, RewardNamer, follows, refuse_needs
from mmrl.config import Component, ConfigError
from mmrl.fields import ANYTHING, Stage
from mmrl.readings import Reading
from mmrl.recipe import PolicyConfig, RewardConfig
from mmrl.registry import build, find
from mmrl.rewards import Isolated
from mmrl.rollout import OutcomeReward, Prompt, StepReward
from mmrl.scorers.scoring import check_trained


class Task(Protocol):
    """What the trainers need to know of a task. Evaluation prompts have distinct ids, as training prompts do."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]


T = TypeVar("T")
Extra = TypeVar("Extra")

FOREIGN_TIMEOUT_S = 60.0  # of a batch, for rewards that are named by a dotted path


def build_rewards(config: PolicyConfig, task: Task) -> dict[str, tuple[OutcomeReward, float]]:
    """name -> (reward, weight), from the recipe or the task's default. Dotted paths run in a killable process."""
    named = task.rewards if isinstance(task, RewardNamer) else ()
    chosen = config.rewards or [RewardConfig(name=name) for name in named]
    if not chosen:
        raise ConfigError(f"task.name={config.task.name!r} names no reward that fits it; list some in `rewards:`")
    out: dict[str, tuple[OutcomeReward, float]] = {}
    for i, r in enumerate(chosen):
        if r.name in out:
            raise ValueError(f"rewards.{i}: {r.name!r} is listed twice; give it once with the summed weight")
        out[r.name] = (build_reward(r, f"rewards.{i}"), r.weight)
    return out


def build_step_rewards(config: PolicyConfig) -> dict[str, tuple[StepReward, float]]:
    """name -> (step reward, weight), from the recipe."""
    out: dict[str, tuple[StepReward, float]] = {}
    for i, r in enumerate(config.step_rewards):
        if r.name in out:
            raise ValueError(f"step_rewards.{i}: {r.name!r} is listed twice; give it once with the summed weight")
        out[r.name] = (build("scorers", f"step_rewards.{i}", r.name, r.options), r.weight)
    return out


def follow_policy(
    section: str, components: Mapping[str, tuple[T, Extra]], entries: Sequence[Component], policy: object
) -> dict[str, tuple[T, Extra]]:
    """The components of a section, those that follow the policy with its options in place of their defaults.

    Args:
        entries: the recipe's section, in the order of the components; empty for components of other origin.

    Raises:
        ConfigError: the recipe gives such an option another value than the policy has.
    """
    followers = {}
    for i, (name, (component, extra)) in enumerate(components.items()):
        follower = component
        if isinstance(component, PolicyFollower):
            follower = component.following(policy)
            options = entries[i].options if i < len(entries) else {}
            taken = vars(follower)
            for option, value in options.items():
                if option in taken and taken[option] != vars(component)[option]:
                    raise ConfigError(
                        f"{section}.{i}.{option}={value!r}: the policy has {taken[option]!r}; leave it out, it is "
                        "taken from the policy"
                    )
        followers[name] = (follower, extra)
    return followers


def build_readings(config: PolicyConfig) -> dict[str, tuple[Reading, tuple[str, ...]]]:
    """name -> (reading, fields it writes), from the recipe; a name that occurs again gets its place behind it."""
    out: dict[str, tuple[Reading, tuple[str, ...]]] = {}
    for i, r in enumerate(config.readings):
        row = find("readings", r.name)
        name = f"{r.name}.{i}" if r.name in out else r.name
        out[name] = (row.build(r.options, f"readings.{i}"), row.writes(r.options))
    return out


def producers(config: PolicyConfig) -> list[Stage]:
    """What fills the fields of a rollout in this recipe, in the order in which it runs; options are checked."""
    policy = find("policies", config.policy.name)
    written = policy.writes(config.policy.options) if policy.declared.writes is not None else (ANYTHING,)
    stages = [Stage("policy", f"policy {policy.name!r}", (), written)]
    stages.append(Stage("rewards", "the task's rewards", (), ("outcome",)))
    sections: list[tuple[str, str, Sequence[Component]]] = [
        ("rewards", "rewards", config.rewards),
        ("step_rewards", "scorers", config.step_rewards),
        ("readings", "readings", config.readings),
    ]
    for section, kind, components in sections:
        for i, component in enumerate(components):
            where = f"{section}.{i}"
            row = find(kind, component.name)
            row.check(component.options, where)
            who = f"{row.kind.singular} {row.name!r}"
            stages.append(Stage(where, who, row.reads(component.options), row.writes(component.options)))
            if kind == "readings":
                refuse_needs(where, row, component.options, policy, find("tasks", config.task.name))
    return stages


def check_heads(config: PolicyConfig, learns: str = "") -> None:
    """Refuse step rewards, and readings whose fact `scorer` names an option with one, that have an untrained head.

    learns: name of the one that learns along.

    Raises:
        ComponentError: naming its place in the recipe.
    """
    scorers: dict[str, tuple[str, Any]] = {}  # place -> the component's name, and the scorer
    for i, r in enumerate(config.step_rewards):
        scorers[f"step_rewards.{i}"] = r.name, {"name": r.name, **r.options}
    for i, reading in enumerate(config.readings):
        option = find("readings", reading.name).facts.get("scorer", "")
        scorers[f"readings.{i}.scorer"] = reading.name, reading.options.get(option)
    for where, (name, scorer) in scorers.items():
        if scorer is not None and name != learns:
            check_trained(scorer, where)


def build_reward(r: RewardConfig, section: str) -> OutcomeReward:
    """One reward; by a dotted path, in a killable process."""
    # a registered one that waits for somebody else says so by the fact `timeout_s`
    foreign = FOREIGN_TIMEOUT_S if ":" in r.name else find("rewards", r.name).facts.get("timeout_s", 0.0)
    timeout_s = foreign if r.timeout_s is None else r.timeout_s
    if timeout_s > 0:
        if ":" not in r.name and follows(find("rewards", r.name), ContrastReward):
            raise ConfigError(
                f"{section}: {r.name} compares with other prompts and cannot run apart; leave timeout_s out"
            )
        return Isolated(r.name, r.options, timeout_s, section=section)
    return build("rewards", section, r.name, r.options)
