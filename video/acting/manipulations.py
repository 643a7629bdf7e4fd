"""The registry of manipulations, the check of their arguments, and the four built-in ones.

A manipulation is one function `(state, args) -> looks, texts or a Problem`, registered under its name with the
arguments that it takes, described in the terms of JSON schema. Arguments are checked before the function is called,
its looks after; one that raises or returns something else refuses its turn.

    @manipulation("slow_motion", {"properties": {"start": {"type": "number"}, "end": {"type": "number"}}})
    def slow_motion(state, args):
        "Watch the seconds from start to end with every frame."
        ...

Names and arguments are known to `video.acting.syntax`, so both surface syntaxes read and write them at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl.registry import hint
from video.acting.segments import frame_at
from video.acting.state import Look, Problem, VideoAction, VideoState, frame_range, look_problem

Args = Mapping[str, Any]
Result = Look | str | Sequence[Look | str] | Problem
Run = Callable[[VideoState, Args], Result]

# numbers beyond are not told apart as floats
LIMIT = 2**53
# the argument that carries an action's phrase in tool-call JSON
LABEL = "label"
_KEYS = {"type", "properties", "required", "oneOf", "description"}
_TYPES = {"integer", "number", "string", "array"}


@dataclass(frozen=True)
class Manipulation:
    """A registered function, its `schema` (properties, required, oneOf) and its description for policies."""

    name: str
    schema: Mapping[str, Any]
    description: str
    run: Run


# in order of registration, which is the order of Video-CoM text
MANIPULATIONS: dict[str, Manipulation] = {}


def manipulation(name: str, schema: Mapping[str, Any]) -> Callable[[Run], Run]:
    """Register a function (state, args) -> looks, texts or a Problem under `name`; its docstring is for policies.

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
        description = " ".join((run.__doc__ or "").split())
        MANIPULATIONS[name] = Manipulation(name, schema, description, run)
        return run

    return register


def tool_specs() -> list[dict[str, Any]]:
    """The registry as the `tools` of a chat template (JSON schema of every manipulation)."""
    specs = []
    for registered in MANIPULATIONS.values():
        parameters = {"type": "object", **registered.schema}
        if "oneOf" not in parameters:
            parameters.setdefault("required", list(registered.schema["properties"]))
        function = {"name": registered.name, "description": registered.description, "parameters": parameters}
        specs.append({"type": "function", "function": function})
    return specs


def _check_schema(name: str, schema: Mapping[str, Any]) -> None:
    where = f"schema of manipulation {name!r}"
    properties = schema.get("properties")
    if not isinstance(properties, Mapping) or set(schema) - _KEYS:
        raise ValueError(f"{where}: keys {sorted(schema)}; it takes {', '.join(sorted(_KEYS))}, and needs properties")
    for key, rule in properties.items():
        if key == LABEL or not _is_readable(rule):
            readable_types = ", ".join(sorted(_TYPES))
            raise ValueError(
                f"{where}: {key} has type {rule.get('type')!r}; {readable_types} (of a plain type) can be read, and "
                f"{LABEL} is the phrase's"
            )
    required = set().union(*_argument_sets(schema))
    if required - set(properties):
        raise ValueError(f"{where}: {sorted(required - set(properties))} required but not among the properties")


def _is_readable(rule: Mapping[str, Any]) -> bool:
    """True for a plain type, and for an array of items of one."""
    if rule.get("type") != "array":
        return rule.get("type") in _TYPES
    return rule.get("items", {}).get("type") in _TYPES - {"array"}


# ---- arguments ------------------------------------------------------------------------------------------------------


def check(action: VideoAction) -> VideoAction | Problem:
    """The action with its arguments in their types (57.0 -> 57 for an integer, lists as tuples), or the problem.

    Depends on the registry alone: whether frame 57 exists is for `video.acting.actions.act` to say.
    """
    registered = MANIPULATIONS.get(action.name)
    if registered is None:
        names = tuple(MANIPULATIONS)
        message = f"there is no action {quote(action.name)}{hint(str(action.name)[:40], names)}."
        return Problem("unknown_action", message, {"actions": names})
    properties = registered.schema["properties"]
    # names of arguments first, so that a wrong one is told before a wrong value
    problem = _argument_problem(registered, action)
    if problem is not None:
        return problem
    args: dict[str, Any] = {}
    for key, value in action.args.items():
        args[key] = _typed(f"{key} of {registered.name}", value, properties[key])
        if isinstance(args[key], Problem):
            return args[key]
    return VideoAction(registered.name, args, action.phrase)


def _argument_problem(registered: Manipulation, action: VideoAction) -> Problem | None:
    """The problem with the names of an action's arguments, if any."""
    argument_sets = _argument_sets(registered.schema)
    required = set().union(*argument_sets)
    optional = tuple(key for key in registered.schema["properties"] if key not in required)
    if any(set(action.args) - set(optional) == set(names) for names in argument_sets):
        return None
    args = ", ".join(map(quote, list(action.args)[:6])) or "none"
    valid = {"arguments": tuple(" and ".join(names) or "none" for names in argument_sets)}
    if optional:
        valid["optional"] = optional
    return Problem("parse_error", f"{registered.name} was given the arguments {args}.", valid)


