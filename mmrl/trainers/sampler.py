"""From the number of an iteration to a rollout: which prompts it sees, and what is sampled from them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmrl.recipe import RunConfig
from mmrl.rollout import BranchPlan, Policy, Prompt, Rollout, Sample
from mmrl.trainers.data import Admission, prompt_batch
from mmrl.trainers.meter import Meter
from mmrl.trainers.processes import Processes
from mmrl.trainers.stored import StoredRollouts

log = logging.getLogger(__name__)


class Sampler:
    """Samples a policy on this rank's share of an iteration's prompts.

    Args:
        prompts: those of the task.
        meter: notes costs and times.
    """

    def __init__(
        self, policy: Policy, prompts: Sequence[Prompt], run: RunConfig, processes: Processes, meter: Meter
    ) -> None:
        self._policy, self._prompts, self._run = policy, prompts, run
        self._processes, self._meter = processes, meter
        self.admission = Admission(policy.admit, run.max_unusable)

    def prompts(self, iteration: int, among: Sequence[Prompt] | None = None) -> list[Prompt]:
        """This rank's usable prompts of the iteration, of `among` (default the task's)."""
        candidates = self._prompts if among is None else among
        chosen = prompt_batch(candidates, self._run.prompts_per_iteration, iteration, self._run.seed)
        return self.admission.fill(self._processes.share(chosen), self._processes.share(candidates))

    def others(self) -> list[Prompt]:
        """This rank's share of all prompts that are not known to be unusable."""
        return [p for p in self._processes.share(self._prompts) if p.id not in self.admission.bad]

    def rollout(
        self,
        prompts: Sequence[Prompt],
        plan: BranchPlan,
        contrasts: Mapping[str, Sequence[Prompt]],
        *,
        seed: int,
        iteration: int,
    ) -> tuple[Rollout, dict[str, list[Sample]]]:
        """A rollout, and samples of the prompts that rewards compare with.

        Args:
            contrasts: name of a reward -> the other prompts that it compares with; they get half as many leaves.
        """
        controls: dict[str, list[Sample]] = {}
        with self._meter.timed("rollout"):
            rollout = self._policy.rollout(prompts, plan, seed=seed, iteration=iteration)
            few = BranchPlan({0: max(1, plan.leaves // 2)}, plan.max_leaves)
            for name, others in contrasts.items():
                beside = self._policy.rollout(others, few, seed=seed, iteration=iteration)
                # costs are told per trained leaf
                self._meter.cost.update({k: n for k, n in beside.counts.items() if k != "leaves"})
                controls[name] = self._policy.samples(beside)
        self._meter.cost.update(rollout.counts)
        return rollout, controls

    def open(self, folder: Path, plan: BranchPlan | None) -> StoredRollouts:
        """Rollouts on disk in place of sampled ones, checked against the task and the policy.

        Args:
            plan: the one they must have been sampled by, None = any.
        Raises:
            ValueError: there are none, or this policy and task could not have made them.
        """
        run, acc = self._run, self._processes.accelerator
        stored = StoredRollouts(
            folder, run.prompts_per_iteration, seed=run.seed, rank=acc.process_index, world=acc.num_processes
        )
        stored.check(self._policy, self._prompts, plan)
        if stored.left_out and self._processes.is_main:
            log.warning("%d prompts of the stored rollouts are too few for a batch and left out", stored.left_out)
        return stored
