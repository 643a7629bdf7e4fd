"""Step beam search and its diverse form (DVTS), after search-and-learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

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
    dedupe: of candidates with equal texts only the first goes on.
    """
    beam_size = _parts(n, width)
    ended: list[Candidate] = []
    open_paths: list[Candidate] = []
    states = [State(prompt)]
    for round_index in range(rounds):
        steps = 1 if round_index < rounds - 1 else None
        rows = yield from propose(states, n // len(states), temperature=temperature, steps=steps)
        children = list(chain.from_iterable(rows))
        if dedupe:
            children = _first_of_equal_texts(children)
        candidates = yield from score_candidates(problem, children, aggregate, lookahead=lookahead)
        ended += [candidate for candidate in candidates if candidate.state.done]
        open_paths = [candidate for candidate in candidates if not candidate.state.done]
        if not open_paths or len(ended) >= n or problem.spent(prompt):
            break
        scores = [candidate.score for candidate in open_paths]
        states = [open_paths[i].state for i in keep_best(scores, beam_size)]
    everything = ended + open_paths
    # In the order they were proposed, so that later ties go to the earlier one.
    chosen = sorted(ranking(everything)[:n])
    return result(problem, prompt, [everything[i] for i in chosen])


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
    num_subtrees = _parts(n, width)
    if n % width:
        raise ValueError(f"dvts: n={n} is no multiple of width={width}; subtrees have equal widths")
    (children,) = yield from propose([State(prompt)], n, temperature=temperature, steps=1 if rounds > 1 else None)
    candidates = yield from score_candidates(problem, children, aggregate, lookahead=lookahead)
    # Per subtree: the candidates of its latest round, and the state of the best of them.
    latest = [candidates[i * width : (i + 1) * width] for i in range(num_subtrees)]
    heads = keep_per_subtree([candidate.score for candidate in candidates], width)
    leaders = [candidates[i].state for i in heads]
    for round_index in range(1, rounds):
        live = [i for i, leader in enumerate(leaders) if not problem.is_done(leader)]
        if not live or problem.spent(prompt):
            break
        steps = 1 if round_index < rounds - 1 else None
        rows = yield from propose([leaders[i] for i in live], width, temperature=temperature, steps=steps)
        children = list(chain.from_iterable(rows))
        candidates = yield from score_candidates(problem, children, aggregate, lookahead=lookahead)
        for position, i in enumerate(live):
            latest[i] = candidates[position * width : (position + 1) * width]
            leaders[i] = latest[i][best([candidate.score for candidate in latest[i]])].state
    return result(problem, prompt, list(chain.from_iterable(latest)))


def keep_best(scores: Sequence[float], k: int) -> list[int]:
    """Indices of the k largest scores in ascending order, the earlier one on ties."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def keep_per_subtree(scores: Sequence[float], width: int) -> list[int]:
    """Index of the largest score of each run of `width`."""
    return [i + best(scores[i : i + width]) for i in range(0, len(scores), width)]


def _first_of_equal_texts(states: Sequence[State]) -> list[State]:
    """The first state of each text, in the order in which texts occur for the last time."""
    state_of_text = {state.text: state for state in reversed(states)}
    return list(state_of_text.values())[::-1]


def _parts(n: int, width: int) -> int:
    """The number n // width of paths that go on; raises ValueError unless 1 <= width <= n."""
    if not 1 <= width <= n:
        raise ValueError(f"n={n}, width={width}: 1 <= width <= n must hold; n // width paths are kept")
    return n // width
