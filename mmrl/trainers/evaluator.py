"""Evaluation of a policy: rewards, judges and diversity on prompts that are not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from mmrl.capabilities import SampleJudge
from mmrl.report.artifacts import save_samples
from mmrl.rewards import score
from mmrl.rollout import OutcomeReward, Policy
from mmrl.task import Task
from mmrl.trainers.data import Admission
from mmrl.trainers.processes import Processes

EVAL_SEED = 20_000_003  # evaluation noise is the same in every run, whatever run.seed


class Evaluator:
    """Measures a policy on the evaluation prompts of a task.

    Args:
        rewards: name -> (reward, weight).
        admission: keeps prompts that the policy cannot take away.
        folder: where samples go, a folder per evaluation.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        rewards: Mapping[str, tuple[OutcomeReward, float]],
        admission: Admission,
        processes: Processes,
        folder: Path,
    ) -> None:
        self._policy, self._task, self._rewards, self._admission = policy, task, rewards, admission
        self._processes, self._folder = processes, folder

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Reward, judges and diversity, side by side; samples go to the folder.

        Every sample is scored once, by the rank that made it, and the judges see them all once, on the main process.
        """
        prompts, processes = list(self._task.eval_prompts), self._processes
        own = self._policy.generate(self._admission.good(processes.share(prompts)), seed=EVAL_SEED)
        scored = score(own, self._rewards, max_unscored=1.0)
        # per sample its total and, in the order of the rewards, what each of them gave
        numbers = torch.stack([scored.total, *scored.parts.values()], 1).tolist()
        rows = processes.gather(list(zip(own, numbers, strict=True)))
        place = {p.id: i for i, p in enumerate(prompts)}
        rows.sort(key=lambda row: place[row[0].prompt.id])  # the order of one process, whatever the number of ranks
        samples = [sample for sample, _ in rows]
        columns = torch.tensor([n for _, n in rows], dtype=torch.float64).reshape(len(rows), 1 + len(self._rewards))
        total, *parts = columns.T.contiguous()
        metrics = {"eval/reward": float(total.nanmean())}
        if len(parts) > 1:
            metrics |= {f"eval/reward/{k}": float(v.nanmean()) for k, v in zip(self._rewards, parts, strict=True)}
        verdicts: Mapping[str, float] = {}
        if processes.is_main and isinstance(self._task, SampleJudge):
            verdicts = self._task.judges(samples)
        metrics |= {f"eval/{k}": v for k, v in processes.from_main(verdicts).items()}
        if processes.is_main:
            save_samples(samples, total.tolist(), self._folder / f"{iteration:06d}")
        return metrics
