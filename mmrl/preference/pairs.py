"""`Pairs`: preferences between two segments of a tree that begin after the same state.

A segment is a step alone, or a step with the steps that follow it down to an end:

    state -- chosen   -- ... -- chosen_end
         \\- rejected -- ... -- rejected_end
"""

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
    counts: numbers of what a builder considered and left out, by name; see `left_out`.
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
        """The same pairs, chosen and rejected exchanged."""
        return Pairs(
            self.rejected,
            self.chosen,
            self.rejected_end,
            self.chosen_end,
            self.gap,
            self.weight,
            self.counts,
        )

    def steps(self, tree: StepTree) -> Tensor:
        """(S,) int ascending, every step of every segment once."""
        chosen_steps, _ = self.segments(tree, "chosen")
        rejected_steps, _ = self.segments(tree, "rejected")
        return torch.unique(torch.cat([chosen_steps, rejected_steps]))

    def segments(self, tree: StepTree, side: str) -> tuple[Tensor, Tensor]:
        """(step, pair), each (M,) int: the steps of the `chosen` or the `rejected` segments, pair after pair."""
        if side == "chosen":
            return segment_steps(tree, self.chosen, self.chosen_end)
        return segment_steps(tree, self.rejected, self.rejected_end)

    def check(self, tree: StepTree) -> Pairs:
        """These pairs, checked to be pairs of `tree`.

        Raises:
            ValueError: two steps that share no parent or are one step, an end that is not below its step, equal
                scores, a weight that is not above 0. The message names the pair and its steps.
        """
        _refuse(self.chosen == self.rejected, self, "compare a step with itself")
        unrelated = tree.sibling_set[self.chosen] != tree.sibling_set[self.rejected]
        _refuse(unrelated, self, "share no parent; only continuations of one state can be compared step by step")
        _refuse(~(self.gap > 0), self, "have equal scores (gap 0): they say nothing, leave ties out")
        _refuse(~(self.weight > 0), self, "have a weight that is not above 0; leave such pairs out")
        # Walking the segments raises when an end does not lie below its step.
        for side in ("chosen", "rejected"):
            self.segments(tree, side)
        return self

    def left_out(self) -> str:
        """The builder's counts in words, for an error or a log: "3 pairs (5 forks, 2 equal)"."""
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in self.counts.items())
        return f"{len(self)} pairs" + (f" ({counts})" if counts else "")


def _refuse(bad: Tensor, pairs: Pairs, why: str) -> None:
    """Raises ValueError naming the first pair where `bad` (P,) is True."""
    if bool(bad.any()):
        i, others = int(bad.nonzero()[0]), int(bad.sum()) - 1
        steps = f"steps {int(pairs.chosen[i])} and {int(pairs.rejected[i])}"
        raise ValueError(f"pair {i}: {steps} {why}" + (f" ({others} more)" if others else ""))


def segment_steps(tree: StepTree, head: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """(step, segment), each (M,) int: the steps from `head` (P,) down to `end` (P,), segment after segment, in order.

    Raises:
        ValueError: an end that is neither its head nor below it.
    """
    current, row = end, torch.arange(len(end))
    steps, rows = [current], [row]
    # All segments climb together from their ends, one step per pass; those that arrive at their head drop out.
    while len(current):
        below_head = current != head[row]
        current, row = tree.parent[current[below_head]], row[below_head]
        if bool((current < 0).any()):
            i = int(row[current < 0][0])
            raise ValueError(f"segment {i}: step {int(end[i])} does not lie below step {int(head[i])}")
        steps.append(current)
        rows.append(row)
    step, segment = torch.cat(steps), torch.cat(rows)
    num_levels = int(tree.depth.max()) + 1 if len(tree) else 1
    order = torch.argsort(segment * num_levels + tree.depth[step])
    return step[order], segment[order]


def fork_of(tree: StepTree, a: int, b: int) -> tuple[int, int]:
    """The two siblings at which the paths to steps a and b part: ancestors of a and of b, or these steps themselves.

    Raises:
        ValueError: steps of two prompts, or one that lies above the other.
    """
    if int(tree.group[a]) != int(tree.group[b]):
        raise ValueError(f"steps {a} and {b} belong to two prompts: they share no parent")
    above_a, above_b = a, b
    # First climb to equal depths, then together until the parents are the same.
    while int(tree.depth[above_a]) > int(tree.depth[above_b]):
        above_a = int(tree.parent[above_a])
    while int(tree.depth[above_b]) > int(tree.depth[above_a]):
        above_b = int(tree.parent[above_b])
    if above_a == above_b:
        raise ValueError(f"of steps {a} and {b} one lies above the other: they are no alternatives")
    while int(tree.parent[above_a]) != int(tree.parent[above_b]):
        above_a, above_b = int(tree.parent[above_a]), int(tree.parent[above_b])
    return above_a, above_b
