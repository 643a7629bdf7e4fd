"""What an iteration measured: rewards, readings, costs and times, as metrics over all ranks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mmrl.readings import ReadingRecord
from mmrl.rewards.scoring import Scored
from mmrl.rewards.steps import ScoredSteps


class Meter:
    """Collects what the parts of a run note in one iteration.

    Args:
        rewards, step_rewards: names. readings: name -> fields.
        costs: names that are known to every rank, whatever its readings came to.
        all_sum: sums numbers over all ranks.
    """

    def __init__(
        self,
        rewards: Sequence[str],
        step_rewards: Sequence[str],
        readings: Mapping[str, Sequence[str]],
        costs: Sequence[str],
        all_sum: Callable[..., list[float]],
    ) -> None:
        self._rewards, self._step_rewards, self._readings = rewards, step_rewards, readings
        self._costs, self._all_sum = costs, all_sum
        self.clear()

    def clear(self) -> None:
        """Begin an iteration."""
        self.scores: list[Scored] = []  # of every rollout of the iteration
        self.step_scores: list[ScoredSteps] = []
        self.records: list[dict[str, ReadingRecord]] = []
        self.cost: Counter[str] = Counter(dict.fromkeys(self._costs, 0))
        self.seconds: dict[str, float] = {}

    def add_readings(self, records: dict[str, ReadingRecord], cost: Mapping[str, int]) -> None:
        """Note what the readings of a rollout came to, and what they spent."""
        self.records.append(records)
        self.cost.update({k: cost[k] for k in self._costs})

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's wall time to `time/<phase>_s`."""
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, unusable: int) -> dict[str, float]:
        """Rewards and costs of the iteration over all ranks, this rank's times, the unusable prompts so far.

        Empty of rewards and costs when nothing was sampled. All ranks must call it.

        Args:
            unusable: prompts of this rank that cannot be used.
        """
        sums = self._sums() | {"bad": float(unusable)}
        sums = dict(zip(sums, self._all_sum(*sums.values()), strict=True))
        metrics = {f"time/{k}_s": v for k, v in self.seconds.items()} | {"rollout/unusable_prompts": sums["bad"]}
        if leaves := sums.get("cost/leaves"):
            spent = {k[5:]: v for k, v in sums.items() if k.startswith("cost/") and k != "cost/leaves"}
            metrics |= {f"rollout/{k}_per_leaf": v / leaves for k, v in spent.items()}
        if sums["samples"]:
            metrics["reward/unscored_frac"] = 1 - sums["reward/n"] / sums["samples"]
        names = ["reward", *(f"reward/{n}" for n in self._rewards if len(self._rewards) > 1)]
        names += [f"step_reward/{n}" for n in self._step_rewards]
        for name in names:
            if n := sums[f"{name}/n"]:
                mean = sums[f"{name}/sum"] / n
                metrics["reward/mean" if name == "reward" else name] = mean
                if name == "reward":
                    metrics["reward/std"] = max(sums["reward/sq"] / n - mean**2, 0) ** 0.5
        for name, fields in self._readings.items():
            metrics[f"reading/{name}/failed_prompts"] = sums[f"reading/{name}/failed"]
            for key in fields:
                if n := sums[f"reading/{name}/{key}/n"]:
                    metrics[f"reading/{name}/{key}"] = sums[f"reading/{name}/{key}/sum"] / n
        return metrics

    def _sums(self) -> dict[str, float]:
        """Counts and sums of this rank, the same names on every rank."""
        nothing = torch.zeros(0, dtype=torch.float64)
        sums = moments("reward", torch.cat([nothing, *(s.total for s in self.scores)]))
        for name in self._rewards:
            sums |= moments(f"reward/{name}", torch.cat([nothing, *(s.parts[name] for s in self.scores)]))
        for name in self._step_rewards:
            parts = torch.cat([nothing, *(s.parts[name] for s in self.step_scores)])
            sums |= moments(f"step_reward/{name}", parts)
        for name, fields in self._readings.items():
            sums |= reading_sums(name, fields, [r[name] for r in self.records])
        sums |= {f"cost/{k}": float(v) for k, v in self.cost.items()}
        sums["samples"] = float(sum(len(s.total) for s in self.scores))
        return sums


def moments(name: str, x: Tensor) -> dict[str, float]:
    """Count, sum and sum of squares of what is not NaN."""
    x = x[~x.isnan()]
    return {f"{name}/n": float(x.numel()), f"{name}/sum": float(x.sum()), f"{name}/sq": float((x**2).sum())}


def reading_sums(name: str, fields: Sequence[str], records: Sequence[ReadingRecord]) -> dict[str, float]:
    """Prompts set aside, and sum and count of every field, of one reading in one iteration."""
    sums = {f"reading/{name}/failed": float(sum(r.failed_prompts for r in records))}
    for key in fields:
        parts = [r.sums.get(key, (0.0, 0)) for r in records]
        sums[f"reading/{name}/{key}/sum"] = sum(p[0] for p in parts)
        sums[f"reading/{name}/{key}/n"] = float(sum(p[1] for p in parts))
    return sums
