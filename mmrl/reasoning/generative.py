"""A generative process reward model: a policy reads a step, may reason about it; its verdict token is the score."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from mmrl.capabilities import Chooser, begin_iteration, build_policy, model_of, policy_section
from mmrl.model_names import model_name
from mmrl.reasoning.answer_text import reply_spans
from mmrl.registry import declares, of_kind
from mmrl.rewards.steps import step_views
from mmrl.rollout import Prompt, Rollout, State
from mmrl.scorers.scoring import RECORD

ASK = (
    "{question}\n\nA solution begins as follows; the last step is to be judged.\n\n{steps}\n\n"
    "Is the last step right, given what stands before it? End with \\boxed{{Yes}} or \\boxed{{No}}."
)
VERDICT = "\\boxed{"
# the words between which an analysis chooses at its verdict: in a box, or as VL-PRM300K's judge in its conclusion
CHOICES = (("Yes", "No"), ("yes", "no"), ("Correct", "Incorrect"), ("correct", "incorrect"))
_VERDICT = re.compile(
    r"(?:\\(?:boxed|fbox)\s*+\{|<conclusion>)[\s$*]*+(?:\\[a-z]++\s*+\{\s*+)?+(?P<word>\w*+)\s*+(?P<end>\}|</conclusion>)?"
)


class GenerativePrm:
    """A StepReward: p(Yes) / (p(Yes) + p(No)) at the verdict, the mean over `samples` analyses (GenPRM, ThinkPRM).

    samples: 0 asks for the verdict at once, without an analysis. A sampled analysis without a verdict counts as wrong,
    never as missing: otherwise a broken form would be rewarded. stop: steps after the first one judged wrong (below
    1/2) have no score.
    """

    def __init__(
        self,
        policy: Chooser,
        *,
        samples: int = 0,
        stop: bool = False,
        seed: int = 0,
        section: Mapping[str, Any] | None = None,
    ) -> None:
        """section: what `build` made the policy of."""
        self.policy, self.samples, self.stop, self.seed, self._section = policy, samples, stop, seed, section

    @property
    def model(self) -> Any:
        """The judge's model, None where it has none."""
        return model_of(self.policy)

    @classmethod
    @declares(reads=("texts",))
    def build(
        cls,
        policy: Annotated[Mapping[str, Any], of_kind("policies"), policy_section(Chooser)] | None = None,
        samples: int | None = None,
        stop: bool | None = None,
        seed: int | None = None,
        model: Annotated[str, model_name()] | None = None,
    ) -> GenerativePrm:
        """From a recipe: `policy:` is a section like a trainer's, with `name` and options. Or from the folder of a
        saved one, `model`, which brings its own options where none are named.

        Raises:
            ValueError: neither of the two, or both.
        """
        if (policy is None) == (model is None):
            raise ValueError("generative_prm: give `policy`, a section with name and options, or `model`, its folder")
        options: dict[str, Any] = {"samples": 0, "stop": False, "seed": 0}
        if model is not None:
            record = json.loads((Path(model) / RECORD).read_text())
            policy = {**record["policy"], "model": model}
            options = {key: record[key] for key in options}
        assert policy is not None
        named = {"samples": samples, "stop": stop, "seed": seed}
        options |= {key: value for key, value in named.items() if value is not None}
        return cls(build_policy("scorer.policy", policy, Chooser), **options, section=policy)

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in its ecosystem's format, and a record of how it is asked."""
        self.policy.save(folder, state_dict)
        record = {
            "scorer": "generative_prm", "policy": dict(self._section or {}), "samples": self.samples,
            "stop": self.stop, "seed": self.seed, "format": {"aggregate": "min"},
        }  # fmt: skip
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")

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

    def begin_iteration(self) -> None:
        """The policy's; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self.policy)

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The policy's."""
        return self.policy.admit(prompts)

    def _scores(self, states: Sequence[State]) -> Tensor:
        """(S,) of the questions about single steps."""
        if not self.samples:
            return self._verdicts([State(s.prompt, (VERDICT,)) for s in states])
        readings = self.policy.extend(states, self.samples, seed=self.seed)
        analyses = [(i, "".join(c.steps)) for i, said in enumerate(readings) for c in said]
        read: dict[tuple[str, str], list[tuple[int, State]]] = {}
        for i, text in analyses:
            stated = stated_verdict(text)
            if stated is not None:
                start, choices = stated
                read.setdefault(choices, []).append((i, State(states[i].prompt, (text[:start],))))
        total = torch.zeros(len(states), dtype=torch.float64)
        for choices, found in read.items():
            p = self._verdicts([state for _, state in found], choices)
            total.index_add_(0, torch.tensor([i for i, _ in found]), p)
        return total / self.samples

    def _verdicts(self, states: Sequence[State], choices: tuple[str, str] = CHOICES[0]) -> Tensor:
        logp = self.policy.choice_logps(states, choices).double()
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


def stated_verdict(text: str) -> tuple[int, tuple[str, str]] | None:
    """Where the verdict of an analysis begins, and the two words of `CHOICES` that stand to choice there; None unless
    its reply, the text without the thinking, holds exactly one box or conclusion and that is a verdict."""
    found = [mark for start, end in reply_spans(text) for mark in _VERDICT.finditer(text, start, end)]
    if len(found) != 1 or found[0]["end"] is None:
        return None
    choices = next((pair for pair in CHOICES if found[0]["word"] in pair), None)
    return None if choices is None else (found[0].start("word"), choices)
