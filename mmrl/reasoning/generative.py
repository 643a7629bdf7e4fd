"""A generative process reward model: a policy reads a step, may reason about it; its verdict token is the score.

Without an analysis the model is asked for its next word after "\\boxed{": the score is p(Yes) / (p(Yes) + p(No)). With
analyses the score is read in the same way where each of them states its verdict, and averaged.
"""

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
# The words between which an analysis chooses at its verdict: in a box, or as VL-PRM300K's judge in its conclusion.
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
        """Save the policy in its ecosystem's format, and the settings of this scorer beside it."""
        self.policy.save(folder, state_dict)
        record = {
            "scorer": "generative_prm",
            "policy": dict(self._section or {}),
            "samples": self.samples,
            "stop": self.stop,
            "seed": self.seed,
            "format": {"aggregate": "min"},
        }
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 in [0, 1]; NaN for blank steps, where the policy cannot take the question about a step (too
        long, or with a placeholder in it), and after the first wrong one with `stop`."""
        views = step_views(rollout)
        questions: dict[int, Prompt] = {}  # by the index of a step
        for i, view in enumerate(views):
            if view.text.strip():
                steps = [text.strip() for text in (*view.before, view.text) if text.strip()]
                questions[i] = self._prompt(view.prompt, steps)
        # By object, since the questions about one prompt's steps have the same id.
        admitted = {id(prompt) for prompt in self.policy.admit(list(questions.values()))}
        questions = {i: prompt for i, prompt in questions.items() if id(prompt) in admitted}
        scores = torch.full((len(views),), torch.nan, dtype=torch.float64)
        if questions:
            scores[list(questions)] = self._scores([State(prompt) for prompt in questions.values()])
        return self._stopped(scores, rollout) if self.stop else scores

    def begin_iteration(self) -> None:
        """The policy's; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self.policy)

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The policy's."""
        return self.policy.admit(prompts)

    def _scores(self, states: Sequence[State]) -> Tensor:
        """(S,) scores in [0, 1] of S questions about single steps."""
        if not self.samples:
            return self._verdicts([State(state.prompt, (VERDICT,)) for state in states])
        analyses = self.policy.extend(states, self.samples, seed=self.seed)
        # By the two words to choose between: the index of a question, and the state right before the verdict.
        verdicts: dict[tuple[str, str], list[tuple[int, State]]] = {}
        for i, of_question in enumerate(analyses):
            for analysis in of_question:
                text = "".join(analysis.steps)
                stated = stated_verdict(text)
                if stated is not None:
                    start, choices = stated
                    verdicts.setdefault(choices, []).append((i, State(states[i].prompt, (text[:start],))))
        # The divisor is the number of analyses: one without a verdict adds 0, as one that says No.
        total = torch.zeros(len(states), dtype=torch.float64)
        for choices, places in verdicts.items():
            p_right = self._verdicts([state for _, state in places], choices)
            total.index_add_(0, torch.tensor([i for i, _ in places]), p_right)
        return total / self.samples

    def _verdicts(self, states: Sequence[State], choices: tuple[str, str] = CHOICES[0]) -> Tensor:
        """(S,) probability of the first word of `choices` against the second, float64."""
        logp = self.policy.choice_logps(states, choices).double()
        return logp.softmax(1)[:, 0]

    def _prompt(self, prompt: Prompt, steps: Sequence[str]) -> Prompt:
        text = ASK.format(question=prompt.inputs.get("question", ""), steps="\n\n".join(steps))
        return Prompt(f"{prompt.id}/judge", {**prompt.inputs, "question": text})

    @staticmethod
    def _stopped(scores: Tensor, rollout: Rollout) -> Tensor:
        """The scores (N,), NaN below every step that is wrong."""
        # True for a step that is wrong or has a wrong step above it; parents come before their children.
        wrong: list[bool] = []
        for step, parent in enumerate(rollout.tree.parent.tolist()):
            below_wrong = parent >= 0 and wrong[parent]
            wrong.append(below_wrong or bool(scores[step] < 0.5))
            if below_wrong:
                scores[step] = torch.nan
        return scores


def stated_verdict(text: str) -> tuple[int, tuple[str, str]] | None:
    """The place where the verdict of an analysis begins, and the pair of `CHOICES` that it is one of.

    None unless its reply, the text without the thinking, holds exactly one box or conclusion and that is a verdict.
    """
    marks = [mark for start, end in reply_spans(text) for mark in _VERDICT.finditer(text, start, end)]
    if len(marks) != 1 or marks[0]["end"] is None:
        return None
    for choices in CHOICES:
        if marks[0]["word"] in choices:
            return marks[0].start("word"), choices
    return None