def quote(value: object) -> str:
    """A few harmless characters of what a policy wrote: a quoted `<|image_pad|>` would become a token of its own."""
    text = value if isinstance(value, str) else type(value).__name__
    return "'" + re.sub(r"[^A-Za-z0-9_ .,:+-]", "?", text[:40]) + "'"


def _argument_sets(schema: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The sets of arguments that go together, one of which an action has to have; apart from optional ones."""
    if "oneOf" not in schema:
        return [tuple(schema.get("required", schema["properties"]))]
    always = tuple(schema.get("required", ()))
    return [always + tuple(alternative["required"]) for alternative in schema["oneOf"]]


def _typed(what: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """The value in the type of its rule, or a Problem."""
    kind = rule["type"]
    if kind == "string":
        return value if isinstance(value, str) else _wrong_type(what, "a text")
    if kind == "array":
        return _typed_items(what, value, rule)
    type_name = "a whole number" if kind == "integer" else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _wrong_type(what, type_name)
    low, high = rule.get("minimum", -LIMIT), rule.get("maximum", LIMIT)
    # `not` before a chained comparison refuses NaN as well
    if not low <= value <= high:
        has_limits = "minimum" in rule or "maximum" in rule
        return Problem("out_of_range", f"{what} is out of range.", {what: (low, high)} if has_limits else {})
    if kind == "number":
        return value
    # 57.0 is a whole number, as JSON writes it in some languages
    return int(value) if value == math.floor(value) else _wrong_type(what, type_name)


def _typed_items(what: str, value: Any, rule: Mapping[str, Any]) -> Any:
    low, high = rule.get("minItems", 1), rule.get("maxItems", 1000)
    if not isinstance(value, list | tuple) or not low <= len(value) <= high:
        count = f"{low}" if low == high else f"{low} to {high}"
        return _wrong_type(what, f"a list of {count} {rule['items']['type']}s")
    items = []
    for item in value:
        typed_item = _typed(f"an item of {what}", item, rule["items"])
        if isinstance(typed_item, Problem):
            return typed_item
        items.append(typed_item)
    return tuple(items)


def _wrong_type(what: str, type_name: str) -> Problem:
    return Problem("parse_error", f"{what} must be {type_name}.")


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
    # all segments together are one run, hence one look
    if any(frame_range(state, look) == (0, len(state.starts) - 1) for look in looks):
        alternative = "fewer segments or " if len(state.segments) > 1 else ""
        message = f"this is the whole video, which was shown already; choose {alternative}a shorter range of seconds."
        return Problem("whole_video", message, {"seconds": (0.0, state.duration)})
    return looks


def _by_ids(state: VideoState, ids: tuple[int, ...]) -> tuple[Look, ...] | Problem:
    """One look for each run of neighbouring segments; numbers given twice count once."""
    table = state.segments
    first_id, last_id = min(ids), max(ids)
    if first_id < 1 or last_id > len(table):
        wrong = first_id if first_id < 1 else last_id
        return Problem("out_of_range", f"there is no segment {wrong}.", {"segments": (1, len(table))})
    # [first, last] of each run, 1-based
    runs: list[list[int]] = []
    for segment in sorted(set(ids)):
        if runs and segment == runs[-1][1] + 1:
            runs[-1][1] = segment
        else:
            runs.append([segment, segment])
    return tuple(state.segment(table[first - 1].start, table[last - 1].end) for first, last in runs)


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
        # policies count frames from 1, looks from 0
        return (state.still(args["frame"] - 1),)
    if not 0 <= args["time"] <= state.duration:
        message = f"{args['time']:.10g} s is not inside the video."
        return Problem("out_of_range", message, {"time": (0.0, state.duration)})
    return (state.still(frame_at(state.starts, args["time"])),)


@manipulation(
    "spatial_zoom",
    {
        "properties": {
            "bbox": {
                "type": "array",
                "items": {"type": "number"},
                "minItems": 4,
                "maxItems": 4,
                "description": "x1, y1, x2, y2",
            },
            "frame": {"type": "integer", "description": "frame number, from 1; by default the frame last looked at"},
        },
        "required": ["bbox"],
    },
)
def spatial_zoom(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Look at a part of the frame that was looked at last, enlarged."""
    frame = args["frame"] - 1 if "frame" in args else state.frame
    if frame is None:
        message = "no frame has been looked at yet; find one first, or name it in the call."
        return Problem("no_frame_selected", message, {"frame": (1, len(state.starts))})
    box = state.unit_box(args["bbox"])
    # checked before the pad, which would mend a box that is too small
    problem = look_problem(state, state.still(frame, box))
    if problem:
        return problem
    x1, y1, x2, y2 = box
    padded = (
        max(x1 - state.pad, 0.0),
        max(y1 - state.pad, 0.0),
        min(x2 + state.pad, 1.0),
        min(y2 + state.pad, 1.0),
    )
    return (state.still(frame, padded),)


@manipulation("answer", {"properties": {"text": {"type": "string"}}})
def answer(state: VideoState, args: Args) -> tuple[Look, ...] | Problem:
    """Give the final answer, which ends the episode."""
    return ()
