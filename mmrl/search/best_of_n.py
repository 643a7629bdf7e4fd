"""Best-of-N: independent solutions, of which the best scored one is the answer; votes and curves use the same pool."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import SearchResult, Turn, propose, result, score_candidates, side_by_side
from mmrl.search.problem import Problem


@register("searches", "best_of_n", pool=True, source="VisualPRM, VL-PRM")
@side_by_side
def best_of_n(
    problem: Problem,
    prompt: Prompt,
    *,
    n: int = 16,
    temperature: float | None = None,
    aggregate: str = "min",
    max_steps: int | None = None,
) -> Turn[SearchResult]:
    """n whole solutions, ranked by the aggregate of their step scores.

    max_steps: the largest number of steps that the scorer reads; neighbouring ones are joined (`join_steps`). With 1
        it reads the whole solution as one step, which makes an outcome reward of it (VL-PRM's `granularity:
        solution`). None: steps as written.
    """
    (states,) = yield from propose([State(prompt)], n, temperature=temperature, steps=None)
    scored_states = states if max_steps is None else [join_steps(state, max_steps) for state in states]
    scored = yield from score_candidates(problem, scored_states, aggregate)
    # The result has the solutions as they were written.
    candidates = [replace(candidate, state=state) for candidate, state in zip(scored, states, strict=True)]
    return result(problem, prompt, candidates)


def join_steps(state: State, max_steps: int) -> State:
    """The same text in at most `max_steps` steps: consecutive groups of ceil(T / max_steps) (VisualPRM's merging)."""
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1")
    size = max(ceil(len(state.steps) / max_steps), 1)
    starts = range(0, len(state.steps), size)
    joined = tuple("".join(state.steps[i : i + size]) for i in starts)
    ends = tuple(state.path[i : i + size][-1] for i in starts) if state.path else ()
    return State(state.prompt, joined, state.done, path=ends)
