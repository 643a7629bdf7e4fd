"""Files of prompts as they are published: one small function per format, from a row to a Prompt.

A format is a function `(row, place) -> Prompt` that raises RowError for a row it cannot use; `place` is `file:row`.
Its fact `repeats` says that several rows share a prompt, as pairs of pictures do: each text is then taken once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mmrl.jsonl import RowError
from mmrl.reasoning.questions import check_json, last_question
from mmrl.reasoning.rows import rest, row_id, text
from mmrl.registry import Kind, add_kind, register
from mmrl.rollout import Prompt

Row = Mapping[str, Any]
PromptFormat = Callable[[Row, str], Prompt]

add_kind(Kind("prompt_formats", "prompt format", arguments=2))

# What Pick-a-Pic and HPDv2 say of pictures, not of the prompt.
_PICTURES = re.compile(
    r"jpg_\d|image_\d_(uid|url)|best_image_uid|image_path|file_path|label_\d|human_preference|rank|raw_annotations"
)
_QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')


def _made(row: Row, place: str, column: str, *, id_column: str = "id", **reference: Any) -> Prompt:
    """A prompt with every further column, but what describes pictures, as its reference."""
    value = row.get(column)
    prompt = last_question(value, column) if isinstance(value, list) else text(row, column).strip()
    others = {k: v for k, v in rest(row, id_column, column).items() if not _PICTURES.fullmatch(k)} | reference
    check_json(others)
    return Prompt(row_id(row, place, id_column), {"prompt": prompt}, others)


@register("prompt_formats", "rows")
def rows(row: Row, place: str, *, column: str = "prompt") -> Prompt:
    """Any table or text file: the prompt in one column, everything else is its reference."""
    value = row.get(column)
    prompt = last_question(value, column) if isinstance(value, list) else text(row, column).strip()
    others = rest(row, "id", column)
    check_json(others)
    return Prompt(row_id(row, place), {"prompt": prompt}, others)


@register("prompt_formats", "hpdv2", source="HPDv2", repeats=True)
def hpdv2(row: Row, place: str) -> Prompt:
    """HPDv2: the benchmark's arrays of texts, one per style, or objects with `prompt`, of its pairs and rankings."""
    return _made(row, place, "prompt")


@register("prompt_formats", "pick_a_pic", source="Pick-a-Pic", repeats=True)
def pick_a_pic(row: Row, place: str) -> Prompt:
    """Pick-a-Pic, with pictures or without: `caption`; every pair of its pictures is a row."""
    return Prompt(place, {"prompt": text(row, "caption").strip()}, {})


@register("prompt_formats", "drawbench", source="DrawBench")
def drawbench(row: Row, place: str) -> Prompt:
    """DrawBench: a table of `Prompts` and `Category`."""
    return Prompt(place, {"prompt": text(row, "Prompts").strip()}, {"category": text(row, "Category").strip()})


@register("prompt_formats", "parti", source="PartiPrompts")
def parti(row: Row, place: str) -> Prompt:
    """PartiPrompts: a table of `Prompt`, `Category`, `Challenge` and `Note`."""
    kinds = {name.lower(): text(row, name).strip() for name in ("Category", "Challenge")}
    return Prompt(place, {"prompt": text(row, "Prompt").strip()}, kinds)


@register("prompt_formats", "geneval", source="GenEval")
def geneval(row: Row, place: str) -> Prompt:
    """GenEval: `prompt`, its `tag`, and the objects to `include` (and `exclude`), which verify a picture."""
    include = row.get("include")
    if not isinstance(include, list) or not include or not all(isinstance(x, dict) and "class" in x for x in include):
        raise RowError("no objects in column 'include': a list of {class, count, ..} is needed")
    return _made(row, place, "prompt")


@register("prompt_formats", "ocr", source="Flow-GRPO")
def ocr(row: Row, place: str) -> Prompt:
    """Texts to write: a prompt (a line, or column `prompt`) with the wanted text in double quotes, kept as `text`."""
    quoted = [a or b for a, b in _QUOTED.findall(text(row, "prompt"))]
    if not quoted:
        raise RowError("no text in double quotes: nothing says what the picture is to read")
    return _made(row, place, "prompt", text=" ".join(quoted))


@register("prompt_formats", "vidprom", source="VidProM", repeats=True)
def vidprom(row: Row, place: str) -> Prompt:
    """VidProM: a table of `uuid`, `prompt`, `time` and scores of toxicity; a prompt may occur under several ids."""
    return _made(row, place, "prompt", id_column="uuid")
