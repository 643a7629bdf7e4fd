"""A judge's verdicts: a policy reads the solutions of a rollout and says what is wrong with their steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.capabilities import Extender, admitted, begin_iteration, build_policy, model_of, policy_section, require
from mmrl.credit.steps import VoteRule, judged_wrong
from mmrl.readings.base import ReadingContext, Values
from mmrl.reasoning.annotate.direct import LabelAsk, parse_labels
from mmrl.reasoning.annotate.judge import BEST_GRADE, judge_prompt, parse_grade, parse_severities
from mmrl.reasoning.records import plain_steps
from mmrl.registry import of_kind, register
from mmrl.rollout import Prompt, Rollout, State, reference_solution
from mmrl.seeding import named_generator

# Of the steps of one solution, None = no opinion.
Verdicts = Sequence[float | None]


@register(
    "readings",
    "judge",
    reads=("texts",),
    writes=lambda options: (f"tags.{options['ask']}",),
    may_write=("tags.wrong", "tags.severity", "tags.aspect"),
    source="CAPO, TP-GRPO, MQM severities, ALaRM",
    policy=lambda options: Extender if options["policy"] is None else None,
    costs=("judge_readings", "judge_unread"),
)
class JudgeReading:
    """Verdicts of a judge on every solution, the path of steps to a leaf; a shared step gets those on each of them.

    ask wrong: tags.wrong, 1 where the votes call the step wrong by `rule`, else 0. severity: tags.severity, the median
    of the classes they give it (0 none, 1 minor, 2 major, 3 critical; of two in the middle the lower). aspect:
    tags.aspect of leaves, the mean grade from 0 to 10, less 5. NaN: nobody has an opinion.

    A reply that cannot be read is no opinion and counted (`judge_unread` beside `judge_readings` among the costs).

    Args:
        policy: a section like the recipe's `policy`; by default the policy in training judges itself.
        votes: readings of each solution. rule: for `wrong`. form: for `wrong`, an analysis of every step, the index
            of the first error, which says nothing of what follows it, or a comparison with the reference solution.
        aspect: what is graded, in words, for `ask: aspect`.
    """

    def __init__(
        self,
        ask: Literal["wrong", "severity", "aspect"] = "wrong",
        policy: Annotated[Mapping[str, Any], of_kind("policies"), policy_section(Extender)] | None = None,
        votes: Annotated[int, Field(ge=1)] = 1,
        rule: VoteRule = "majority",
        form: LabelAsk = "critique",
        aspect: str = "",
    ) -> None:
        if (ask == "aspect") != bool(aspect):
            raise ValueError(f"ask={ask!r} with aspect={aspect!r}: name the aspect with ask: aspect, and only there")
        self.ask, self.votes, self.rule, self.form, self.aspect = ask, votes, rule, form, aspect
        self._judge = None if policy is None else build_policy("policy", policy, Extender)

    @property
    def model(self) -> nn.Module | None:
        """The judge's own, None when the policy in training judges."""
        return model_of(self._judge)

    def begin_iteration(self) -> None:
        """The judge's own; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self._judge)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """The tag that `ask` names."""
        judge: Extender = require("reading 'judge'", Extender, self._judge or context.policy, "policies")
        paths = _written_paths(rollout)
        questions: dict[int, Prompt] = {}  # by leaf
        for leaf, path in paths.items():
            question = self._question(rollout, leaf, path)
            if question is not None:
                questions[leaf] = question
        admitted_ids = {prompt.id for prompt in admitted(judge, list(questions.values()))}
        leaves = [leaf for leaf, prompt in questions.items() if prompt.id in admitted_ids]
        seed = named_generator("judge", context.seed, context.iteration).initial_seed()
        states = [State(questions[leaf]) for leaf in leaves]
        replies = judge.extend(states, self.votes, seed=seed) if leaves else []
        step_verdicts: list[list[float]] = [[] for _ in rollout.texts]
        # A solution that the judge cannot be asked about counts as if none of its replies could be read.
        num_unread = self.votes * (len(paths) - len(leaves))
        for leaf, leaf_replies in zip(leaves, replies, strict=True):
            for reply in leaf_replies:
                verdicts = self._read("".join(reply.steps), leaf, paths[leaf], rollout.texts)
                num_unread += not verdicts
                for step, verdict in verdicts.items():
                    step_verdicts[step].append(verdict)
        context.cost["judge_readings"] += self.votes * len(paths)
        context.cost["judge_unread"] += num_unread
        return {f"tags.{self.ask}": self._summary(step_verdicts)}

    def _question(self, rollout: Rollout, leaf: int, path: Sequence[int]) -> Prompt | None:
        """The prompt to the judge about the solution that ends at a leaf; None when it cannot be asked about it."""
        prompt = rollout.prompts[int(rollout.tree.group[leaf])]
        texts = [rollout.texts[step].strip() for step in path]
        ask = self.form if self.ask == "wrong" else self.ask
        try:
            reference = reference_solution(prompt) or ""
            text = judge_prompt(str(prompt.inputs.get("question", "")), texts, ask, reference, self.aspect)
        except ValueError:
            # Nothing was written, or a step holds the judge's own tags.
            return None
        # Counted within the prompt, so that the judge's sample does not depend on the other prompts of the rollout.
        place = int((rollout.tree.group[:leaf] == rollout.tree.group[leaf]).sum())
        return Prompt(f"{prompt.id}/judge/{place}", {**prompt.inputs, "question": text})

    def _read(self, reply: str, leaf: int, path: Sequence[int], texts: Sequence[str]) -> dict[int, float]:
        """Step -> verdict of one reply; empty when it cannot be read."""
        if self.ask == "aspect":
            grade = parse_grade(reply)
            return {} if grade is None else {leaf: grade - BEST_GRADE / 2}
        verdicts: Verdicts | None
        if self.ask == "severity":
            verdicts = parse_severities(reply, len(path))
        else:
            # Labels are 1 for right steps, this tag is 1 for wrong ones.
            labels = parse_labels(reply, plain_steps([texts[step] for step in path]), self.form)
            verdicts = None if labels is None else [None if label is None else 1.0 - label for label in labels]
        if not verdicts:
            return {}
        return {step: float(verdict) for step, verdict in zip(path, verdicts, strict=True) if verdict is not None}

    def _summary(self, step_verdicts: Sequence[Sequence[float]]) -> Tensor:
        """(N,) one number per step from all verdicts on it."""
        # (N, most verdicts on a step), NaN behind the last verdict of a step.
        most = max(1, *map(len, step_verdicts))
        votes = torch.full((len(step_verdicts), most), torch.nan, dtype=torch.float64)
        for step, verdicts in enumerate(step_verdicts):
            votes[step, : len(verdicts)] = torch.tensor(verdicts, dtype=torch.float64)
        if self.ask == "severity":
            return votes.nanmedian(1).values
        if self.ask == "aspect":
            return votes.nanmean(1)
        return torch.where(votes.isnan().all(1), math.nan, judged_wrong(votes, self.rule).double())


def _written_paths(rollout: Rollout) -> dict[int, list[int]]:
    """Leaf -> the steps to it that say something, first steps first."""
    tree = rollout.tree
    parent = tree.parent.tolist()
    paths: dict[int, list[int]] = {}
    for leaf in tree.is_leaf.nonzero().flatten().tolist():
        path, step = [], leaf
        while step >= 0:
            if rollout.texts[step].strip():
                path.append(step)
            step = parent[step]
        paths[leaf] = path[::-1]
    return paths
