"""Guided greedy decoding: at each step the best of n candidates, with or without steps back."""

from __future__ import annotations

from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import Candidate, SearchResult, Turn, best, propose, result, score_candidates, side_by_side
from mmrl.search.problem import Problem


@register("searches", "greedy", source="VL-PRM")
@side_by_side
def greedy(
    problem: Problem,
    prompt: Prompt,
    *,
    n: int = 8,
    temperature: float | None = None,
    aggregate: str = "last",
    rounds: int = 40,
    lookahead: int = 0,
) -> Turn[SearchResult]:
    """Take the best of n next steps until the solution ends; the last of `rounds` writes to the end.

    When all candidates score badly the least bad one is taken (VL-PRM). The candidates of the final round are the
    result.
    """
    state = State(prompt)
    candidates: list[Candidate] = []
    for round_index in range(rounds):
        steps = 1 if round_index < rounds - 1 else None
        (children,) = yield from propose([state], n, temperature=temperature, steps=steps)
        candidates = yield from score_candidates(problem, children, aggregate, lookahead=lookahead)
        state = candidates[best([candidate.score for candidate in candidates])].state
        if problem.is_done(state) or problem.spent(prompt):
            break
    return result(problem, prompt, candidates)


@register(
    "searches",
    "greedy_backtrack",
    source='"Let\'s reward step by step" (HGS-PRM), thresholds in place of its classes',
)
@side_by_side
def greedy_backtrack(
    problem: Problem,
    prompt: Prompt,
    *,
    n: int = 8,
    temperature: float | None = None,
    positive: float = 0.8,
    negative: float = 0.5,
    backtracks: int = 5,
    rounds: int = 40,
) -> Turn[SearchResult]:
    """Take the first step scored above `positive`, else the best one not below `negative`, else take a step back.

    "Let's reward step by step"; thresholds in place of its three classes as defined here. A step back drops the last
    step and proposes anew from before it; after `backtracks` of them the best candidate is taken as it is. rounds:
    longest path; its last proposal writes to the end.
    """
    path: list[Candidate] = []
    backtracks_left = backtracks
    while len(path) < rounds:
        state = path[-1].state if path else State(prompt)
        steps = 1 if len(path) < rounds - 1 else None
        (children,) = yield from propose([state], n, temperature=temperature, steps=steps)
        candidates = yield from score_candidates(problem, children, "last")
        scores = [candidate.score for candidate in candidates]
        chosen = first_good(scores, positive=positive, negative=negative)
        if chosen is None and backtracks_left and not problem.spent(prompt):
            backtracks_left -= 1
            path = path[:-1]
            continue
        if chosen is None:
            chosen = best(scores)
        path.append(candidates[chosen])
        if problem.is_done(path[-1].state) or problem.spent(prompt):
            break
    return result(problem, prompt, path[-1:])


def first_good(scores: list[float], *, positive: float, negative: float) -> int | None:
    """Index of the first score > positive, else of the best one >= negative, else None."""
    for i, score in enumerate(scores):
        if score > positive:
            return i
    top = best(scores)
    return top if scores[top] >= negative else None
