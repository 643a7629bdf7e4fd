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
# longest arguments in Video-CoM text
_JSON_CHARS = 4000
# levels of lists and objects in an argument
_MAX_DEPTH = 8
# in one turn; reading thousands would stall every rollout beside it
MAX_CALLS = 16


@dataclass(frozen=True)
class Turn:
    """One turn of a policy as it is read: actions, or an answer, or a problem; exactly one of them is there."""

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
    read = _read_videocom if syntax == "videocom" else _read_tool_calls
    try:
        answer, actions = read(text)
    except _Unreadable as unreadable:
        return Turn(problem=unreadable.problem)
    if answer == "":
        return Turn(problem=_bad("the answer is empty."))
    if answer is not None:
        return Turn(answer=answer)
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
        answer = action.args["text"]
        text = f"FINAL_ANSWER: {answer}" if syntax == "videocom" else f"<answer>{answer}</answer>"
        turn = Turn(answer=answer)
    else:
        write = _write_call if syntax == "videocom" else _write_tool_call
        text = write(checked, phrase)
        turn = Turn((checked,))
    # phrases do not count when actions are compared, hence the second condition
    read_back = parse_turn(text, syntax)
    if read_back != turn or (read_back.actions and read_back.actions[0].phrase != phrase.strip()):
        raise ValueError(f"{text!r} would not be read back as {action} in {syntax}; choose a simpler phrase or text")
    return text


def _clean(text: str) -> str:
    """Lone surrogates, which no log can store, become `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _check_calls(count: int) -> None:
    if count > MAX_CALLS:
        message = "there are too many calls in this turn."
        raise _Unreadable(Problem("budget_exceeded", message, {"calls in a turn": (1, MAX_CALLS)}))


def _bad(message: str, **valid: Any) -> Problem:
    return Problem("parse_error", message, valid)


# ---- Video-CoM text -------------------------------------------------------------------------------------------------


def _read_videocom(text: str) -> tuple[str | None, tuple[VideoAction, ...]]:
    """The answer, or the actions of the first kind that is called; raises `_Unreadable`."""
    answers = list(_ANSWER.finditer(text))
    if answers:
        return text[answers[-1].end() :].lstrip().partition("\n")[0].strip(), ()
    calls, name_without_value = _calls(text)
    called_names = {name for name, _ in calls}
    # the registry is in the order of the kinds
    for name in MANIPULATIONS:
        if name in called_names:
            return None, tuple(_accept(result) for called, result in calls if called == name)
    if name_without_value:
        name = name_without_value.upper()
        raise _Unreadable(_bad(f"{name}(...) lacks its value: write {name}(what you look for) = ..."))
    _refuse_unregistered(text)
    return None, ()


def _calls(text: str) -> tuple[list[tuple[str, VideoAction | Problem]], str]:
    """(name, action or problem) of every call with a value, in order, and the name of the first call without one."""
    names = tuple(name for name in MANIPULATIONS if name != "answer")
    heads = list(_heads(names).finditer(text))
    partners = _partners(text) if heads else {}
    calls: list[tuple[str, VideoAction | Problem]] = []
    name_without_value = ""
    end = 0
    for i, head in enumerate(heads):
        # the phrase of the call before may look like a call
        if head.start() < end:
            continue
        name, opened = head[1].lower(), head.end() - 1
        limit = heads[i + 1].start() if i + 1 < len(heads) else len(text)
        close = _phrase_end(text, opened, partners.get(opened), limit)
        if close is None:
            name_without_value = name_without_value or name
            continue
        result, end = _value(text, close + 1, name, text[opened + 1 : close].strip())
        calls.append((name, result))
        _check_calls(len(calls))
    return calls, name_without_value


@lru_cache(maxsize=8)
def _heads(names: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of the openings `NAME(` of these manipulations."""
    return re.compile(rf"(?<![A-Za-z0-9_])({'|'.join(names)})\s*+\(", re.IGNORECASE | re.ASCII)


def _partners(text: str) -> dict[int, int]:
    """Positions of opening parentheses -> their closing ones, in one pass over the text."""
    open_positions: list[int] = []
    partners: dict[int, int] = {}
    for i, char in enumerate(text):
        if char == "(":
            open_positions.append(i)
        elif char == ")" and open_positions:
            partners[open_positions.pop()] = i
    return partners


def _phrase_end(text: str, opened: int, partner: int | None, limit: int) -> int | None:
    """The end of a phrase: its balanced parenthesis if `=` follows, else the first `) =` before `limit`, else None."""
    if partner is not None and _ASSIGNED.match(text, partner):
        return partner
    match = _ASSIGNED.search(text, opened, limit)
    return match.start() if match else None


