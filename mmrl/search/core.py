"""Searches as generators: each is written for one prompt, and all prompts take their turns in common batches.

A search yields what it wants (`propose`, `score_candidates`) and receives the answer; `side_by_side` collects the
wishes of all prompts and serves equal ones with one call. So a search reads as if it were alone and costs as if it
were batched.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from mmrl.growth import GrowingTree
from mmrl.rollout import Prompt, State, check_prompts
from mmrl.scorers.aggregate import aggregate
from mmrl.search.budget import Budget
from mmrl.search.problem import Problem


@dataclass(frozen=True)
class Candidate:
    """A path and its scores. score: aggregate of the step scores, -inf for a path without steps."""

    state: State
    step_scores: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one prompt.

    candidates: in the order they were found, so that ties go to the earlier one whatever they are ranked by later.
    answer: index of the one that the method answers with. budget: what it cost.
    tree: all that was proposed, with scores and values. temperature: of all
        proposals, None = the policy's own, or several.
    """

    candidates: tuple[Candidate, ...]
    answer: int
    budget: Budget
    tree: GrowingTree = field(compare=False, repr=False)
    temperature: float | None = None

    @property
    def states(self) -> list[State]:
        """The paths."""
        return [c.state for c in self.candidates]

    @property
    def scores(self) -> list[float]:
        """Their scores."""
        return [c.score for c in self.candidates]

    @property
    def ranked(self) -> list[int]:
        """Indices, best first: ended paths before others, then by score, then by order found."""
        return ranking(self.candidates)


@dataclass(frozen=True)
class _Propose:
    states: Sequence[State]
    n: int
    temperature: float | None
    steps: int | None
    keep: bool


@dataclass(frozen=True)
class _Score:
    states: Sequence[State]


T = TypeVar("T")
P = ParamSpec("P")
Turn = Generator[_Propose | _Score, Any, T]  # a piece of a search that gives a T


def propose(
    states: Sequence[State], n: int, *, temperature: float | None = None, steps: int | None = 1, keep: bool = True
) -> Turn[list[list[State]]]:
    """`Problem.propose`, from inside a search: `children = yield from propose([state], 4)`."""
    return (yield _Propose(states, n, temperature, steps, keep))


def score_candidates(
    problem: Problem, states: Sequence[State], by: str, *, lookahead: int = 0, temperature: float | None = 0.0
) -> Turn[list[Candidate]]:
    """The states with their scores, aggregated by the aggregate called `by`, which are noted in the prompt's tree.

    lookahead: a state that has not ended is continued by so many steps (greedily by default) for its score alone;
        it keeps its own steps and their scores. Left out once the budget is spent.
    """
    shown = list(states)
    ahead = [i for i, s in enumerate(states) if not s.done and not problem.spent(s.prompt)] if lookahead else []
    if ahead:
        new = yield from propose([states[i] for i in ahead], 1, temperature=temperature, steps=lookahead, keep=False)
        for i, (state,) in zip(ahead, new, strict=True):
            shown[i] = state
    rows: list[list[float]] = yield _Score(shown)
    value = number(by)
    out = []
    for state, row in zip(states, rows, strict=True):
        out.append(Candidate(state, tuple(row[: len(state.steps)]), value(row)))
        if problem.scored:
            _note(problem.tree(state.prompt), out[-1], value)
    return out


def _note(tree: GrowingTree, found: Candidate, value: Callable[[Sequence[float]], float]) -> None:
    """Write the scores of a path into its tree: each step's own as its reward, the aggregate up to it as its value.

    Blank steps have no score of their own; one that ends a path has the value of the path.
    """
    path, row = found.state.path, found.step_scores
    said = path if len(path) == len(row) else tuple(v for v in path if tree.texts[v].strip())
    if not row or len(said) != len(row):
        return
    for t, node in enumerate(said):
        tree.numbers["step_reward"][node] = row[t]
        if math.isfinite(worth := value(row[: t + 1])):
            tree.numbers["value"].setdefault(node, worth)
    if math.isfinite(found.score):
        tree.numbers["value"][path[-1]] = found.score


def number(by: str) -> Callable[[Sequence[float]], float]:
    """The aggregate called `by`, which must give a number.

    Raises:
        ValueError: no such aggregate, or its result is a key of several numbers.
    """
    value = aggregate(by)
    if isinstance(value([]), tuple):
        raise ValueError(f"aggregate {by!r} gives a pair; a search adds and compares numbers: take min or last")
    return cast(Callable[[Sequence[float]], float], value)


def best(scores: Sequence[float]) -> int:
    """Index of the largest score, the first one among equals.

    Raises:
        ValueError: there is none, or one is NaN.
    """
    if not scores:
        raise ValueError("best of nothing: no candidate has been found")
    if any(math.isnan(s) for s in scores):
        raise ValueError(f"score {next(i for i, s in enumerate(scores) if math.isnan(s))} is NaN; it has no rank")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def ranking(candidates: Sequence[Candidate]) -> list[int]:
    """Indices, best first: ended paths before others, then by score, then by order."""
    return sorted(range(len(candidates)), key=lambda i: (not candidates[i].state.done, -candidates[i].score, i))


def result(
    problem: Problem, prompt: Prompt, candidates: Sequence[Candidate], answer: int | None = None
) -> SearchResult:
    """The end of a search; without `answer` the best ranked one is it."""
    if not candidates:
        raise ValueError(f"prompt {prompt.id!r}: the search ended before its first proposal; give it at least 1 round")
    chosen = ranking(candidates)[0] if answer is None else answer
    budget = problem.budget(prompt).snapshot()
    return SearchResult(tuple(candidates), chosen, budget, problem.tree(prompt), problem.temperature(prompt))


def side_by_side(
    search: Callable[Concatenate[Problem, Prompt, P], Turn[SearchResult]],
) -> Callable[Concatenate[Problem, Sequence[Prompt], P], list[SearchResult]]:
    """Turn a search for one prompt into one for many, in common batches; results in the order of the prompts."""

    @wraps(search)
    def searches(
        problem: Problem, prompts: Sequence[Prompt], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[SearchResult]:
        check_prompts(prompts)
        return _run(problem, [search(problem, p, *args, **kwargs) for p in prompts])

    return searches


def _run(problem: Problem, searches: Sequence[Turn[SearchResult]]) -> list[SearchResult]:
    results: dict[int, SearchResult] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(searches)))
    while answers:
        wishes: dict[int, _Propose | _Score] = {}
        for i, answer in answers.items():
            try:
                wishes[i] = searches[i].send(answer)
            except StopIteration as stop:
                results[i] = stop.value
        answers = _serve(problem, wishes)
    return [results[i] for i in range(len(searches))]


def _serve(problem: Problem, wishes: dict[int, _Propose | _Score]) -> dict[int, Any]:
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, w in wishes.items():
        alike[(w.n, w.temperature, w.steps, w.keep) if isinstance(w, _Propose) else None].append(i)
    answers: dict[int, Any] = {}
    for who in alike.values():
        states = [s for i in who for s in wishes[i].states]
        first = wishes[who[0]]
        rows: list[Any]
        if isinstance(first, _Propose):
            rows = problem.propose(states, first.n, temperature=first.temperature, steps=first.steps, keep=first.keep)
        else:
            rows = problem.score(states)
        for i in who:
            answers[i], rows = rows[: len(wishes[i].states)], rows[len(wishes[i].states) :]
    return dict(sorted(answers.items()))
