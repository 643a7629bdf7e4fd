"""StepCo: score a whole solution and rewrite it from its first bad step on, until it is accepted."""

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
        bad_steps = [i for i, score in enumerate(version.step_scores) if score < threshold]
        accepted = version.score >= threshold or not bad_steps
        if accepted or _repeats(versions, canonical) or problem.spent(prompt):
            break
        state = version.state.upto(bad_steps[0])
    return result(problem, prompt, versions, answer=len(versions) - 1)


def _repeats(versions: list[Candidate], canonical: Callable[[Prompt, str], str | None]) -> bool:
    """True when the newest version has the same answer as the one before it."""
    if len(versions) < 2:
        return False
    old, new = (canonical(version.state.prompt, version.state.text) for version in versions[-2:])
    return new is not None and old == new
