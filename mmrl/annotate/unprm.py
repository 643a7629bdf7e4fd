"""UnPRM: how many rollouts a question gets, which steps are probed first, which solutions are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal


def rollouts_needed(flags: Sequence[bool], *, right: int = 10, multiple: int = 8, least: int = 16) -> int | None:
    """Rollouts per prefix: position (from 1) of the `right`-th right answer, rounded up to `multiple`, >= `least`.

    Args:
        flags: whether each of the answers sampled from the bare question is right, in order (72 in UnPRM).

    Returns:
        None when at most `right` are right: the question is skipped.
    """
    where = [i for i, flag in enumerate(flags, start=1) if flag]
    if len(where) <= right:
        return None
    return max(math.ceil(where[right - 1] / multiple) * multiple, least)


def probe_order(uncertainty: Sequence[float], by: Literal["level", "increase"] = "level") -> list[int]:
    """Steps by falling uncertainty, or by falling u_(i+1) - u_i, credited to i + 1, which leaves step 0 out.

    Ties go to the earlier step.
    """
    if by == "level":
        return sorted(range(len(uncertainty)), key=lambda i: -uncertainty[i])
    return sorted(range(1, len(uncertainty)), key=lambda i: uncertainty[i - 1] - uncertainty[i])


def probe_error(
    order: Sequence[int],
    num_steps: int,
    solve_rate: Callable[[int], float],
    question_rate: float,
    *,
    confirm_left: bool = False,
) -> tuple[int, dict[int, float]]:
    """First error of a wrong solution, and the rates that were probed.

    Probes steps in `order`; the first whose solve rate after it is below the question's own is the error, without one
    the last step. A hit need not be the earliest: `confirm_left` (as defined here) then probes the step to its left
    and moves there as long as that is below too.

    Args:
        solve_rate: step -> share of completions after it that are right; called at most once per step.

    Raises:
        ValueError: no steps.
    """
    if num_steps < 1:
        raise ValueError("no steps to probe")
    rates: dict[int, float] = {}

    def below(step: int) -> bool:
        if step not in rates:
            rates[step] = solve_rate(step)
        return rates[step] < question_rate

    error = next((t for t in order if below(t)), num_steps - 1)
    while confirm_left and error > 0 and below(error - 1):
        error -= 1
    return error, rates
