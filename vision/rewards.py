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

Box = tuple[float, float, float, float]  # left, top, right, bottom, in one unit for actions and references
KeySteps = Sequence[str | Sequence[str]]  # each a text, or alternatives of which one suffices


def _needs(sample: Sample, key: str) -> Any:
    reference = sample.prompt.reference
    return reference.get(key) if isinstance(reference, Mapping) else None


# ---- structure ------------------------------------------------------------------------------------------------------


def is_think_answer(text: str) -> bool:
    """The whole text is one `<think>..</think>` and one `<answer>..</answer>`, neither empty."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [text.find(t) for t in tags]
    if any(text.count(t) != 1 for t in tags) or places != sorted(places):
        return False
    a, b, c, d = places
    outside = text[:a] + text[b + len(tags[1]) : c] + text[d + len(tags[3]) :]
    return not outside.strip() and bool(text[a + len(tags[0]) : b].strip() and text[c + len(tags[2]) : d].strip())


def is_boxed(text: str) -> bool:
    r"""There is exactly one `\boxed{..}` in the reply, its braces balance and it is not empty."""
    reply = without_thinking(text)
    content = boxed(reply)
    return reply.count("\\boxed{") == 1 and content is not None and bool(content.strip())


def is_line_trace(text: str) -> bool:
    """Two or more non-empty lines; the last one, and no other, is `answer X` or `answer: X`."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    says = [re.match(r"answer\b\s*:?\s*\S", line, re.IGNORECASE) is not None for line in lines]
    return len(lines) >= 2 and says[-1] and not any(says[:-1])


def is_chain_of_step(text: str) -> bool:
    """The special-token structure of CoS: steps of name, thought and reflection, then the answer.

    `<|reasoning_start|>`, one or more steps with `<|reasoning_proceed|>` between them, `<|reasoning_end|>`, then
    `<|answer_start|>..<|answer_end|>`. Names, thoughts and the answer are not empty, a reflection may be; between the
    parts stands only white space.
    """
    parts = re.split(r"(<\|(?:reasoning|answer)_\w+\|>)", text)
    tokens, between = [t[2:-2] for t in parts[1::2]], parts[::2]
    filled = [bool(t.strip()) for t in between]
    if tokens != _chain_tokens(tokens.count("reasoning_step_start")):
        return False
    for i, token in enumerate(tokens):  # between[i + 1] follows token i
        if token.endswith(("name_start", "thought_start")) or token == "answer_start":
            if not filled[i + 1]:
                return False
        elif filled[i + 1] and token != "reasoning_step_reflection_start":
            return False
    return not filled[0]


def _chain_tokens(steps: int) -> list[str]:
    parts = [f"step_{part}_{end}" for part in ("name", "thought", "reflection") for end in ("start", "end")]
    one = ["step_start", *parts, "step_end"]
    chain = ["start", *one, *(["proceed", *one] * max(steps - 1, 0)), "end"]
    return [f"reasoning_{t}" for t in chain] + ["answer_start", "answer_end"]


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
        return [float(FORMATS[self.kind](completion(s))) for s in samples]


@declares(reads=("texts",))
def cos_structure(samples: Sequence[Sample]) -> list[float | None]:
    """`Format` of kind `chain_of_step`: 1 when the special-token structure is well formed, else 0."""
    return Format("chain_of_step")(samples)


# ---- StepGRPO (R1-VL) -----------------------------------------------------------------------------------------------


def key_step_share(text: str, key_steps: KeySteps) -> float:
    """Share of key steps found in `text`, in [0, 1]; 0 when there are none (R1-VL, soft key-step matching).

    A key step is found when one of its alternatives, lower-cased, is part of the lower-cased text.
    """
    low = text.lower()
    found = [any(a.lower() in low for a in ([k] if isinstance(k, str) else k)) for k in key_steps]
    return sum(found) / len(found) if found else 0.0


def step_bodies(text: str) -> list[str]:
    """What stands under each `### Step k:` of the reply, up to the next `###`."""
    return [body for name, body in header_parts(without_thinking(text)) if name.startswith("Step ")]


def is_valid_reasoning(text: str) -> bool:
    """Complete and logical: the reply is a description, rationales, steps 1..n and one answer, none of them empty.

    Headers may all stand on one line. What stands before the first one does not count.
    """
    parts = header_parts(without_thinking(text))
    steps = [f"Step {k}" for k in range(1, len(parts) - 2)]
    in_order = ["Image Description", "Rationales", *steps, "The final answer is"]
    return bool(steps) and [name for name, _ in parts] == in_order and all(body for _, body in parts)


@declares(reads=("texts",))
class StepRAR:
    """Share of `reference["key_steps"]` found in the `### Step k:` sections. R1-VL weighs it 0.1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference names no key steps (an empty list scores 0)."""
        return [_key_steps(s, " ".join(step_bodies(completion(s)))) for s in samples]


@declares(reads=("texts",))
class StepRVR:
    """1 when the reasoning is complete and in order, else 0. R1-VL weighs it 1."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [float(is_valid_reasoning(completion(s))) for s in samples]


@declares(reads=("texts",))
class KeyStepMatch:
    """`StepRAR` for texts of any structure: share of `reference["key_steps"]` found anywhere in the completion."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference names no key steps (an empty list scores 0)."""
        return [_key_steps(s, completion(s)) for s in samples]


