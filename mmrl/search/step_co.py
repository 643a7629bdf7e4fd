"""StepCo: verify a whole solution, write it anew from its first bad step, until it is accepted."""

from __future__ import annotations

from collections.abc import Callable

from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import Candidate, SearchResult, Turn, propose, result, score_candidates, side_by_side
from mmrl.search.problem import Problem
from mmrl.search.votes import whole_text


@register("searches", "step_co", source="StepCo, with a fresh sample in place of its revision prompt")
@side_by_side
def step_co(
    problem: Problem,
    prompt: Prompt,
    *,
    temperature: float | None = None,
    aggregate: str = "last",
    threshold: float = 0.5,
    rounds: int = 5,
    canonical: Callable[[Prompt, str], str | None] = whole_text,
) -> Turn[SearchResult]:
    """Write a solution; while it scores below `threshold`, propose anew from before its first step below it.

    Stops when a version is accepted, when no step is below the threshold, when the answer stays the same, or after
    `rounds` revisions. Every version is a candidate, the last one answers. The method's own revision prompt (the step
    with its probability) is replaced by a fresh sample from the same prefix.
    """
    versions: list[Candidate] = []
    state = State(prompt)
    for _ in range(rounds + 1):
        (children,) = yield from propose([state], 1, temperature=temperature, steps=None)
        (version,) = yield from score_candidates(problem, children, aggregate)
        versions.append(version)
        bad = next((t for t, p in enumerate(version.step_scores) if p < threshold), None)
        if version.score >= threshold or bad is None or _repeats(versions, canonical) or problem.spent(prompt):
            break
        state = version.state.upto(bad)
    return result(problem, prompt, versions, answer=len(versions) - 1)


def _repeats(versions: list[Candidate], canonical: Callable[[Prompt, str], str | None]) -> bool:
    if len(versions) < 2:
        return False
    old, new = (canonical(v.state.prompt, v.state.text) for v in versions[-2:])
    return new is not None and old == new
