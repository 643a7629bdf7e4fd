"""Labels on the steps of a rollout, and written solutions as a rollout in which common prefixes are shared steps.

rollout, paths = solution_forest([prompt], [[["a", "b"], ["a", "c"]]])
rollout.texts, paths     # ["a", "b", "c"], [[[0, 1], [0, 2]]]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmrl.rollout import Actions, Prompt, Rollout
from mmrl.tree import INTERNAL, UNFINISHED, StepTree

# Per prompt and solution, the steps along it.
Paths = list[list[list[int]]]


@dataclass(frozen=True)
class Labelled:
    """Labels on the steps of a forest; several solutions may label one step, each in its own way.

    rollout: N steps.
    node: (M,) int, the step that a label belongs to.
    label: (M,) float32 in [0, 1], NaN = unlabelled.
    solution: (M,) int, 0..S-1, ascending; the rows of a solution are its steps in order.
    kinds: (M,) names of the kinds of steps, by which measures are split.
    """

    rollout: Rollout
    node: Tensor
    label: Tensor
    solution: Tensor
    kinds: Sequence[str]

    @property
    def paths(self) -> list[Tensor]:
        """The rows of each solution."""
        lengths = torch.bincount(self.solution).tolist()
        return list(torch.arange(len(self.node)).split(lengths))


@runtime_checkable
class LabelledTask(Protocol):
    """A task of labelled steps, the data of the step-reward trainer."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """The labelled solutions of these prompts, prompts in this order."""


@runtime_checkable
class StepMeasurer(Protocol):
    """A task of labelled steps that adds measures to those of every step-reward model."""

    def measures(self, data: Labelled, score: Tensor) -> Mapping[str, float]:
        """Measures by name. score: (M,) float64 of the rows of `data`, NaN where a step cannot be read."""


def solution_forest(prompts: Sequence[Prompt], solutions: Sequence[Sequence[Sequence[str]]]) -> tuple[Rollout, Paths]:
    """Written solutions as a rollout without actions: steps with equal texts after equal steps are one step.

    Args:
        prompts: G prompts. solutions: per prompt, any number of solutions (at least one in all), each a list of step
            texts; a solution without steps has an empty path.
    Returns:
        The rollout, and per prompt and solution the steps along it.
    """
    parent: list[int] = []
    prompt_of: list[int] = []
    texts: list[str] = []
    # (prompt, parent, text) -> the step
    node_of: dict[tuple[int, int, str], int] = {}
    paths: Paths = []
    for prompt_index, prompt_solutions in enumerate(solutions):
        paths.append([])
        for steps in prompt_solutions:
            path: list[int] = []
            for text in steps:
                above = path[-1] if path else -1
                node = node_of.setdefault((prompt_index, above, text), len(parent))
                if node == len(parent):
                    parent.append(above)
                    prompt_of.append(prompt_index)
                    texts.append(text)
                path.append(node)
            paths[-1].append(path)
    # Groups of a tree are numbered without gaps; a prompt whose solutions are all empty has no group.
    used = sorted(set(prompt_of))
    group_of = {prompt_index: group for group, prompt_index in enumerate(used)}
    num_steps = len(parent)
    inner = torch.zeros(num_steps, dtype=torch.bool)
    inner[[above for above in parent if above >= 0]] = True
    no_actions = torch.zeros(num_steps, dtype=torch.int64)
    tree = StepTree(
        torch.tensor(parent, dtype=torch.int64),
        torch.tensor([group_of[prompt_index] for prompt_index in prompt_of], dtype=torch.int64),
        torch.where(inner, INTERNAL, UNFINISHED),
        torch.full((num_steps,), torch.nan),
        tok_start=no_actions,
        tok_end=no_actions,
    )
    actions = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    return Rollout([prompts[prompt_index] for prompt_index in used], tree, actions, texts=texts), paths
