"""Actions as text: read a policy's turn, and write an action the way a policy would. Reading never raises.

videocom   `FIND_SEGMENT(phrase) = [3, 4]`, `FIND_FRAME(phrase) = 57`, `SPATIAL_ZOOM(phrase) = [x1, y1, x2, y2]`,
           `FINAL_ANSWER: B. text`, in any case and with any blanks. Every manipulation can also be written with its
           arguments as JSON: `FIND_SEGMENT(phrase) = {"start": 2.5, "end": 4}`. Only calls of one kind are carried
           out per turn: the first kind found in the order segment, frame, zoom, the user's own.
tool_call  `<tool_call>{"name": "find_frame", "arguments": {"frame": 57, "label": "phrase"}}</tool_call>`, any number
           of them in order; `<answer>B</answer>` or the tool `answer`.

In both the thinking is cut first: what stands in `<think>..</think>` and the like neither calls nor answers. An answer
ends the episode and calls beside it are not carried out, so `Turn.actions` is empty. A turn is taken whole or not at
all: one faulty call makes the turn a Problem. A call without `= value` is prose (`I will use FIND_FRAME(dog)`) unless
the turn has nothing else. More than `MAX_CALLS` calls are `budget_exceeded`. Time is linear in the length of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, Literal

from mmrl.reasoning.answer_text import answer_in_tags, without_thinking
from video.acting.manipulations import LABEL, MANIPULATIONS, check
from video.acting.state import Problem, VideoAction

Syntax = Literal["videocom", "tool_call"]

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# the argument that a bare `= value` stands for
_SHORT = {"find_segment": "segments", "find_frame": "frame", "spatial_zoom": "bbox"}
_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"
# `3`, and without brackets `3, 4`, `3 and 4`, on one line
_BARE = rf"{_NUMBER}(?:[ \t]*+(?:,(?:[ \t]*+and\b)?+|;|&|and\b)[ \t]*+{_NUMBER})*+"
_VALUE = re.compile(rf"\s*+=\s*+(?:\[([0-9eE+\-.,\s]*+)\]|(\{{)|({_BARE}))")
_MORE_NUMBERS = re.compile(r"[ \t]*+(?:-|to\b|through\b|\.\.++)?+[ \t]*+[0-9]")
_ASSIGNED = re.compile(r"\)\s*+=")
_ANSWER = re.compile(r"(?<![A-Za-z0-9_])FINAL_ANSWER\s*+:", re.IGNORECASE | re.ASCII)
_OTHER = re.compile(r"(?<![A-Za-z0-9_])([A-Z][A-Z0-9]*+(?:_[A-Z0-9]++)++)\s*+\(", re.ASCII)
_JSON_CHARS = 4000  # longest arguments in Video-CoM text
_DEEP = 8  # no argument nests deeper
MAX_CALLS = 16  # in one turn; reading thousands would stall every rollout beside it


@dataclass(frozen=True)
class Turn:
    """What a policy wanted in one turn: actions, or an answer, or a problem; exactly one of them is there."""

    actions: tuple[VideoAction, ...] = ()
    answer: str | None = None
    problem: Problem | None = None


class _Unreadable(Exception):
    """Carries a Problem out of the depths of a parser."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def parse_turn(text: str, syntax: Syntax) -> Turn:
    """The actions, the answer or the problem in one turn of a policy. Never raises, whatever the text.

    Actions are known to the registry and have arguments of the right types; whether they fit the video is for
    `video.acting.actions.act` to say. Of several answers the last counts.

    Raises:
        ValueError: a syntax that is not one of the two (the caller's mistake).
    """
    if syntax not in ("videocom", "tool_call"):
        raise ValueError(f"syntax={syntax!r}: videocom or tool_call")
    text = without_thinking(_clean(text))
    try:
        answer, actions = (_read_videocom if syntax == "videocom" else _read_tool_calls)(text)
    except _Unreadable as unreadable:
        return Turn(problem=unreadable.problem)
    if answer is not None:
        return Turn(answer=answer) if answer else Turn(problem=_bad("the answer is empty."))
    if not actions:
        return Turn(problem=_bad("there is no call and no answer in this turn.", actions=tuple(MANIPULATIONS)))
    return Turn(actions=actions)


