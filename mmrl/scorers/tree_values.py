"""Stored rollouts as data of a value model: every step with the value of the state it leads to, sibling by sibling."""

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
        paths: what stands together for losses that compare steps: the children of one state (`siblings`), or the
            steps to one finished leaf, each labelled with that leaf's outcome (`solutions`, for return_decomposition).
        train, eval: folders of rollouts. by: the value of a step: `outcome` (mean outcome of the leaves below it),
            `best`, `value`, `step_reward`, or `tags.<name>`, as in `pairs.by`; in [0, 1].
        margin: siblings whose values differ by at least so much count in the measure `pair_acc`.
        units: of the training trees: `steps`; `pairs`, which adds every two neighbouring steps as one (HRM); or
            `contracted`, trees in which some pairs stand for their steps (HNC). seed: of the contraction.

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
        """The states of these trees, siblings or the steps of a solution together; those without value are
        unlabelled."""
        rollout = Rollout.concatenate([self._rollouts[p.id] for p in prompts])
        if self.paths == "solutions":
            return _solutions(rollout)
        tree, state = rollout.tree, states(rollout)
        value = tree.value
        known = (~value.isnan()).double()
        total, count = (torch.zeros(len(tree)).double().index_add(0, state, x) for x in (value.nan_to_num(), known))
        node = state.unique()
        above = torch.where(tree.parent >= 0, state[tree.parent], -1 - tree.group)
        fork, order = torch.sort(torch.unique(above[node], return_inverse=True)[1], stable=True)
        node = node[order]
        return Labelled(rollout, node, (total / count)[node].float(), fork, ["unknown"] * len(node))

    def measures(self, data: Labelled, score: Tensor) -> dict[str, float]:
        """`pair_acc`: share of sibling pairs in the order of their values, equal scores counting half; `value_mse`."""
        y, known = data.label.double(), ~(data.label.isnan() | score.isnan())
        same = data.solution[:, None] == data.solution[None, :]
        w, l = (same & (y[:, None] - y[None, :] >= self.margin - 1e-6) & known).nonzero().unbind(1)  # noqa: E741
        w, l = w[known[w]], l[known[w]]  # noqa: E741
        right = torch.where(score[w] == score[l], 0.5, (score[w] > score[l]).double())
        out = {"value_mse": float(((score - y)[known] ** 2).mean())} if bool(known.any()) else {}
        return out | ({"pair_acc": float(right.mean()), "pairs": float(len(right))} if len(right) else {})

    def _read(self, folder: Path, units: str) -> list[Prompt]:
        """Every prompt of every rollout is a tree of its own, named after its folder; its values as `tree.value`."""
        files = sorted(folder.rglob("rollout.json"))
        if not files:
            raise ValueError(f"no rollout in {folder}; write some: mmrl rollouts RECIPE --out {folder}")
        out = []
        for file in files:
            whole = Rollout.load(file.parent)
            if units == "contracted":
                whole = contract_edges(whole, self.seed)
            value = step_scores(whole.tree, self.by)
            if bool(((value < 0) | (value > 1)).any()):
                low, high = float(value[~value.isnan()].min()), float(value[~value.isnan()].max())
                raise ValueError(
                    f"{file.parent}: values by {self.by} go from {low:g} to {high:g}; a value model learns values in "
                    "[0, 1]: store rollouts with a reward in that range"
                )
            whole = whole.with_tree(whole.tree.replace(value=value))
            if units == "pairs":
                whole = with_pairs(whole)
            prompts = [replace(p, id=f"{file.parent}/{p.id}") for p in whole.prompts]
            named = replace(whole, prompts=prompts, counts={})
            self._rollouts |= {p.id: named.select([g]) for g, p in enumerate(prompts)}
            out += prompts
        return out


def _solutions(rollout: Rollout) -> Labelled:
    """The path to every finished leaf, each of its steps labelled with the outcome."""
    tree = rollout.tree
    leaf, node = path_pairs(tree)
    order = torch.argsort(leaf * len(tree) + tree.depth[node])  # leaf by leaf, first steps first
    leaf, node = leaf[order], node[order]
    solution = torch.unique(leaf, return_inverse=True)[1]
    return Labelled(rollout, node, tree.outcome[leaf].float(), solution, ["unknown"] * len(node))


def states(rollout: Rollout) -> Tensor:
    """(N,) int, the state each step leads to, named by its first step: steps with equal texts after one state lead to
    one state, whose value is the mean of theirs. Without texts every step has a state of its own."""
    tree = rollout.tree
    if not rollout.texts:
        return torch.arange(len(tree))
    known: dict[tuple[int, int, str], int] = {}
    out: list[int] = []
    for v, (p, g) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
        out.append(known.setdefault((g, out[p] if p >= 0 else -1, rollout.texts[v].strip()), v))
    return torch.tensor(out, dtype=torch.int64)
