"""Searches as generators: each is written for one prompt, and all prompts take their turns in common batches.

A search yields requests (`propose`, `score_candidates`) and receives their results; `side_by_side` collects the
requests of all prompts and serves those with equal settings by one call. So a search is written as if it were alone,
and runs in batches:

    @side_by_side
    def one_step(problem, prompt, *, n=4):
        (children,) = yield from propose([State(prompt)], n)
        candidates = yield from score_candidates(problem, children, "last")
        return result(problem, prompt, candidates)

    results = one_step(problem, prompts, n=8)
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
    """The result of a search for one prompt.

    candidates: in the order of their proposal, so that ties go to the earlier one whatever they are ranked by later.
    answer: index of the candidate that the method answers with.
    budget: the cost.
    tree: all proposals, with scores and values.
    temperature: of all proposals; None = the policy's default, or several.
    """

    candidates: tuple[Candidate, ...]
    answer: int
    budget: Budget
    tree: GrowingTree = field(compare=False, repr=False)
    temperature: float | None = None

    @property
    def states(self) -> list[State]:
        """The paths of the candidates."""
        return [candidate.state for candidate in self.candidates]

    @property
    def scores(self) -> list[float]:
        """The scores of the candidates."""
        return [candidate.score for candidate in self.candidates]

    @property
    def ranked(self) -> list[int]:
        """Indices, best first: ended paths before others, then by score, then by order."""
        return ranking(self.candidates)


@dataclass(frozen=True)
class _Propose:
    """A request for `Problem.propose`."""

    states: Sequence[State]
    n: int
    temperature: float | None
    steps: int | None
    keep: bool


@dataclass(frozen=True)
class _Score:
    """A request for `Problem.score`."""

    states: Sequence[State]


T = TypeVar("T")
P = ParamSpec("P")
# A search, or a part of one, that yields requests and returns a T.
Turn = Generator[_Propose | _Score, Any, T]


def propose(
    states: Sequence[State], n: int, *, temperature: float | None = None, steps: int | None = 1, keep: bool = True
) -> Turn[list[list[State]]]:
    """`Problem.propose`, from inside a search: `children = yield from propose([state], 4)`."""
    return (yield _Propose(states, n, temperature, steps, keep))


def score_candidates(
    problem: Problem, states: Sequence[State], by: str, *, lookahead: int = 0, temperature: float | None = 0.0
) -> Turn[list[Candidate]]:
    """The states with their step scores and the aggregate `by` of these; scores are also written into the trees.

    lookahead: number of steps (greedy ones by default) by which a state that has not ended is continued for its score
        alone; it keeps its own steps and their scores. No state is continued once the budget is spent.
    """
    scored_states = list(states)
    continued: list[int] = []
    if lookahead:
        continued = [i for i, state in enumerate(states) if not state.done and not problem.spent(state.prompt)]
    if continued:
        from_states = [states[i] for i in continued]
        rows = yield from propose(from_states, 1, temperature=temperature, steps=lookahead, keep=False)
        for i, (state,) in zip(continued, rows, strict=True):
            scored_states[i] = state
    all_scores: list[list[float]] = yield _Score(scored_states)
    aggregate_scores = number(by)
    candidates = []
    for state, scores in zip(states, all_scores, strict=True):
        candidate = Candidate(state, tuple(scores[: len(state.steps)]), aggregate_scores(scores))
        candidates.append(candidate)
        if problem.scored:
            _write_scores(problem.tree(state.prompt), candidate, aggregate_scores)
    return candidates


def _write_scores(
    tree: GrowingTree, candidate: Candidate, aggregate_scores: Callable[[Sequence[float]], float]
) -> None:
    """Write the scores of a path into its tree: each as the step's reward, the aggregate up to it as its value.

    Blank steps have no score; one that ends a path has the value of the path.
    """
    path, scores = candidate.state.path, candidate.step_scores
    scored_nodes = path
    if len(path) != len(scores):
        scored_nodes = tuple(node for node in path if tree.texts[node].strip())
    if not scores or len(scored_nodes) != len(scores):
        return
    for i, node in enumerate(scored_nodes):
        tree.numbers["step_reward"][node] = scores[i]
        value = aggregate_scores(scores[: i + 1])
        if math.isfinite(value):
            tree.numbers["value"].setdefault(node, value)
    if math.isfinite(candidate.score):
        tree.numbers["value"][path[-1]] = candidate.score


def number(by: str) -> Callable[[Sequence[float]], float]:
    """The aggregate called `by`, checked to give a number.

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
    for i, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"score {i} is NaN; it has no rank")
    return max(range(len(scores)), key=lambda i: (scores[i], -i))


def ranking(candidates: Sequence[Candidate]) -> list[int]:
    """Indices, best first: ended paths before others, then by score, then by order."""

    def rank(i: int) -> tuple[bool, float, int]:
        return not candidates[i].state.done, -candidates[i].score, i

    return sorted(range(len(candidates)), key=rank)


def result(
    problem: Problem, prompt: Prompt, candidates: Sequence[Candidate], answer: int | None = None
) -> SearchResult:
    """The result of a search; without `answer` the best ranked candidate is the answer."""
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
        return _run(problem, [search(problem, prompt, *args, **kwargs) for prompt in prompts])

    return searches


def _run(problem: Problem, searches: Sequence[Turn[SearchResult]]) -> list[SearchResult]:
    """Run the generators of several prompts side by side, each to its result."""
    results: dict[int, SearchResult] = {}
    # Index of a running search -> what it receives next; a generator begins by receiving None.
    replies: dict[int, Any] = dict.fromkeys(range(len(searches)))
    while replies:
        requests: dict[int, _Propose | _Score] = {}
        for i, reply in replies.items():
            try:
                requests[i] = searches[i].send(reply)
            except StopIteration as stop:
                results[i] = stop.value
        replies = _serve(problem, requests)
    return [results[i] for i in range(len(searches))]


def _serve(problem: Problem, requests: dict[int, _Propose | _Score]) -> dict[int, Any]:
    """The reply to each request; requests with equal settings are served by one call."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for i, request in requests.items():
        settings: Hashable = None
        if isinstance(request, _Propose):
            settings = (request.n, request.temperature, request.steps, request.keep)
        alike[settings].append(i)
    replies: dict[int, Any] = {}
    for indices in alike.values():
        states: list[State] = []
        for i in indices:
            states += requests[i].states
        first = requests[indices[0]]
        rows: list[Any]
        if isinstance(first, _Propose):
            rows = problem.propose(states, first.n, temperature=first.temperature, steps=first.steps, keep=first.keep)
        else:
            rows = problem.score(states)
        # The rows of the call, handed back request by request.
        for i in indices:
            count = len(requests[i].states)
            replies[i], rows = rows[:count], rows[count:]
    return dict(sorted(replies.items()))
