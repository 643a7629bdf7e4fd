"""One labelled solution: the record that annotation writes and that reward models train on and are tested with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmrl.rollout import Prompt

Kind = Literal["perception", "reasoning", "answer", "reflection", "unknown"]
# Titles of a solution's sections (VL-PRM300K); their steps and analyses are numbered from 1 in each.
SECTIONS: Mapping[str, Kind] = {
    "Visual Elements": "perception",
    "Perception": "perception",
    "Reasoning": "reasoning",
}


@dataclass(frozen=True)
class Step:
    """One step of a written solution, without separators around it."""

    text: str
    kind: Kind = "unknown"


def plain_steps(texts: Sequence[str]) -> tuple[Step, ...]:
    """Steps of unknown kind."""
    return tuple(Step(t) for t in texts)


@dataclass(frozen=True)
class Counts:
    """A Monte-Carlo estimate: `correct` of `total` completions reached a right answer; total 0 = not sampled."""

    correct: int
    total: int


@dataclass(frozen=True)
class SolutionRecord:
    """A solution with the labels and counts of its steps; all sequences per step have as many entries as `steps`.

    labels: per step in [0, 1] (soft) or {0, 1} (hard), None = unlabelled; None as a whole = nothing labelled.
    scope: "local", each step judged on its own, or "prefix", wrong from the first error on.
    first_error: 0-based, -1 = no error, None = unknown. final_correct: the answer is right, None = unknown.
    mc: Monte-Carlo counts per step, kept beside the labels made of them.
    images, videos: paths. history: turns before the question, as in `mmrl.reasoning.questions.Question`. meta:
    anything else that came with it, JSON values.
    """

    id: str
    question: str
    steps: tuple[Step, ...]
    images: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    answer: str | None = None
    labels: tuple[float | None, ...] | None = None
    label_kind: Literal["hard", "soft"] = "hard"
    scope: Literal["local", "prefix"] = "local"
    first_error: int | None = None
    final_correct: bool | None = None
    mc: tuple[Counts, ...] | None = None
    judge: Sequence[Mapping[str, Any]] = ()
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    videos: tuple[str, ...] = ()
    history: tuple[Mapping[str, str], ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts of the steps."""
        return tuple(step.text for step in self.steps)

    @property
    def prompt(self) -> Prompt:
        """The question as policies and scorers take it, reference = the answer and `meta`."""
        inputs: dict[str, Any] = {"question": self.question, "images": list(self.images)}
        if self.videos:
            inputs["videos"] = list(self.videos)
        if self.history:
            inputs["history"] = [dict(turn) for turn in self.history]
        if self.options:
            inputs["options"] = list(self.options)
        return Prompt(self.id, inputs, dict(self.meta) | {"answer": self.answer})

    @property
    def asked(self) -> str:
        """Equal for solutions of the same question on the same media."""
        return json.dumps(self.prompt.inputs)


def record_of(prompt: Prompt, texts: Sequence[str]) -> SolutionRecord:
    """An unlabelled record of a prompt; `meta` has the reference's columns besides the answer.

    Raises:
        ValueError: the prompt has no question.
    """
    inputs, reference = prompt.inputs, prompt.reference
    if not isinstance(inputs.get("question"), str):
        raise ValueError(f"prompt {prompt.id!r} has no text `question` in its inputs, only {sorted(inputs)}")
    columns: dict[str, Any] = dict(reference) if isinstance(reference, Mapping) else {"answer": reference}
    answer = columns.pop("answer", None)
    return SolutionRecord(
        prompt.id,
        inputs["question"],
        plain_steps(texts),
        images=tuple(inputs.get("images") or ()),
        videos=tuple(inputs.get("videos") or ()),
        history=tuple(inputs.get("history") or ()),
        options=tuple(inputs.get("options") or ()),
        answer=None if answer is None else str(answer),
        meta=columns,
    )
