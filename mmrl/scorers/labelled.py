"""Labels on the steps of a forest, and written solutions as a forest: common prefixes become shared steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmrl.rollout import Actions, Prompt, Rollout
from mmrl.tree import INTERNAL, UNFINISHED, StepTree


@dataclass(frozen=True)
class Labelled:
    """Labels on the steps of a forest; several solutions may label one step, each in its own way.

    rollout: N steps. node (M,) int: the step a label belongs to. label (M,) float32 in [0, 1], NaN = unlabelled.
    solution (M,) int: 0..S-1, ascending; the rows of a solution are its steps in order. kinds: (M,) what they are.
    """

    rollout: Rollout
    node: Tensor
    label: Tensor
    solution: Tensor
    kinds: Sequence[str]

    @property
    def paths(self) -> list[Tensor]:
        """The rows of each solution."""
        return list(torch.arange(len(self.node)).split(torch.bincount(self.solution).tolist()))


@runtime_checkable
class LabelledTask(Protocol):
    """A task of labelled steps: what the step-reward trainer needs to know of its data."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """Everything known about the solutions of these prompts, prompts in this order."""


@runtime_checkable
class StepMeasurer(Protocol):
    """A task of labelled steps with measures of its own, beside those of every step-reward model."""

    def measures(self, data: Labelled, score: Tensor) -> Mapping[str, float]:
        """Numbers by name. score: (M,) float64 of the rows of `data`, NaN where a step cannot be read."""


def solution_forest(prompts: Sequence[Prompt], solutions: Sequence[Sequence[Sequence[str]]]) -> tuple[Rollout, Paths]:
    """Written solutions as a rollout without actions: steps with equal texts after equal steps are one step.

    Args:
        prompts: G prompts. solutions: per prompt, any number of solutions (at least one in all), each a list of step
            texts; a solution without steps has an empty path.
    Returns:
        The rollout, and per prompt and solution the steps along it.
    """
    parent: list[int] = []
    group: list[int] = []
    texts: list[str] = []
    known: dict[tuple[int, int, str], int] = {}
    paths: Paths = []
    for g, own in enumerate(solutions):
        paths.append([])
        for steps in own:
            path: list[int] = []
            for text in steps:
                above = path[-1] if path else -1
                node = known.setdefault((g, above, text), len(parent))
                if node == len(parent):
                    parent.append(above)
                    group.append(g)
                    texts.append(text)
                path.append(node)
            paths[-1].append(path)
    used = sorted(set(group))  # a prompt whose solutions are all empty has no place in the forest
    place = {g: i for i, g in enumerate(used)}
    n = len(parent)
    inner = torch.zeros(n, dtype=torch.bool)
    inner[[p for p in parent if p >= 0]] = True
    none = torch.zeros(n, dtype=torch.int64)
    ints = partial(torch.tensor, dtype=torch.int64)  # of an empty list as well
    tree = StepTree(
        ints(parent), ints([place[g] for g in group]), torch.where(inner, INTERNAL, UNFINISHED),
        torch.full((n,), torch.nan), tok_start=none, tok_end=none,
    )  # fmt: skip
    actions = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    return Rollout([prompts[g] for g in used], tree, actions, texts=texts), paths


Paths = list[list[list[int]]]
