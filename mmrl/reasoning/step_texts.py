"""Steps of a finished response: parse and join the published text formats.

Steps of a response that is being sampled are cut on its token ids instead, by the policy's step rule: tokens merge
differently once their neighbours are known, so spans are never found by tokenising text again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from mmrl.reasoning.records import Kind
from mmrl.reasoning.tags import between

Layout = Literal[
    "double_newline", "newline", "numbered", "tags", "sectioned_tags", "headers", "special_tokens", "paragraph_tags"
]


class StepParseError(ValueError):
    """A response that lacks a part its format asks for. Count it and keep it out of training; it has no score 0."""


@dataclass(frozen=True)
class ParsedStep:
    """One step of a text: `source[char_span[0]:char_span[1]] == text`.

    index: 0-based position; for `paragraph_tags` the number in the tag, which may leave gaps.
    section: the part of the response the step stands in; name: the step's own title.
    """

    text: str
    index: int
    kind: Kind
    char_span: tuple[int, int]
    section: str | None = None
    name: str | None = None


def parse(text: str, format: Layout) -> list[ParsedStep]:
    """The steps of `text`, in reading order (sectioned_tags: by number within a section).

    double_newline  split at blank lines, nothing trimmed. A blank part is no step, it stays with the step after it
                    (at the end: before it), so `join` gives back every text.
    newline         split at line ends; blank lines are dropped, `join` gives back texts without them.
    numbered        `Step k:` at line start, or inside a line where k is the next number; the header belongs to its
                    step's text. A line `†Answer:` starts the answer. Text before the first header is a step too.
    tags            `<step>..</step>`, `<answer>..</answer>`; text outside of them is no step.
    sectioned_tags  `[Visual Elements]` and `[Reasoning]` with `<step_k>..</step_k>`, then `<correct_answer>`.
    headers         `### Image Description:`, `### Rationales:`, `### Let's think step by step.`, `### Step k:`,
                    `### The final answer is:`.
    special_tokens  `<|reasoning_step_start|>`..; thought and reflection of one step share `section` and `name`.
    paragraph_tags  `<paragraph_i>..</paragraph_i>`, i from 0.

    In the last five, texts carry no outer white space and `join` gives back texts in the layout it writes itself.

    Raises:
        StepParseError: a part is missing, empty, out of order or numbered with gaps (paragraph_tags: twice).
        ValueError: unknown format.
    """
    steps = list(_pair(format)[0](text))
    if not steps:
        raise StepParseError(f"no step in the {format} text {text[:80]!r}")
    return steps


def join(steps: Sequence[ParsedStep], format: Layout) -> str:
    """The text of `steps` in a format's own layout; the counterpart of `parse`.

    Raises:
        ValueError: no steps, unknown format, or a step whose text holds the format's own markers.
    """
    if not steps:
        raise ValueError(f"no steps to join as {format}; a response has at least one")
    reader, writer = _pair(format)
    out = writer(steps)
    if format in ("double_newline", "newline"):
        return out
    if [step.text for step in reader(out)] != [step.text for step in steps]:
        raise ValueError(f"a step's text holds markers of {format} or outer white space; it would not be read back")
    return out


def merge(steps: Sequence[ParsedStep], max_steps: int, *, separator: str = "\n\n") -> list[ParsedStep]:
    """At most `max_steps` steps: consecutive groups of k = ceil(T / max_steps), joined by `separator` (VisualPRM).

    The result has ceil(T / k) steps, which can be fewer than `max_steps`. What differs inside a group (kind, section,
    name) becomes unknown or None; merge each section on its own to keep it.
    """
    if max_steps < 1:
        raise ValueError(f"max_steps={max_steps}: at least 1 step must be left")
    size = math.ceil(len(steps) / max_steps)
    merged: list[ParsedStep] = []
    for start in range(0, len(steps), max(size, 1)):
        group = steps[start : start + size]
        # What differs inside a group has no single value.
        same_kind = len({step.kind for step in group}) == 1
        same_section = len({step.section for step in group}) == 1
        same_name = len({step.name for step in group}) == 1
        step = ParsedStep(
            text=separator.join(step.text for step in group),
            index=len(merged),
            kind=group[0].kind if same_kind else "unknown",
            char_span=(group[0].char_span[0], group[-1].char_span[1]),
            section=group[0].section if same_section else None,
            name=group[0].name if same_name else None,
        )
        merged.append(step)
    return merged


def read_numbered_tags(text: str, tag: str) -> dict[int, str]:
    """number -> text of every `<tag_i>..</tag_i>` of a judge's critique, stripped.

    Match steps to analyses by this number and never by position: judges skip steps even when they find no error.

    Raises:
        StepParseError: a number occurs twice, so its text is ambiguous.
    """
    texts: dict[int, str] = {}
    for number, start, end in _numbered_tags(text, tag, 0, len(text)):
        if number in texts:
            raise StepParseError(f"<{tag}_{number}> occurs twice; which one holds is unknown")
        texts[number] = text[start:end]
    return texts


def header_parts(text: str) -> list[tuple[str, str]]:
    """(name, stripped text) of every part of a text in R1-VL's layout (`headers`), in order, whatever is missing.

    A part ends at the next `###`. The heading of the steps, which says nothing itself, is left out.
    """
    parts: list[tuple[str, str]] = []
    for header in _HEADER.finditer(text):
        end = text.find("###", header.end())
        if header["name"]:
            parts.append((header["name"], text[header.end() : end if end >= 0 else None].strip()))
    return parts


# --- readers and writers, one pair per format ----------------------------------------------------------------------

_LETS_THINK = "Let's think step by step."
# Headers stand on a line of their own or, where a model writes no line breaks, inside one.
_HEADER = re.compile(
    r"(?<!#)### (?:(?P<name>Image Description|Rationales|Step (?P<k>[0-9]{1,6})|The final answer is):"
    rf"|{re.escape(_LETS_THINK)})"
)
_NUMBER = re.compile(r"(?P<line>^)?(?<!\S)(?:Step (?P<k>[0-9]{1,6}):|(?P<answer>†Answer:))", re.MULTILINE)


def _trim(text: str, start: int, end: int, what: str) -> tuple[int, int]:
    """The span without outer white space; an empty one is an error."""
    inner = text[start:end]
    if not inner.strip():
        raise StepParseError(f"{what} is empty")
    return start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())


def _step(
    text: str,
    span: tuple[int, int],
    index: int,
    kind: Kind,
    section: str | None = None,
    name: str | None = None,
) -> ParsedStep:
    return ParsedStep(text[slice(*span)], index, kind, span, section, name)


def _check_numbers(numbers: Sequence[int], where: str) -> None:
    if list(numbers) != list(range(1, len(numbers) + 1)):
        raise StepParseError(f"{where}: steps are numbered {list(numbers)}; expected 1, 2, .. without gaps")


def _read_split(separator: str, glue: bool) -> Callable[[str], Iterator[ParsedStep]]:
    """Parts between separators. With `glue`, blank parts become the beginning of the next step, else they go."""

    def read(text: str) -> Iterator[ParsedStep]:
        spans, start, at = [], 0, 0
        for part in text.split(separator):
            end = at + len(part)
            if part.strip():
                spans.append((start if glue else at, end))
                start = end + len(separator)
            at = end + len(separator)
        if glue and spans:
            spans[-1] = (spans[-1][0], len(text))
        return (_step(text, span, i, "unknown") for i, span in enumerate(spans))

    return read


def _read_numbered(text: str) -> Iterator[ParsedStep]:
    # Per step: its start, the end of its header, its kind and its name.
    starts: list[tuple[int, int, Kind, str | None]] = []
    number = 0
    for match in _NUMBER.finditer(text):
        if match["k"] and int(match["k"]) != number + 1:
            # Inside a line another number than the next is a mention in a sentence.
            if match["line"] is None:
                continue
            raise StepParseError(f"Step {match['k']} follows Step {number}; expected 1, 2, .. without gaps")
        if starts and starts[-1][2] == "answer":
            raise StepParseError(f"{match[0]} stands after the answer")
        number += match["answer"] is None
        kind: Kind = "answer" if match["answer"] else "reasoning"
        starts.append((match.start(), match.end(), kind, None if match["answer"] else f"Step {number}"))
    if not number:
        raise StepParseError(f"no `Step 1:` in {text[:80]!r}")
    if text[: starts[0][0]].strip():
        starts.insert(0, (0, 0, "unknown", None))
    ends = [start for start, *_ in starts[1:]] + [len(text)]
    for index, ((start, body, kind, name), end) in enumerate(zip(starts, ends, strict=True)):
        stop = _trim(text, body, end, name or "the answer")[1]
        yield _step(text, (start, stop), index, kind, name=name)


def _read_tags(text: str) -> Iterator[ParsedStep]:
    parts = list(between(text, "<(step|answer)>", "</(step|answer)>"))
    kinds = [name for name, _ in parts]
    if "step" not in kinds or kinds.count("answer") != 1 or kinds[-1] != "answer":
        raise StepParseError(f"tags hold {kinds}; expected one or more <step> and then one <answer>, each closed")
    for index, (name, span) in enumerate(parts):
        kind: Kind = "answer" if name == "answer" else "reasoning"
        yield _step(text, _trim(text, *span, f"<{name}> {index}"), index, kind)


def _numbered_tags(text: str, tag: str, start: int, end: int) -> list[tuple[int, int, int]]:
    """(number, start, end) of `<tag_k>..</tag_k>` in text[start:end], both with the same number."""
    name = rf"{re.escape(tag)}_([0-9]{{1,6}})"
    parts = between(text, f"<{name}>", f"</{name}>", start, end)
    return [(int(number), *_trim(text, *span, f"<{tag}_{number}>")) for number, span in parts]


def _read_sectioned(text: str) -> Iterator[ParsedStep]:
    visual, reasoning = text.find("[Visual Elements]"), text.find("[Reasoning]")
    _, answer = next(between(text, "<correct_answer>", "</correct_answer>"), ("", (-1, -1)))
    if not 0 <= visual < reasoning < answer[0]:
        raise StepParseError(
            "expected [Visual Elements], [Reasoning] and <correct_answer>, each present, in this order"
        )
    index = 0
    sections: tuple[tuple[str, Kind, int, int], ...] = (
        ("Visual Elements", "perception", visual, reasoning),
        ("Reasoning", "reasoning", reasoning, answer[0]),
    )
    for section, kind, start, end in sections:
        steps = sorted(_numbered_tags(text, "step", start, end))
        if not steps:
            raise StepParseError(f"[{section}] has no step")
        _check_numbers([number for number, _, _ in steps], f"[{section}]")
        for _, step_start, step_end in steps:
            yield _step(text, (step_start, step_end), index, kind, section)
            index += 1
    yield _step(text, _trim(text, *answer, "<correct_answer>"), index, "answer")


def _read_headers(text: str) -> Iterator[ParsedStep]:
    headers = list(_HEADER.finditer(text))
    names = [header["name"] or _LETS_THINK for header in headers]
    has_ends = bool(names) and names[0] == "Image Description" and names[-1] == "The final answer is"
    if not has_ends or len(set(names)) != len(names):
        raise StepParseError(
            f"headers are {names}; expected Image Description first, The final answer is last, each once"
        )
    if text[: headers[0].start()].strip():
        raise StepParseError(f"text before the first header: {text[:80]!r}")
    numbers = [int(header["k"]) for header in headers if header["k"]]
    if not numbers:
        raise StepParseError("no `### Step 1:`")
    _check_numbers(numbers, "headers")
    index = 0
    ends = [header.start() for header in headers[1:]] + [len(text)]
    kinds: dict[str, Kind] = {names[0]: "perception", names[-1]: "answer"}
    for name, header, end in zip(names, headers, ends, strict=True):
        # A heading of the steps below it, which has no text of its own.
        if name == _LETS_THINK and not text[header.end() : end].strip():
            continue
        kind = kinds.get(name, "reasoning")
        yield _step(text, _trim(text, header.end(), end, f"### {name}"), index, kind, name=name)
        index += 1


def _marks(part: str) -> tuple[str, str]:
    return rf"<\|{part}_start\|>", rf"<\|{part}_end\|>"


def _read_special(text: str) -> Iterator[ParsedStep]:
    _, chain = next(between(text, *_marks("reasoning")), ("", (-1, 0)))
    _, answer = next(between(text, *_marks("answer"), chain[1]), ("", (0, 0)))
    # Only blanks may stand between the two.
    if "".join(text[chain[1] : answer[0]].split()) != "<|reasoning_end|><|answer_start|>":
        raise StepParseError("expected <|reasoning_start|>..<|reasoning_end|> and <|answer_start|>..<|answer_end|>")
    index = 0
    for k, (_, outer) in enumerate(between(text, *_marks("reasoning_step"), *chain), start=1):
        parts = dict(between(text, *_marks("reasoning_step_(name|thought|reflection)"), *outer))
        if not {"name", "thought"} <= parts.keys():
            raise StepParseError(f"step {k} has the parts {sorted(parts)}; it needs a name and a thought")
        name = text[slice(*_trim(text, *parts["name"], f"the name of step {k}"))]
        section = f"step {k}"
        yield _step(text, _trim(text, *parts["thought"], section), index, "reasoning", section, name)
        index += 1
        if "reflection" in parts and text[slice(*parts["reflection"])].strip():
            yield _step(text, _trim(text, *parts["reflection"], section), index, "reflection", section, name)
            index += 1
    if not index:
        raise StepParseError("no <|reasoning_step_start|> between <|reasoning_start|> and <|reasoning_end|>")
    yield _step(text, _trim(text, *answer, "the answer"), index, "answer")


def _read_paragraphs(text: str) -> Iterator[ParsedStep]:
    # It raises the error for a number that occurs twice.
    read_numbered_tags(text, "paragraph")
    for number, start, end in sorted(_numbered_tags(text, "paragraph", 0, len(text))):
        yield _step(text, (start, end), number, "unknown")


def _write_tags(steps: Sequence[ParsedStep]) -> str:
    lines = []
    for step in steps:
        tag = "answer" if step.kind == "answer" else "step"
        lines.append(f"<{tag}>{step.text}</{tag}>")
    return "\n".join(lines)


def _write_sectioned(steps: Sequence[ParsedStep]) -> str:
    def block(kind: Kind) -> str:
        texts = [step.text for step in steps if step.kind == kind]
        return "\n".join(f"<step_{number}>\n{text}\n</step_{number}>" for number, text in enumerate(texts, start=1))

    answers = [step.text for step in steps if step.kind == "answer"]
    answer = "".join(f"<correct_answer>\n{text}\n</correct_answer>" for text in answers)
    return f"[Visual Elements]\n{block('perception')}\n\n[Reasoning]\n{block('reasoning')}\n\n{answer}"


def _write_headers(steps: Sequence[ParsedStep]) -> str:
    blocks = []
    heading = _LETS_THINK not in [step.name for step in steps]
    for step in steps:
        if step.name == "Step 1" and heading:
            blocks.append(f"### {_LETS_THINK}")
        colon = "" if step.name == _LETS_THINK else ":"
        gap = " " if step.kind == "answer" else "\n"
        blocks.append(f"### {step.name}{colon}{gap}{step.text}")
    return "\n\n".join(blocks)


def _write_special(steps: Sequence[ParsedStep]) -> str:
    def pair(part: str, text: str) -> str:
        return f"<|{part}_start|>{text}<|{part}_end|>"

    written = []
    reasoning = [step for step in steps if step.kind != "answer"]
    for _, group in groupby(reasoning, key=lambda step: step.section):
        parts = list(group)
        body = pair("reasoning_step_name", parts[0].name or "")
        for part in parts:
            role = "reflection" if part.kind == "reflection" else "thought"
            body += pair(f"reasoning_step_{role}", part.text)
        written.append(pair("reasoning_step", body))
    answer = "".join(pair("answer", step.text) for step in steps if step.kind == "answer")
    return pair("reasoning", "<|reasoning_proceed|>".join(written)) + answer


def _write_split(separator: str) -> Callable[[Sequence[ParsedStep]], str]:
    return lambda steps: separator.join(step.text for step in steps)


def _write_paragraphs(steps: Sequence[ParsedStep]) -> str:
    return "\n\n".join(f"<paragraph_{step.index}>\n{step.text}\n</paragraph_{step.index}>" for step in steps)


_Pair = tuple[Callable[[str], Iterator[ParsedStep]], Callable[[Sequence[ParsedStep]], str]]
_FORMATS: dict[str, _Pair] = {
    "double_newline": (_read_split("\n\n", glue=True), _write_split("\n\n")),
    "newline": (_read_split("\n", glue=False), _write_split("\n")),
    "numbered": (_read_numbered, _write_split("\n")),
    "tags": (_read_tags, _write_tags),
    "sectioned_tags": (_read_sectioned, _write_sectioned),
    "headers": (_read_headers, _write_headers),
    "special_tokens": (_read_special, _write_special),
    "paragraph_tags": (_read_paragraphs, _write_paragraphs),
}


def _pair(format: str) -> _Pair:
    if format not in _FORMATS:
        raise ValueError(f"unknown step format {format!r}; known: {', '.join(_FORMATS)}")
    return _FORMATS[format]
