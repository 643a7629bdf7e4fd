"""Step beam search and its diverse form (DVTS), after search-and-learn."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import (
    Candidate,
    SearchResult,
    Turn,
    best,
    propose,
    ranking,
    result,
    score_candidates,
    side_by_side,
)
from mmrl.search.problem import Problem


@register("searches", "beam", source="search-and-learn; CoS, MASPRM")
@side_by_side
def beam(
    problem: Problem,
    prompt: Prompt,
    *,
    n: int = 4,
    width: int = 4,
    temperature: float | None = None,
    aggregate: str = "last",
    rounds: int = 40,
    lookahead: int = 0,
    dedupe: bool = False,
) -> Turn[SearchResult]:
    """n candidate steps a round; the best n // width paths go on, each with n // kept next steps.

    Paths that end leave the beam and free their places; the search is over when n have ended, after `rounds` (the
    last one writes to the end) or when the budget is spent. The n best are the result, ended ones first.
    """
    keep = _parts(n, width)
    done: list[Candidate] = []
    kept: list[Candidate] = []
    states = [State(prompt)]
    for k in range(rounds):
        steps = 1 if k < rounds - 1 else None
        rows = yield from propose(states, n // len(states), temperature=temperature, steps=steps)
        children = [s for row in rows for s in row]
        if dedupe:
            children = list({s.text: s for s in reversed(children)}.values())[::-1]
        found = yield from score_candidates(problem, children, aggregate, lookahead=lookahead)
        done += [c for c in found if c.state.done]
        kept = [c for c in found if not c.state.done]
        if not kept or len(done) >= n or problem.spent(prompt):
            break
        states = [kept[i].state for i in keep_best([c.score for c in kept], keep)]
    everything = done + kept
    return result(problem, prompt, [everything[i] for i in sorted(ranking(everything)[:n])])


@register("searches", "dvts", source="search-and-learn (DVTS)")
@side_by_side
def dvts(
    problem: Problem,
    prompt: Prompt,
    *,
    n: int = 4,
    width: int = 4,
    temperature: float | None = None,
    aggregate: str = "last",
    rounds: int = 40,
    lookahead: int = 0,
) -> Turn[SearchResult]:
    """n // width independent subtrees; each takes the best of `width` next steps, round by round.

    Subtrees are compared only at the end, when all `width` children of each one's final round are the result: n
    candidates (n must be a multiple of width).
    """
    trees = _parts(n, width)
    if n % width:
        raise ValueError(f"dvts: n={n} is no multiple of width={width}; subtrees have equal widths")
    (rows,) = yield from propose([State(prompt)], n, temperature=temperature, steps=1 if rounds > 1 else None)
    found = yield from score_candidates(problem, rows, aggregate, lookahead=lookahead)
    final = [found[t * width : (t + 1) * width] for t in range(trees)]
    heads = keep_per_subtree([c.score for c in found], width)
    leaders = [found[i].state for i in heads]
    for k in range(1, rounds):
        live = [t for t, s in enumerate(leaders) if not problem.is_done(s)]
        if not live or problem.spent(prompt):
            break
        steps = 1 if k < rounds - 1 else None
        grown = yield from propose([leaders[t] for t in live], width, temperature=temperature, steps=steps)
        found = yield from score_candidates(problem, [s for row in grown for s in row], aggregate, lookahead=lookahead)
        for j, t in enumerate(live):
            final[t] = found[j * width : (j + 1) * width]
            leaders[t] = final[t][best([c.score for c in final[t]])].state
    return result(problem, prompt, [c for children in final for c in children])


def keep_best(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k largest scores in ascending order, the earlier one on ties."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def keep_per_subtree(scores: Sequence[float], width: int) -> list[int]:
    """Index of the largest score of each run of `width`."""
    return [i + best(scores[i : i + width]) for i in range(0, len(scores), width)]


def _parts(n: int, width: int) -> int:
    if not 1 <= width <= n:
        raise ValueError(f"n={n}, width={width}: 1 <= width <= n must hold; n // width paths are kept")
    return n // width