def _key_steps(sample: Sample, text: str) -> float | None:
    keys = _needs(sample, "key_steps")
    return None if keys is None else key_step_share(text, keys)


# ---- LaV-CoT --------------------------------------------------------------------------------------------------------


def count_score(predicted: int | None, true: int) -> float:
    """max(0, 1 - |predicted - true| / max(true, 1)), 0 without a prediction (LaV-CoT, object count)."""
    return 0.0 if predicted is None else max(0.0, 1 - abs(predicted - true) / max(true, 1))


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein(a, b) / max(|a|, |b|), in [0, 1]; 1 for two empty texts. Takes O(|a| |b|)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
    longest = max(len(a), len(b))
    return 1 - row[-1] / longest if longest else 1.0


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
        return [self._score(s) for s in samples]

    def _score(self, sample: Sample) -> float | None:
        text, right, count = completion(sample), _needs(sample, "answer"), _needs(sample, "count")
        if right is None:
            return None
        answer = extract_answer(text)
        aspects = [
            float(is_think_answer(text)),
            float(bool(_tag(text, self.language_tag))),
            0.0 if answer is None else edit_similarity(normalise(answer), normalise(str(right))),
        ]
        if count is not None:
            told = _tag(text, self.count_tag)
            aspects.append(count_score(int(told) if re.fullmatch(r"[0-9]{1,9}", told) else None, int(count)))
        return sum(aspects) / len(aspects)


def _tag(text: str, name: str) -> str:
    """Content of the last `<name>..</name>`, empty without one."""
    before, closing, _ = text.rpartition(f"</{name}>")
    return before.rpartition(f"<{name}>")[2].strip() if closing and f"<{name}>" in before else ""


# ---- length ---------------------------------------------------------------------------------------------------------


def overlong(length: int, limit: int, buffer: int) -> float:
    """0 up to `limit - buffer`, linear down to -1 at `limit`, -1 beyond (DAPO, soft overlong punishment)."""
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))


def repeated_share(steps: Sequence[str]) -> float:
    """Share of steps, in [0, 1], whose text occurred before (spaces and case aside); 0 without steps."""
    plain = [" ".join(s.split()).lower() for s in steps]
    return 1 - len(set(plain)) / len(plain) if plain else 0.0


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
        return [overlong(self._length(completion(s)), self.limit, self.buffer) for s in samples]

    def _length(self, text: str) -> int:
        return {"words": len(text.split()), "characters": len(text), "steps": len(_lines(text))}[self.unit]


@declares(reads=("texts",))
class RepeatedSteps:
    """Minus the share of non-empty lines that repeat an earlier line, in (-1, 0]."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        return [0.0 - repeated_share(_lines(completion(s))) for s in samples]


# ---- visual actions (ViRL) ------------------------------------------------------------------------------------------

_VALUE = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(
    r"\b(?:crop|zoom|zoom_in|box|bbox|bbox_2d)\b[^\w\[(\n]{0,8}[\[(]" + ",".join([_VALUE] * 4) + r"[\])]",
    re.IGNORECASE,
)


def parse_boxes(text: str) -> list[Box]:
    """Boxes of the visual actions in `text`, in order: `crop(1, 2, 3, 4)`, `"bbox_2d": [1, 2, 3, 4]`, `<box>[..]`."""
    boxes = [tuple(float(v) for v in found) for found in _BOX.findall(text)]
    return [(a, b, c, d) for a, b, c, d in boxes]


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 for a box without area."""
    sides = [max(0.0, min(a[2 + k], b[2 + k]) - max(a[k], b[k])) for k in (0, 1)]
    areas = [max(0.0, x[2] - x[0]) * max(0.0, x[3] - x[1]) for x in (a, b)]
    shared = sides[0] * sides[1]
    return shared / (sum(areas) - shared) if min(areas) > 0 else 0.0


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

    An action hits the reference regions that it overlaps with IoU >= `threshold`. If one of them has not been found
    before, the best overlapped of these now is, and the action gets `hit` * IoU; if all have, it is redundant and gets
    `repeat`; an action that hits none gets `miss`.
    """
    found: set[int] = set()
    credits = []
    for box in boxes:
        overlaps = {i: iou(box, r) for i, r in enumerate(references)}
        hits = [i for i, x in overlaps.items() if x >= threshold]
        new = [i for i in hits if i not in found]
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
        how = {"threshold": self.threshold, "hit": self.hit, "repeat": self.repeat, "miss": self.miss}
        return action_credit(parse_boxes(text), regions, **how)


@declares(reads=("texts",))
class ViRLAction(_ActionWeights):
    """Outcome form: the summed credit of a completion's visual actions; 0 without actions."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference has no regions."""
        credits = [self.credit(completion(s), s.prompt) for s in samples]
        return [None if c is None else float(sum(c)) for c in credits]


@declares(reads=("texts",))
class ViRLStep(_ActionWeights):
    """Step form: the credit of each step's own actions, given the regions found before it on its path."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN for steps without an action and prompts without regions."""
        return torch.tensor([self._step(v.prompt, v.before, v.text) for v in step_views(rollout)], dtype=torch.float64)

    def _step(self, prompt: Prompt, before: Sequence[str], text: str) -> float:
        own = len(parse_boxes(text))
        if not own:
            return math.nan
        credits = self.credit("\n".join([*before, text]), prompt)
        return math.nan if credits is None else sum(credits[-own:])
