"""Verifiable rewards on what a vision-language model writes: structure, key steps, length, visual actions.

Each is a pure function of a text and a small class that applies it to samples, for a recipe's weighted list. Published
compositions are such lists: StepGRPO is `math_answer` (1), `step_rar` (0.1) and `step_rvr` (1) with the
estimator `grpo`. A reference that lacks what a reward needs leaves the sample unscored (None), it does not score 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl.reasoning.answer_text import boxed, extract_answer, normalise, without_thinking
from mmrl.reasoning.answers import completion
from mmrl.reasoning.step_texts import header_parts
from mmrl.registry import declares
from mmrl.rewards.steps import step_views
from mmrl.rollout import Prompt, Rollout, Sample

# left, top, right, bottom, in one unit for actions and references
Box = tuple[float, float, float, float]
# Each key step is a text, or alternatives of which one suffices.
KeySteps = Sequence[str | Sequence[str]]


def _in_reference(sample: Sample, key: str) -> Any:
    """A value of the sample's reference, None where the reference lacks it."""
    reference = sample.prompt.reference
    return reference.get(key) if isinstance(reference, Mapping) else None


# ---- structure ------------------------------------------------------------------------------------------------------


def is_think_answer(text: str) -> bool:
    """The whole text is one `<think>..</think>` and one `<answer>..</answer>`, neither empty."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    if any(text.count(tag) != 1 for tag in tags):
        return False
    pieces = []  # the texts before, between and behind the tags
    rest = text
    for tag in tags:
        piece, found, rest = rest.partition(tag)
        if not found:
            return False  # it stands before an earlier tag
        pieces.append(piece)
    before, thought, between, answer = pieces
    return not (before + between + rest).strip() and bool(thought.strip() and answer.strip())


def is_boxed(text: str) -> bool:
    r"""There is exactly one `\boxed{..}` in the reply, its braces balance and it is not empty."""
    reply = without_thinking(text)
    content = boxed(reply)
    return reply.count("\\boxed{") == 1 and content is not None and bool(content.strip())


def is_line_trace(text: str) -> bool:
    """Two or more non-empty lines; the last one, and no other, is `answer X` or `answer: X`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    is_answer = [re.match(r"answer\b\s*:?\s*\S", line, re.IGNORECASE) is not None for line in lines]
    return len(lines) >= 2 and is_answer[-1] and not any(is_answer[:-1])


def is_chain_of_step(text: str) -> bool:
    """The special-token structure of CoS: steps of name, thought and reflection, then the answer.

    `<|reasoning_start|>`, one or more steps with `<|reasoning_proceed|>` between them, `<|reasoning_end|>`, then
    `<|answer_start|>..<|answer_end|>`. Names, thoughts and the answer are not empty, a reflection may be; between the
    parts stands only white space.
    """
    # Texts and tokens in turn, beginning and ending with a text.
    parts = re.split(r"(<\|(?:reasoning|answer)_\w+\|>)", text)
    tokens = [part.removeprefix("<|").removesuffix("|>") for part in parts[1::2]]
    first, *behind = [bool(part.strip()) for part in parts[::2]]
    if first or tokens != _chain_tokens(tokens.count("reasoning_step_start")):
        return False
    for token, has_text in zip(tokens, behind, strict=True):
        if token.endswith(("name_start", "thought_start")) or token == "answer_start":
            if not has_text:
                return False
        elif has_text and token != "reasoning_step_reflection_start":
            return False
    return True


def _chain_tokens(steps: int) -> list[str]:
    """The tokens of a chain of so many steps, without their bars; at least one step."""
    step = ["step_start"]
    for part in ("name", "thought", "reflection"):
        step += [f"step_{part}_start", f"step_{part}_end"]
    step.append("step_end")
    chain = ["start", *step]
    for _ in range(steps - 1):
        chain += ["proceed", *step]
    chain.append("end")
    return [f"reasoning_{token}" for token in chain] + ["answer_start", "answer_end"]


FORMATS: dict[str, Callable[[str], bool]] = {
    "think_answer": is_think_answer,
    "boxed": is_boxed,
    "lines": is_line_trace,
    "chain_of_step": is_chain_of_step,
}


@declares(reads=("texts",))
@dataclass(frozen=True)
class Format:
    """1 when the completion has the structure `kind`, else 0; see the `is_..` functions of this module."""

    kind: Literal["think_answer", "boxed", "lines", "chain_of_step"] = "think_answer"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        matches = FORMATS[self.kind]
        return [float(matches(completion(sample))) for sample in samples]


@declares(reads=("texts",))
def cos_structure(samples: Sequence[Sample]) -> list[float | None]:
    """`Format` of kind `chain_of_step`: 1 when the special-token structure is well formed, else 0."""
    return Format("chain_of_step")(samples)


# ---- StepGRPO (R1-VL) -----------------------------------------------------------------------------------------------


