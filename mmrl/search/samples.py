"""Best of k per step and best of n whole samples, for policies whose steps are no texts (denoising).

A row of `sample_searches` grows them, since only the package of a policy knows its steps; here they are verified and
compared at stated cost. One pool of n samples per prompt and k says what every smaller number would have given.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mmrl.rewards.scoring import score
from mmrl.rollout import BranchPlan, OutcomeReward, Policy, Prompt, Rollout, Sample, check_prompts
from mmrl.rollout_folder import RolloutFolder
from mmrl.search import curves
from mmrl.search.core import best
from mmrl.search.run import OTHER, RECORD, bar
from mmrl.workdir import WorkDir, write_json, write_lines

RULES = (
    "reward: expected verdict of the sample that the scorer ranks first among n of the pool, over all choices of n; "
    "bound: of the best one by the verdict itself. judges: on one pick per prompt, among its first n samples. gain: "
    "reward less that of one sample with k = 1, prompt by prompt. Intervals: 95 % percentile bootstrap over prompts. "
    "cost: per prompt."
)


@dataclass(frozen=True)
class SearchResult:
    """The samples that a search returns, prompt by prompt.

    samples: n independent ones per prompt. scores: the scorer's number for each; higher is better.
    policy_calls: network rows, summed. scorer_calls: candidates scored on the way, without the `scores`.
    rollout: the tree that was grown, sample j of prompt p as its prompt p n + j, with the candidates beside those that
        went on; `Sample.step` are its leaves.
    """

    samples: list[list[Sample]]
    scores: list[list[float]]
    policy_calls: int
    scorer_calls: int
    rollout: Rollout | None = None


class SampleSearch(Protocol):
    """A row of `sample_searches`: n samples per prompt, the best of k candidates by `scorer` going on at each step.

    k = 1 is plain sampling. Random numbers depend on (seed, prompt id) alone. Its facts `policy` and `scorer` are the
    protocols that policy and scorer follow. Raises ValueError: a scorer or a sampling that does not fit.
    """

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], scorer: Any, *, n: int, k: int, seed: int
    ) -> SearchResult: ...


@dataclass
class _Pool:
    """The samples of all prompts for one k."""

    scores: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    picks: dict[int, list[Sample]] = field(default_factory=dict)  # n -> the best of the first n of each prompt
    policy_calls: int = 0
    scorer_calls: int = 0
    seconds: float = 0.0


def search_samples(
    prompts: Sequence[Prompt],
    policy: Policy,
    search: SampleSearch,
    scorer: Any,
    verifier: OutcomeReward,
    *,
    folder: Path,
    method: str = "best_of_k",
    n: int = 8,
    k: Sequence[int] = (4,),
    judges: Callable[[Sequence[Sample]], Mapping[str, float]] | None = None,
    seed: int = 0,
    prompts_per_batch: int = 64,
    max_unscored: float = 0.2,
    about: Mapping[str, Any] | None = None,
    rollouts: RolloutFolder | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Search with every k (and with 1), write results.jsonl and report.json, and return the report.

    reward, gain, bound, judges, cost: name of the way -> numbers; `generate` is the policy's evaluation sample,
    `n4/k2` the best of 4 samples that went on with the best of 2 candidates at each step. See `RULES`.

    Args:
        search, method: a row of `sample_searches`, and its name. scorer: what the row takes.
        verifier: any number per sample; None leaves its prompt out, counted.
        n: samples per prompt; smaller numbers 1, 2, 4, .. come from the same pool.
        judges: numbers on a set of samples that show whether the scorer is being exploited.
        about: JSON values that name policy and scorer; a folder made with others is refused.
        rollouts: where the trees of the largest k go, verdicts as outcomes and the scores at their ends as values; a
            batch per sample, since each of a prompt's samples began with noise of its own.

    Raises:
        ValueError: n or a k below 1, no prompts, the folder holds another search, or a sampling without
            candidates.
        RewardError: more than `max_unscored` of the samples of a batch have no verdict.
    """
    if not prompts or n < 1 or any(x < 1 for x in k):
        raise ValueError(f"{method}: n={n} and k={list(k)} must be at least 1, and there must be prompts")
    check_prompts(prompts)
    tried = sorted({1, *k})
    settings = {"n": n, "k": list(k)}
    record = {"format": 1, "method": method, "settings": settings, "seed": seed, "about": dict(about or {})}
    pools = {x: _Pool() for x in tried}
    plain = _Pool()
    with WorkDir(folder).owned() as work, bar(len(prompts), 0, progress) as advance:
        work.identify(RECORD, record, OTHER)
        if rollouts is not None:
            rollouts.keep(())
        for i in range(0, len(prompts), prompts_per_batch):
            batch = prompts[i : i + prompts_per_batch]
            _generate(plain, policy, batch, verifier, seed, max_unscored)
            for x, pool in pools.items():
                found, verdicts = _fill(
                    pool, partial(search, policy), batch, scorer, verifier, (n, x, seed), max_unscored
                )
                if rollouts is not None and x == tried[-1]:
                    for rollout in _trees(found, verdicts, batch, n, method):
                        rollouts.append(rollout)
            advance(len(batch))
        rows = _result_rows(prompts, plain, pools)
        write_lines(folder / "results.jsonl", map(json.dumps, rows))
        calls = policy.forecast(BranchPlan({})).independent_calls
        numbers = _measure(plain, pools, calls, judges, seed)
        report = record | {"prompts": len(prompts), **numbers, "rules": RULES}
        write_json(folder / "report.json", report)
    return report


def _generate(
    pool: _Pool, policy: Policy, prompts: Sequence[Prompt], verifier: OutcomeReward, seed: int, limit: float
) -> None:
    start = time.perf_counter()
    samples = policy.generate(prompts, seed=seed)
    pool.seconds += time.perf_counter() - start
    pool.rewards += [[x] for x in _verdicts(samples, verifier, limit)]
    pool.picks.setdefault(1, []).extend(samples)


