r"""Asking a judge about steps and reading its answer. What cannot be read is None, never a verdict."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmrl.annotate.labels import Labels, local_first_error
from mmrl.rewards.answer_text import boxed, normalise

_FIRST_ERROR = """\
Below are a question and a solution to it. The solution is cut into paragraphs, counted from 0.

[Question]
{question}

[Solution]
{solution}

Go through the paragraphs in order and check each of them. Give the index of the first paragraph that holds an error, \
or -1 if there is none, as your last line in the form \\boxed{{index}}."""

_CRITIQUE = """\
Below are a question and a solution to it. The solution is cut into paragraphs, counted from 0.

[Question]
{question}

[Solution]
{solution}

Check the paragraphs in order. Write what you find about paragraph i as <analysis_i>...</analysis_i> and end it with \
\\boxed{{correct}} or \\boxed{{incorrect}}. Stop after the first incorrect paragraph. Last, after all analyses, give \
your verdict on the whole solution: \\boxed{{correct}} or \\boxed{{incorrect}}."""

_STEP = """\
Below are a question and the beginning of a solution to it, cut into paragraphs that are counted from 0.

[Question]
{question}

[Solution so far]
{solution}

Is paragraph {last} right, given what stands before it? Answer with one word, Yes or No."""

_REFERENCE = """\
Below are a question, a reference solution that is right, and a student's solution, cut into steps that are counted \
from 1.

[Question]
{question}

[Reference]
{reference}

[Solution]
{solution}

Compare each step of the student's solution with the part of the reference that it corresponds to, and decide whether \
the step is right. Answer with a JSON list that has one object for every step, in order:
[{{"student_step": 1, "reference": "what the step was compared with", "label": "CORRECT" or "INCORRECT"}}, ...]"""

_SEVERITY = """\
Below are a question and a solution to it. The solution is cut into paragraphs, counted from 0.

[Question]
{question}

[Solution]
{solution}

How bad are the errors of each paragraph? Go through all of them in order. Write what you find about paragraph i as \
<analysis_i>...</analysis_i> and end it with \\boxed{{none}}, \\boxed{{minor}}, \\boxed{{major}} or \
\\boxed{{critical}}."""

_ASPECT = """\
Below are a question and a solution to it. The solution is cut into paragraphs, counted from 0.

[Question]
{question}

[Solution]
{solution}