def key_step_share(text: str, key_steps: KeySteps) -> float:
    """Share of key steps found in `text`, in [0, 1]; 0 when there are none (R1-VL, soft key-step matching).

    A key step is found when one of its alternatives, lower-cased, is part of the lower-cased text.
    """
    if not key_steps:
        return 0.0
    lower = text.lower()
    found = 0
    for key_step in key_steps:
        alternatives = [key_step] if isinstance(key_step, str) else key_step
        found += any(alternative.lower() in lower for alternative in alternatives)
    return found / len(key_steps)


def step_bodies(text: str) -> list[str]:
    """The text under each `### Step k:` of the reply, up to the next `###`."""
    return [body for name, body in header_parts(without_thinking(text)) if name.startswith("Step ")]


def is_valid_reasoning(text: str) -> bool:
    """Complete and logical: the reply is a description, rationales, steps 1..n and one answer, none of them empty.

    Headers may all stand on one line. Text before the first one does not count.
    """
    parts = header_parts(without_thinking(text))
    steps = [f"Step {number}" for number in range(1, len(parts) - 2)]
    in_order = ["Image Description", "Rationales", *steps, "The final answer is"]
    return bool(steps) and [name for name, _ in parts] == in_order and all(body for _, body in parts)


@declares(reads=("texts",))
class StepRAR:
    """Share of `reference["key_steps"]` found in the `### Step k:` sections. R1-VL weighs it 0.1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference names no key steps (an empty list scores 0)."""
        return [_key_steps(sample, " ".join(step_bodies(completion(sample)))) for sample in samples]


@declares(reads=("texts",))
class StepRVR:
    """1 when the reasoning is complete and in order, else 0. R1-VL weighs it 1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [float(is_valid_reasoning(completion(sample))) for sample in samples]


@declares(reads=("texts",))
class KeyStepMatch:
    """`StepRAR` for texts of any structure: share of `reference["key_steps"]` found anywhere in the completion."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference names no key steps (an empty list scores 0)."""
        return [_key_steps(sample, completion(sample)) for sample in samples]


def _key_steps(sample: Sample, text: str) -> float | None:
    """The share of the sample's key steps in a text, None where its reference names none."""
    key_steps = _in_reference(sample, "key_steps")
    return None if key_steps is None else key_step_share(text, key_steps)


# ---- LaV-CoT --------------------------------------------------------------------------------------------------------


def count_score(predicted: int | None, true: int) -> float:
    """max(0, 1 - |predicted - true| / max(true, 1)), 0 without a prediction (LaV-CoT, object count)."""
    return 0.0 if predicted is None else max(0.0, 1 - abs(predicted - true) / max(true, 1))


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein(a, b) / max(|a|, |b|), in [0, 1]; 1 for two empty texts. Takes O(|a| |b|)."""
    longest = max(len(a), len(b))
    if longest == 0:
        return 1.0
    # row[j]: the distance of the beginning of `a` to the first j letters of `b`
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row = row, [i]
        for j, other in enumerate(b, 1):
            deleted, inserted, replaced = before[j] + 1, row[-1] + 1, before[j - 1] + (letter != other)
            row.append(min(deleted, inserted, replaced))
    return 1 - row[-1] / longest


@declares(reads=("texts",))
@dataclass(frozen=True)
class LavCot:
    """Mean of the aspects of LaV-CoT, in [0, 1], equal weights.

    Format (think and answer tags and nothing else), object count (`<count>3</count>` against `reference["count"]`),
    language marker (`<language>..</language>` is there), answer (edit similarity of normal forms, 0 without answer).
    The count is left out of the mean for references without one; without an answer the sample is unscored.

    Args:
        count_tag, language_tag: names of the tags that the prompt asks for.
    """

    count_tag: str = "count"
    language_tag: str = "language"

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference has no answer."""
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float | None:
        text = completion(sample)
        right_answer, right_count = _in_reference(sample, "answer"), _in_reference(sample, "count")
        if right_answer is None:
            return None
        aspects = [float(is_think_answer(text)), float(bool(_tag(text, self.language_tag)))]
        answer = extract_answer(text)
        if answer is None:
            aspects.append(0.0)
        else:
            aspects.append(edit_similarity(normalise(answer), normalise(str(right_answer))))
        if right_count is not None:
            written = _tag(text, self.count_tag)
            count = int(written) if re.fullmatch(r"[0-9]{1,9}", written) else None
            aspects.append(count_score(count, int(right_count)))
        return sum(aspects) / len(aspects)


def _tag(text: str, name: str) -> str:
    """Content of the last `<name>..</name>`, empty without one."""
    before, closing, _ = text.rpartition(f"</{name}>")
    _, opening, content = before.rpartition(f"<{name}>")
    return content.strip() if opening and closing else ""


# ---- length ---------------------------------------------------------------------------------------------------------