def render(action: VideoAction, syntax: Syntax, phrase: str = "") -> str:
    """The text of an action, in the published short form where there is one; `parse_turn` reads it back.

    phrase: what is looked for; defaults to the action's own.

    Raises:
        ValueError: it would be read as something else: an unknown action, arguments of the wrong type, an answer that
            holds markup or (videocom) several lines, or a phrase that looks like a call.
    """
    phrase = phrase or action.phrase
    checked = check(action)
    if isinstance(checked, Problem):
        raise ValueError(f"{action} cannot be written: {checked.message}")
    if action.name == "answer":
        said = action.args["text"]
        text, want = f"FINAL_ANSWER: {said}" if syntax == "videocom" else f"<answer>{said}</answer>", Turn(answer=said)
    else:
        text, want = (_write_call if syntax == "videocom" else _write_tool_call)(checked, phrase), Turn((checked,))
    found = parse_turn(text, syntax)
    if found != want or (found.actions and found.actions[0].phrase != phrase.strip()):
        raise ValueError(f"{text!r} would not be read back as {action} in {syntax}; choose a simpler phrase or text")
    return text


def _clean(text: str) -> str:
    """Lone surrogates, which no log can store, become `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _check_calls(count: int) -> None:
    if count > MAX_CALLS:
        told = "there are too many calls in this turn."
        raise _Unreadable(Problem("budget_exceeded", told, {"calls in a turn": (1, MAX_CALLS)}))


def _bad(message: str, **valid: Any) -> Problem:
    return Problem("parse_error", message, valid)


# ---- Video-CoM text -------------------------------------------------------------------------------------------------


def _read_videocom(text: str) -> tuple[str | None, tuple[VideoAction, ...]]:
    answers = list(_ANSWER.finditer(text))
    if answers:
        return text[answers[-1].end() :].lstrip().partition("\n")[0].strip(), ()
    calls, prose = _calls(text)
    kind = next((name for name in MANIPULATIONS if any(name == called for called, _ in calls)), None)
    if kind is not None:
        return None, tuple(_accept(found) for called, found in calls if called == kind)
    if prose:
        raise _Unreadable(
            _bad(f"{prose.upper()}(...) lacks its value: write {prose.upper()}(what you look for) = ...")
        )
    _refuse_other(text)
    return None, ()


def _calls(text: str) -> tuple[list[tuple[str, VideoAction | Problem]], str]:
    """(name, action or problem) of every call with a value, and the name of one without, in order."""
    names = tuple(name for name in MANIPULATIONS if name != "answer")
    heads = _heads(names)
    partner = _partners(text) if heads.search(text) else {}
    calls: list[tuple[str, VideoAction | Problem]] = []
    prose, done = "", 0
    for head, following in pairwise(chain(heads.finditer(text), (None,))):
        if head is None or head.start() < done:
            continue  # inside the phrase of the call before
        name, opened = head[1].lower(), head.end() - 1
        limit = following.start() if following else len(text)
        close = _phrase_end(text, opened, partner.get(opened), limit)
        if close is None:
            prose = prose or name
            continue
        found, done = _value(text, close + 1, name, text[opened + 1 : close].strip())
        calls.append((name, found))
        _check_calls(len(calls))
    return calls, prose


@lru_cache(maxsize=8)
def _heads(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(names)})\s*+\(", re.IGNORECASE | re.ASCII)


def _partners(text: str) -> dict[int, int]:
    """Positions of opening parentheses -> their closing ones, in one pass over the text."""
    opened: list[int] = []
    partner: dict[int, int] = {}
    for i, char in enumerate(text):
        if char == "(":
            opened.append(i)
        elif char == ")" and opened:
            partner[opened.pop()] = i
    return partner


def _phrase_end(text: str, opened: int, partner: int | None, limit: int) -> int | None:
    """Where the phrase closes: at its balanced parenthesis if `=` follows, else at the first `) =` before `limit`."""
    if partner is not None and _ASSIGNED.match(text, partner):
        return partner
    match = _ASSIGNED.search(text, opened, limit)
    return match.start() if match else None


def _value(text: str, at: int, name: str, phrase: str) -> tuple[VideoAction | Problem, int]:
    """The action that the value after `)` makes, and where that value ends."""
    match = _VALUE.match(text, at)
    if match is None:
        wanted = "numbers in brackets" if _SHORT.get(name) != "frame" else "a number"
        return _bad(f"the value of {name.upper()} is not readable; it takes {wanted}."), at
    if match[2]:
        try:
            args, length = _DECODER.raw_decode(text[match.end() - 1 : match.end() - 1 + _JSON_CHARS])
            return check(VideoAction(name, _frozen(args), phrase)), match.end() - 1 + length
        except _FAULTS:
            return _bad(f"the arguments of {name.upper()} are not readable as JSON."), match.end()
    short = _SHORT.get(name)
    if short is None:
        return _bad(f"{name.upper()} takes its arguments as JSON: {name.upper()}(phrase) = {{...}}."), match.end()
    if match[3] is None:
        numbers = _numbers(match[1])
    else:
        numbers = _numbers(" ".join(re.findall(_NUMBER, match[3])))
        # one number was read where several seem to be meant, or a box is not marked as one
        if short == "bbox" or (short == "segments" and _MORE_NUMBERS.match(text, match.end())):
            return _bad(f"the value of {name.upper()} is not clear; write it as numbers in brackets."), match.end()
    if not numbers:
        return _bad(f"the value of {name.upper()} is no list of numbers."), match.end()
    return check(VideoAction(name, {short: numbers[0] if short == "frame" else numbers}, phrase)), match.end()


def _numbers(text: str) -> tuple[int | float, ...]:
    """Numbers between commas or blanks; empty if anything else is there."""
    words = text.replace(",", " ").split()
    if len(words) > 1000 or not all(re.fullmatch(_NUMBER, word) for word in words):
        return ()
    return tuple(_whole(word) if re.fullmatch(r"-?[0-9]+", word) else float(word) for word in words)


def _accept(found: VideoAction | Problem) -> VideoAction:
    if isinstance(found, Problem):
        raise _Unreadable(found)
    return found


def _refuse_other(text: str) -> None:
    """A call in the same style of something that nobody registered is an unknown action, not a turn without one."""
    others = list(_OTHER.finditer(text))
    partner = _partners(text) if others else {}
    for other in others:
        closed = partner.get(other.end() - 1)
        if closed is not None and _ASSIGNED.match(text, closed):
            _accept(check(VideoAction(other[1].lower(), {})))


def _write_call(action: VideoAction, phrase: str) -> str:
    short = _SHORT.get(action.name)
    if short is None or set(action.args) != {short}:
        value = _json(dict(action.args))
    else:
        value = _json(action.args[short])
    return f"{action.name.upper()}({phrase}) = {value}"


# ---- tool-call JSON -------------------------------------------------------------------------------------------------


def _read_tool_calls(text: str) -> tuple[str | None, tuple[VideoAction, ...]]:
    answer = answer_in_tags(text)
    if answer is not None:
        return answer.strip(), ()
    bodies = list(_bodies(text))
    _check_calls(len(bodies))
    found = [_tool_call(body) for body in bodies]
    answers = [call.args["text"].strip() for call in found if isinstance(call, VideoAction) and call.name == "answer"]
    if answers:
        return answers[-1], ()
    if not found and "<answer>" in text:
        raise _Unreadable(_bad("the answer is not closed with </answer>."))
    return None, tuple(_accept(call) for call in found)


def _bodies(text: str) -> Iterator[str]:
    """What stands behind each opening tag, up to its closing one; a call that nothing closes cannot be read.

    A tag that no call follows before the next one opens is a mention of it ("I could use <tool_call>").
    """
    parts = text.split(_OPEN)[1:]
    for i, part in enumerate(parts):
        body, closed, _ = part.partition(_CLOSE)
        if closed or i == len(parts) - 1 or body.lstrip().startswith("{"):
            yield body if closed else ""


def _tool_call(body: str) -> VideoAction | Problem:
    try:
        call = _frozen(_DECODER.decode(body.strip()))
    except _FAULTS:
        return _bad(f"the call is not JSON between {_OPEN[1:-1]} tags.")
    if not isinstance(call, dict) or set(call) != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return _bad("a call is an object with name and arguments, and the arguments are an object.")
    if not isinstance(call["name"], str):
        return _bad("the name of a call must be a text.")
    args = dict(call["arguments"])
    phrase = args.pop(LABEL, "")
    if not isinstance(phrase, str):
        return _bad(f"{LABEL} must be a text.")
    return check(VideoAction(call["name"], args, phrase.strip()))


def _write_tool_call(action: VideoAction, phrase: str) -> str:
    args = dict(action.args) | ({LABEL: phrase} if phrase else {})
    body = _json({"name": action.name, "arguments": args}).replace("<", "\\u003c")  # a phrase may hold a tag
    return f"{_OPEN}{body}{_CLOSE}"


# ---- JSON of a policy -----------------------------------------------------------------------------------------------


def _whole(digits: str) -> int | float:
    """Python refuses to read more than 4300 digits; from 18 on only the size matters."""
    return int(digits) if len(digits) <= 18 else float(digits)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _frozen(value: Any, depth: int = 0) -> Any:
    """Lists as tuples, texts without lone surrogates; nothing nested deeply."""
    if depth > _DEEP:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return tuple(_frozen(v, depth + 1) for v in value)
    if isinstance(value, Mapping):
        return {_clean(k): _frozen(v, depth + 1) for k, v in value.items()}
    return _clean(value) if isinstance(value, str) else value


_DECODER = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_once, strict=False)
_FAULTS = (ValueError, RecursionError)