Whether the solution is right is not asked. Judge one aspect of it alone: {aspect}. Give a whole number from 0 \
(worst) to 10 (best) as your last line in the form \\boxed{{number}}."""

Ask = Literal["first_error", "critique", "step", "reference", "severity", "aspect"]
SEVERITIES = ("none", "minor", "major", "critical")  # MQM's classes; their index is the class
BEST_GRADE = 10

_PROMPTS = {
    "first_error": _FIRST_ERROR,
    "critique": _CRITIQUE,
    "step": _STEP,
    "reference": _REFERENCE,
    "severity": _SEVERITY,
    "aspect": _ASPECT,
}
_PLAIN_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_ANALYSIS = re.compile(r"<analysis_(\d{1,6})>(.*?)</analysis_\1>", re.DOTALL)
_VERDICTS = dict.fromkeys(("yes", "correct", "right", "true"), True)
_VERDICTS |= dict.fromkeys(("no", "incorrect", "wrong", "false"), False)


# ---- asking ---------------------------------------------------------------------------------------------------------


def paragraphs(steps: Sequence[str]) -> str:
    """Steps in ProcessBench's tags, `<paragraph_i>`, i from 0, with an empty line between them.

    Raises:
        ValueError: no steps, or a step that holds such a tag itself and would shift the indices.
    """
    if not steps:
        raise ValueError("no steps to judge")
    for i, step in enumerate(steps):
        if re.search(r"</?(paragraph|analysis)_\d+>", step):
            raise ValueError(f"step {i} holds a paragraph or analysis tag itself, which a judge would misread")
    return "\n\n".join(f"<paragraph_{i}>\n{step}\n</paragraph_{i}>" for i, step in enumerate(steps))


def judge_prompt(
    question: str, steps: Sequence[str], ask: Ask = "first_error", reference: str = "", aspect: str = ""
) -> str:
    """A prompt for the index of the first error, an analysis of every step, Yes/No about the last of `steps`, every
    step's label beside a reference solution, the severity of every step's errors, or a grade of the whole for an
    `aspect` in words.

    Read the replies with `parse_first_error`, `parse_critique`, `parse_verdict`, `mmrl.annotate.spare.read_spare`,
    `parse_severities` and `parse_grade`.
    """
    if ask not in _PROMPTS:
        raise ValueError(f"ask={ask!r} is none of {', '.join(_PROMPTS)}")
    if ask == "aspect" and not aspect:
        raise ValueError("ask='aspect' grades an aspect of the solution; name it in words: aspect")
    if ask == "reference":
        if not reference:
            raise ValueError("no reference solution to compare with")
        solution = "\n\n".join(f"Step {i}: {step}" for i, step in enumerate(steps, start=1))
    else:
        solution = paragraphs(steps)
    fields = {"solution": solution, "last": len(steps) - 1, "reference": reference, "aspect": aspect}
    return _PROMPTS[ask].format(question=question, **fields)


# ---- reading --------------------------------------------------------------------------------------------------------


def parse_first_error(text: str, num_steps: int | None = None) -> int | None:
    r"""The integer in the last `\boxed{..}` without inner braces (ProcessBench), None when there is none.

    With `num_steps`, an index outside -1..num_steps-1 is None too: no such step can be labelled.
    """
    boxes = _PLAIN_BOX.findall(text)
    try:
        index = int(boxes[-1])
    except (IndexError, ValueError):
        return None
    return index if num_steps is None or -1 <= index < num_steps else None


def parse_verdict(text: str) -> bool | None:
    r"""Whether the last `\boxed{..}` says yes / correct or no / incorrect; None when it says neither."""
    inner = boxed(text)
    return None if inner is None else _VERDICTS.get(normalise(inner))


def parse_severities(text: str, num_steps: int) -> tuple[int | None, ...] | None:
    """Per step the class of its errors, an index into `SEVERITIES`; None for a step without one single analysis that
    ends in a class, and None altogether when no step has one."""
    said: dict[int, list[int | None]] = {}
    for index, analysis in _ANALYSIS.findall(text):
        word = normalise(boxed(analysis) or "")
        said.setdefault(int(index), []).append(SEVERITIES.index(word) if word in SEVERITIES else None)
    out = tuple(said[t][0] if len(said.get(t, [])) == 1 else None for t in range(num_steps))
    return out if any(y is not None for y in out) else None


def parse_grade(text: str) -> int | None:
    r"""The whole number from 0 to `BEST_GRADE` in the last `\boxed{..}` without inner braces, None without one."""
    boxes = _PLAIN_BOX.findall(text)
    number = boxes[-1].strip() if boxes else ""
    return int(number) if re.fullmatch(r"[0-9]{1,2}", number) and int(number) <= BEST_GRADE else None


@dataclass(frozen=True)
class Critique:
    """labels: per step by its own analysis, None without one. overall: the verdict on the whole solution.

    first_error: -1 = none, None = unparsed. ignored: analyses of steps that do not exist.
    """

    labels: Labels
    overall: bool | None
    first_error: int | None
    ignored: int


def parse_critique(text: str, num_steps: int) -> Critique:
    """Analyses in `<analysis_i>` tags, matched to steps by index: judges skip and add some even when all is right.

    The verdict on the whole stands outside the tags. "Correct" vouches for steps without an analysis; a verdict that
    contradicts the analyses, or "incorrect" without a wrong step, leaves the first error unparsed. Two analyses of one
    step that differ cancel out.
    """
    verdicts: dict[int, set[bool | None]] = {}
    for index, analysis in _ANALYSIS.findall(text):
        verdicts.setdefault(int(index), set()).add(parse_verdict(analysis))
    overall = parse_verdict(_ANALYSIS.sub("", text))
    labels = tuple(_single(verdicts.get(t, set())) for t in range(num_steps))
    return Critique(labels, overall, _first_error(labels, overall), sum(t >= num_steps for t in verdicts))


def _single(verdicts: set[bool | None]) -> float | None:
    (verdict,) = verdicts if len(verdicts) == 1 else (None,)
    return None if verdict is None else float(verdict)


def _first_error(labels: Labels, overall: bool | None) -> int | None:
    first = local_first_error(labels)
    if overall is None:
        return first
    if overall:
        return None if 0.0 in labels else -1
    return None if first == -1 else first
