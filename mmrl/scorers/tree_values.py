"""Stored rollouts as training data of a value model: each step is labelled with the value of the state after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmrl.preference.scores import step_scores
from mmrl.rollout import Prompt, Rollout
from mmrl.scorers.labelled import Labelled
from mmrl.scorers.units import contract_edges, with_pairs
from mmrl.tree_ops import path_pairs


class TreeValues:
    """Task `tree_values`: the steps of rollouts on disk (`mmrl rollouts`).

    Args:
        train, eval: folders of rollouts.
        by: the value of a step: `outcome` (mean outcome of the leaves below it), `best`, `value`, `step_reward`, or
            `tags.<name>`, as in `pairs.by`; in [0, 1].
        margin: siblings whose values differ by at least this much count in the measure `pair_acc`.
        units: of the training trees: `steps`; `pairs`, which adds every two neighbouring steps as one (HRM); or
            `contracted`, trees in which some pairs stand for their steps (HNC).
        seed: of the contraction.
        paths: the steps that losses on pairs compare: the children of one state (`siblings`), or the steps to one
            finished leaf, each labelled with that leaf's outcome (`solutions`, for return_decomposition).

    Raises:
        ValueError: no rollout there, no value, or a value outside [0, 1]; or solutions by something else than outcome.
    """

    def __init__(
        self,
        train: str,
        eval: str,
        by: str = "outcome",
        margin: float = 0.1,
        units: Literal["steps", "pairs", "contracted"] = "steps",
        seed: int = 0,
        paths: Literal["siblings", "solutions"] = "siblings",
    ) -> None:
        if paths == "solutions" and by != "outcome":
            raise ValueError(f"task.by={by!r}: the steps of a solution are labelled with its outcome; leave by out")
        self.by, self.margin, self.seed, self.paths = by, margin, seed, paths
        self._rollouts: dict[str, Rollout] = {}
        self.prompts, self.eval_prompts = self._read(Path(train), units), self._read(Path(eval), "steps")

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """The states of these trees, siblings (or the steps of a solution) together; unlabelled without a value."""
        rollout = Rollout.concatenate([self._rollouts[prompt.id] for prompt in prompts])
        if self.paths == "solutions":
            return _solutions(rollout)
        tree, state = rollout.tree, states(rollout)
        # (N,) mean value of the steps that lead to one state, kept at the state's first step; NaN without any.
        zero = torch.zeros(len(tree), dtype=torch.float64)
        total = zero.index_add(0, state, tree.value.nan_to_num())
        count = zero.index_add(0, state, (~tree.value.isnan()).double())
        value = total / count
        # States after the same state, or the same prompt, form one fork; rows are sorted fork by fork.
        node = state.unique()
        above = torch.where(tree.parent >= 0, state[tree.parent], -1 - tree.group)
        fork, order = torch.sort(torch.unique(above[node], return_inverse=True)[1], stable=True)
        node = node[order]
        return Labelled(rollout, node, value[node].float(), fork, ["unknown"] * len(node))

    def measures(self, data: Labelled, score: Tensor) -> dict[str, float]:
        """`pair_acc`: share of sibling pairs in the order of their values, equal scores counting half; `value_mse`."""
        value = data.label.double()
        has_both = ~(value.isnan() | score.isnan())
        measures: dict[str, float] = {}
        if bool(has_both.any()):
            measures["value_mse"] = float(((score - value)[has_both] ** 2).mean())
        # (M, M) entry [i, j]: i is the better one of a pair of siblings; labels are float32, hence the tolerance.
        same = data.solution[:, None] == data.solution[None, :]
        far = value[:, None] - value[None, :] >= self.margin - 1e-6
        better, worse = (same & far & has_both[:, None] & has_both[None, :]).nonzero().unbind(1)
        if len(better):
            right = torch.where(score[better] == score[worse], 0.5, (score[better] > score[worse]).double())
            measures |= {"pair_acc": float(right.mean()), "pairs": float(len(right))}
        return measures

    def _read(self, folder: Path, units: str) -> list[Prompt]:
        """The prompts of all rollouts below `folder`, each named after its folder, its tree kept with its values."""
        files = sorted(folder.rglob("rollout.json"))
        if not files:
            raise ValueError(f"no rollout in {folder}; write some: mmrl rollouts RECIPE --out {folder}")
        all_prompts = []
        for file in files:
            rollout = Rollout.load(file.parent)
            if units == "contracted":
                rollout = contract_edges(rollout, self.seed)
            value = step_scores(rollout.tree, self.by)
            if bool(((value < 0) | (value > 1)).any()):
                low, high = float(value[~value.isnan()].min()), float(value[~value.isnan()].max())
                raise ValueError(
                    f"{file.parent}: values by {self.by} go from {low:g} to {high:g}; a value model learns values in "
                    "[0, 1]: store rollouts with a reward in that range"
                )
            rollout = rollout.with_tree(rollout.tree.replace(value=value))
            if units == "pairs":
                rollout = with_pairs(rollout)
            prompts = [replace(prompt, id=f"{file.parent}/{prompt.id}") for prompt in rollout.prompts]
            named = replace(rollout, prompts=prompts, counts={})
            for group, prompt in enumerate(prompts):
                self._rollouts[prompt.id] = named.select([group])
            all_prompts += prompts
        return all_prompts


def _solutions(rollout: Rollout) -> Labelled:
    """The path to every finished leaf, each of its steps labelled with the outcome."""
    tree = rollout.tree
    leaf, node = path_pairs(tree)
    # Leaf by leaf, first steps first.
    order = torch.argsort(leaf * len(tree) + tree.depth[node])
    leaf, node = leaf[order], node[order]
    solution = torch.unique(leaf, return_inverse=True)[1]
    return Labelled(rollout, node, tree.outcome[leaf].float(), solution, ["unknown"] * len(node))


def states(rollout: Rollout) -> Tensor:
    """(N,) int, the state that each step leads to, named by the first step that leads to it.

    Steps with equal texts after one state lead to one state. Without texts every step leads to another one.
    """
    tree = rollout.tree
    if not rollout.texts:
        return torch.arange(len(tree))
    # (prompt, state before, text) -> the first such step
    first_step: dict[tuple[int, int, str], int] = {}
    state_of: list[int] = []
    for step, (parent, group) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
        state_before = state_of[parent] if parent >= 0 else -1
        state_of.append(first_step.setdefault((group, state_before, rollout.texts[step].strip()), step))
    return torch.tensor(state_of, dtype=torch.int64)
