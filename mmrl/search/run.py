"""A search over a set of prompts: candidates and their verdicts in a folder, and the report on them.

`results.jsonl` has a line per prompt, `search.json` what made them, `report.json` the numbers. A search that was cut
goes on with the prompts that have no line yet; since each prompt draws its own noise the result is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmrl.capabilities import Extender, begin_iteration
from mmrl.growth import rollout_for
from mmrl.registry import find
from mmrl.rewards.scoring import RewardError, score
from mmrl.rollout import OutcomeReward, Prompt, Sample, check_prompts
from mmrl.rollout_folder import RolloutFolder
from mmrl.search.budget import Budget
from mmrl.search.core import SearchResult, number
from mmrl.search.measures import measure
from mmrl.search.problem import Problem, Scorer
from mmrl.workdir import WorkDir, append, cut_half_line, write_json

RECORD, OTHER = "search.json", "holds another search"  # what is searched in a folder, and what is said of another one


def search(
    prompts: Sequence[Prompt],
    extender: Extender,
    scorer: Scorer | None,
    verifier: OutcomeReward,
    *,
    folder: Path,
    method: str = "best_of_n",
    settings: Mapping[str, Any] | None = None,
    aggregations: Sequence[str] = ("min", "last", "mean", "product"),
    seed: int = 0,
    budget: Budget | None = None,
    prompts_per_batch: int = 8,
    max_unscored: float = 0.2,
    prompt_tokens: Callable[[Prompt], int] | None = None,
    stop: Callable[[str], bool] | None = None,
    canonical: Callable[[Prompt, str], str | None],
    about: Mapping[str, Any] | None = None,
    rollouts: RolloutFolder | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Search every prompt, verify every candidate, write the folder, and return its report (`measures.measure`).

    Args:
        verifier: 1 for a right answer, 0 for a wrong one, None without a verdict.
        method: a row of `mmrl list searches`, or a dotted path. settings: its options.
        budget: limit per prompt. prompts_per_batch: searched side by side.
        prompt_tokens, stop: see `Problem`. canonical: (prompt, text) -> the answer that votes compare.
        about: JSON values that name policy and scorer; a folder made with others is refused.
        rollouts: where the trees go, a batch at a time, with the outcome of every path that ended.

    Raises:
        ValueError: unknown method, setting or aggregation, no prompts, the folder holds another search, or prompts
            searched before whose trees were not kept.
        RewardError: more than `max_unscored` of the candidates have no verdict.
    """
    kind = find("searches", method)
    run = kind.build(settings or {}, "method", canonical=canonical)
    for name in aggregations:
        number(name)
    check_prompts(prompts)
    limits = budget or Budget()
    record = {
        "format": 1, "method": method, "settings": dict(settings or {}), "seed": seed,
        "max_tokens": limits.max_tokens, "about": dict(about or {}),
    }  # fmt: skip
    if not prompts:
        raise ValueError("search: no prompts")
    problem = Problem(extender, scorer, limits, seed, prompt_tokens=prompt_tokens, stop=stop)
    with WorkDir(folder).owned() as work:
        work.identify(RECORD, record, OTHER)
        results_file = folder / "results.jsonl"
        rows = _known_rows(results_file, prompts)
        if rollouts is not None:
            _check_trees(rollouts, folder, rows)
        todo = [p for p in prompts if p.id not in rows]
        with bar(len(prompts), len(rows), progress) as advance:
            for i in range(0, len(todo), prompts_per_batch):
                batch = todo[i : i + prompts_per_batch]
                begin_iteration(extender, scorer)
                results = run(problem, batch)
                new = _rows(results, batch, verifier, canonical, whole_trees=rollouts is not None)
                _check_unscored([*rows.values(), *new], max_unscored)
                if rollouts is not None:  # before the rows: a prompt with a row has its tree
                    heats = {r.temperature for r in results}
                    told = {"temperature": heats.pop()} if len(heats) == 1 and None not in heats else {}
                    about_trees = {"grown_by": method, "seed": seed, **told}
                    rollouts.append(rollout_for(extender, [r.tree for r in results], about_trees))
                append(results_file, new)
                rows |= {row["id"]: row for row in new}
                problem.forget(batch)
                advance(len(batch))
        pool = bool(kind.facts.get("pool"))
        numbers = measure([rows[p.id] for p in prompts], aggregations=aggregations, pool=pool, seed=seed)
        report = record | numbers
        write_json(folder / "report.json", report)
    return report


