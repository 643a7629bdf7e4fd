"""PATS: guided greedy decoding whose number of candidates depends on the scores of the last step."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import Candidate, SearchResult, Turn, best, propose, result, score_candidates, side_by_side
from mmrl.search.problem import Problem


@register("searches", "pats", source="PATS")
@side_by_side
def pats(
    problem: Problem,
    prompt: Prompt,
    *,
    widths: Sequence[int] = (8, 4, 2),
    temperatures: Sequence[float | None] = (None, None, None),
    aggregate: str = "last",
    easier: float = 0.85,
    harder: float = 0.75,
    reject: float = 0.4,
    penalty: int = 1,
    rounds: int = 40,
) -> Turn[SearchResult]:
    """Guided greedy decoding in three modes, 0 complex, 1 medium, 2 simple; see `next_mode`.

    A step whose best candidate scores below `reject` is proposed again in mode 0, at most `penalty` times. The
    candidates of the final round are the result. rounds: longest path; its last proposal writes to the end.
    """
    if not len(widths) == len(temperatures) == 3:
        raise ValueError(
            f"pats: {len(widths)} widths and {len(temperatures)} temperatures; give 3 of each, complex first"
        )
    state, mode, rejections, depth = State(prompt), 0, 0, 0
    candidates: list[Candidate] = []
    while depth < rounds:
        steps = 1 if depth < rounds - 1 else None
        (children,) = yield from propose([state], widths[mode], temperature=temperatures[mode], steps=steps)
        candidates = yield from score_candidates(problem, children, aggregate)
        top = candidates[best([candidate.score for candidate in candidates])]
        spent = problem.spent(prompt)
        may_reject = rejections < penalty and not spent
        accepted, mode = next_mode(mode, top.score, easier=easier, harder=harder, reject=reject, may_reject=may_reject)
        rejections = 0 if accepted else rejections + 1
        if accepted:
            state, depth = top.state, depth + 1
        if spent or problem.is_done(state):
            break
    return result(problem, prompt, candidates)


def next_mode(
    mode: int, reward: float, *, may_reject: bool, easier: float = 0.85, harder: float = 0.75, reject: float = 0.4
) -> tuple[bool, int]:
    """(accept the step, mode of the next proposal).

    reward < reject: proposed again in mode 0, if it may be rejected. Otherwise the step is accepted; reward >= easier:
    one mode simpler; reward < harder: mode 0; else the same mode.
    """
    if reward < reject and may_reject:
        return False, 0
    if reward >= easier:
        return True, min(mode + 1, 2)
    return True, 0 if reward < harder else mode
