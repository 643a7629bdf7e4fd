"""Preference data of latent rewards: samples noised alike, and states of saved trees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.adapters.base import Cond, Level
from diffusion.latent.reward import levels_of
from mmrl.preference.scores import step_scores
from mmrl.rollout import Actions, Prompt, Rollout
from mmrl.scorers.labelled import Labelled
from mmrl.tree import UNFINISHED, StepTree
from mmrl.tree_ops import backup


def ranked_pairs(value: Tensor, group: Tensor, *, margin: float = 0.0) -> Tensor:
    """(P, 2) int, all pairs inside a group whose values differ by more than `margin`, the better one first.

    value: (N,), NaN takes part in no pair. group: (N,) int.
    """
    gap = value[:, None] - value[None, :]
    return ((gap > margin) & (group[:, None] == group[None, :])).nonzero()


def labelled_pairs(rollout: Rollout, pairs: Tensor, tie: Tensor | None = None) -> Labelled:
    """Pairs (P, 2) of steps, the better one first, as what `loss: {name: preference}` reads: labels 1 and 0.

    tie: (P,) bool, pairs labelled 1/2 and 1/2.
    """
    label = torch.tensor([1.0, 0.0]).repeat(len(pairs), 1)
    if tie is not None:
        label[tie] = 0.5
    rows = torch.arange(len(pairs)).repeat_interleave(2)
    return Labelled(rollout, pairs.flatten(), label.flatten(), rows, ["unknown"] * len(rows))


def noised(
    prompts: Sequence[Prompt], x0: Tensor, own: Tensor, levels: Sequence[Level], noise: Tensor, cond: Cond
) -> Rollout:
    """Clean latents with noise as a rollout of one step each: the samples of a prompt have its level.

    Args:
        x0: (N, *D). own: (N,) int, the prompt of each. levels: G. noise: (N, *D). cond: entries of G rows.
    """
    table = torch.tensor([tuple(v) for v in levels], dtype=torch.float64)
    a, s = (table[own, i].to(x0.dtype).view(-1, *[1] * (x0.ndim - 1)) for i in (0, 1))
    n = len(x0)
    empty = torch.full((n,), torch.nan)
    tree = StepTree(torch.full((n,), -1), own, torch.full((n,), UNFINISHED), empty)
    payload = {"latent": a * x0 + s * noise, "level": table[own]}
    actions = Actions(empty, torch.zeros(n, dtype=torch.bool), payload)
    return Rollout(list(prompts), tree, actions, {f"cond_{k}": v for k, v in cond.items()})


def pair_accuracy(data: Labelled, score: Tensor) -> dict[str, float]:
    """Share of pairs whose better state scores higher, equal scores counting half, ties of labels left out.

    `pair_acc` over all, `pair_acc/s0.30` at noise level s = 0.30. score: (M,), one per row of `data`.
    """
    first, second = data.label.view(-1, 2).unbind(1)
    clear = (first != second) & ~(first + second).isnan()
    gap = (score.view(-1, 2)[:, 0] - score.view(-1, 2)[:, 1]) * (first - second).sign()
    right = torch.where(gap == 0, 0.5, (gap > 0).double())[clear]
    s = levels_of(data.rollout)[data.node.view(-1, 2)[clear][:, 0], 1]
    by_level = {f"pair_acc/s{float(v):.2f}": float(right[s == v].mean()) for v in s.unique()}
    return ({"pair_acc": float(right.mean())} if len(right) else {}) | by_level


class TreePairs:
    """Task `tree_pairs`: pairs of states of one prompt and one depth from saved branch rollouts.

    A state's value is the mean reward of the leaves below it; two states of one depth have the same noise level.

    Args:
        train, eval: folders of rollouts (`Rollout.save`), or folders that hold such folders. margin: least difference
            of values. among: pairs of any states of a prompt's depth, or of siblings only.
        consistent: further scores of a step, as in `pairs.by`, that the better state must have more of: name -> least
            lead (LRM's multi-preference filter; a slightly negative one forgives a loss, theirs: -0.5 of the aesthetic
            score, 0 of CLIP and VQA). A step without such a score is in no pair.
    Raises:
        ValueError: no rollout there, leaves without reward, no pair that differs by the margin, or no such score.
    """

    def __init__(
        self,
        train: str,
        eval: str,
        margin: float = 0.0,
        among: Literal["depth", "siblings"] = "depth",
        consistent: Mapping[str, float] | None = None,
    ) -> None:
        self.margin, self.among, self.consistent = margin, among, dict(consistent or {})
        self._rollouts: dict[str, Rollout] = {}
        self.prompts, self.eval_prompts = self._read(Path(train)), self._read(Path(eval))

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """The pairs of these trees."""
        rollout = Rollout.concatenate([self._rollouts[p.id] for p in prompts])
        return labelled_pairs(rollout, self._pairs(rollout))

    def measures(self, data: Labelled, score: Tensor) -> dict[str, float]:
        """Pair accuracy, by noise level too."""
        return pair_accuracy(data, score)

    def _pairs(self, rollout: Rollout) -> Tensor:
        tree = rollout.tree
        value = backup(tree).where(tree.valid, torch.nan)
        depth = tree.group * (int(tree.depth.max()) + 1) + tree.depth
        pairs = ranked_pairs(value, tree.sibling_set if self.among == "siblings" else depth, margin=self.margin)
        for name, least in self.consistent.items():
            score = step_scores(tree, name)
            better, worse = pairs.unbind(1)
            pairs = pairs[score[better] - score[worse] > least]
        return pairs

    def _read(self, folder: Path) -> list[Prompt]:
        """Every prompt of every rollout is a tree of its own; those without a pair are left out."""
        files = sorted(folder.rglob("rollout.json"))
        if not files:
            raise ValueError(f"no rollout in {folder}; write them with rollout.save()")
        kept, leaves = [], 0
        for file in files:
            for tree in _trees(file.parent, str(file.parent)):
                leaves += int(tree.tree.is_finished.sum())
                if len(self._pairs(tree)):
                    kept.append(tree.prompts[0])
                    self._rollouts[tree.prompts[0].id] = tree
        if not leaves:
            raise ValueError(f"no leaf of the rollouts in {folder} has a reward; save them after rewarding")
        if not kept:
            raise ValueError(
                f"{folder}: no two states of one {'parent' if self.among == 'siblings' else 'depth'} differ by more "
                f"than task.margin={self.margin} and are consistent; lower it, or take rollouts whose rewards differ"
            )
        return kept


def _trees(folder: Path, name: str) -> list[Rollout]:
    """The rollout of each prompt, with a unique id and what a latent reward reads: latents, levels, conditions."""
    whole = Rollout.load(folder)
    latent = whole.actions.payload.get("latent")
    if latent is None:
        raise ValueError(f"the rollout in {folder} has no latents: it is none of a diffusion policy")
    actions = replace(whole.actions, payload={"latent": latent, "level": levels_of(whole)})
    cond = {k: v for k, v in whole.prompt_payload.items() if k.startswith("cond_")}
    prompts = [replace(p, id=f"{name}/{p.id}") for p in whole.prompts]
    light = replace(whole, prompts=prompts, actions=actions, prompt_payload=cond, counts={})
    return [light.select([g]) for g in range(len(prompts))]
