r"""Prompts to a judge about the steps of a solution, and its replies read. An unreadable reply is None, no verdict.

`judge_prompt` writes the prompt for one kind of question (`ask`), a `parse_*` function reads the reply to it:

    first_error   "... \boxed{2}"                                     -> parse_first_error: 2
    critique      "<analysis_0>.. \boxed{correct}</analysis_0> ..."    -> parse_critique: labels per step
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

from mmrl.reasoning.annotate.labels import Labels, local_first_error
from mmrl.reasoning.answer_text import boxed, normalise, unwrapped, without_thinking
from mmrl.reasoning.records import SECTIONS, Kind
from mmrl.reasoning.tags import between

_QUESTION_AND_SOLUTION = """\
Below are a question and a solution to it. The solution is cut into paragraphs, counted from 0.

[Question]
{question}

[Solution]
{solution}

"""

_FIRST_ERROR = (
    _QUESTION_AND_SOLUTION
    + """\
Go through the paragraphs in order and check each of them. Give the index of the first paragraph that holds an error, \
or -1 if there is none, as your last line in the form \\boxed{{index}}."""
)

_CRITIQUE = (
    _QUESTION_AND_SOLUTION
    + """\
Check the paragraphs in order. Write what you find about paragraph i as <analysis_i>...</analysis_i> and end it with \
\\boxed{{correct}} or \\boxed{{incorrect}}. Stop after the first incorrect paragraph. Last, after all analyses, give \
your verdict on the whole solution: \\boxed{{correct}} or \\boxed{{incorrect}}."""
)

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

_SEVERITY = (
    _QUESTION_AND_SOLUTION
    + """\
How bad are the errors of each paragraph? Go through all of them in order. Write what you find about paragraph i as \
<analysis_i>...</analysis_i> and end it with \\boxed{{none}}, \\boxed{{minor}}, \\boxed{{major}} or \
\\boxed{{critical}}."""
)

_ASPECT = (
    _QUESTION_AND_SOLUTION
    + """\
