"""What trainers that sample share: an iteration's prompts, rewarded rollouts, evaluation, rollouts on disk."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from rich.progress import track
from torch import Tensor

from mmrl.capabilities import (
    AnswerGiver,
    ContrastReward,
    Needs,
    PromptChecker,
    SampleJudge,
    ScorerReading,
    begin_iteration,
    build_with,
    model_of,
    refuse_row,
    require,
    require_needs,
)
from mmrl.config import ConfigError
from mmrl.fields import Stage, check_fields
from mmrl.readings import ReadingContext, ReadingRecord, fill
from mmrl.readings.base import keeps_reference
from mmrl.recipe import PolicyConfig
from mmrl.registry import build, find
from mmrl.report.artifacts import save_samples, save_tree
from mmrl.rewards import score
from mmrl.rewards.scoring import Scored, write_outcomes
from mmrl.rewards.steps import ScoredSteps, score_steps
from mmrl.rollout import BranchPlan, OutcomeReward, Policy, Prompt, Rollout, Sample, StepReward, check_prompts
from mmrl.rollout_folder import RolloutFolder
from mmrl.sharding import check_launcher
from mmrl.trainers.data import Admission, prompt_batch
from mmrl.trainers.loop import Loop
from mmrl.trainers.stored import StoredRollouts
from mmrl.trainers.task import Task, build_readings, build_rewards, build_step_rewards, check_heads, producers
from mmrl.workdir import WorkDir, publish

log = logging.getLogger(__name__)

EVAL_SEED = 20_000_003  # evaluation noise is the same in every run, whatever run.seed


class Rollouts:
    """Task, policy, rewards and loop of one run, and what an iteration of it measured.

    Args:
        policy, task, rewards: in place of those the recipe names.
        reference: keep the policy's initial weights, for losses that compare with them; readings may ask for it too.
        readers: what reads the fields of a rollout, checked against what writes them before anything is loaded.
        given: fields that are there before anything of the recipe has written, see `fields_given`.
        policy_needs, reward_needs: protocols that the policy and every reward have to follow, asked for before the
            policy is made where its class is known.
        learns: name of the step reward or reading whose scorer learns along, so that its head may be new.
    """

    def __init__(
        self,
        config: PolicyConfig,
        policy: Policy | None = None,
        task: Task | None = None,
        rewards: Mapping[str, tuple[OutcomeReward, float]] | None = None,
        *,
        reference: bool = False,
        readers: Sequence[Stage] = (),
        given: Sequence[str] = (),
        policy_needs: Needs | None = None,
        reward_needs: Needs | None = None,
        learns: str = "",
    ) -> None:
        self.config = config
        policy_needs = {f"trainer: {config.trainer}": Policy, **(policy_needs or {})}
        check_launcher("policies", "policy", config.policy.name)
        check_fields([*producers(config), *readers], given)
        for who, protocol in policy_needs.items() if policy is None else ():  # before task and rewards are made
            refuse_row(who, protocol, find("policies", config.policy.name))
        check_heads(config, learns)
        self.task: Task = task or build("tasks", "task", config.task.name, config.task.options)
        self.rewards = dict(rewards) if rewards is not None else build_rewards(config, self.task)
        for who, protocol in (reward_needs or {}).items():
            for name, (reward, _) in self.rewards.items():
                require(f"reward {name!r}: {who}", protocol, reward, "rewards")
        useless = self._useless_prompts()
        named = config.policy
        self.policy: Policy = policy or build_with(policy_needs, "policies", "policy", named.name, named.options)
        self.step_rewards = build_step_rewards(config)
        self.readings = build_readings(config)
        check_prompts(self.task.prompts)
        check_prompts(self.task.eval_prompts)
        costs: list[str] = []
        for i, r in enumerate(config.readings):
            row = find("readings", r.name)
            require_needs(f"readings.{i}", row, r.options, self.policy, self.task)
            reference = reference or keeps_reference(row, r.options)
            costs += row.facts.get("costs", ())
        self._reading_costs = costs  # known to every rank, whatever its readings came to
        if reference:
            self.policy.freeze_reference()
        self.loop = Loop(config, self.policy.model)
        self.policy.model = self.loop.model
        for component, _ in [*self.step_rewards.values(), *self.readings.values()]:
            if (model := model_of(component)) is not None:
                model.to(self.loop.accelerator.device)
        self.admission = Admission(self.policy.admit, config.run.max_unusable)
        self.admission.refuse(useless)
        self.clear()

    def _useless_prompts(self) -> dict[str, str]:
        """Prompts that a reward will never score, by id, with the reason.

        Raises:
            ConfigError: they are more than `run.max_unusable` of all.
        """
        prompts = [*self.task.prompts, *self.task.eval_prompts]
        reasons: dict[str, str] = {}
        for reward, _ in self.rewards.values():
            if isinstance(reward, PromptChecker):
                reasons |= {p.id: why for p in prompts if (why := reward.refusal(p)) is not None}
        known = len({p.id for p in prompts})  # training and evaluation may share some
        if len(reasons) > self.config.run.max_unusable * known:
            raise ConfigError(
                f"{len(reasons)} of {known} prompts can never be rewarded (limit run.max_unusable="
                f"{self.config.run.max_unusable}); the first: {next(iter(reasons.values()))}"
            )
        return reasons

    def clear(self) -> None:
        """Begin an iteration: forget the last one's scores, costs, times and encoded prompts."""
        self._forget_encoded()
        self.scores: list[Scored] = []  # of every rollout of the iteration
        self.step_scores: list[ScoredSteps] = []
        self.records: list[dict[str, ReadingRecord]] = []
        self.cost: Counter[str] = Counter(dict.fromkeys(self._reading_costs, 0))
        self.seconds: dict[str, float] = {}

    def _forget_encoded(self) -> None:
        """Let go of the encoded prompts that policy, scorers and readings have kept so far."""
        readings = [reading for reading, _ in self.readings.values()]
        scorers: list[StepReward | None] = [scorer for scorer, _ in self.step_rewards.values()]
        scorers += [reading.scorer for reading in readings if isinstance(reading, ScorerReading)]
        begin_iteration(self.policy, *scorers, *readings)

    # ---- sampling ---------------------------------------------------------------------------------------------

    def mine(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """This rank's share of `prompts`."""
        acc = self.loop.accelerator
        return list(prompts)[acc.process_index :: acc.num_processes]

    def prompts(self, iteration: int, among: Sequence[Prompt] | None = None) -> list[Prompt]:
        """This rank's usable prompts of the iteration, of `among` (default the task's)."""
        run, known = self.config.run, self.task.prompts if among is None else among
        chosen = prompt_batch(known, run.prompts_per_iteration, iteration, run.seed)
        return self.admission.fill(self.mine(chosen), self.mine(known))

    def rewarded(self, prompts: Sequence[Prompt], plan: BranchPlan, iteration: int, attempt: int = 0) -> Rollout:
        """A rollout with the outcomes of its leaves and the rewards of its steps; adds to the iteration's scores.

        attempt: counts rollouts of one prompt in one iteration; each draws other noise.
        """
        with self.timed("rollout"):
            seed = self.config.run.seed + attempt * 1_000_003
            rollout = self.policy.rollout(prompts, plan, seed=seed, iteration=iteration)
            controls = self._controls(prompts, plan, seed=seed, iteration=iteration)
        self.cost.update(rollout.counts)
        rollout = self.reward_steps(self.reward_leaves(rollout, controls))
        return self.fill(rollout, seed, iteration)

    def _controls(
        self, prompts: Sequence[Prompt], plan: BranchPlan, *, seed: int, iteration: int
    ) -> dict[str, list[Sample]]:
        """For each reward that compares with other prompts, samples of those; see `ContrastReward`."""
        out: dict[str, list[Sample]] = {}
        few = BranchPlan({0: max(1, plan.leaves // 2)}, plan.max_leaves)
        for name, (reward, _) in self.rewards.items():
            others = reward.controls(prompts) if isinstance(reward, ContrastReward) else []
            if not others:
                continue
            rollout = self.policy.rollout(others, few, seed=seed, iteration=iteration)
            self.cost.update({k: n for k, n in rollout.counts.items() if k != "leaves"})  # per trained leaf
            out[name] = self.policy.samples(rollout)
        return out

    def reward_leaves(self, rollout: Rollout, controls: Mapping[str, Sequence[Sample]] | None = None) -> Rollout:
        """The rollout with the outcomes of its decoded leaves. controls: see `_controls`."""
        with self.timed("rollout"):
            samples = ended(rollout, self.policy.samples(rollout))
        rewards = dict(self.rewards)
        for name, others in (controls or {}).items():
            reward: Any = rewards[name][0]
            rewards[name] = (partial(reward, controls=others), rewards[name][1])
        with self.timed("reward"):
            scored = score(samples, rewards, self.config.run.max_unscored)
        self.scores.append(scored)
        return write_outcomes(rollout, samples, scored.total)

    def reward_steps(self, rollout: Rollout) -> Rollout:
        """The rollout with the recipe's step rewards, when it has any."""
        if not self.step_rewards:
            return rollout
        with self.timed("reward"):
            rollout, scored = score_steps(rollout, self.step_rewards)
        self.step_scores.append(scored)
        return rollout

    def fill(self, rollout: Rollout, seed: int, iteration: int) -> Rollout:
        """The rollout with the fields of the recipe's readings, when it has any."""
        if not self.readings:
            return rollout
        answer = self.task.answer if isinstance(self.task, AnswerGiver) else None
        context = ReadingContext(self.policy, self._outcome, seed, iteration, answer)
        with self.timed("readings"):
            rollout, records = fill(rollout, self.readings, context, self.config.run.max_unscored)
        self.cost.update({k: context.cost[k] for k in self._reading_costs})
        self.records.append(records)
        return rollout

    def _outcome(self, samples: Sequence[Sample]) -> Tensor:
        """(L,) rewards of samples that a reading made; they do not enter the iteration's scores."""
        return score(samples, self.rewards, max_unscored=1.0).total

    def sampled(self, plan: BranchPlan, iteration: int) -> Rollout:
        """This rank's share of the iteration's prompts, rolled out and rewarded."""
        return self.rewarded(self.prompts(iteration), plan, iteration)

    # ---- rollouts on disk -------------------------------------------------------------------------------------

    def open_stored(self, folder: Path | None, plan: BranchPlan | None = None) -> StoredRollouts | None:
        """The rollouts on disk that a recipe names, checked against its task and policy; None when it names none.

        Args:
            plan: the one they must have been sampled by, None = any.
        Raises:
            ValueError: there are none, or this recipe's policy and task could not have made them.
        """
        if folder is None:
            return None
        run, acc = self.config.run, self.loop.accelerator
        stored = StoredRollouts(
            folder, run.prompts_per_iteration, seed=run.seed, rank=acc.process_index, world=acc.num_processes
        )
        stored.check(self.policy, self.task.prompts, plan)
        if stored.left_out and self.loop.is_main:
            log.warning("%d prompts of the stored rollouts are too few for a batch and left out", stored.left_out)
        if self._others_rewarded(stored) and self.loop.is_main:
            log.info("the rewards of this recipe are not those stored: every leaf is rewarded anew")
        return stored

    def read(self, stored: StoredRollouts, iteration: int) -> Rollout:
        """This rank's share of the iteration's batch, with the outcomes of its leaves and the rewards of its steps.

        Outcomes are those stored, unless there are none or the recipe names other rewards; step rewards that the
        recipe names are computed anew.
        """
        rollout = stored.batch(iteration)
        if self._others_rewarded(stored) or not bool(rollout.tree.is_finished.any()):
            self._need_no_controls()
            return self._filled(self.reward_steps(self.reward_leaves(rollout)), iteration)
        nothing = torch.zeros(0, dtype=torch.float64)  # single rewards are not stored, their sum is
        known = rollout.tree.outcome[rollout.tree.is_finished]
        self.scores.append(Scored(known, dict.fromkeys(self.rewards, nothing), {}, {}))
        return self._filled(self.reward_steps(rollout), iteration)

    def _filled(self, rollout: Rollout, iteration: int) -> Rollout:
        return self.fill(rollout, self.config.run.seed, iteration)

    def _need_no_controls(self) -> None:
        comparing = [k for k, (reward, _) in self.rewards.items() if isinstance(reward, ContrastReward)]
        if comparing:
            raise ConfigError(
                f"rewards: {comparing[0]} compares with prompts that stored rollouts do not have; write the rollouts "
                "with it among their rewards (mmrl rollouts)"
            )

    def _others_rewarded(self, stored: StoredRollouts) -> bool:
        return stored.recipe.get("rewards", self.reward_names()) != self.reward_names()

    def reward_names(self) -> list[dict[str, Any]]:
        """Name, weight and options of every reward."""
        options = {r.name: r.options for r in self.config.rewards}
        return [{"name": k, "weight": w, **options.get(k, {})} for k, (_, w) in self.rewards.items()]

    # ---- evaluation -------------------------------------------------------------------------------------------

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward, judges and diversity on the evaluation prompts, side by side; samples go to the run folder.

        Every sample is scored once, by the rank that made it, and the judges see them all once, on the main process.
        """
        self._forget_encoded()
        prompts, world = list(self.task.eval_prompts), self.loop.accelerator.num_processes
        own = self.policy.generate(self.admission.good(self.mine(prompts)), seed=EVAL_SEED)
        scored = score(own, self.rewards, max_unscored=1.0)
        # per sample its total and, in the order of `rewards`, what each reward gave
        numbers = torch.stack([scored.total, *scored.parts.values()], 1).tolist()
        rows = list(zip(own, numbers, strict=True))
        if world > 1:
            rows = gather_object(rows)
        place = {p.id: i for i, p in enumerate(prompts)}
        rows.sort(key=lambda row: place[row[0].prompt.id])  # the order of one process, whatever the number of ranks
        samples = [sample for sample, _ in rows]
        columns = torch.tensor([n for _, n in rows], dtype=torch.float64).reshape(len(rows), 1 + len(self.rewards))
        total, *parts = columns.T.contiguous()
        metrics = {"eval/reward": float(total.nanmean())}
        if len(parts) > 1:
            metrics |= {f"eval/reward/{k}": float(v.nanmean()) for k, v in zip(self.rewards, parts, strict=True)}
        verdicts: list[Mapping[str, float]] = [{}]
        if self.loop.is_main and isinstance(self.task, SampleJudge):
            verdicts = [self.task.judges(samples)]
        if world > 1:
            broadcast_object_list(verdicts)
        metrics |= {f"eval/{k}": v for k, v in verdicts[0].items()}
        if self.loop.is_main:
            save_samples(samples, total.tolist(), self.loop.folder.root / "samples" / f"{iteration:06d}")
        return metrics

    # ---- records ----------------------------------------------------------------------------------------------

    def save_model(self) -> None:
        """The trained model in its ecosystem's format, under model/."""
        state = self.loop.full_state()  # on all ranks
        if self.loop.is_main:
            with publish(self.loop.folder.root / "model") as part:
                self.policy.save(part, state)

    def keep_tree(self, rollout: Rollout, mark: Tensor, iteration: int) -> None:
        """The tree of the first prompt, with a number (N,) per step, of the first and the last iteration."""
        names = {self.config.run.iterations - 1: "last", 0: "first"}
        if self.loop.is_main and iteration in names:
            folder = self.loop.folder.root / "trees" / names[iteration]
            save_tree(rollout, mark, self.policy.describe, folder)

    def metrics(self) -> dict[str, float]:
        """Rewards and costs of the iteration over all ranks, this rank's times, the unusable prompts so far.

        Empty of rewards and costs when nothing was sampled. All ranks must call it.
        """
        sums: dict[str, float] = {}
        nothing = torch.zeros(0, dtype=torch.float64)
        sums |= moments("reward", torch.cat([nothing, *(s.total for s in self.scores)]))
        for name in self.rewards:
            sums |= moments(f"reward/{name}", torch.cat([nothing, *(s.parts[name] for s in self.scores)]))
        for name in self.step_rewards:
            parts = torch.cat([nothing, *(s.parts[name] for s in self.step_scores)])
            sums |= moments(f"step_reward/{name}", parts)
        for name, (_, fields) in self.readings.items():
            sums |= _reading_sums(name, fields, [r[name] for r in self.records])
        sums |= {f"cost/{k}": float(v) for k, v in self.cost.items()}
        sums["samples"] = float(sum(len(s.total) for s in self.scores))
        sums["bad"] = float(len(self.admission.bad))
        sums = dict(zip(sums, self.loop.all_sum(*sums.values()), strict=True))
        metrics = {f"time/{k}_s": v for k, v in self.seconds.items()} | {"rollout/unusable_prompts": sums["bad"]}
        if leaves := sums.get("cost/leaves"):
            spent = {k[5:]: v for k, v in sums.items() if k.startswith("cost/") and k != "cost/leaves"}
            metrics |= {f"rollout/{k}_per_leaf": v / leaves for k, v in spent.items()}
        if sums["samples"]:
            metrics["reward/unscored_frac"] = 1 - sums["reward/n"] / sums["samples"]
        names = ["reward", *(f"reward/{n}" for n in self.rewards if len(self.rewards) > 1)]
        names += [f"step_reward/{n}" for n in self.step_rewards]
        for name in names:
            if n := sums[f"{name}/n"]:
                mean = sums[f"{name}/sum"] / n
                metrics["reward/mean" if name == "reward" else name] = mean
                if name == "reward":
                    metrics["reward/std"] = max(sums["reward/sq"] / n - mean**2, 0) ** 0.5
        for name, (_, fields) in self.readings.items():
            metrics[f"reading/{name}/failed_prompts"] = sums[f"reading/{name}/failed"]
            for key in fields:
                if n := sums[f"reading/{name}/{key}/n"]:
                    metrics[f"reading/{name}/{key}"] = sums[f"reading/{name}/{key}/sum"] / n
        return metrics

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to `time/<phase>_s`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def ended(rollout: Rollout, samples: Sequence[Sample]) -> list[Sample]:
    """Without those of leaves that a search left open (tag `open`): nobody knows what they would have come to."""
    if "open" not in rollout.tree.tags:
        return list(samples)
    still_open = rollout.tree.tags["open"].tolist()
    return [s for s in samples if not still_open[s.step]]


def moments(name: str, x: Tensor) -> dict[str, float]:
    """Count, sum and sum of squares of what is not NaN."""
    x = x[~x.isnan()]
    return {f"{name}/n": float(x.numel()), f"{name}/sum": float(x.sum()), f"{name}/sq": float((x**2).sum())}


def _reading_sums(name: str, fields: Sequence[str], records: Sequence[ReadingRecord]) -> dict[str, float]:
    """Prompts set aside, and sum and count of every field, of one reading in one iteration."""
    sums = {f"reading/{name}/failed": float(sum(r.failed_prompts for r in records))}
    for key in fields:
        parts = [r.sums.get(key, (0.0, 0)) for r in records]
        sums[f"reading/{name}/{key}/sum"] = sum(p[0] for p in parts)
        sums[f"reading/{name}/{key}/n"] = float(sum(p[1] for p in parts))
    return sums


def store_rollouts(
    rollouts: Rollouts, plan: BranchPlan, folder: str | Path, iterations: int, *, model: str = ""
) -> list[Path]:
    """Sample and reward `iterations` batches of prompts and save each below `folder`, one folder per rank and batch.

    They hold everything that GRPO, step rewards and preferences need. Those that are there already are kept, so that
    a call that was cut short can be repeated; `recipe.json` beside them says what made them.

    Args:
        model: which weights sample, where the recipe's `policy.model` does not say it all.
    Returns:
        this rank's folders.
    Raises:
        ConfigError: the folder has rollouts of another recipe or of an unknown one, or another process writes into it.
    """
    loop = rollouts.loop
    with loop.owning(WorkDir(Path(folder))):
        store = RolloutFolder(folder, recipe_record(rollouts, plan) | {"model": model}, write=loop.is_main)
        loop.accelerator.wait_for_everyone()
        made, rank = [], loop.accelerator.process_index
        for i in track(range(iterations), description="rollouts", disable=not loop.is_main):
            made.append(store.place(i, rank))
            complete = (made[-1] / "rollout.json").exists()
            if loop.all_max(float(not complete))[0]:  # engines sample on all ranks or on none
                rollouts.clear()
                store.save(rollouts.sampled(plan, i), i, rank)
        loop.accelerator.wait_for_everyone()
    return made


def recipe_record(rollouts: Rollouts, plan: BranchPlan) -> dict[str, Any]:
    """What decides the contents of stored rollouts, as JSON values."""
    c, run = rollouts.config, rollouts.config.run
    return json.loads(json.dumps({
        "task": c.task.model_dump(mode="json"), "policy": c.policy.model_dump(mode="json"),
        "plan": {str(d): k for d, k in sorted(plan.factors.items())}, "rewards": rollouts.reward_names(),
        "step_rewards": [r.model_dump(mode="json") for r in c.step_rewards], "seed": run.seed,
        "prompts_per_iteration": run.prompts_per_iteration, "processes": rollouts.loop.accelerator.num_processes,
    }))  # fmt: skip
