"""SPARE: one generation that aligns solution steps with a reference and labels them, read leniently."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mmrl.reasoning.annotate.labels import Labels
from mmrl.reasoning.answer_text import without_thinking

# Up to the next brace, so that a reply that was cut off still gives its last item.
_OBJECT = re.compile(r"\{[^{}]*")
_STEP = re.compile(r"""["']?student_step["']?\s*[:=]\s*["']?(?:step\s*)?(\d{1,6})\b""", re.IGNORECASE)
_LABEL = re.compile(r"""["']?label["']?\s*[:=]\s*["']?([A-Za-z_]+)""", re.IGNORECASE)


def read_spare(text: str, num_steps: int) -> Labels | None:
    """Labels of a SPARE reply, a list of `{"student_step": 1-based, "label": "CORRECT" | "INCORRECT"}`.

    The list may stand in other text and be broken JSON. Any label but CORRECT is wrong; of several items for one step
    a single wrong one makes it wrong, and a step without an item is wrong (SPARE's strict reading). Items without step
    or label, or for a step that does not exist, are left out. When no item is left the reply is unparsed: None, never
    all wrong.
    """
    right: dict[int, bool] = {}  # by step, 1-based
    for item in _items(without_thinking(text)):
        step, label = _step(item.get("student_step")), item.get("label")
        if step is not None and 1 <= step <= num_steps and isinstance(label, str):
            right[step] = right.get(step, True) and label.strip().upper() == "CORRECT"
    if not right:
        return None
    return tuple(float(right.get(step, False)) for step in range(1, num_steps + 1))


def _items(text: str) -> list[Mapping[str, Any]]:
    try:
        parsed = json.loads(text[text.index("[") : text.rindex("]") + 1])
        if all(isinstance(item, dict) for item in parsed):
            return list(parsed)
    except (ValueError, RecursionError):
        # No brackets, or broken JSON: the items are read one by one below.
        pass
    return [_loose_item(chunk) for chunk in _OBJECT.findall(text)]


def _loose_item(chunk: str) -> dict[str, Any]:
    matches = {"student_step": _STEP.search(chunk), "label": _LABEL.search(chunk)}
    return {key: match.group(1) for key, match in matches.items() if match}


def _step(value: object) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    number = re.fullmatch(r"\s*(?:step\s*)?(\d{1,6})\s*", value, re.IGNORECASE)
    return int(number.group(1)) if number else None
