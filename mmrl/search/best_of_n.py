"""Best-of-N: independent solutions, the best score answers. Its pool also serves every vote and every curve."""

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

    max_steps: the scorer sees at most so many steps (neighbours joined, `join_steps`); 1 shows the whole solution as
        one step, which makes an outcome reward of the scorer (VL-PRM's `granularity: solution`). None: as written.
    """
    states = (yield from propose([State(prompt)], n, temperature=temperature, steps=None))[0]
    shown = states if max_steps is None else [join_steps(s, max_steps) for s in states]
    judged = yield from score_candidates(problem, shown, aggregate)
    return result(problem, prompt, [replace(c, state=s) for c, s in zip(judged, states, strict=True)])


def join_steps(state: State, max_steps: int) -> State:
    """The same text in at most `max_steps` steps: consecutive groups of ceil(T / max_steps) (VisualPRM's merging)."""
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps} must be at least 1")
    size = max(ceil(len(state.steps) / max_steps), 1)
    starts = range(0, len(state.steps), size)
    joined = tuple("".join(state.steps[i : i + size]) for i in starts)
    ends = tuple(state.path[i : i + size][-1] for i in starts) if state.path else ()
    return State(state.prompt, joined, state.done, path=ends)