def _rows(
    results: Sequence[SearchResult],
    prompts: Sequence[Prompt],
    verifier: OutcomeReward,
    canonical: Callable[[Prompt, str], str | None],
    *,
    whole_trees: bool,
) -> list[dict[str, Any]]:
    """A row per prompt, every candidate verified; whole_trees: and every other path that ended, for its outcome."""
    samples = [Sample(p, s.text, -1) for p, r in zip(prompts, results, strict=True) for s in r.states]
    others = [(r.tree, v) for r in results for v in _ended_elsewhere(r)] if whole_trees else []
    samples += [Sample(tree.prompt, tree.text(v), -1) for tree, v in others]
    verdicts = iter(score(samples, {"verifier": (verifier, 1.0)}, max_unscored=1.0).total.tolist())
    rows = []
    for p, r in zip(prompts, results, strict=True):
        candidates = []
        for c in r.candidates:
            verdict = next(verdicts)
            if c.state.done and not math.isnan(verdict):
                r.tree.numbers["outcome"][r.tree.node(c.state)] = verdict
            candidates.append(
                {
                    "steps": list(c.state.steps),
                    "done": c.state.done,
                    "step_scores": list(c.step_scores),
                    "score": c.score if math.isfinite(c.score) else None,
                    "answer": canonical(p, c.state.text) if c.state.done else None,
                    "correct": None if math.isnan(verdict) else verdict >= 0.5,
                }
            )
        row = {"id": p.id, "prompt": _digest(p), "reference": p.reference, "answer": r.answer}
        rows.append(row | {"candidates": candidates, "cost": r.budget.report()})
    for (tree, v), verdict in zip(others, verdicts, strict=True):
        if not math.isnan(verdict):
            tree.numbers["outcome"][v] = verdict
    return rows


def _ended_elsewhere(found: SearchResult) -> list[int]:
    """The leaves of a tree that ended and are no candidate."""
    known = {found.tree.node(s) for s in found.states}
    return [v for v in found.tree.leaves if found.tree.ended[v] and v not in known]


def _check_trees(rollouts: RolloutFolder, folder: Path, rows: Mapping[str, Any]) -> None:
    """Every prompt that has been searched has its tree, and no other one; ValueError where a tree is missing."""
    missing = sorted(rows.keys() - rollouts.keep(rows.keys()))
    if missing:
        raise ValueError(
            f"{folder} has {len(missing)} prompts whose trees are not in {rollouts.root}, the first: {missing[0]!r}; "
            "they were searched without `rollouts`, or into another folder: take another output"
        )


def _check_unscored(rows: Sequence[Mapping[str, Any]], limit: float) -> None:
    verdicts = [c["correct"] for row in rows for c in row["candidates"]]
    missing = verdicts.count(None) / len(verdicts)
    if missing > limit:
        raise RewardError(
            f"{missing:.0%} of {len(verdicts)} candidates have no verdict (limit {limit:.0%}); see the log for the "
            "verifier's errors, mend it, or raise max_unscored if this share is expected"
        )


def _known_rows(results: Path, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """The rows that a results file already holds for these prompts; a prompt whose row was cut is searched again."""
    if not results.exists():
        return {}
    cut_half_line(results)
    digests = {p.id: _digest(p) for p in prompts}
    rows: dict[str, dict[str, Any]] = {}
    for i, line in enumerate(results.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            name, digest = row["id"], row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{results}, line {i}: no result of a search ({error}); remove the line") from error
        if digests.get(name, digest) != digest:
            raise ValueError(f"{results}: prompt {name!r} was searched with another question; take another folder")
        if name in digests:
            rows[name] = row
    return rows


def _digest(prompt: Prompt) -> str:
    text = json.dumps([dict(prompt.inputs), prompt.reference], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def bar(total: int, done: int, shown: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over prompts; gives the function that advances it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("search"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda n: bar.update(task, advance=n)
