"""Rewards on the final answer of a video question, by the type of answer that each sample asks for.

    answer_score("(B) a dog", "B", "multiple choice")    # 1.0
    answer_score("8", "10", "regression")                # 0.8
    answer_score("from 2 to 6 s", "3 to 7", "interval")  # 0.6, the IoU of the two

A type of answer is one function (answer, reference) -> score in [0, 1], registered under `answer_types`.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from mmrl.reasoning.answer_text import FULL_WIDTH, normalise, unboxed, unwrapped
from mmrl.registry import Kind, add_kind, declares, find, register
from mmrl.rewards.steps import step_views
from mmrl.rollout import Prompt, Rollout, Sample
from video.acting.actions import Syntax
from video.rewards.turns import AnswerSyntax, count_calls, last_answer, turn_options, turns_of
from vision import is_think_answer

# (answer, reference) -> score in [0, 1]
add_kind(Kind("answer_types", "answer type", arguments=2))

A = TypeVar("A")
B = TypeVar("B")

# a letter that nothing, a stop or a blank follows, so that the B of "Because" is none
_LETTER = re.compile(r"^\s*\(?([A-Z])\)?(?:[.):\s]|$)")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
_POSITIVE = re.compile(r"\d+(?:\.\d+)?")


# ---- one answer against one reference -------------------------------------------------------------------------------


def option_letter(text: str) -> str | None:
    """The capital letter with which `text` opens: "B", "(B)", "B. text"; None for "Because .." and the like."""
    match = _LETTER.match(unwrapped(text.translate(FULL_WIDTH)))
    return match.group(1) if match else None


def number(text: str) -> float | None:
    """The number that `text` is, thousands commas allowed; None when it is more or less than one number."""
    plain = unwrapped(text).strip(" \t\n$")
    if not _NUMBER.fullmatch(plain):
        return None
    return float(plain.replace(",", ""))


@register("answer_types", "multiple choice")
def same_choice(answer: str, reference: str) -> float:
    """1 when both open with the same option letter, else 0 (Video-CoM, with a strict letter).

    Raises:
        ValueError: the reference opens with no letter.
    """
    right_letter = option_letter(reference)
    if right_letter is None:
        raise ValueError(f"the reference {reference!r} of a multiple choice question opens with no letter A-Z")
    return float(option_letter(answer) == right_letter)


@register("answer_types", "numerical")
def same_number(answer: str, reference: str) -> float:
    """1 when both are equal after rounding to 2 decimals; 0 when only one is written with `.` or `,` (Video-R1)."""
    value, right_value = number(answer), _reference_number(reference)
    if value is None or _has_separator(answer) != _has_separator(reference):
        return 0.0
    return float(round(value, 2) == round(right_value, 2))


def _has_separator(text: str) -> bool:
    return "." in text or "," in text


@register("answer_types", "regression")
def closeness(answer: str, reference: str) -> float:
    """1 - min(1, |x - y| / |y|) in [0, 1] (Video-R1, regression); for y = 0 only x = 0 counts."""
    x, y = number(answer), _reference_number(reference)
    if x is None:
        return 0.0
    if y == 0:
        return float(x == y)
    return 1 - min(1.0, abs(x - y) / abs(y))


def _reference_number(text: str) -> float:
    value = number(text)
    if value is None:
        raise ValueError(f"the reference {text!r} of a numerical question is no number")
    return value


@register("answer_types", "OCR")
def word_accuracy(answer: str, reference: str) -> float:
    """clip(1 - word edits / max(1, reference words), 0, 1), words between white space, case kept (Video-R1, OCR)."""
    words, right_words = answer.split(), reference.split()
    # Levenshtein's table, one row at a time: edits[j] turns the words so far into the first j words of the reference
    edits = list(range(len(right_words) + 1))
    for i, word in enumerate(words, 1):
        previous, edits = edits, [i]
        for j, right_word in enumerate(right_words, 1):
            substituted = previous[j - 1] + (word != right_word)
            edits.append(min(previous[j] + 1, edits[-1] + 1, substituted))
    return max(0.0, 1 - edits[-1] / max(1, len(right_words)))


@register("answer_types", "free-form")
def rouge(answer: str, reference: str) -> float:
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over lower-cased words, in [0, 1] (Video-R1, free-form).

    Words are runs of letters and digits of any script and are not stemmed. Two texts without words give 0.
    """
    words = _WORD.findall(answer.lower())
    right_words = _WORD.findall(reference.lower())
    scores = []
    # ROUGE-1 and ROUGE-2: n-grams in common; of k words there are k - n + 1
    for n in (1, 2):
        shared = (_ngrams(words, n) & _ngrams(right_words, n)).total()
        scores.append(_f1(shared, len(words) - n + 1, len(right_words) - n + 1))
    # ROUGE-L: the longest common subsequence
    scores.append(_f1(common_length(words, right_words), len(words), len(right_words)))
    return sum(scores) / len(scores)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(shared: int, first: int, second: int) -> float:
    """F1 of `shared` items of two collections of so many items."""
    return 2 * shared / (first + second) if shared else 0.0


