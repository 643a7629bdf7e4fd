"""One turn of a video agent: text -> `parse_turn` -> `act` -> looks to show, or the problem with the turn.

    state = VideoState.start(info.starts, info.duration, (info.height, info.width))
    state, looks, problem = act(state, parse_turn(text, "videocom"))
    reply = problem_text(problem) if problem else ...   # else show the looks

Nothing here reads pixels. This module is the front door of `video.acting.state`, `video.acting.manipulations` and
`video.acting.syntax`."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

from video.acting.manipulations import MANIPULATIONS, Manipulation, check, manipulation, tool_specs
from video.acting.state import (
    Change,
    Code,
    Coords,
    Look,
    Problem,
    UnshowableError,
    VideoAction,
    VideoState,
    frame_range,
    look_problem,
    pixel_box,
)
from video.acting.syntax import Syntax, Turn, parse_turn, render

__all__ = [
    "MANIPULATIONS",
    "Change",
    "Code",
    "Coords",
    "Look",
    "Manipulation",
    "Problem",
    "Syntax",
    "Turn",
    "UnshowableError",
    "VideoAction",
    "VideoState",
    "act",
    "check",
    "frame_range",
    "look_problem",
    "manipulation",
    "parse_turn",
    "pixel_box",
    "problem_text",
    "render",
    "tool_specs",
]

log = logging.getLogger(__name__)

_LOOK_KINDS = ("segment", "frame", "crop", "text")


def act(
    state: VideoState, turn: Turn, *, cost: Callable[[Look], int] | None = None
) -> tuple[VideoState, tuple[Look, ...], Problem | None]:
    """Carry out a turn: the next state, the looks to show, and the problem. Never raises, whatever the policy wrote.

    Every turn uses up one of `turns_left`. A turn is carried out whole or refused whole: with a problem nothing is
    shown and only the turn count changes. An answer is always accepted. Anything else in the last turn is
    `budget_exceeded`, since nobody would see what it shows.

    Args:
        cost: tokens that showing a look takes; what a turn costs is taken off `tokens_left`, if that is limited.

    A manipulation that raises, or returns something else than looks, texts or a Problem, refuses its turn as
    `failed_action`; the log has the first traceback of each.
    """
    after = replace(state, turns_left=max(state.turns_left - 1, 0))
    # an answer ends the conversation, also in the last turn
    if turn.answer is not None:
        return after, (), None
    if turn.problem is not None:
        return after, (), turn.problem
    if not turn.actions:
        return after, (), Problem("parse_error", "there is no call and no answer in this turn.")
    if after.turns_left == 0:
        return after, (), Problem("budget_exceeded", "this was the last turn; it has to be the answer.")
    # `after` is the state if the turn is refused, `carried_out` the one that grows with every action
    turn_looks: tuple[Look, ...] = ()
    carried_out = after
    for action in turn.actions:
        # later calls of a turn see the earlier ones: a zoom may follow the frame that it refers to
        looks = _run(carried_out, action)
        if isinstance(looks, Problem):
            return after, (), looks
        turn_looks += looks
        last_frame = carried_out.frame
        for look in looks:
            if look.frame is not None:
                last_frame = look.frame
        carried_out = replace(carried_out, frame=last_frame, done=(*carried_out.done, (action.name, looks)))
    return _charge(after, carried_out, turn_looks, cost)


def _run(state: VideoState, action: VideoAction) -> tuple[Look, ...] | Problem:
    """The looks of one action, each fit to be shown, or the first thing wrong with it."""
    checked = check(action)
    if isinstance(checked, Problem):
        return checked
    name = checked.name
    try:
        result = MANIPULATIONS[name].run(state, checked.args)
        if isinstance(result, Problem):
            return result
        looks = _as_looks(state, name, result)
        for look in looks:
            problem = look_problem(state, look)
            if problem is not None:
                return problem
        # by the looks, not by the words: the same place may be named by its time or its number
        is_repeat = bool(looks) and (name, looks) in state.done
    except Exception as error:
        # a function of the user's own costs its turn, not the run
        _log_failure(name, type(error).__name__)
        return Problem("failed_action", f"{name} failed here; look elsewhere, or answer.")
    if is_repeat:
        return Problem("duplicate_action", f"{name} has shown exactly this before; look elsewhere or answer.")
    return looks


def _as_looks(state: VideoState, name: str, result: Any) -> tuple[Look, ...]:
    """The looks of a manipulation's result: a look, a text, or several of them.

    Raises:
        TypeError, ValueError: it is something else, or a look that no encoder could show.
    """
    parts = result if isinstance(result, tuple | list) else (result,)
    looks: list[Look] = []
    for part in parts:
        look = state.words(part) if isinstance(part, str) else part
        if not isinstance(look, Look) or look.kind not in _LOOK_KINDS:
            raise TypeError(f"{name} returned {part!r}: looks, texts or a Problem are needed")
        if look.kind == "text" and not look.text.strip():
            raise ValueError(f"{name} returned an empty text")
        # numbers of frames are whole, and looks are keys of caches
        for number in (look.frame, look.frames):
            if number is not None:
                operator.index(number)
        hash(look)
        looks.append(look)
    if not looks and name != "answer":
        raise ValueError(f"{name} returned nothing to show")
    return tuple(looks)


@lru_cache(maxsize=256)
def _log_failure(name: str, error: str) -> None:
    """Log the exception that is being handled, the first one of a kind of each manipulation."""
    log.warning("manipulation %s failed (%s); its turns are refused", name, error, exc_info=True)


def _charge(
    refused: VideoState, carried_out: VideoState, looks: tuple[Look, ...], cost: Callable[[Look], int] | None
) -> tuple[VideoState, tuple[Look, ...], Problem | None]:
    """Take the tokens of a turn's looks off its state, or refuse the turn where too few are left."""
    if cost is None or carried_out.tokens_left is None:
        return carried_out, looks, None
    tokens_left = carried_out.tokens_left
    total = sum(cost(look) for look in looks)
    if total > tokens_left:
        message = f"showing this takes {total} tokens and {tokens_left} are left; look at less, or answer."
        return refused, (), Problem("budget_exceeded", message)
    return replace(carried_out, tokens_left=tokens_left - total), looks, None


def problem_text(problem: Problem) -> str:
    """A problem in one line: `Error out_of_range: frame 200 is not in the video. Valid: frame 1 to 132.`

    It quotes nothing of the policy's text that a tokenizer could take for a token of its own.
    """
    text = f"Error {problem.code}: {problem.message}"
    if not problem.valid:
        return text
    valid = [f"{name} {_valid_text(value)}" for name, value in problem.valid.items()]
    return f"{text} Valid: {'; '.join(valid)}."


def _valid_text(value: Any) -> str:
    """A number, a name, a list of them, or `low to high` for two numbers."""
    if not isinstance(value, tuple | list):
        return f"{value:.10g}" if isinstance(value, int | float) else str(value)
    if len(value) == 2 and all(isinstance(bound, int | float) for bound in value):
        return f"{value[0]:.10g} to {value[1]:.10g}"
    return ", ".join(map(str, value))
