"""Fills a rollout: outcomes of its leaves, rewards of its steps, the fields of readings; scorers may learn along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrl.capabilities import AnswerGiver, ContrastReward, PromptChecker, ScorerReading
from mmrl.config import ConfigError
from mmrl.credit.norm import group_scaled_sum
from mmrl.readings import Reading, ReadingContext, fill
from mmrl.recipe import PolicyConfig
from mmrl.rewards import score
from mmrl.rewards.scoring import Scored, write_outcomes
from mmrl.rewards.steps import score_steps
from mmrl.rollout import OutcomeReward, Policy, Prompt, Rollout, Sample, StepReward
from mmrl.task import Task
from mmrl.trainers.loop import Loop
from mmrl.trainers.meter import Meter
from mmrl.trainers.online import OnlineConfig, OnlineScorer


class Rewarder:
    """Rewards, step rewards and readings of a run.

    Rewards of a user's own run in processes that can be killed (`mmrl.rewards.isolation`); a sample that cannot be
    scored is set aside, up to `run.max_unscored`.

    Args:
        rewards, step_rewards: name -> (component, weight). readings: name -> (reading, fields that it writes).
        meter: notes scores, costs and times.
    """

    def __init__(
        self,
        config: PolicyConfig,
        policy: Policy,
        task: Task,
        rewards: Mapping[str, tuple[OutcomeReward, float]],
        step_rewards: Mapping[str, tuple[StepReward, float]],
        readings: Mapping[str, tuple[Reading, Sequence[str]]],
        meter: Meter,
    ) -> None:
        self._config, self._policy, self._task, self._meter = config, policy, task, meter
        self.rewards, self.step_rewards, self.readings = rewards, step_rewards, readings
        self.online: OnlineScorer | None = None

    def names(self) -> list[dict[str, Any]]:
        """Name, weight and options of every reward, and how they are scaled where they are."""
        options = {r.name: r.options for r in self._config.rewards}
        how = {} if self._config.reward_scale == "none" else {"reward_scale": self._config.reward_scale}
        return [{"name": k, "weight": w, **how, **options.get(k, {})} for k, (_, w) in self.rewards.items()]

    def contrasts(self, prompts: Sequence[Prompt]) -> dict[str, Sequence[Prompt]]:
        """The other prompts that rewards compare these with, by reward; see `ContrastReward`."""
        others: dict[str, Sequence[Prompt]] = {}
        for name, (reward, _) in self.rewards.items():
            if isinstance(reward, ContrastReward) and (asked := reward.controls(prompts)):
                others[name] = asked
        return others

    # ---- filling ----------------------------------------------------------------------------------------------

    def fill(
        self, rollout: Rollout, controls: Mapping[str, Sequence[Sample]], *, seed: int, iteration: int
    ) -> Rollout:
        """The rollout with all that the recipe fills. controls: samples of `contrasts`, by reward."""
        return self.run_readings(
            self.reward_steps(self.reward_leaves(rollout, controls)), seed=seed, iteration=iteration
        )

    def reward_leaves(self, rollout: Rollout, controls: Mapping[str, Sequence[Sample]]) -> Rollout:
        """The rollout with the outcomes of its decoded leaves."""
        with self._meter.timed("rollout"):
            samples = ended(rollout, self._policy.samples(rollout))
        rewards = dict(self.rewards)
        for name, others in controls.items():
            reward: Any = rewards[name][0]
            rewards[name] = (partial(reward, controls=others), rewards[name][1])
        with self._meter.timed("reward"):
            scored = score(samples, rewards, self._config.run.max_unscored)
        self._meter.scores.append(scored)
        if self._config.reward_scale == "none":
            return write_outcomes(rollout, samples, scored.total)
        weighted = [(scored.parts[name], weight) for name, (_, weight) in self.rewards.items()]
        group = rollout.tree.group[[s.step for s in samples]]
        return write_outcomes(rollout, samples, group_scaled_sum(weighted, group))

    def reward_steps(self, rollout: Rollout) -> Rollout:
        """The rollout with the recipe's step rewards, when it has any."""
        if not self.step_rewards:
            return rollout
        with self._meter.timed("reward"):
            rollout, scored = score_steps(rollout, self.step_rewards)
        self._meter.step_scores.append(scored)
        return rollout

    def run_readings(self, rollout: Rollout, *, seed: int, iteration: int) -> Rollout:
        """The rollout with the fields of the recipe's readings, when it has any."""
        if not self.readings:
            return rollout
        answer = self._task.answer if isinstance(self._task, AnswerGiver) else None
        context = ReadingContext(self._policy, self.outcome, seed, iteration, answer)
        with self._meter.timed("readings"):
            rollout, records = fill(rollout, self.readings, context, self._config.run.max_unscored)
        self._meter.add_readings(records, context.cost)
        return rollout

    def outcome(self, samples: Sequence[Sample]) -> Tensor:
        """(L,) rewards of samples that a reading made; they do not enter the iteration's scores."""
        return score(samples, self.rewards, max_unscored=1.0).total

    def fill_stored(self, rollout: Rollout, recipe: Mapping[str, Any], *, seed: int, iteration: int) -> Rollout:
        """A rollout from disk with what the recipe at hand fills.

        Outcomes are those stored, unless there are none or other rewards are named now; step rewards and readings
        are computed anew.

        Args:
            recipe: what made it.
        Raises:
            ConfigError: a reward compares with other prompts, which stored rollouts do not have.
        """
        if self.differs_from(recipe) or not bool(rollout.tree.is_finished.any()):
            comparing = [k for k, (reward, _) in self.rewards.items() if isinstance(reward, ContrastReward)]
            if comparing:
                raise ConfigError(
                    f"rewards: {comparing[0]} compares with prompts that stored rollouts do not have; write the "
                    "rollouts with it among their rewards (mmrl rollouts)"
                )
            return self.fill(rollout, {}, seed=seed, iteration=iteration)
        nothing = torch.zeros(0, dtype=torch.float64)  # single rewards are not stored, their sum is
        known = rollout.tree.outcome[rollout.tree.is_finished]
        self._meter.scores.append(Scored(known, dict.fromkeys(self.rewards, nothing), {}, {}))
        return self.run_readings(self.reward_steps(rollout), seed=seed, iteration=iteration)

    def differs_from(self, recipe: Mapping[str, Any]) -> bool:
        """Rollouts of `recipe` have the outcomes of other rewards."""
        return recipe.get("rewards", self.names()) != self.names()

    # ---- learning along ---------------------------------------------------------------------------------------

    def learn(self, config: OnlineConfig, loop: Loop) -> None:
        """Train one of the scorers along with the policy.

        Raises:
            ConfigError: it is missing or cannot be trained.
        """
        scorers: dict[str, StepReward | None] = {}
        for name, (reading, _) in self.readings.items():
            if isinstance(reading, ScorerReading):
                scorers[name] = reading.scorer
        scorers |= {name: reward for name, (reward, _) in self.step_rewards.items()}
        self.online = OnlineScorer.of(config, scorers, loop)

    def update(self, rollout: Rollout) -> dict[str, float]:
        """One update of the scorer that learns along, when there is one."""
        if self.online is None:
            return {}
        with self._meter.timed("online"):
            return self.online.update(rollout)


def refusals(
    rewards: Mapping[str, tuple[OutcomeReward, float]], prompts: Sequence[Prompt], limit: float
) -> dict[str, str]:
    """Prompts that a reward will never score, by id, with the reason.

    Raises:
        ConfigError: they are more than `limit` of all.
    """
    reasons: dict[str, str] = {}
    for reward, _ in rewards.values():
        if isinstance(reward, PromptChecker):
            reasons |= {p.id: why for p in prompts if (why := reward.refusal(p)) is not None}
    known = len({p.id for p in prompts})  # training and evaluation may share some
    if len(reasons) > limit * known:
        raise ConfigError(
            f"{len(reasons)} of {known} prompts can never be rewarded (limit run.max_unusable={limit}); the first: "
            f"{next(iter(reasons.values()))}"
        )
    return reasons


def ended(rollout: Rollout, samples: Sequence[Sample]) -> list[Sample]:
    """Without those of leaves that a search left open (tag `open`): nobody knows what they would have come to."""
    if "open" not in rollout.tree.tags:
        return list(samples)
    still_open = rollout.tree.tags["open"].tolist()
    return [s for s in samples if not still_open[s.step]]
