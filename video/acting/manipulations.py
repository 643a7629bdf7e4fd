"""The registry of manipulations, the check of their arguments, and the four built-in ones.

A manipulation is one function `(state, args) -> looks | Problem`, registered under its name with the arguments that it
takes, described in the terms of JSON schema. Arguments are checked before the function is called, its looks after.

    @manipulation("slow_motion", {"properties": {"start": {"type": "number"}, "end": {"type": "number"}}})
    def slow_motion(state, args):
        "Watch the seconds from start to end with every frame."
        ...

Names and arguments are known to `video.acting.syntax`, so both surface syntaxes read and write them at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mmrl.registry import hint
from video.acting.segments import frame_at
from video.acting.state import Look, Problem, VideoAction, VideoState, frame_range, look_problem

Args = Mapping[str, Any]
Run = Callable[[VideoState, Args], tuple[Look, ...] | Problem]

LIMIT = 2**53  # numbers beyond are not told apart as floats
LABEL = "label"  # the argument that carries an action's phrase in tool-call JSON
_KEYS = {"type", "properties", "required", "oneOf", "description"}
_TYPES = {"integer", "number", "string", "array"}


@dataclass(frozen=True)
class Manipulation:
    """A registered function, its `schema` (properties, required, oneOf) and what is told to policies about it."""

    name: str
    schema: Mapping[str, Any]
    description: str
    run: Run


MANIPULATIONS: dict[str, Manipulation] = {}  # in order of registration, which is the order of Video-CoM text


def manipulation(name: str, schema: Mapping[str, Any]) -> Callable[[Run], Run]:
    """Register a function (state, args) -> looks or Problem under `name`; its docstring tells policies what it does.

    Args:
        name: lower case letters, digits and underscores; Video-CoM text writes it in upper case.
        schema: `properties` by name, each with a `type` (integer, number, string; array with `items`, `minItems`,
            `maxItems`), for numbers `minimum` and `maximum`; `required` (default: all of them) or `oneOf`, a list of
            {"required": [...]}: the arguments that go together.

    Raises:
        ValueError: a name that is taken or cannot be written, or a schema beyond what is said above.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "final_answer":
        raise ValueError(f"manipulation {name!r}: lower case letters, digits and _, and not final_answer")
    if name in MANIPULATIONS:
        raise ValueError(f"manipulation {name!r} is registered already; give yours another name")
    _check_schema(name, schema)

    def register(run: Run) -> Run:
        told = " ".join((run.__doc__ or "").split())
        MANIPULATIONS[name] = Manipulation(name, schema, told, run)
        return run

    return register


def tool_specs() -> list[dict[str, Any]]:
    """The registry as the `tools` of a chat template (JSON schema of every manipulation)."""
    specs = []
    for m in MANIPULATIONS.values():
        parameters = {"type": "object", **m.schema}
        if "oneOf" not in parameters:
            parameters.setdefault("required", list(m.schema["properties"]))
        function = {"name": m.name, "description": m.description, "parameters": parameters}
        specs.append({"type": "function", "function": function})
    return specs


def _check_schema(name: str, schema: Mapping[str, Any]) -> None:
    where, properties = f"schema of manipulation {name!r}", schema.get("properties")
    if not isinstance(properties, Mapping) or set(schema) - _KEYS:
        raise ValueError(f"{where}: keys {sorted(schema)}; it takes {', '.join(sorted(_KEYS))}, and needs properties")
    for key, rule in properties.items():
        kind = rule.get("type")
        items = rule.get("items", {}).get("type") if kind == "array" else "integer"
        if kind not in _TYPES or items not in _TYPES - {"array"} or key == LABEL:
            readable = ", ".join(sorted(_TYPES))
            told = f"{where}: {key} has type {kind!r}; {readable} (of a plain type) can be read"
            raise ValueError(f"{told}, and {LABEL} is the phrase's")
    named = {n for way in _ways(schema) for n in way}
    if named - set(properties):
        raise ValueError(f"{where}: {sorted(named - set(properties))} required but not among the properties")


# ---- arguments ------------------------------------------------------------------------------------------------------


def check(action: VideoAction) -> VideoAction | Problem:
    """The action with its arguments in their types (57.0 -> 57 for an integer, lists as tuples), or what is wrong.

    Depends on the registry alone: whether frame 57 exists is for `video.acting.actions.act` to say.
    """
    known = MANIPULATIONS.get(action.name)
    if known is None:
        names = tuple(MANIPULATIONS)
        told = f"there is no action {quote(action.name)}{hint(str(action.name)[:40], names)}."
        return Problem("unknown_action", told, {"actions": names})
    properties, ways = known.schema["properties"], _ways(known.schema)
    optional = tuple(key for key in properties if not any(key in way for way in ways))
    if set(action.args) - set(optional) not in [set(way) for way in ways]:
        given = ", ".join(quote(k) for k in list(action.args)[:6]) or "none"
        told = f"{known.name} was given the arguments {given}."
        valid = tuple(" and ".join(way) or "none" for way in ways)
        return Problem("parse_error", told, {"arguments": valid} | ({"optional": optional} if optional else {}))
    args: dict[str, Any] = {}
    for key, value in action.args.items():
        args[key] = _typed(f"{key} of {known.name}", value, properties[key])
        if isinstance(args[key], Problem):
            return args[key]
    return VideoAction(known.name, args, action.phrase)


def quote(value: object) -> str:
    """A few harmless characters of what a policy wrote: a quoted `<|image_pad|>` would become a token of its own."""
    text = value if isinstance(value, str) else type(value).__name__
    return "'" + re.sub(r"[^A-Za-z0-9_ .,:+-]", "?", text[:40]) + "'"