def _fill(
    pool: _Pool,
    search: Callable[..., SearchResult],
    prompts: Sequence[Prompt],
    scorer: Any,
    verifier: OutcomeReward,
    how: tuple[int, int, int],
    limit: float,
) -> tuple[SearchResult, list[float]]:
    """Add the samples of some prompts; returns them with their verdicts. how: n, k, seed."""
    n, k, seed = how
    start = time.perf_counter()
    found = search(prompts, scorer, n=n, k=k, seed=seed)
    pool.seconds += time.perf_counter() - start
    verdicts = _verdicts([s for own in found.samples for s in own], verifier, limit)
    pool.scores += found.scores
    pool.rewards += [verdicts[i : i + n] for i in range(0, len(verdicts), n)]
    pool.policy_calls += found.policy_calls
    pool.scorer_calls += found.scorer_calls
    for m in curves.sizes(n):
        picks = [own[best(s[:m])] for own, s in zip(found.samples, found.scores, strict=True)]
        pool.picks.setdefault(m, []).extend(picks)
    return found, verdicts


def _trees(
    found: SearchResult, verdicts: Sequence[float], prompts: Sequence[Prompt], n: int, method: str
) -> list[Rollout]:
    """Of each of the n samples, the trees of all prompts."""
    if found.rollout is None:
        raise ValueError("this search does not return the tree that it grew; leave `rollouts` out")
    tree = found.rollout.tree
    leaves = torch.tensor([s.step for own in found.samples for s in own])
    value = tree.value.clone()
    value[leaves] = torch.tensor([x for own in found.scores for x in own], dtype=torch.float64)
    tree = tree.with_outcomes(leaves, torch.tensor(verdicts, dtype=torch.float64)).replace(value=value)
    about = dict(found.rollout.about) | {"grown_by": method}
    whole = replace(found.rollout, tree=tree, about=about)
    parts = [whole.select(range(j, len(whole.prompts), n)) for j in range(n)]
    return [replace(part, prompts=list(prompts)) for part in parts]


def _verdicts(samples: Sequence[Sample], verifier: OutcomeReward, limit: float) -> list[float]:
    return list(score(samples, {"verifier": (verifier, 1.0)}, limit).total.tolist())


def _result_rows(prompts: Sequence[Prompt], plain: _Pool, pools: Mapping[int, _Pool]) -> Iterator[dict[str, Any]]:
    """A row per prompt; null stands for a missing verdict."""
    for i, p in enumerate(prompts):
        row: dict[str, Any] = {"id": p.id, "generate": _known(plain.rewards[i])[0]}
        for k, pool in pools.items():
            row[f"k{k}"] = {"scores": pool.scores[i], "rewards": _known(pool.rewards[i])}
        yield row


def _known(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(x) else x for x in values]


def _measure(
    plain: _Pool, pools: Mapping[int, _Pool], calls: int, judges: Callable[..., Mapping[str, float]] | None, seed: int
) -> dict[str, Any]:
    """The report's tables. calls: network rows of one sample of `generate`."""
    every = [plain, *pools.values()]
    good = [i for i in range(len(plain.rewards)) if all(np.isfinite(p.rewards[i]).all() for p in every)]
    sizes = curves.sizes(len(pools[1].scores[0]))
    names, columns, bounds = ["generate"], [_take(plain.rewards, good)], [_take(plain.rewards, good)]
    judged = {"generate": dict(judges(plain.picks[1])) if judges else {}}
    prompts = len(plain.rewards)
    cost = {"generate": {"policy_calls": calls, "scorer_calls": 0, "wall_s": plain.seconds / prompts}}
    for k, pool in pools.items():
        scores, rewards = ([rows[i] for i in good] for rows in (pool.scores, pool.rewards))
        columns.append(curves.best_of_k(scores, rewards, sizes))
        bounds.append(curves.best_of_k(rewards, rewards, sizes))
        for m in sizes:
            names.append(f"n{m}/k{k}")
            judged[names[-1]] = dict(judges(pool.picks[m])) if judges else {}
            cost[names[-1]] = _cost(pool, m, prompts)
    table, bound = np.concatenate(columns, 1), np.concatenate(bounds, 1)
    single = table[:, [names.index("n1/k1")]]
    return {
        "reward": _intervals(names, table, seed), "gain": _intervals(names, table - single, seed),
        "bound": dict(zip(names, bound.mean(0).tolist(), strict=True)), "judges": judged, "cost": cost,
        "unscored_prompts": prompts - len(good),
    }  # fmt: skip


def _take(rows: Sequence[Sequence[float]], good: Sequence[int]) -> curves.Floats:
    if not good:
        raise ValueError("every prompt has a sample without verdict, so nothing can be compared; mend the verifier")
    return np.array([rows[i] for i in good], np.float64)


def _cost(pool: _Pool, m: int, prompts: int) -> dict[str, float]:
    """Of m samples of a prompt, and of ranking them, which one sample does not need."""
    share = m / (prompts * len(pool.scores[0]))
    return {
        "policy_calls": pool.policy_calls * share, "scorer_calls": pool.scorer_calls * share + (m if m > 1 else 0),
        "wall_s": pool.seconds * share,
    }  # fmt: skip


def _intervals(names: Sequence[str], table: curves.Floats, seed: int) -> dict[str, dict[str, float]]:
    columns = zip(*curves.mean_interval(table, seed=seed), strict=True)
    return {
        name: {"mean": float(m), "low": float(low), "high": float(high)}
        for name, (m, low, high) in zip(names, columns, strict=True)
    }