def common_length(a: Sequence[A], b: Sequence[B], same: Callable[[A, B], bool] = operator.eq) -> int:
    """Length of the longest common subsequence of two sequences, O(len(a) len(b)); `same` says which items match."""
    # best[j]: of the items of `a` so far and the first j of `b`; `diagonal` is best[j - 1] of the row before
    best = [0] * (len(b) + 1)
    for first in a:
        diagonal = 0
        for j, second in enumerate(b, 1):
            above = best[j]
            if same(first, second):
                best[j] = diagonal + 1
            else:
                best[j] = max(above, best[j - 1])
            diagonal = above
    return best[-1]


@register("answer_types", "text")
def same_text(answer: str, reference: str) -> float:
    """1 when both are equal in normal form (case, spaces, final stop, plain numbers), else 0."""
    return float(normalise(answer) == normalise(reference))


def interval_iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two stretches of time, in [0, 1]; 0 when they are apart or the union is empty."""
    shared = min(a[1], b[1]) - max(a[0], b[0])
    # the hull of both, which is their union wherever they overlap
    union = max(a[1], b[1]) - min(a[0], b[0])
    return shared / union if shared > 0 else 0.0


def interval(text: str) -> tuple[float, float] | None:
    """The two numbers of "from 2 to 6.5 s", "[2, 6.5]", "2-6.5", when there are two and the first is not larger."""
    numbers = [float(digits) for digits in _POSITIVE.findall(text)]
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        return None
    return numbers[0], numbers[1]


@register("answer_types", "interval")
def grounding(answer: str, reference: str) -> float:
    """IoU of two intervals in seconds (VideoChat-R1, temporal grounding); 0 when the answer is no interval."""
    span, right_span = interval(answer), interval(reference)
    if right_span is None:
        raise ValueError(f"the reference {reference!r} of an interval question is not a start and an end in seconds")
    return 0.0 if span is None else interval_iou(span, right_span)


def answer_score(answer: str | None, reference: str, answer_type: str) -> float:
    """Score of one answer in [0, 1] by its own type, a row of `answer_types`; no answer is 0.

    Raises:
        ValueError: an unknown type, or a reference that is none of its type.
    """
    # scored also without an answer, so that a reference that does not fit its type is refused in any case
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
    default_type = "multiple choice" if prompt.inputs.get("options") else "text"
    answer_type = str(reference.get("answer_type") or default_type)
    if answer is not None:
        # models trained on mathematics write \boxed{B} for B
        answer = unboxed(answer)
    try:
        return answer_score(answer, str(reference["answer"]), answer_type)
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
        scores = []
        for sample in samples:
            answer = last_answer(turns_of(sample, self.syntax), self.syntax)
            scores.append(graded(sample.prompt, answer))
        return scores


@declares(reads=("texts",))
@dataclass(frozen=True)
class VideoAnswerStep:
    """Step form of `VideoAnswer`: the score on the last step of each path, NaN before.

    Beside `manipulations` in `step_rewards` it puts the outcome at the last step of a return (mode `future`).
    """

    syntax: AnswerSyntax = "tags"

    def following(self, policy: object) -> Self:
        """The same with the syntax of a video agent; itself for other policies."""
        return replace(self, syntax=turn_options(policy).get("syntax", self.syntax))

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64."""
        scores = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
        for i, step in enumerate(step_views(rollout)):
            if not step.is_last:
                continue
            score = graded(step.prompt, last_answer([step.text], self.syntax))
            if score is not None:
                scores[i] = score
        return scores


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
        answer = last_answer(turns, "tags")
        is_overlong = answer is not None and len(answer) >= 1000
        accuracy = graded(sample.prompt, None if is_overlong else answer)
        if accuracy is None:
            return None
        text = "\n".join(turns)
        tags_are_paired = all(text.count(f"<{tag}>") == text.count(f"</{tag}>") for tag in ("think", "answer"))
        # a call ends a turn in its own syntax, so the turns are cut anew to count calls
        called_a_tool = count_calls(turns_of(sample, self.syntax), self.syntax) > 0
        return deep_eyes(accuracy, well_formed=tags_are_paired and answer is not None, tool=called_a_tool)
