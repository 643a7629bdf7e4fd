"""Errors by rule: change one value of one step of a right solution, so that its first error is known exactly."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mmrl.reasoning.annotate.labels import labels_up_to
from mmrl.reasoning.records import Kind, SolutionRecord, Step

Value = Literal["number", "colour", "relation"]
VALUES: tuple[Value, ...] = ("number", "colour", "relation")

# Not a step's own number: "Step 3", "2. Then", "(1)"; not a part of something else: x_2, 3rd, 10:05, 1,200
_NUMBER = re.compile(r"(?<![\w.])(?<!\d,)(?<!step )(?:0|[1-9]\d*)(?:\.\d+)?(?!\w|[.,]\d)", re.IGNORECASE)
_LIST_MARK = re.compile(r"^\s*\(?\d+[.):](?=\s|$)", re.MULTILINE)
_COLOURS = (
    ("red",), ("blue",), ("green",), ("yellow",), ("orange",), ("purple", "violet"), ("pink",), ("brown",),
    ("black",), ("white",), ("gray", "grey"), ("cyan",),
)  # fmt: skip
# Phrases rather than words: "right", "above" and "more" mostly say something else
_OPPOSITES = (
    ("to the left", "to the right"), ("left of", "right of"), ("left side", "right side"), ("above the", "below the"),
    ("at the top", "at the bottom"), ("inside", "outside"), ("larger", "smaller"), ("largest", "smallest"),
    ("bigger", "smaller"), ("biggest", "smallest"), ("greater than", "less than"), ("more than", "less than"),
    ("longer", "shorter"), ("longest", "shortest"), ("taller", "shorter"), ("higher", "lower"),
    ("highest", "lowest"), ("increases", "decreases"), ("increasing", "decreasing"), ("horizontal", "vertical"),
    ("darker", "lighter"), ("clockwise", "counterclockwise"),
)  # fmt: skip


def _opposites() -> dict[str, str]:
    """Phrase -> its opposite; of a phrase with several the first ("largest" gives "smallest")."""
    table: dict[str, str] = {}
    for phrase, opposite in _OPPOSITES:
        table.setdefault(phrase, opposite)
        table.setdefault(opposite, phrase)
    return table


_OPPOSITE = _opposites()
_SAME_COLOUR = {name: names for names in _COLOURS for name in names}


def _words(table: Collection[str]) -> re.Pattern[str]:
    # No hyphen in front: "anti-clockwise" is no "clockwise"
    longest_first = sorted(table, key=len, reverse=True)
    return re.compile(r"(?<![\w-])(?:" + "|".join(longest_first) + r")\b", re.IGNORECASE)


_RELATION, _COLOUR = _words(_OPPOSITE), _words(_SAME_COLOUR)


@dataclass(frozen=True)
class Place:
    """A value that can be changed: `text[start:start + len(old)] == old`."""

    value: Value
    start: int
    old: str


def places(text: str, values: Sequence[Value] = VALUES) -> list[Place]:
    """Numbers, colour words and relation words of a text, in order; no list marks, ordinals or parts of names."""
    list_marks = [match.span() for match in _LIST_MARK.finditer(text)]
    patterns = {"number": _NUMBER, "colour": _COLOUR, "relation": _RELATION}
    changeable = []
    for value in values:
        for match in patterns[value].finditer(text):
            if not any(start <= match.start() < end for start, end in list_marks):
                changeable.append(Place(value, match.start(), match[0]))
    return sorted(changeable, key=lambda place: place.start)


def inject_error(
    record: SolutionRecord,
    seed: int,
    *,
    step_kinds: Collection[Kind] | None = None,
    values: Sequence[Value] = VALUES,
) -> SolutionRecord:
    """A copy of a right solution with exactly one value changed; that step is its first error.

    A step is drawn evenly among those with a value to change, then one of its values; the same record and seed give
    the same edit. Numbers move by 1 to 3, colours become one the step does not name, relations their opposite. That
    the changed statement is wrong is assumed, not checked ("5 > 3" stays true as "6 > 3"): use it on statements of
    fact. `meta["edit"]` holds step, value, start, old, new; labels are 1, 0, then None. Counts and judgements of the
    old text are dropped, and final_correct too when the last step changed.

    Args:
        step_kinds: only steps of these kinds, ("perception",) for URSA's misinterpretation insertion; None = all.

    Raises:
        ValueError: the record is not known to be right, or no such step has a value to change.
    """
    if not _known_right(record):
        raise ValueError(
            f"record {record.id!r} is not known to be right (first_error {record.first_error}); inject only into "
            "solutions with first_error -1 or labels of 1 on every step"
        )
    by_step: dict[int, list[Place]] = {}
    for t, step in enumerate(record.steps):
        if step_kinds is None or step.kind in step_kinds:
            changeable = places(step.text, values)
            if changeable:
                by_step[t] = changeable
    if not by_step:
        kinds = "any kind" if step_kinds is None else f"kind {sorted(step_kinds)}"
        raise ValueError(f"record {record.id!r}: no step of {kinds} has a {', '.join(values)} to change; skip it")
    rng = random.Random(f"{seed}/{record.id}")
    t = rng.choice(list(by_step))
    place = rng.choice(by_step[t])
    new = _changed(place, record.steps[t].text, rng)
    return _edited(record, t, place, new, seed)


def with_errors(
    records: Sequence[SolutionRecord],
    *,
    copies: int,
    seed: int,
    kinds: Collection[Kind] | None = None,
    values: Sequence[Value] = VALUES,
) -> list[SolutionRecord]:
    """`copies` edited copies of every solution that is right in its answer and known to have no wrong step.

    Solutions without such a step or value are left out.
    """
    edited: list[SolutionRecord] = []
    for record in records:
        if not _known_right(record) or not record.final_correct:
            continue
        steps = [step for step in record.steps if kinds is None or step.kind in kinds]
        if any(places(step.text, values) for step in steps):
            for copy in range(copies):
                edited.append(inject_error(record, seed * copies + copy, step_kinds=kinds, values=values))
    return edited


def _known_right(record: SolutionRecord) -> bool:
    """True for a solution that is known to have no wrong step."""
    if record.first_error == -1:
        return True
    return bool(record.labels) and all(label == 1 for label in record.labels or ())


def _edited(record: SolutionRecord, t: int, place: Place, new: str, seed: int) -> SolutionRecord:
    """The record with `new` at a place of step t, labels that say so, and without what was known of the old text."""
    old = record.steps[t]
    text = old.text[: place.start] + new + old.text[place.start + len(place.old) :]
    edit = {"step": t, "value": place.value, "start": place.start, "old": place.old, "new": new}
    last = t == len(record.steps) - 1
    return replace(
        record,
        id=f"{record.id}#error{seed}",
        steps=(*record.steps[:t], Step(text, old.kind), *record.steps[t + 1 :]),
        labels=labels_up_to(t, len(record.steps)),
        label_kind="hard",
        scope="prefix",
        first_error=t,
        final_correct=None if last else record.final_correct,
        mc=None,
        judge=(),
        meta={**record.meta, "edit": edit, "original_id": record.id},
    )


def _changed(place: Place, text: str, rng: random.Random) -> str:
    if place.value == "number":
        return _other_number(place.old, rng)
    old = place.old.lower()
    if place.value == "relation":
        new = _OPPOSITE[old]
    else:
        # A colour that the step names already could make another right statement.
        in_text: set[str] = set()
        for word in _COLOUR.findall(text):
            in_text.update(_SAME_COLOUR[word.lower()])
        free = [names[0] for names in _COLOURS if names[0] not in in_text]
        new = rng.choice(free or [names[0] for names in _COLOURS if old not in names])
    return new.capitalize() if place.old[0].isupper() else new


def _other_number(old: str, rng: random.Random) -> str:
    whole, dot, part = old.partition(".")
    offsets = [offset for offset in (-3, -2, -1, 1, 2, 3) if int(whole) + offset >= 0]
    return str(int(whole) + rng.choice(offsets)) + dot + part
