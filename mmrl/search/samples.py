"""Best of k per step and best of n whole samples, for policies whose steps are no texts (denoising).

A row of `sample_searches` generates them, since only the package of a policy knows its steps; here they are verified
and compared, with their costs. From one pool of n samples per prompt and k, the result of every smaller number of
samples follows exactly (see `mmrl.search.curves`).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
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
    policy_calls: network rows, summed. scorer_calls: candidates scored at inner steps, without the `scores`.
    rollout: the tree of all candidates, also those that were not continued; sample j of prompt p is its prompt
        p n + j, and `Sample.step` are its leaves.
    """

    samples: list[list[Sample]]
    scores: list[list[float]]
    policy_calls: int
    scorer_calls: int
    rollout: Rollout | None = None


class SampleSearch(Protocol):
    """A row of `sample_searches`: n samples per prompt; at each step the best of k candidates by `scorer` goes on.

    k = 1 is plain sampling. Random numbers depend on (seed, prompt id) alone. The row's facts `policy` and `scorer`
    are the protocols that policy and scorer follow. Raises ValueError: a scorer or a sampling that does not fit.
    """

    def __call__(
        self, policy: Any, prompts: Sequence[Prompt], scorer: Any, *, n: int, k: int, seed: int
    ) -> SearchResult: ...