def overlong(length: int, limit: int, buffer: int) -> float:
    """0 up to `limit - buffer`, linear down to -1 at `limit`, -1 beyond (DAPO, soft overlong punishment)."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))


def repeated_share(steps: Sequence[str]) -> float:
    """Share of steps, in [0, 1], whose text occurred before (spaces and case aside); 0 without steps."""
    if not steps:
        return 0.0
    plain = [" ".join(step.split()).lower() for step in steps]
    return 1 - len(set(plain)) / len(plain)


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@declares(reads=("texts",))
@dataclass(frozen=True)
class LengthPenalty:
    """Soft budget, in [-1, 0]: no cost up to `limit - buffer`, then linear, -1 from `limit` on.

    Args:
        limit: > 0, in `unit`s.
        buffer: 1..limit, over how many units the cost rises.
        unit: words (between white space), characters (for scripts without spaces) or steps (non-empty lines).
    """

    limit: int
    buffer: int
    unit: Literal["words", "characters", "steps"] = "words"

    def __post_init__(self) -> None:
        if not 1 <= self.buffer <= self.limit:
            raise ValueError(f"length_penalty: buffer={self.buffer} must lie in 1..limit ({self.limit})")

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [overlong(self._length(completion(sample)), self.limit, self.buffer) for sample in samples]

    def _length(self, text: str) -> int:
        if self.unit == "words":
            return len(text.split())
        if self.unit == "steps":
            return len(_lines(text))
        return len(text)


@declares(reads=("texts",))
class RepeatedSteps:
    """Minus the share of non-empty lines that repeat an earlier line, in (-1, 0]."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        # From 0.0, so that no sample gets -0.0.
        return [0.0 - repeated_share(_lines(completion(sample))) for sample in samples]


# ---- visual actions (ViRL) ------------------------------------------------------------------------------------------

_VALUE = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
    r"\b(?:crop|zoom|zoom_in|box|bbox|bbox_2d)\b[^\w\[(\n]{0,8}[\[(]" + ",".join([_VALUE] * 4) + r"[\])]",
    re.IGNORECASE,
)


def parse_boxes(text: str) -> list[Box]:
    """Boxes of the visual actions in `text`, in order: `crop(1, 2, 3, 4)`, `"bbox_2d": [1, 2, 3, 4]`, `<box>[..]`."""
    boxes = []
    for numbers in _BOX.findall(text):
        left, top, right, bottom = (float(number) for number in numbers)
        boxes.append((left, top, right, bottom))
    return boxes


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 for a box without area."""
    areas = [max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]) for box in (a, b)]
    if min(areas) <= 0:
        return 0.0
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / (sum(areas) - shared)


def action_credit(
    boxes: Sequence[Sequence[float]],
    references: Sequence[Sequence[float]],
    *,
    threshold: float = 0.5,
    hit: float = 1.0,
    repeat: float = 0.0,
    miss: float = -0.5,
) -> list[float]:
    """Credit of each visual action, in order (ViRL's idea, our numbers).

    An action hits the reference regions that it overlaps with IoU >= `threshold`. If one of them was not found before,
    the best overlapped of these now is, and the action gets `hit` * IoU; if all were, it is redundant and gets
    `repeat`; an action that hits none gets `miss`.
    """
    found: set[int] = set()
    credits = []
    for box in boxes:
        overlaps = [iou(box, region) for region in references]
        hits = [region for region, overlap in enumerate(overlaps) if overlap >= threshold]
        new = [region for region in hits if region not in found]
        if new:
            best = max(new, key=overlaps.__getitem__)
            found.add(best)
            credits.append(hit * overlaps[best])
        else:
            credits.append(repeat if hits else miss)
    return credits


@dataclass(frozen=True)
class _ActionWeights:
    """threshold: in (0, 1], the IoU of a hit. hit, repeat, miss: see `action_credit`."""

    threshold: float = 0.5
    hit: float = 1.0
    repeat: float = 0.0
    miss: float = -0.5

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"visual actions: threshold={self.threshold} must lie in (0, 1]")

    def credit(self, text: str, prompt: Prompt) -> list[float] | None:
        """Credit of the actions in `text` against `prompt.reference["regions"]`, None without regions."""
        regions = prompt.reference.get("regions") if isinstance(prompt.reference, Mapping) else None
        if regions is None:
            return None
        for region in regions:
            if len(region) != 4:
                raise ValueError(f"prompt {prompt.id!r}: region {region} must be [left, top, right, bottom]")
        return action_credit(
            parse_boxes(text), regions, threshold=self.threshold, hit=self.hit, repeat=self.repeat, miss=self.miss
        )


@declares(reads=("texts",))
class ViRLAction(_ActionWeights):
    """Outcome form: the summed credit of a completion's visual actions; 0 without actions."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference has no regions."""
        credits = [self.credit(completion(sample), sample.prompt) for sample in samples]
        return [None if own is None else float(sum(own)) for own in credits]


@declares(reads=("texts",))
class ViRLStep(_ActionWeights):
    """Step form: the credit of each step's own actions, given the regions found before it on its path."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN for steps without an action and prompts without regions."""
        rewards = [self._step(view.prompt, view.before, view.text) for view in step_views(rollout)]
        return torch.tensor(rewards, dtype=torch.float64)

    def _step(self, prompt: Prompt, before: Sequence[str], text: str) -> float:
        num_actions = len(parse_boxes(text))
        if num_actions == 0:
            return math.nan
        credits = self.credit("\n".join([*before, text]), prompt)
        return math.nan if credits is None else sum(credits[-num_actions:])
