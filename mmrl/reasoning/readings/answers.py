"""The probability of the right answer after every step, teacher-forced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmrl.capabilities import AnswerGiver, AnswerReader, require
from mmrl.readings.base import ReadingContext, Values
from mmrl.reasoning.answers import right_answer
from mmrl.registry import ComponentError, register
from mmrl.rollout import Answer, Place, Prompt, Rollout, Sight
from mmrl.tree_ops import before


def _reads(options: Mapping[str, Any]) -> tuple[str, ...]:
    """A value at an end is its outcome."""
    return ("outcome",) if options["into"] == "value" else ()


def _writes(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("value", "root_value") if options["into"] == "value" else (options["into"],)


def _task(options: Mapping[str, Any]) -> type | None:
    """Without a `lead` of its own the reading takes the task's."""
    return AnswerGiver if options["lead"] is None else None


@register(
    "readings",
    "answer_probability",
    reads=_reads,
    writes=_writes,
    fits="policies that write",
    source="IGPO; potentials of answer probability",
    policy=AnswerReader,
    task=_task,
)
class AnswerProbability:
    """exp of the mean log-prob of the right answer's tokens, behind every step and behind the prompt.

    The differences between steps are IGPO's information gain (transform `progress`). All states of a prompt are read
    in one pass over its tree.

    Args:
        lead: what is written between a state and the answer; None = as the task has it.
        sight: how the prompt is seen: as given, with its media blanked out, or shuffled in time.
        minus: another sight whose probability is subtracted: with `blank`, what seeing adds.
        into: "value" fills value and root_value; an end is worth its own outcome, one without outcome as much as the
            state before it. "tags.NAME" fills a tag of the steps, NaN at ends.
    """

    def __init__(
        self, lead: str | None = None, sight: Sight = "given", minus: Sight | None = None, into: str = "value"
    ) -> None:
        if into != "value" and not into.removeprefix("tags."):
            raise ComponentError(f"answer_probability: into={into!r} is neither value nor tags.NAME")
        if into == "value" and minus is not None:
            raise ComponentError("answer_probability: a difference of probabilities is no value; set into: tags.NAME")
        self._lead, self._sight, self._minus, self._into = lead, sight, minus, into

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """The fields of a rollout."""
        tree, num_prompts = rollout.tree, len(rollout.prompts)
        policy: AnswerReader = require("reading 'answer_probability'", AnswerReader, context.policy, "policies")
        answers = [self._answer(prompt, context) for prompt in rollout.prompts]
        # The answer is read behind every prompt, then behind every step.
        places = [Place(prompt) for prompt in range(num_prompts)]
        places += [Place(prompt, step) for step, prompt in enumerate(tree.group.tolist())]
        place_answers = [answers[place.prompt] for place in places]

        def probability(sight: Sight) -> Tensor:
            return policy.answer_logps(rollout, places, place_answers, sight=sight).exp()

        # (prompts + N,)
        probabilities = probability(self._sight)
        if self._minus is not None:
            probabilities = probabilities - probability(self._minus)
        root, steps = probabilities[:num_prompts], probabilities[num_prompts:]
        if self._into != "value":
            return {self._into: steps}
        value = torch.where(tree.is_finished, tree.outcome, steps)
        return {"value": torch.where(value.isnan(), before(tree, value, root), value), "root_value": root}

    def _answer(self, prompt: Prompt, context: ReadingContext) -> Answer:
        if context.answer is not None:
            given = context.answer(prompt)
            return given if self._lead is None else given._replace(lead=self._lead)
        return Answer(self._lead or "", right_answer(prompt))
