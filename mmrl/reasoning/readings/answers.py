"""How likely the right answer is after every step, teacher-forced: what the policy already knows."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.capabilities import AnswerGiver, AnswerReader, require
from mmrl.readings.base import ReadingContext, Values
from mmrl.reasoning.answers import right_answer
from mmrl.registry import ComponentError, register
from mmrl.rollout import Answer, Place, Prompt, Rollout, Sight
from mmrl.tree_ops import before


@register(
    "readings",
    "answer_probability",
    reads=lambda options: ("outcome",) if options["into"] == "value" else (),
    writes=lambda options: ("value", "root_value") if options["into"] == "value" else (options["into"],),
    fits="policies that write",
    source="IGPO; potentials of answer probability",
    policy=AnswerReader,
    task=lambda options: AnswerGiver if options["lead"] is None else None,
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
        tree, prompts = rollout.tree, len(rollout.prompts)
        policy: AnswerReader = require("reading 'answer_probability'", AnswerReader, context.policy, "policies")
        answers = [self._answer(p, context) for p in rollout.prompts]
        places = [Place(g) for g in range(prompts)]
        places += [Place(g, v) for v, g in enumerate(tree.group.tolist())]

        def probability(sight: Sight) -> Tensor:
            told = [answers[p.prompt] for p in places]
            return policy.answer_logps(rollout, places, told, sight=sight).exp()

        p = probability(self._sight)
        if self._minus is not None:
            p = p - probability(self._minus)
        root, steps = p[:prompts], p[prompts:]
        if self._into != "value":
            return {self._into: steps}
        value = torch.where(tree.is_finished, tree.outcome, steps)
        return {"value": torch.where(value.isnan(), before(tree, value, root), value), "root_value": root}

    def _answer(self, prompt: Prompt, context: ReadingContext) -> Answer:
        if context.answer is not None:
            given = context.answer(prompt)
            return given if self._lead is None else given._replace(lead=self._lead)
        return Answer(self._lead or "", right_answer(prompt))