def _value(text: str, at: int, name: str, phrase: str) -> tuple[VideoAction | Problem, int]:
    """The action of the value that stands behind `)` at `at`, and the end of that value.

    The value is numbers in brackets, an object of JSON, or bare numbers: groups 1, 2 and 3 of `_VALUE`.
    """
    upper_name, argument = name.upper(), _SHORT.get(name)
    match = _VALUE.match(text, at)
    if match is None:
        expected = "a number" if argument == "frame" else "numbers in brackets"
        return _bad(f"the value of {upper_name} is not readable; it takes {expected}."), at
    if match[2]:
        brace = match.end() - 1
        try:
            args, length = _DECODER.raw_decode(text[brace : brace + _JSON_CHARS])
            return check(VideoAction(name, _frozen(args), phrase)), brace + length
        except _FAULTS:
            return _bad(f"the arguments of {upper_name} are not readable as JSON."), match.end()
    if argument is None:
        return _bad(f"{upper_name} takes its arguments as JSON: {upper_name}(phrase) = {{...}}."), match.end()
    if match[3] is None:
        numbers = _numbers(match[1])
    else:
        numbers = _numbers(" ".join(re.findall(_NUMBER, match[3])))
        # one number was read where several seem to be meant, or a box is not marked as one
        if argument == "bbox" or (argument == "segments" and _MORE_NUMBERS.match(text, match.end())):
            return _bad(f"the value of {upper_name} is not clear; write it as numbers in brackets."), match.end()
    if not numbers:
        return _bad(f"the value of {upper_name} is no list of numbers."), match.end()
    value = numbers[0] if argument == "frame" else numbers
    return check(VideoAction(name, {argument: value}, phrase)), match.end()


def _numbers(text: str) -> tuple[int | float, ...]:
    """Numbers between commas or blanks; empty if anything else is there."""
    words = text.replace(",", " ").split()
    if len(words) > 1000:
        return ()
    numbers: list[int | float] = []
    for word in words:
        if not re.fullmatch(_NUMBER, word):
            return ()
        is_whole = re.fullmatch(r"-?[0-9]+", word)
        numbers.append(_whole(word) if is_whole else float(word))
    return tuple(numbers)


def _accept(result: VideoAction | Problem) -> VideoAction:
    """The action, or the exception that ends the reading of the turn."""
    if isinstance(result, Problem):
        raise _Unreadable(result)
    return result


def _refuse_unregistered(text: str) -> None:
    """A call in the same style of something that nobody registered is an unknown action, not a turn without one."""
    heads = list(_OTHER.finditer(text))
    partners = _partners(text) if heads else {}
    for head in heads:
        close = partners.get(head.end() - 1)
        if close is not None and _ASSIGNED.match(text, close):
            _accept(check(VideoAction(head[1].lower(), {})))


def _write_call(action: VideoAction, phrase: str) -> str:
    argument = _SHORT.get(action.name)
    if argument is None or set(action.args) != {argument}:
        value = _json(dict(action.args))
    else:
        value = _json(action.args[argument])
    return f"{action.name.upper()}({phrase}) = {value}"


# ---- tool-call JSON -------------------------------------------------------------------------------------------------


def _read_tool_calls(text: str) -> tuple[str | None, tuple[VideoAction, ...]]:
    """The answer, in its tags or as the last call of the tool `answer`, or all actions; raises `_Unreadable`."""
    answer = answer_in_tags(text)
    if answer is not None:
        return answer.strip(), ()
    bodies = list(_bodies(text))
    _check_calls(len(bodies))
    results = [_tool_call(body) for body in bodies]
    for result in reversed(results):
        if isinstance(result, VideoAction) and result.name == "answer":
            return result.args["text"].strip(), ()
    if not results and "<answer>" in text:
        raise _Unreadable(_bad("the answer is not closed with </answer>."))
    return None, tuple(map(_accept, results))


def _bodies(text: str) -> Iterator[str]:
    """The text behind each opening tag, up to its closing one; empty, thus unreadable, where nothing closes it.

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
    args = dict(action.args)
    if phrase:
        args[LABEL] = phrase
    # a phrase may hold a tag
    body = _json({"name": action.name, "arguments": args}).replace("<", "\\u003c")
    return f"{_OPEN}{body}{_CLOSE}"


# ---- JSON of a policy -----------------------------------------------------------------------------------------------


def _whole(digits: str) -> int | float:
    """Python refuses to read more than 4300 digits; from 18 on only the size matters."""
    return int(digits) if len(digits) <= 18 else float(digits)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that stands twice Python would silently take the last value."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands twice")
    return fields


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _frozen(value: Any, depth: int = 0) -> Any:
    """Lists as tuples, texts without lone surrogates; nothing nested deeply."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, list):
        return tuple(_frozen(item, depth + 1) for item in value)
    if isinstance(value, Mapping):
        return {_clean(key): _frozen(item, depth + 1) for key, item in value.items()}
    return _clean(value) if isinstance(value, str) else value


_DECODER = json.JSONDecoder(parse_int=_whole, object_pairs_hook=_without_repeats, strict=False)
_FAULTS = (ValueError, RecursionError)
