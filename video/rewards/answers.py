"""Rewards on the final answer of a video question, by the type of answer that each sample asks for."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmrl.reasoning.answer_text import FULL_WIDTH, normalise, unboxed, unwrapped
from mmrl.registry import Kind, add_kind, declares, find, register
from mmrl.rewards.steps import step_views
from mmrl.rollout import Prompt, Rollout, Sample
from video.acting.actions import Syntax
from video.rewards.turns import AnswerSyntax, count_calls, last_answer, turns_of
from vision import is_think_answer

# (answer, reference) -> score in [0, 1]
add_kind(Kind("answer_types", "answer type", arguments=2))

A = TypeVar("A")
B = TypeVar("B")

_LETTER = re.compile(r"^\s*\(?([A-Z])\)?(?:[.):\s]|$)")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_POSITIVE = re.compile(r"\d+(?:\.\d+)?")


# ---- one answer against one reference -------------------------------------------------------------------------------


def option_letter(text: str) -> str | None:
    """The capital letter with which `text` opens: "B", "(B)", "B. text"; None for "Because .." and the like."""
    found = _LETTER.match(unwrapped(text.translate(FULL_WIDTH)))
    return found.group(1) if found else None


def number(text: str) -> float | None:
    """The number that `text` is, thousands commas allowed; None when it is more or less than one number."""
    plain = unwrapped(text).strip(" \t\n$")
    return float(plain.replace(",", "")) if _NUMBER.fullmatch(plain) else None


@register("answer_types", "multiple choice")
def same_choice(answer: str, reference: str) -> float:
    """1 when both open with the same option letter, else 0 (Video-CoM, with a strict letter).

    Raises:
        ValueError: the reference opens with no letter.
    """
    right = option_letter(reference)
    if right is None:
        raise ValueError(f"the reference {reference!r} of a multiple choice question opens with no letter A-Z")
    return float(option_letter(answer) == right)


@register("answer_types", "numerical")
def same_number(answer: str, reference: str) -> float:
    """1 when both are equal after rounding to 2 decimals; 0 when only one is written with `.` or `,` (Video-R1)."""
    x, y = number(answer), _reference_number(reference)
    marked = [any(c in text for c in ".,") for text in (answer, reference)]
    return float(x is not None and marked[0] == marked[1] and round(x, 2) == round(y, 2))


@register("answer_types", "regression")
def closeness(answer: str, reference: str) -> float:
    """1 - min(1, |x - y| / |y|) in [0, 1] (Video-R1, regression); for y = 0 only x = 0 counts."""
    x, y = number(answer), _reference_number(reference)
    if x is None:
        return 0.0
    return float(x == y) if y == 0 else 1 - min(1.0, abs(x - y) / abs(y))


def _reference_number(text: str) -> float:
    value = number(text)
    if value is None:
        raise ValueError(f"the reference {text!r} of a numerical question is no number")
    return value


@register("answer_types", "OCR")
def word_accuracy(answer: str, reference: str) -> float:
    """clip(1 - word edits / max(1, reference words), 0, 1), words between white space, case kept (Video-R1, OCR)."""
    words, right = answer.split(), reference.split()
    row = list(range(len(right) + 1))
    for i, word in enumerate(words, 1):
        above, row = row, [i]
        for j, want in enumerate(right, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != want)))
    return max(0.0, 1 - row[-1] / max(1, len(right)))


@register("answer_types", "free-form")
def rouge(answer: str, reference: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over lower-cased words, in [0, 1] (Video-R1, free-form).

    Words are runs of letters and digits of any script and are not stemmed. Two texts without words give 0.
    """
    a, b = (_WORD.findall(t.lower()) for t in (answer, reference))
    shared = [(_overlap(_grams(a, n), _grams(b, n)), len(a) - n + 1, len(b) - n + 1) for n in (1, 2)]
    shared.append((common_length(a, b), len(a), len(b)))
    return sum(_f1(*part) for part in shared) / len(shared)


def _grams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _overlap(a: Counter[tuple[str, ...]], b: Counter[tuple[str, ...]]) -> int:
    return (a & b).total()


def _f1(shared: int, first: int, second: int) -> float:
    return 2 * shared / (first + second) if shared else 0.0


def common_length(a: Sequence[A], b: Sequence[B], same: Callable[[A, B], bool] = operator.eq) -> int:
    """Length of the longest common subsequence, `same` telling which items match; O(len(a) len(b))."""
    best = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            above = best[j]
            best[j] = diagonal + 1 if same(x, y) else max(above, best[j - 1])
            diagonal = above
    return best[-1]


@register("answer_types", "text")
def same_text(answer: str, reference: str) -> float:
    """1 when both are equal in normal form (case, spaces, final stop, plain numbers), else 0."""
    return float(normalise(answer) == normalise(reference))


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two stretches of time, in [0, 1]; 0 when they are apart or the union is empty."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    union = max(a[1], b[1]) - min(a[0], b[0])  # no other when they meet
    return shared / union if shared > 0 else 0.0


