"""A generative process reward model: a policy reads a step, may reason about it; its verdict token is the score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrl.registry import build_section
from mmrl.rewards.steps import step_views
from mmrl.rollout import Extender, Prompt, Rollout, State

ASK = (
    "{question}\n\nA solution begins as follows; the last step is to be judged.\n\n{steps}\n\n"
    "Is the last step right, given what stands before it? End with \\boxed{{Yes}} or \\boxed{{No}}."
)
VERDICT = "\\boxed{"


class Chooser(Extender, Protocol):
    """A policy that can also say which prompts it can take, and how likely given texts are to come next."""

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those it can take; the others are logged with their reason."""

    def choice_logps(self, states: Sequence[State], choices: Sequence[str]) -> Tensor:
        """(S, C) float32 log-prob of the first token of each choice directly after each state."""


class GenerativePrm:
    """A StepReward: p(Yes) / (p(Yes) + p(No)) at the verdict, the mean over `samples` analyses (GenPRM, ThinkPRM).

    samples: 0 asks for the verdict at once, without an analysis. A sampled analysis without a verdict counts as wrong,
    never as missing: otherwise a broken form would be rewarded. stop: steps after the first one judged wrong (below
    1/2) have no score.
    """

    def __init__(self, policy: Chooser, *, samples: int = 0, stop: bool = False, seed: int = 0) -> None:
        self.policy, self.samples, self.stop, self.seed = policy, samples, stop, seed

    @property
    def model(self) -> Any:
        """The judge's model, None where it has none."""
        return getattr(self.policy, "model", None)

    @classmethod
    def build(cls, policy: Mapping[str, Any], samples: int = 0, stop: bool = False, seed: int = 0) -> GenerativePrm:
        """From a recipe: `policy:` is a section like a trainer's, with `name` and options."""
        judge = build_section("policies", "scorer.policy", policy)
        return cls(judge, samples=samples, stop=stop, seed=seed)

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 in [0, 1]; NaN for blank steps, where the policy cannot take the question about a step (too
        long, or with a placeholder in it), and after the first wrong one with `stop`."""
        views = step_views(rollout)
        asked = {}
        for i, view in enumerate(views):
            if view.text.strip():
                steps = [t.strip() for t in (*view.before, view.text) if t.strip()]
                asked[i] = self._prompt(view.prompt, steps)
        taken = {id(p) for p in self.policy.admit(list(asked.values()))}
        asked = {i: p for i, p in asked.items() if id(p) in taken}
        out = torch.full((len(views),), torch.nan, dtype=torch.float64)
        if asked:
            out[list(asked)] = self._scores([State(p) for p in asked.values()])
        return self._stopped(out, rollout) if self.stop else out

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The policy's."""
        return self.policy.admit(prompts)

    def _scores(self, states: Sequence[State]) -> Tensor:
        """(S,) of the questions about single steps."""
        if not self.samples:
            return self._verdicts([State(s.prompt, (VERDICT,)) for s in states])
        readings = self.policy.extend(states, self.samples, seed=self.seed)
        analyses = [(i, "".join(c.steps)) for i, said in enumerate(readings) for c in said]
        found = [(i, text[: text.rindex(VERDICT) + len(VERDICT)]) for i, text in analyses if _has_verdict(text)]
        total = torch.zeros(len(states), dtype=torch.float64)
        if found:
            p = self._verdicts([State(states[i].prompt, (text,)) for i, text in found])
            total.index_add_(0, torch.tensor([i for i, _ in found]), p)
        return total / self.samples

    def _verdicts(self, states: Sequence[State]) -> Tensor:
        logp = self.policy.choice_logps(states, ("Yes", "No")).double()
        return logp.softmax(1)[:, 0]

    def _prompt(self, prompt: Prompt, steps: Sequence[str]) -> Prompt:
        text = ASK.format(question=prompt.inputs.get("question", ""), steps="\n\n".join(steps))
        return Prompt(f"{prompt.id}/judge", {**prompt.inputs, "question": text})

    @staticmethod
    def _stopped(scores: Tensor, rollout: Rollout) -> Tensor:
        wrong: list[bool] = []
        for v, parent in enumerate(rollout.tree.parent.tolist()):
            after = parent >= 0 and wrong[parent]
            wrong.append(after or bool(scores[v] < 0.5))
            if after:
                scores[v] = torch.nan
        return scores


def _has_verdict(text: str) -> bool:
    """Whether the text ends in a boxed Yes or No, exactly one."""
    return len(re.findall(r"\\boxed\{(?:Yes|No)\}", text)) == 1 and text.count(VERDICT) == 1