def _ways(schema: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The sets of arguments that may be given, apart from optional ones."""
    both = tuple(schema.get("required", () if "oneOf" in schema else schema["properties"]))
    return [both + tuple(way["required"]) for way in schema["oneOf"]] if "oneOf" in schema else [both]


def _typed(what: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """The value in the type of its rule, or a Problem."""
    kind = rule["type"]
    if kind == "string":
        return value if isinstance(value, str) else _wrong(what, "a text")
    if kind == "array":
        return _typed_items(what, value, rule)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _wrong(what, "a whole number" if kind == "integer" else "a number")
    low, high = rule.get("minimum", -LIMIT), rule.get("maximum", LIMIT)
    if not low <= value <= high:  # refuses NaN as well
        shown = {what: (low, high)} if {"minimum", "maximum"} & set(rule) else {}
        return Problem("out_of_range", f"{what} is out of range.", shown)
    if kind == "number":
        return value
    return int(value) if value == math.floor(value) else _wrong(what, "a whole number")


def _typed_items(what: str, value: Any, rule: Mapping[str, Any]) -> Any:
    low, high = rule.get("minItems", 1), rule.get("maxItems", 1000)
    count = f"{low}" if low == high else f"{low} to {high}"
    wanted = f"a list of {count} {rule['items']['type']}s"
    if not isinstance(value, list | tuple) or not low <= len(value) <= high:
        return _wrong(what, wanted)
    items = tuple(_typed(f"an item of {what}", v, rule["items"]) for v in value)
    return next((v for v in items if isinstance(v, Problem)), items)


def _wrong(what: str, wanted: str) -> Problem:
    return Problem("parse_error", f"{what} must be {wanted}.")


# ---- the built-in ones ----------------------------------------------------------------------------------------------


@manipulation(
    "find_segment",
    {
        "properties": {
            "start": {"type": "number", "description": "seconds"},
            "end": {"type": "number", "description": "seconds"},
            "segments": {"type": "array", "items": {"type": "integer"}, "description": "segment numbers, from 1"},
        },
        "oneOf": [{"required": ["start", "end"]}, {"required": ["segments"]}],
    },
)
def find_segment(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Watch a part of the video again, more closely: from start to end in seconds, or by segment numbers."""
    if "segments" in args:
        looks = _by_ids(state, args["segments"])
    else:
        looks = (state.segment(args["start"], args["end"]),)
    if isinstance(looks, Problem):
        return looks
    for look in looks:
        problem = look_problem(state, look)
        if problem:
            return problem
    # all segments are one run, hence one look
    if any(frame_range(state, look) == (0, len(state.starts) - 1) for look in looks):
        some = "fewer segments or " if len(state.segments) > 1 else ""
        told = f"this is the whole video, which was shown already; choose {some}a shorter range of seconds."
        return Problem("whole_video", told, {"seconds": (0.0, state.duration)})
    return looks


def _by_ids(state: VideoState, ids: tuple[int, ...]) -> tuple[Look, ...] | Problem:
    """One look for each run of neighbouring segments; numbers given twice count once."""
    table, chosen = state.segments, sorted(set(ids))
    if chosen[0] < 1 or chosen[-1] > len(table):
        wrong = chosen[0] if chosen[0] < 1 else chosen[-1]
        return Problem("out_of_range", f"there is no segment {wrong}.", {"segments": (1, len(table))})
    cuts = [i + 1 for i, (a, b) in enumerate(pairwise(chosen)) if b > a + 1]
    runs = [chosen[a:b] for a, b in pairwise([0, *cuts, len(chosen)])]
    return tuple(state.segment(table[run[0] - 1].start, table[run[-1] - 1].end) for run in runs)


@manipulation(
    "find_frame",
    {
        "properties": {
            "frame": {"type": "integer", "description": "frame number, from 1"},
            "time": {"type": "number", "description": "seconds"},
        },
        "oneOf": [{"required": ["frame"]}, {"required": ["time"]}],
    },
)
def find_frame(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Look at one frame of the video, by its number or its time in seconds."""
    if "frame" in args:
        return (state.still(args["frame"] - 1),)
    if not 0 <= args["time"] <= state.duration:
        told = f"{args['time']:.10g} s is not inside the video."
        return Problem("out_of_range", told, {"time": (0.0, state.duration)})
    return (state.still(frame_at(state.starts, args["time"])),)


@manipulation(
    "spatial_zoom",
    {
        "properties": {
            "bbox": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4,
                     "description": "x1, y1, x2, y2"},
            "frame": {"type": "integer", "description": "frame number, from 1; by default the frame last looked at"},
        },
        "required": ["bbox"],
    },
)  # fmt: skip
def spatial_zoom(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Look at a part of the frame that was looked at last, enlarged."""
    frame = args["frame"] - 1 if "frame" in args else state.frame
    if frame is None:
        told = "no frame has been looked at yet; find one first, or name it in the call."
        return Problem("no_frame_selected", told, {"frame": (1, len(state.starts))})
    box = state.unit_box(args["bbox"])
    problem = look_problem(state, state.still(frame, box))  # before the pad, which would mend a box that is too small
    if problem:
        return problem
    x1, y1, x2, y2 = box
    pad = state.pad
    return (state.still(frame, (max(x1 - pad, 0.0), max(y1 - pad, 0.0), min(x2 + pad, 1.0), min(y2 + pad, 1.0))),)


@manipulation("answer", {"properties": {"text": {"type": "string"}}})
def answer(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Give the final answer, which ends the episode."""
    return ()