def interval(text: str) -> tuple[float, float] | None:
    """The two numbers of "from 2 to 6.5 s", "[2, 6.5]", "2-6.5", when there are two and the first is not larger."""
    found = [float(x) for x in _POSITIVE.findall(text)]
    return (found[0], found[1]) if len(found) == 2 and found[0] <= found[1] else None


@register("answer_types", "interval")
def grounding(answer: str, reference: str) -> float:
    """IoU of two intervals in seconds (VideoChat-R1, temporal grounding); 0 when the answer is no interval."""
    given, right = interval(answer), interval(reference)
    if right is None:
        raise ValueError(f"the reference {reference!r} of an interval question is not a start and an end in seconds")
    return 0.0 if given is None else interval_iou(given, right)


def answer_score(answer: str | None, reference: str, answer_type: str) -> float:
    """Score of one answer in [0, 1] by its own type, a row of `answer_types`; no answer is 0.

    Raises:
        ValueError: an unknown type, or a reference that is none of its type.
    """
    score = answer_type_of(answer_type)(answer or "", reference)
    return 0.0 if answer is None else score


def answer_type_of(name: str) -> Callable[[str, str], float]:
    """The function (answer, reference) -> score of an answer type.

    Raises:
        ValueError: no registered name. Types stand in data files, which must not choose what is imported.
    """
    if ":" in name:
        raise ValueError(f"answer type {name!r} is no registered name")
    score: Callable[[str, str], float] = find("answer_types", name).target
    return score


# ---- rewards --------------------------------------------------------------------------------------------------------


def video_reference(prompt: Prompt) -> Mapping[str, Any]:
    """The prompt's reference, empty where it has none."""
    return prompt.reference if isinstance(prompt.reference, Mapping) else {}


def graded(prompt: Prompt, answer: str | None) -> float | None:
    """`answer_score` of an answer to `prompt`, None when the reference holds no answer.

    Without `answer_type`, a prompt with options is multiple choice and any other a text.

    Raises:
        ValueError: as `answer_score`; the message names the prompt.
    """
    reference = video_reference(prompt)
    if reference.get("answer") is None:
        return None
    kind = reference.get("answer_type") or ("multiple choice" if prompt.inputs.get("options") else "text")
    try:
        return answer_score(None if answer is None else unboxed(answer), str(reference["answer"]), str(kind))
    except ValueError as error:
        raise ValueError(f"prompt {prompt.id!r}: {error}") from None


@declares(reads=("texts",))
@dataclass(frozen=True)
class VideoAnswer:
    """Score of the final answer in [0, 1] against `reference["answer"]`, by `reference["answer_type"]` of each sample.

    Args:
        syntax: how an answer is written: `tags` (`<answer>..</answer>`), or the action syntax `videocom` or
            `tool_call`.
    """

    syntax: AnswerSyntax = "tags"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference holds no answer."""
        return [graded(s.prompt, last_answer(turns_of(s, self.syntax), self.syntax)) for s in samples]


@declares(reads=("texts",))
@dataclass(frozen=True)
class VideoAnswerStep:
    """Step form of `VideoAnswer`: the score on the last step of each path, NaN before.

    Beside `manipulations` in `step_rewards` it puts the outcome at the last step of a return (mode `future`).
    """

    syntax: AnswerSyntax = "tags"

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64."""
        scores = [
            graded(v.prompt, last_answer([v.text], self.syntax)) if v.is_last else None for v in step_views(rollout)
        ]
        return torch.tensor([torch.nan if s is None else s for s in scores], dtype=torch.float64)


@declares(reads=("texts",))
class VideoFormat:
    """1 when the last turn is one `<think>..</think>` and one `<answer>..</answer>`, neither empty, else 0 (Video-R1).

    The published pattern also takes empty ones.
    """

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [float(is_think_answer(turns_of(s)[-1])) for s in samples]


def deep_eyes(accuracy: float, *, well_formed: bool, tool: bool) -> float:
    """0.8 accuracy + 0.2 format + 1.2 [accuracy > 0.5 and a tool gave a picture], format 0 or -1 (DeepEyes)."""
    return 0.8 * accuracy + (0.0 if well_formed else -0.2) + 1.2 * float(accuracy > 0.5 and tool)


@declares(reads=("texts",))
@dataclass(frozen=True)
class DeepEyes:
    """The whole reward of DeepEyes, in [-0.2, 2]: see `deep_eyes`.

    Accuracy is `VideoAnswer`'s, 0 for answers of 1000 characters and more. A completion is well formed when it has an
    answer and as many closing as opening `think` and `answer` tags. A tool gave a picture when a call parses.
    """

    syntax: Syntax = "tool_call"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference holds no answer."""
        return [self._score(s) for s in samples]

    def _score(self, sample: Sample) -> float | None:
        turns = turns_of(sample)
        answer, text = last_answer(turns, "tags"), "\n".join(turns)
        accuracy = graded(sample.prompt, None if answer is None or len(answer) >= 1000 else answer)
        if accuracy is None:
            return None
        paired = all(text.count(f"<{t}>") == text.count(f"</{t}>") for t in ("think", "answer"))
        tool = count_calls(turns_of(sample, self.syntax), self.syntax) > 0
        return deep_eyes(accuracy, well_formed=paired and answer is not None, tool=tool)
