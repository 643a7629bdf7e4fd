"""One turn of a video agent: text -> `parse_turn` -> `act` -> looks to show, or a problem to tell.

    state = VideoState.start(info.starts, info.duration, (info.height, info.width))
    state, looks, problem = act(state, parse_turn(text, "videocom"))
    told = problem_text(problem) if problem else ...   # else show the looks

Nothing here reads pixels. This module is the front door of `video.acting.state`, `video.acting.manipulations` and
`video.acting.syntax`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from video.acting.manipulations import MANIPULATIONS, Manipulation, check, manipulation, tool_specs
from video.acting.state import (
    Code,
    Coords,
    Look,
    Problem,
    VideoAction,
    VideoState,
    frame_range,
    look_problem,
    pixel_box,
)
from video.acting.syntax import Syntax, Turn, parse_turn, render

__all__ = [
    "MANIPULATIONS", "Code", "Coords", "Look", "Manipulation", "Problem", "Syntax", "Turn", "VideoAction",
    "VideoState", "act", "check", "frame_range", "look_problem", "manipulation", "parse_turn", "pixel_box",
    "problem_text", "render", "tool_specs",
]  # fmt: skip


def act(
    state: VideoState, turn: Turn, *, cost: Callable[[Look], int] | None = None
) -> tuple[VideoState, tuple[Look, ...], Problem | None]:
    """Carry out a turn: the next state, what to show, and what was wrong. Never raises, whatever the policy wrote.

    Every turn uses up one of `turns_left`. A turn is carried out whole or refused whole: with a problem nothing is
    shown and only the turn count changes. An answer is always accepted. Anything else in the last turn is
    `budget_exceeded`, since nobody would see what it shows.

    Args:
        cost: tokens that showing a look takes; what a turn costs is taken off `tokens_left`, if that is limited.

    Raises:
        Whatever a registered function or `cost` raises by itself; the built-in manipulations raise nothing.
    """
    after = replace(state, turns_left=max(state.turns_left - 1, 0))
    if turn.answer is not None:
        return after, (), None
    if turn.problem is not None:
        return after, (), turn.problem
    if not turn.actions:
        return after, (), Problem("parse_error", "there is no call and no answer in this turn.")
    if after.turns_left == 0:
        return after, (), Problem("budget_exceeded", "this was the last turn; it has to be the answer.")
    shown: tuple[Look, ...] = ()
    new = after
    for action in turn.actions:
        looks = _run(new, action)
        if isinstance(looks, Problem):
            return after, (), looks
        shown += looks
        stills = [look.frame for look in looks if look.frame is not None]
        new = replace(new, frame=stills[-1] if stills else new.frame, done=(*new.done, (action.name, looks)))
    return _charge(after, new, shown, cost)


def _run(state: VideoState, action: VideoAction) -> tuple[Look, ...] | Problem:
    """The looks of one action, each fit to be shown, or the first thing wrong with it."""
    checked = check(action)
    if isinstance(checked, Problem):
        return checked
    looks = MANIPULATIONS[checked.name].run(state, checked.args)
    if isinstance(looks, Problem):
        return looks
    problem = next((p for p in (look_problem(state, look) for look in looks) if p), None)
    if problem is None and looks and (checked.name, looks) in state.done:
        return Problem("duplicate_action", f"{checked.name} has shown exactly this before; look elsewhere or answer.")
    return problem or looks


def _charge(
    refused: VideoState, new: VideoState, looks: tuple[Look, ...], cost: Callable[[Look], int] | None
) -> tuple[VideoState, tuple[Look, ...], Problem | None]:
    if cost is None or new.tokens_left is None:
        return new, looks, None
    total = sum(cost(look) for look in looks)
    if total > new.tokens_left:
        told = f"showing this takes {total} tokens and {new.tokens_left} are left; look at less, or answer."
        return refused, (), Problem("budget_exceeded", told)
    return replace(new, tokens_left=new.tokens_left - total), looks, None


def problem_text(problem: Problem) -> str:
    """A problem in one line: `Error out_of_range: frame 200 is not in the video. Valid: frame 1 to 132.`

    It quotes nothing of the policy's text that a tokenizer could take for a token of its own.
    """
    valid = "; ".join(f"{name} {_shown(value)}" for name, value in problem.valid.items())
    return f"Error {problem.code}: {problem.message}" + (f" Valid: {valid}." if valid else "")


def _shown(value: Any) -> str:
    if not isinstance(value, tuple | list):
        return f"{value:.10g}" if isinstance(value, int | float) else str(value)
    if len(value) == 2 and all(isinstance(v, int | float) for v in value):
        return f"{value[0]:.10g} to {value[1]:.10g}"
    return ", ".join(str(v) for v in value)
