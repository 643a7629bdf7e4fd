"""Measures of a search, from its stored rows: accuracy of every way to choose among candidates, curves, cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mmrl.search import curves, votes
from mmrl.search.core import best, number

# One line of results.jsonl.
Row = Mapping[str, Any]

RULES = (
    "An unreadable answer forms no group and counts in N. Ties go to the candidate or answer found first. A candidate "
    "that has not ended ranks below the others and does not vote; one without a verdict counts as wrong. Intervals: "
    "95 % percentile bootstrap over problems."
)


def measure(rows: Sequence[Row], *, aggregations: Sequence[str], pool: bool, seed: int = 0) -> dict[str, Any]:
    """The measures of searched problems, by name.

    accuracy: name -> {mean, low, high}. `answer` is the method's own choice, `random` the mean correctness, `pass` 1
    where any candidate is right, then `majority` and per aggregation `best_of_n/..`, `weighted/..`, `hmr/..` and
    `wrf/..`. over_majority: the same picks less the majority's, problem by problem, so the intervals are paired.
    left_out: the `wrf/..` that some problem's negative scores forbid.

    Args:
        pool: candidates are independent samples of one distribution, so curves over their number mean something.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("measure: no rows; search at least one prompt")
    pools = [_Pool(row, aggregations) for row in rows]
    picks = [pool.picks() for pool in pools]
    left_out = [name for name in picks[0] if any(pick[name] is None for pick in picks)]
    names = [name for name in picks[0] if name not in left_out]
    # (problems, ways to choose) 1 where the chosen candidate is right
    table = np.array([[pick[name] for name in names] for pick in picks], np.float64)
    majority = table[:, [names.index("majority")]]
    sizes = [len(pool.right) for pool in pools]
    all_candidates = [candidate for row in rows for candidate in row["candidates"]]
    return {
        "prompts": len(rows),
        "candidates": {"min": min(sizes), "mean": sum(sizes) / len(sizes), "max": max(sizes)},
        "unfinished_frac": _share(not candidate["done"] for candidate in all_candidates),
        "unreadable_frac": _share(candidate["answer"] is None for candidate in all_candidates),
        "unscored_frac": _share(candidate["correct"] is None for candidate in all_candidates),
        "accuracy": dict(zip(names, _intervals(table, seed), strict=True)),
        "over_majority": dict(zip(names, _intervals(table - majority, seed), strict=True)),
        "left_out": left_out,
        "curves": _curves(pools, aggregations, seed) if pool else None,
        "cost": _cost(rows),
        "rules": RULES,
    }


class _Pool:
    """The candidates of one problem as columns."""

    def __init__(self, row: Row, aggregations: Sequence[str]) -> None:
        candidates = row["candidates"]
        self.answer = row["answer"]
        self.right = [bool(candidate["correct"]) for candidate in candidates]
        self.answers = [candidate["answer"] for candidate in candidates]
        # Where none has ended, all rank alike.
        self.done = [candidate["done"] for candidate in candidates]
        if not any(self.done):
            self.done = [True] * len(candidates)
        self.scores: dict[str, list[float]] = {}
        for by in aggregations:
            aggregate = number(by)
            self.scores[by] = [aggregate(candidate["step_scores"]) for candidate in candidates]

    def ranks(self, by: str) -> list[float]:
        """Scores to rank by: unfinished candidates at the end."""
        return [score if done else float("-inf") for score, done in zip(self.scores[by], self.done, strict=True)]

    def picks(self) -> dict[str, float | None]:
        """Way to choose -> 1 (True) where its choice is right, None where it has no meaning."""
        picks: dict[str, float | None] = {
            "answer": self.right[self.answer],
            "random": sum(self.right) / len(self.right),
            "pass": any(self.right),
            "majority": self._voted(votes.majority(self.answers)),
        }
        for by, scores in self.scores.items():
            picks[f"best_of_n/{by}"] = self.right[best(self.ranks(by))]
            picks[f"weighted/{by}"] = self._voted(votes.weighted(self.answers, scores))
            picks[f"hmr/{by}"] = self._voted(votes.hmr(self.answers, self.ranks(by)))
            picks[f"wrf/{by}"] = self._voted(votes.wrf(self.answers, scores)) if min(scores) >= 0 else None
        return picks

    def _voted(self, answer: str | None) -> bool:
        return answer is not None and self.right[self.answers.index(answer)]


def _curves(pools: Sequence[_Pool], aggregations: Sequence[str], seed: int) -> dict[str, Any]:
    """Accuracy of every way to choose among k candidates, for several k, and how each was computed."""
    ks = curves.sizes(min(len(pool.right) for pool in pools))
    right = [pool.right for pool in pools]
    answers = [pool.answers for pool in pools]
    majority, how_majority = curves.majority_at_k(answers, right, ks, seed=seed)
    # (problems, K) each
    tables = {"pass": curves.pass_at_k(right, ks), "majority": majority}
    how: dict[str, str] = {"pass": "exact", "majority": how_majority}
    how |= {f"best_of_n/{by}": "exact" for by in aggregations}
    for by in aggregations:
        ranks = [pool.ranks(by) for pool in pools]
        scores = [pool.scores[by] for pool in pools]
        tables[f"best_of_n/{by}"] = curves.best_of_k(ranks, right, ks)
        tables[f"weighted/{by}"] = curves.weighted_at_k(answers, scores, right, ks, seed=seed)
        how[f"weighted/{by}"] = "sampled"
    return {
        "k": ks,
        "how": how,
        "values": {name: _intervals(table, seed) for name, table in tables.items()},
    }


def _intervals(table: curves.Floats, seed: int) -> list[dict[str, float]]:
    """Mean and interval of each column of `table` (problems, K)."""
    columns = zip(*curves.mean_interval(table, seed=seed), strict=True)
    return [{"mean": float(mean), "low": float(low), "high": float(high)} for mean, low, high in columns]


def _cost(rows: Sequence[Row]) -> dict[str, Any]:
    """Costs summed over prompts; None where it is unknown for a prompt."""
    costs = [row["cost"] for row in rows]
    total: dict[str, Any] = {}
    for name in costs[0]:
        numbers = [cost[name] for cost in costs]
        total[name] = None if None in numbers else sum(numbers)
    return total


def _share(flags: Iterable[bool]) -> float:
    values = list(flags)
    return sum(values) / len(values)
