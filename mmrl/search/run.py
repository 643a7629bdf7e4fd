"""Running a search over a set of prompts, into a folder with its candidates, their verdicts and a report.

`results.jsonl` has a line per prompt, `search.json` the settings, `report.json` the measures. A search that was
interrupted continues with the prompts that have no line yet; since each prompt draws its own noise, the result is the
same.
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
from mmrl.growth import GrowingTree, rollout_for
from mmrl.registry import find
from mmrl.rewards.scoring import RewardError, score
from mmrl.rollout import OutcomeReward, Prompt, Rollout, Sample, check_prompts
from mmrl.rollout_folder import RolloutFolder
from mmrl.search.budget import Budget
from mmrl.search.core import Candidate, SearchResult, number
from mmrl.search.measures import measure
from mmrl.search.problem import Problem, Scorer
from mmrl.workdir import WorkDir, append, cut_half_line, write_json

# The file with the settings of a folder's search, and the error message for a folder with other settings.
RECORD, OTHER = "search.json", "holds another search"


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
        folder: where the results go.
        method: a row of `mmrl list searches`, or a dotted path. settings: its options.
        aggregations: aggregates by which the report ranks candidates.
        budget: limit per prompt.
        prompts_per_batch: number of prompts searched side by side.
        max_unscored: largest share of candidates without verdict.
        prompt_tokens, stop: see `Problem`.
        canonical: (prompt, text) -> the answer that votes compare.
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
        "format": 1,
        "method": method,
        "settings": dict(settings or {}),
        "seed": seed,
        "max_tokens": limits.max_tokens,
        "about": dict(about or {}),
    }
    if not prompts:
        raise ValueError("search: no prompts")
    problem = Problem(extender, scorer, limits, seed, prompt_tokens=prompt_tokens, stop=stop)
    with WorkDir(folder).owned() as work:
        work.identify(RECORD, record, OTHER)
        results_file = folder / "results.jsonl"
        rows = _finished_rows(results_file, prompts)
        if rollouts is not None:
            _check_trees(rollouts, folder, rows)
        todo = [prompt for prompt in prompts if prompt.id not in rows]
        with bar(len(prompts), len(rows), progress) as advance:
            for i in range(0, len(todo), prompts_per_batch):
                batch = todo[i : i + prompts_per_batch]
                begin_iteration(extender, scorer)
                results = run(problem, batch)
                new = _rows(results, batch, verifier, canonical, whole_trees=rollouts is not None)
                _check_unscored([*rows.values(), *new], max_unscored)
                # Trees are written before rows, so that every prompt with a row has its tree after a crash too.
                if rollouts is not None:
                    rollouts.append(_rollout(extender, results, {"grown_by": method, "seed": seed}))
                append(results_file, new)
                rows |= {row["id"]: row for row in new}
                problem.forget(batch)
                advance(len(batch))
        pool = bool(kind.facts.get("pool"))
        rows_in_order = [rows[prompt.id] for prompt in prompts]
        report = record | measure(rows_in_order, aggregations=aggregations, pool=pool, seed=seed)
        write_json(folder / "report.json", report)
    return report


def _rollout(extender: Extender, results: Sequence[SearchResult], about: dict[str, Any]) -> Rollout:
    """The trees of a batch as one rollout; `about` gets the temperature where all proposals had the same one."""
    temperatures = {result.temperature for result in results}
    if len(temperatures) == 1 and None not in temperatures:
        about["temperature"] = temperatures.pop()
    return rollout_for(extender, [result.tree for result in results], about)


def _rows(
    results: Sequence[SearchResult],
    prompts: Sequence[Prompt],
    verifier: OutcomeReward,
    canonical: Callable[[Prompt, str], str | None],
    *,
    whole_trees: bool,
) -> list[dict[str, Any]]:
    """A row per prompt, every candidate verified; verdicts also go into the trees as outcomes.

    whole_trees: verify every other path that ended as well, for its outcome.
    """
    # All candidates, then all other ends, are verified in one call, and the verdicts taken off in the same order.
    samples = []
    for prompt, result in zip(prompts, results, strict=True):
        samples += [Sample(prompt, state.text, -1) for state in result.states]
    others: list[tuple[GrowingTree, int]] = []
    if whole_trees:
        for result in results:
            others += [(result.tree, node) for node in _ends_beside_candidates(result)]
    samples += [Sample(tree.prompt, tree.text(node), -1) for tree, node in others]
    verdicts = iter(score(samples, {"verifier": (verifier, 1.0)}, max_unscored=1.0).total.tolist())
    rows = []
    for prompt, result in zip(prompts, results, strict=True):
        candidates = []
        for candidate in result.candidates:
            verdict = next(verdicts)
            if candidate.state.done and not math.isnan(verdict):
                result.tree.numbers["outcome"][result.tree.node(candidate.state)] = verdict
            candidates.append(_candidate_row(prompt, candidate, verdict, canonical))
        rows.append(
            {
                "id": prompt.id,
                "prompt": _digest(prompt),
                "reference": prompt.reference,
                "answer": result.answer,
                "candidates": candidates,
                "cost": result.budget.report(),
            }
        )
    for (tree, node), verdict in zip(others, verdicts, strict=True):
        if not math.isnan(verdict):
            tree.numbers["outcome"][node] = verdict
    return rows


def _candidate_row(
    prompt: Prompt, candidate: Candidate, verdict: float, canonical: Callable[[Prompt, str], str | None]
) -> dict[str, Any]:
    """One candidate as JSON values; null stands for a missing verdict, and for the score of a path without steps."""
    state = candidate.state
    return {
        "steps": list(state.steps),
        "done": state.done,
        "step_scores": list(candidate.step_scores),
        "score": candidate.score if math.isfinite(candidate.score) else None,
        "answer": canonical(prompt, state.text) if state.done else None,
        "correct": None if math.isnan(verdict) else verdict >= 0.5,
    }


def _ends_beside_candidates(result: SearchResult) -> list[int]:
    """The leaves of a tree that ended and are no candidate."""
    candidate_nodes = {result.tree.node(state) for state in result.states}
    return [node for node in result.tree.leaves if result.tree.ended[node] and node not in candidate_nodes]


def _check_trees(rollouts: RolloutFolder, folder: Path, rows: Mapping[str, Any]) -> None:
    """Drop the trees of prompts without a row; raises ValueError when a prompt with a row has no tree."""
    missing = sorted(rows.keys() - rollouts.keep(rows.keys()))
    if missing:
        raise ValueError(
            f"{folder} has {len(missing)} prompts whose trees are not in {rollouts.root}, the first: {missing[0]!r}; "
            "they were searched without `rollouts`, or into another folder: take another output"
        )


def _check_unscored(rows: Sequence[Mapping[str, Any]], limit: float) -> None:
    verdicts = [candidate["correct"] for row in rows for candidate in row["candidates"]]
    missing = verdicts.count(None) / len(verdicts)
    if missing > limit:
        raise RewardError(
            f"{missing:.0%} of {len(verdicts)} candidates have no verdict (limit {limit:.0%}); see the log for the "
            "verifier's errors, mend it, or raise max_unscored if this share is expected"
        )


def _finished_rows(results: Path, prompts: Sequence[Prompt]) -> dict[str, dict[str, Any]]:
    """Prompt id -> its row in a results file; a half-written row is dropped, and its prompt is searched again."""
    if not results.exists():
        return {}
    cut_half_line(results)
    digests = {prompt.id: _digest(prompt) for prompt in prompts}
    rows: dict[str, dict[str, Any]] = {}
    for i, line in enumerate(results.read_text().splitlines(), start=1):
        try:
            row = json.loads(line)
            prompt_id, digest = row["id"], row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{results}, line {i}: no result of a search ({error}); remove the line") from error
        if digests.get(prompt_id, digest) != digest:
            raise ValueError(
                f"{results}: prompt {prompt_id!r} was searched with another question; take another folder"
            )
        if prompt_id in digests:
            rows[prompt_id] = row
    return rows


def _digest(prompt: Prompt) -> str:
    """A short hash of a prompt's inputs and reference, by which a changed question is noticed."""
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
