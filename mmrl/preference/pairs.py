"""Pairs: of two steps after the same state one is better, each with the continuation that it stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrl.tree import StepTree


@dataclass(frozen=True)
class Pairs:
    """P preferences between segments of one tree.

    chosen, rejected: (P,) int, the first step of each segment; the two share their parent.
    chosen_end, rejected_end: (P,) int, the last step of each segment: that step itself, or one below it.
    gap: (P,) float32 > 0, how far the scores lie apart. weight: (P,) float32 > 0, how much the pair counts.
    counts: what a builder looked at and left out, see `left_out`.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_end: Tensor
    rejected_end: Tensor
    gap: Tensor
    weight: Tensor
    counts: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def of_steps(chosen: Tensor, rejected: Tensor, gap: Tensor, counts: Mapping[str, int] | None = None) -> Pairs:
        """Pairs of single steps, each of weight 1."""
        gap = gap.float()
        return Pairs(chosen, rejected, chosen, rejected, gap, torch.ones_like(gap), counts or {})

    def __len__(self) -> int:
        return self.chosen.numel()

    def swap(self) -> Pairs:
        """The same pairs, each the other way round."""
        ends = self.rejected_end, self.chosen_end
        return Pairs(self.rejected, self.chosen, *ends, self.gap, self.weight, self.counts)

    def steps(self, tree: StepTree) -> Tensor:
        """(S,) int ascending, every step of every segment once."""
        both = [self.segments(tree, side)[0] for side in ("chosen", "rejected")]
        return torch.unique(torch.cat(both))

    def segments(self, tree: StepTree, side: str) -> tuple[Tensor, Tensor]:
        """(step, pair), each (M,) int: the steps of the `chosen` or the `rejected` segments, pair after pair."""
        head, end = (self.chosen, self.chosen_end) if side == "chosen" else (self.rejected, self.rejected_end)
        return segment_steps(tree, head, end)

    def check(self, tree: StepTree) -> Pairs:
        """These pairs, when they are pairs of `tree`.

        Raises:
            ValueError: two steps that share no parent or are one step, an end that is not below its step, equal
                scores, a weight that is not above 0. The message names the pair and its steps.
        """
        _refuse(self.chosen == self.rejected, self, "compare a step with itself")
        _refuse(
            tree.sib[self.chosen] != tree.sib[self.rejected], self,
            "share no parent; only continuations of one state can be compared step by step",
        )  # fmt: skip
        _refuse(~(self.gap > 0), self, "have equal scores (gap 0): they say nothing, leave ties out")
        _refuse(~(self.weight > 0), self, "have a weight that is not above 0; leave such pairs out")
        for side in ("chosen", "rejected"):
            self.segments(tree, side)
        return self

    def left_out(self) -> str:
        """What a builder saw, in words for an error or a log."""
        told = ", ".join(f"{v} {k.replace('_', ' ')}" for k, v in self.counts.items())
        return f"{len(self)} pairs" + (f" ({told})" if told else "")


def _refuse(bad: Tensor, pairs: Pairs, why: str) -> None:
    if bool(bad.any()):
        i, more = int(bad.nonzero()[0]), int(bad.sum()) - 1
        steps = f"steps {int(pairs.chosen[i])} and {int(pairs.rejected[i])}"
        raise ValueError(f"pair {i}: {steps} {why}" + (f" ({more} more)" if more else ""))


def segment_steps(tree: StepTree, head: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(step, segment), each (M,) int: the steps from `head` (P,) down to `end` (P,), segment after segment, in order.

    Raises:
        ValueError: an end that is neither its head nor below it.
    """
    at, row = end, torch.arange(len(end))
    steps, rows = [at], [row]
    while len(at):
        go = at != head[row]
        at, row = tree.parent[at[go]], row[go]
        if bool((at < 0).any()):
            i = int(row[at < 0][0])
            raise ValueError(f"segment {i}: step {int(end[i])} does not lie below step {int(head[i])}")
        steps.append(at)
        rows.append(row)
    step, segment = torch.cat(steps), torch.cat(rows)
    order = torch.argsort(segment * (int(tree.depth.max()) + 1 if len(tree) else 1) + tree.depth[step])
    return step[order], segment[order]


def fork_of(tree: StepTree, a: int, b: int) -> tuple[int, int]:
    """The ancestors of steps a and b (or these themselves) that are siblings: where their paths part.

    Raises:
        ValueError: steps of two prompts, or one that lies above the other.
    """
    if int(tree.group[a]) != int(tree.group[b]):
        raise ValueError(f"steps {a} and {b} belong to two prompts: they share no parent")
    x, y = a, b
    while int(tree.depth[x]) > int(tree.depth[y]):
        x = int(tree.parent[x])
    while int(tree.depth[y]) > int(tree.depth[x]):
        y = int(tree.parent[y])
    if x == y:
        raise ValueError(f"of steps {a} and {b} one lies above the other: they are no alternatives")
    while int(tree.parent[x]) != int(tree.parent[y]):
        x, y = int(tree.parent[x]), int(tree.parent[y])
    return x, y
