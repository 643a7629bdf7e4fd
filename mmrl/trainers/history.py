"""Outcomes of earlier iterations, for estimators whose statistics run on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from mmrl.credit import StepAdvantage
from mmrl.credit.table import Spec, estimator_of
from mmrl.rollout import Prompt
from mmrl.tree import StepTree


class OutcomeHistory:
    """The newest outcomes of every prompt: the same on all processes, and part of every checkpoint.

    Args:
        length: how many outcomes of a prompt are kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.outcomes: dict[str, list[float]] = {}

    @staticmethod
    def of(estimators: Sequence[Spec]) -> OutcomeHistory | None:
        """The history that these estimators want, None when none of them remembers anything."""
        lengths = []
        for spec in estimators:
            row, options = estimator_of(spec)
            option = row.facts.get("remembers")
            if option is not None:
                lengths.append(int(options.get(option, row.options[option].default)))
        return OutcomeHistory(max(lengths)) if lengths else None

    def past(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Outcomes of each prompt so far, oldest first."""
        return [self.outcomes.get(p.id, []) for p in prompts]

    def add(self, prompts: Sequence[Prompt], tree: StepTree, credit: StepAdvantage) -> None:
        """Append the outcomes that were credited in this iteration, of all processes. All ranks must call it."""
        outcome = credit.info["outcome"]
        new = []
        for group, prompt in enumerate(prompts):
            of_prompt = outcome[tree.group == group]
            new.append((prompt.id, of_prompt[~of_prompt.isnan()].tolist()))
        for name, outcomes in gather_object(new):
            self.outcomes[name] = (self.outcomes.get(name, []) + outcomes)[-self.length :]

    def state_dict(self) -> dict[str, Any]:
        """The outcomes of each prompt, for the checkpoint."""
        return dict(self.outcomes)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same, read back."""
        self.outcomes = dict(state)
