"""One run of a recipe with a policy, put together from parts that each do one job."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmrl.capabilities import (
    Needs,
    ScorerReading,
    begin_iteration,
    build_with,
    model_of,
    refuse_row,
    require,
    require_needs,
)
from mmrl.config import Component
from mmrl.fields import Stage, check_fields
from mmrl.readings.base import keeps_reference
from mmrl.recipe import PolicyConfig
from mmrl.registry import build, find
from mmrl.rollout import BranchPlan, OutcomeReward, Policy, Prompt, Rollout, StepReward, check_prompts
from mmrl.sharding import check_launcher
from mmrl.task import Task, build_readings, build_rewards, build_step_rewards, check_heads, follow_policy, producers
from mmrl.trainers.callback import Callback
from mmrl.trainers.callbacks import callbacks_of
from mmrl.trainers.evaluator import Evaluator
from mmrl.trainers.loop import Loop
from mmrl.trainers.meter import Meter
from mmrl.trainers.preflight import check_plan, preflight
from mmrl.trainers.rewarder import Rewarder, refusals
from mmrl.trainers.sampler import Sampler
from mmrl.trainers.stored import StoredRollouts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demands:
    """What a trainer asks of the other parts of a recipe, checked before anything is loaded.

    reference: keep the policy's initial weights, for losses that compare with them; readings may ask for it too.
    readers: what reads the fields of a rollout. given: fields that are there before anything of the recipe has
        written, see `fields_given`.
    policy, reward: protocols that the policy and every reward have to follow.
    learns: name of the step reward or reading whose scorer learns along, so that its head may be new.
    """

    reference: bool = False
    readers: Sequence[Stage] = ()
    given: Sequence[str] = ()
    policy: Needs = field(default_factory=dict)
    reward: Needs = field(default_factory=dict)
    learns: str = ""


class Run:
    """Policy and task of a recipe, the loop, and the parts of an iteration: sampler, rewarder, evaluator, meter.

    Args:
        policy, task, rewards: in place of those the recipe names.
        callbacks: beside those the recipe names.
    """

    def __init__(
        self,
        config: PolicyConfig,
        policy: Policy | None = None,
        task: Task | None = None,
        rewards: Mapping[str, tuple[OutcomeReward, float]] | None = None,
        demands: Demands | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        demands = demands or Demands()
        self.config = config
        needs = {f"trainer: {config.trainer}": Policy, **demands.policy}
        check_launcher("policies", "policy", config.policy.name)
        self.plan = BranchPlan(config.plan)
        chosen = callbacks_of(config, callbacks)
        check_fields([*producers(config), *demands.readers], demands.given)
        for who, protocol in needs.items() if policy is None else ():  # before task and rewards are made
            refuse_row(who, protocol, find("policies", config.policy.name))
        check_heads(config, demands.learns)
        named: list[tuple[str, str, Component]] = []  # what is made from the recipe
        if policy is None:
            named.append(("policies", "policy", config.policy))
            check_plan(config.policy, self.plan)
        if task is None:
            named.append(("tasks", "task", config.task))
        preflight(config, named)
        self.task: Task = task or build("tasks", "task", config.task.name, config.task.options)
        outcomes = dict(rewards) if rewards is not None else build_rewards(config, self.task)
        for who, protocol in demands.reward.items():
            for name, (reward, _) in outcomes.items():
                require(f"reward {name!r}: {who}", protocol, reward, "rewards")
        every_prompt = [*self.task.prompts, *self.task.eval_prompts]
        refused = refusals(outcomes, every_prompt, config.run.max_unusable)
        config.run.count_epochs(len(self.task.prompts))
        self.policy: Policy = policy or build_with(
            needs, "policies", "policy", config.policy.name, config.policy.options
        )
        outcomes = follow_policy("rewards", outcomes, config.rewards if rewards is None else (), self.policy)
        step_rewards = follow_policy("step_rewards", build_step_rewards(config), config.step_rewards, self.policy)
        readings = follow_policy("readings", build_readings(config), config.readings, self.policy)
        check_prompts(self.task.prompts)
        check_prompts(self.task.eval_prompts)
        costs: list[str] = []
        reference = demands.reference
        for i, r in enumerate(config.readings):
            row = find("readings", r.name)
            require_needs(f"readings.{i}", row, r.options, self.policy, self.task)
            reference = reference or keeps_reference(row, r.options)
            costs += row.facts.get("costs", ())
        if reference:
            self.policy.freeze_reference()
        self.loop = Loop(config, self.policy.model, chosen)
        self.policy.model = self.loop.model
        for component, _ in [*step_rewards.values(), *readings.values()]:
            if (model := model_of(component)) is not None:
                model.to(self.loop.accelerator.device)
        self.stored: StoredRollouts | None = None
        fields = {name: written for name, (_, written) in readings.items()}
        self.meter = Meter(list(outcomes), list(step_rewards), fields, costs, self.loop.all_sum)
        self.sampler = Sampler(self.policy, self.task.prompts, config.run, self.loop, self.meter)
        self.sampler.admission.refuse(refused)
        self.rewarder = Rewarder(config, self.policy, self.task, outcomes, step_rewards, readings, self.meter)
        self.evaluator = Evaluator(
            self.policy, self.task, outcomes, self.sampler.admission, self.loop, self.loop.folder.root / "samples"
        )
        self.begin()

    # ---- an iteration -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin an iteration: forget the last one's measurements and encoded prompts."""
        self._forget_encoded()
        self.meter.clear()

    def rollout(self, iteration: int) -> Rollout:
        """This rank's share of the iteration, sampled or read from disk, with all that the recipe fills."""
        if self.stored is None:
            return self.rewarded(self.sampler.prompts(iteration), iteration)
        rollout, seed = self.stored.batch(iteration), self.config.run.seed
        return self.rewarder.fill_stored(rollout, self.stored.recipe, seed=seed, iteration=iteration)

    def rewarded(self, prompts: Sequence[Prompt], iteration: int, attempt: int = 0) -> Rollout:
        """A rollout of these prompts with all that the recipe fills.

        attempt: counts rollouts of one prompt in one iteration; each draws other noise.
        """
        seed = self.config.run.seed + attempt * 1_000_003
        contrasts = self.rewarder.contrasts(prompts)
        rollout, controls = self.sampler.rollout(prompts, self.plan, contrasts, seed=seed, iteration=iteration)
        return self.rewarder.fill(rollout, controls, seed=seed, iteration=iteration)

    def metrics(self) -> dict[str, float]:
        """What the iteration measured, over all ranks; all of them must call it."""
        return self.meter.metrics(len(self.sampler.admission.bad))

    def read_from(self, folder: Path | None, plan: BranchPlan | None = None) -> None:
        """Take rollouts from disk, when there is a folder, in place of sampling.

        Args:
            plan: the one they must have been sampled by, None = any.
        Raises:
            ValueError: there are none, or this recipe's policy and task could not have made them.
        """
        if folder is None:
            return
        self.stored = self.sampler.open(folder, plan)
        if self.rewarder.differs_from(self.stored.recipe) and self.loop.is_main:
            log.info("the rewards of this recipe are not those stored: every leaf is rewarded anew")

    # ---- around iterations ------------------------------------------------------------------------------------

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Metrics of the policy under eval/."""
        self._forget_encoded()
        return self.evaluator.evaluate(iteration)

    def save_model(self, folder: Path) -> None:
        """The policy in its ecosystem's format; all ranks call it."""
        state = self.loop.full_state()
        if self.loop.is_main:
            self.policy.save(folder, state)

    def _forget_encoded(self) -> None:
        """Let go of the encoded prompts that policy, scorers and readings have kept so far."""
        readings = [reading for reading, _ in self.rewarder.readings.values()]
        scorers: list[StepReward | None] = [scorer for scorer, _ in self.rewarder.step_rewards.values()]
        scorers += [reading.scorer for reading in readings if isinstance(reading, ScorerReading)]
        begin_iteration(self.policy, *scorers, *readings)