Whether the solution is right is not asked. Judge one aspect of it alone: {aspect}. Give a whole number from 0 \
(worst) to 10 (best) as your last line in the form \\boxed{{number}}."""
)

Ask = Literal["first_error", "critique", "step", "reference", "severity", "aspect"]
# MQM's classes; their index is the class.
SEVERITIES = ("none", "minor", "major", "critical")
BEST_GRADE = 10

_PROMPTS = {
    "first_error": _FIRST_ERROR,
    "critique": _CRITIQUE,
    "step": _STEP,
    "reference": _REFERENCE,
    "severity": _SEVERITY,
    "aspect": _ASPECT,
}
_VERDICTS = dict.fromkeys(("yes", "correct", "right", "true"), True)
_VERDICTS |= dict.fromkeys(("no", "incorrect", "wrong", "false"), False)
_NUMBER = re.compile(r"(?:paragraph[ _]*)?([+-]?[0-9]{1,6})", re.IGNORECASE)
_TITLE = re.compile(rf"^\[({'|'.join(SECTIONS)})\]", re.MULTILINE)


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

    Read the replies with `parse_first_error`, `parse_critique`, `parse_verdict`,
    `mmrl.reasoning.annotate.spare.read_spare`, `parse_severities` and `parse_grade`.
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
    r"""The whole number in the last `\boxed{..}` of the reply (ProcessBench), None when there is none.

    With `num_steps`, an index outside -1..num_steps-1 is None too: no such step can be labelled.
    """
    index = _boxed_number(without_thinking(text))
    if index is None or (num_steps is not None and not -1 <= index < num_steps):
        return None
    return index


def parse_verdict(text: str) -> bool | None:
    r"""The verdict in the last `\boxed{..}` of the reply, or in `<conclusion>..</conclusion>` where there is no box.

    True for yes or correct, False for no or incorrect, None for anything else.
    """
    reply = without_thinking(text)
    inner = boxed(reply)
    if inner is None:
        inner = _conclusion(reply) or ""
    return _VERDICTS.get(normalise(inner))


def parse_severities(text: str, num_steps: int) -> tuple[int | None, ...] | None:
    """Per step the class of its errors, an index into `SEVERITIES`; None for a step without one single analysis that
    ends in a class, and None altogether when no step has one."""
    classes: dict[int, list[int | None]] = {}  # by the number of a step
    analyses, _ = _analyses(without_thinking(text))
    for analysis in analyses:
        word = normalise(boxed(analysis.text) or "")
        severity = SEVERITIES.index(word) if word in SEVERITIES else None
        classes.setdefault(analysis.number, []).append(severity)
    per_step: list[int | None] = []
    for step in range(num_steps):
        of_step = classes.get(step, [])
        per_step.append(of_step[0] if len(of_step) == 1 else None)
    nothing_said = all(severity is None for severity in per_step)
    return None if nothing_said else tuple(per_step)


def parse_grade(text: str) -> int | None:
    r"""The whole number from 0 to `BEST_GRADE` in the last `\boxed{..}` of the reply, None without one."""
    number = _boxed_number(without_thinking(text))
    return number if number is not None and 0 <= number <= BEST_GRADE else None


def _boxed_number(reply: str) -> int | None:
    plain = unwrapped(boxed(reply) or "").strip(" \t\n$*.")
    number = _NUMBER.fullmatch(plain)
    return int(number[1]) if number else None


def _conclusion(reply: str) -> str | None:
    """The text in the last `<conclusion>..</conclusion>`, None without one."""
    spans = [span for _, span in between(reply, "<conclusion>", "</conclusion>")]
    return reply[slice(*spans[-1])] if spans else None


class _Analysis(NamedTuple):
    """One analysis; `section` is the title that it stands below."""

    number: int
    section: str | None
    text: str


def _analyses(reply: str) -> tuple[list[_Analysis], str]:
    """The analyses in `<analysis_i>..</analysis_i>`, in order, and the text around them."""
    analyses: list[_Analysis] = []
    around: list[str] = []
    section, done = None, 0
    mark = r"analysis_([0-9]{1,6})>"
    for number, (start, end) in between(reply, f"<{mark}", f"</{mark}"):
        around.append(reply[done : start - len(f"<analysis_{number}>")])
        titles = _TITLE.findall(around[-1])
        section = titles[-1] if titles else section
        analyses.append(_Analysis(int(number), section, reply[start:end]))
        done = end + len(f"</analysis_{number}>")
    return analyses, "".join([*around, reply[done:]])


@dataclass(frozen=True)
class Critique:
    """labels: per step by its own analysis, None without one. overall: the verdict on the whole solution.

    first_error: -1 = none, None = unparsed. ignored: analyses of steps that do not exist.
    """

    labels: Labels
    overall: bool | None
    first_error: int | None
    ignored: int


def parse_critique(text: str, num_steps: int, kinds: Sequence[Kind] = ()) -> Critique:
    """Analyses in `<analysis_i>` tags, matched to steps by index: judges skip and add some even when all is right.

    The verdict on the whole stands outside the tags. "Correct" vouches for steps without an analysis; a verdict that
    contradicts the analyses, or "incorrect" without a wrong step, leaves the first error unparsed. Two analyses of one
    step that differ cancel out.

    Replies in the form of VL-PRM300K's judge are read too. It counts from 1, anew below each title of `SECTIONS`, and
    gives one verdict, in `<conclusion>`. It stops at the first error: after "Incorrect" its last analysis is that of
    the first wrong step.

    Args:
        kinds: of the steps, where known: number k of a section is the k-th step of its kind. Without them analyses
            below titles have no place, and only "Correct" says something of the steps.
    """
    analyses, around = _analyses(without_thinking(text))
    overall = parse_verdict(around)
    # VL-PRM300K's form: one verdict in <conclusion>, analyses counted from 1 below each title.
    concluded = boxed(around) is None and _conclusion(around) is not None
    restarts = concluded or any(analysis.section for analysis in analyses)
    base = int(restarts and all(analysis.number > 0 for analysis in analyses))
    places = [_place(analysis.number - base, analysis.section, kinds) for analysis in analyses]
    step_verdicts = [parse_verdict(analysis.text) for analysis in analyses]
    if concluded and all(verdict is None for verdict in step_verdicts):
        step_verdicts = _by_conclusion(places, overall)
    by_step: dict[int, set[bool | None]] = {}
    for place, verdict in zip(places, step_verdicts, strict=True):
        if place is not None:
            by_step.setdefault(place, set()).add(verdict)
    labels = tuple(_single(by_step.get(t, set())) for t in range(num_steps))
    if concluded and overall and not by_step:
        labels = (1.0,) * num_steps
    ignored = sum(t >= num_steps for t in by_step) + places.count(None)
    return Critique(labels, overall, _first_error(labels, overall), ignored)


def _place(index: int, section: str | None, kinds: Sequence[Kind]) -> int | None:
    """The step that the analysis with this index of a section is about, None where that is unknown."""
    if section is None:
        return index
    steps = [step for step, kind in enumerate(kinds) if kind == SECTIONS[section]]
    return steps[index] if index < len(steps) else None


def _by_conclusion(places: Sequence[int | None], overall: bool | None) -> list[bool | None]:
    """Verdicts of analyses that say none themselves, by a judge that stops at the first error."""
    steps = [place for place in places if place is not None]
    if overall is None or any(later <= earlier for earlier, later in pairwise(steps)):
        # Out of the order of the steps it is open which analysis is that of the first error.
        return [None] * len(places)
    before: list[bool | None] = [True] * (len(places) - 1)
    return [*before, overall] if places else []


def _single(verdicts: set[bool | None]) -> float | None:
    """The label by the analyses of one step, None where they differ or say nothing."""
    if len(verdicts) != 1:
        return None
    (verdict,) = verdicts
    return None if verdict is None else float(verdict)


def _first_error(labels: Labels, overall: bool | None) -> int | None:
    """The first error by the labels, None where the verdict on the whole solution contradicts them."""
    first = local_first_error(labels)
    if overall is None:
        return first
    if overall:
        return None if 0.0 in labels else -1
    return None if first == -1 else first
