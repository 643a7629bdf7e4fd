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

Verdicts = Sequence[float | None]  # of the steps of one solution, None = no opinion


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
    """What a judge says of every solution, the path of steps to a leaf; a shared step hears what is said of each.

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
        asked = {leaf: p for leaf, path in paths.items() if (p := self._question(rollout, leaf, path)) is not None}
        taken = {p.id for p in admitted(judge, list(asked.values()))}
        leaves = [leaf for leaf, p in asked.items() if p.id in taken]
        seed = named_generator("judge", context.seed, context.iteration).initial_seed()
        replies = judge.extend([State(asked[v]) for v in leaves], self.votes, seed=seed) if leaves else []
        said: list[list[float]] = [[] for _ in rollout.texts]  # of every step
        unread = self.votes * (len(paths) - len(leaves))
        for leaf, own in zip(leaves, replies, strict=True):
            for reply in own:
                verdicts = self._read("".join(reply.steps), leaf, paths[leaf], rollout.texts)
                unread += not verdicts
                for step, verdict in verdicts.items():
                    said[step].append(verdict)
        context.cost["judge_readings"] += self.votes * len(paths)
        context.cost["judge_unread"] += unread
        return {f"tags.{self.ask}": self._summary(said)}

    def _question(self, rollout: Rollout, leaf: int, path: Sequence[int]) -> Prompt | None:
        """What the judge is asked about the solution that ends at a leaf; None when it cannot be put to a judge."""
        prompt = rollout.prompts[int(rollout.tree.group[leaf])]
        texts = [rollout.texts[v].strip() for v in path]
        ask = self.form if self.ask == "wrong" else self.ask
        try:
            reference = reference_solution(prompt) or ""
            text = judge_prompt(str(prompt.inputs.get("question", "")), texts, ask, reference, self.aspect)
        except ValueError:  # nothing written, or a step with the judge's own tags in it
            return None
        place = int(
            (rollout.tree.group[:leaf] == rollout.tree.group[leaf]).sum()
        )  # within its prompt, whoever is near
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
            labels = parse_labels(reply, plain_steps([texts[v] for v in path]), self.form)
            verdicts = None if labels is None else [None if y is None else 1.0 - y for y in labels]
        return {v: float(y) for v, y in zip(path, verdicts or [None] * len(path), strict=True) if y is not None}

    def _summary(self, said: Sequence[Sequence[float]]) -> Tensor:
        """(N,) one number per step of what was said of it."""
        votes = torch.full((len(said), max(1, *map(len, said))), torch.nan, dtype=torch.float64)
        for step, own in enumerate(said):
            votes[step, : len(own)] = torch.tensor(own, dtype=torch.float64)
        if self.ask == "severity":
            return votes.nanmedian(1).values
        if self.ask == "aspect":
            return votes.nanmean(1)
        return torch.where(votes.isnan().all(1), math.nan, judged_wrong(votes, self.rule).double())


def _written_paths(rollout: Rollout) -> dict[int, list[int]]:
    """Leaf -> the steps to it that say something, first steps first."""
    tree = rollout.tree
    parent = tree.parent.tolist()
    out: dict[int, list[int]] = {}
    for leaf in tree.is_leaf.nonzero().flatten().tolist():
        path, step = [], leaf
        while step >= 0:
            if rollout.texts[step].strip():
                path.append(step)
            step = parent[step]
        out[leaf] = path[::-1]
    return out