@dataclass
class _Pool:
    """The samples of all prompts for one k."""

    scores: list[list[float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    # n -> the best of the first n samples of each prompt.
    picks: dict[int, list[Sample]] = field(default_factory=dict)
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

    The report's tables reward, gain, bound, judges and cost have a row per setting: `generate` is the policy's
    evaluation sample, `n4/k2` the best of 4 samples that continued with the best of 2 candidates at each step. See
    `RULES`.

    Args:
        search, method: a row of `sample_searches`, and its name. scorer: as the row expects it.
        verifier: any number per sample; a prompt with None is left out and counted.
        folder: where the results go.
        n: samples per prompt; smaller numbers 1, 2, 4, .. come from the same pool.
        judges: samples -> further measures by name, which show whether the scorer is being exploited.
        about: JSON values that name policy and scorer; a folder made with others is refused.
        rollouts: where the trees of the largest k go, verdicts as outcomes and final scores as values; a batch per
            sample, since each of a prompt's samples began with its own noise.

    Raises:
        ValueError: n or a k below 1, no prompts, the folder holds another search, or a sampling without
            candidates.
        RewardError: more than `max_unscored` of the samples of a batch have no verdict.
    """
    if not prompts or n < 1 or any(x < 1 for x in k):
        raise ValueError(f"{method}: n={n} and k={list(k)} must be at least 1, and there must be prompts")
    check_prompts(prompts)
    settings = {"n": n, "k": list(k)}
    record = {"format": 1, "method": method, "settings": settings, "seed": seed, "about": dict(about or {})}
    pools = {num_candidates: _Pool() for num_candidates in sorted({1, *k})}
    largest_k = max(pools)
    plain = _Pool()
    with WorkDir(folder).owned() as work, bar(len(prompts), 0, progress) as advance:
        work.identify(RECORD, record, OTHER)
        if rollouts is not None:
            rollouts.keep(())
        for i in range(0, len(prompts), prompts_per_batch):
            batch = prompts[i : i + prompts_per_batch]
            _generate(plain, policy, batch, verifier, seed, max_unscored)
            for num_candidates, pool in pools.items():
                run_search = partial(search, policy, batch, scorer, n=n, k=num_candidates, seed=seed)
                result, verdicts = _fill(pool, run_search, n, verifier, max_unscored)
                if rollouts is not None and num_candidates == largest_k:
                    for rollout in _trees(result, verdicts, batch, n, method):
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
    """Add the policy's evaluation samples of some prompts to `pool`."""
    start = time.perf_counter()
    samples = policy.generate(prompts, seed=seed)
    pool.seconds += time.perf_counter() - start
    pool.rewards += [[verdict] for verdict in _verdicts(samples, verifier, limit)]
    pool.picks.setdefault(1, []).extend(samples)


def _fill(
    pool: _Pool, run_search: Callable[[], SearchResult], n: int, verifier: OutcomeReward, limit: float
) -> tuple[SearchResult, list[float]]:
    """Search some prompts and add their n samples each to `pool`; returns them with their verdicts."""
    start = time.perf_counter()
    result = run_search()
    pool.seconds += time.perf_counter() - start
    verdicts = _verdicts(list(chain.from_iterable(result.samples)), verifier, limit)
    pool.scores += result.scores
    pool.rewards += [verdicts[i : i + n] for i in range(0, len(verdicts), n)]
    pool.policy_calls += result.policy_calls
    pool.scorer_calls += result.scorer_calls
    for size in curves.sizes(n):
        picks = pool.picks.setdefault(size, [])
        for samples, scores in zip(result.samples, result.scores, strict=True):
            picks.append(samples[best(scores[:size])])
    return result, verdicts


def _trees(
    result: SearchResult, verdicts: Sequence[float], prompts: Sequence[Prompt], n: int, method: str
) -> list[Rollout]:
    """n rollouts: the trees of all prompts' first samples, those of their second ones, and so on."""
    if result.rollout is None:
        raise ValueError("this search does not return the tree that it grew; leave `rollouts` out")
    tree = result.rollout.tree
    leaves = torch.tensor([sample.step for sample in chain.from_iterable(result.samples)])
    value = tree.value.clone()
    value[leaves] = torch.tensor(list(chain.from_iterable(result.scores)), dtype=torch.float64)
    tree = tree.with_outcomes(leaves, torch.tensor(verdicts, dtype=torch.float64)).replace(value=value)
    about = dict(result.rollout.about) | {"grown_by": method}
    whole = replace(result.rollout, tree=tree, about=about)
    # In `whole` every sample is a prompt with an id of its own; in each part they are the prompts themselves.
    parts = [whole.select(range(j, len(whole.prompts), n)) for j in range(n)]
    return [replace(part, prompts=list(prompts)) for part in parts]


def _verdicts(samples: Sequence[Sample], verifier: OutcomeReward, limit: float) -> list[float]:
    """The verifier's number of each sample, NaN without one."""
    return list(score(samples, {"verifier": (verifier, 1.0)}, limit).total.tolist())


def _result_rows(prompts: Sequence[Prompt], plain: _Pool, pools: Mapping[int, _Pool]) -> Iterator[dict[str, Any]]:
    """A row per prompt; null stands for a missing verdict."""
    for i, prompt in enumerate(prompts):
        row: dict[str, Any] = {"id": prompt.id, "generate": _nan_to_null(plain.rewards[i])[0]}
        for k, pool in pools.items():
            row[f"k{k}"] = {"scores": pool.scores[i], "rewards": _nan_to_null(pool.rewards[i])}
        yield row


def _nan_to_null(values: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


def _measure(
    plain: _Pool, pools: Mapping[int, _Pool], calls: int, judges: Callable[..., Mapping[str, float]] | None, seed: int
) -> dict[str, Any]:
    """The report's tables. calls: network rows of one sample of `generate`."""
    num_prompts = len(plain.rewards)
    complete = _complete_prompts([plain, *pools.values()])
    if not complete:
        raise ValueError("every prompt has a sample without verdict, so nothing can be compared; mend the verifier")
    sizes = curves.sizes(len(pools[1].scores[0]))
    # Tables (prompts, settings) of rewards and of their upper bounds, put together from blocks of columns.
    names = ["generate"]
    plain_rewards = np.array([plain.rewards[i] for i in complete], np.float64)
    rewards_blocks, bounds_blocks = [plain_rewards], [plain_rewards]
    judged = {"generate": dict(judges(plain.picks[1])) if judges else {}}
    cost = {"generate": {"policy_calls": calls, "scorer_calls": 0, "wall_s": plain.seconds / num_prompts}}
    for k, pool in pools.items():
        scores = [pool.scores[i] for i in complete]
        rewards = [pool.rewards[i] for i in complete]
        rewards_blocks.append(curves.best_of_k(scores, rewards, sizes))
        bounds_blocks.append(curves.best_of_k(rewards, rewards, sizes))
        for size in sizes:
            name = f"n{size}/k{k}"
            names.append(name)
            judged[name] = dict(judges(pool.picks[size])) if judges else {}
            cost[name] = _cost(pool, size, num_prompts)
    table = np.concatenate(rewards_blocks, 1)
    bound = np.concatenate(bounds_blocks, 1)
    single = table[:, [names.index("n1/k1")]]
    return {
        "reward": _intervals(names, table, seed),
        "gain": _intervals(names, table - single, seed),
        "bound": dict(zip(names, bound.mean(0).tolist(), strict=True)),
        "judges": judged,
        "cost": cost,
        "unscored_prompts": num_prompts - len(complete),
    }


def _complete_prompts(pools: Sequence[_Pool]) -> list[int]:
    """Indices of the prompts whose samples all have a verdict, in every pool."""
    complete = []
    for i in range(len(pools[0].rewards)):
        if all(np.isfinite(pool.rewards[i]).all() for pool in pools):
            complete.append(i)
    return complete


def _cost(pool: _Pool, size: int, num_prompts: int) -> dict[str, float]:
    """Mean cost of `size` samples of a prompt and of ranking them; a single sample needs no ranking."""
    share = size / (num_prompts * len(pool.scores[0]))
    ranking_calls = size if size > 1 else 0
    return {
        "policy_calls": pool.policy_calls * share,
        "scorer_calls": pool.scorer_calls * share + ranking_calls,
        "wall_s": pool.seconds * share,
    }


def _intervals(names: Sequence[str], table: curves.Floats, seed: int) -> dict[str, dict[str, float]]:
    """Name -> mean and interval of its column of `table` (prompts, settings)."""
    columns = zip(*curves.mean_interval(table, seed=seed), strict=True)
    intervals = {}
    for name, (mean, low, high) in zip(names, columns, strict=True):
        intervals[name] = {"mean": float(mean), "low": float(low), "high": float(high)}
    return intervals
