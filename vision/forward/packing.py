"""Tree packing: every unique token of a prompt's tree once in one row (arrays, masks, costs; no network here).

Nodes lie in depth-first pre-order, so every subtree is one interval and the tree mask is two comparisons. A prompt of
two tokens (node 0) with the steps 1 and 2 below it and step 3 below 1, a token each:

    packed index   0  1  2  3  4
    node           0  0  1  3  2
    path           0  1  2  3  2     place in the row of its leaf, and so the rotary position of a text
    end            5  5  4  4  5     token i sees token j where j <= i < end[j]
    pred          -1  0  1  2  1     the output that predicts the token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["rows", "rows_shared_image", "packed", "prefix_packed"]


@dataclass(frozen=True)
class Packed:
    """T unique tokens of one tree; all arrays int64 (T,) unless said otherwise.

    ids: tokens. node: the node that a token belongs to. path: index of the token in its leaf row.
    end: exclusive packed end of that node's subtree. pred: packed index whose output predicts the token, -1 for the
        first. types: 1 at image placeholders. start, last: (N,) per node, first index and index of the last token on
        the path that ends with it (its parent's for an empty node). prompt: tokens of node 0.
    """

    ids: Tensor
    node: Tensor
    path: Tensor
    end: Tensor
    pred: Tensor
    types: Tensor
    start: Tensor
    last: Tensor
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)


def pack(parent: Sequence[int], ids: Sequence[Tensor], types: Sequence[Tensor] | None = None) -> Packed:
    """Lay a tree out. Empty nodes take no place; their children continue the nearest ancestor that has tokens.

    Args:
        parent: (N,) parent of each node, -1 for node 0, the prompt; parents come before children.
        ids: N token lists, int64; the prompt's must not be empty.
        types: N lists like `ids`, 1 at image placeholders; default all text.
    Raises:
        ValueError: node 0 is no root or empty, or a parent does not come before its child.
    """
    if parent[0] != -1 or len(ids[0]) == 0:
        raise ValueError("node 0 must be the prompt: parent -1 and at least one token")
    for child, above in enumerate(parent[1:], 1):
        if not 0 <= above < child:
            raise ValueError(f"node {child} has parent {above}; parents come before children and all hang from node 0")
    num_nodes = len(parent)
    order = _depth_first(parent)

    # Per node: its tokens, those of its subtree, its first packed index, the tokens above it on its path, and the
    # packed index of the last token on the path that ends with it.
    size = [len(own) for own in ids]
    subtree = list(size)
    for child in range(num_nodes - 1, 0, -1):
        subtree[parent[child]] += subtree[child]
    start, depth, last = [0] * num_nodes, [0] * num_nodes, [0] * num_nodes
    length = 0
    for node in order:
        start[node] = length
        length += size[node]
        if node != 0:
            depth[node] = depth[parent[node]] + size[parent[node]]
        last[node] = length - 1 if size[node] else last[parent[node]]

    # (T,) per token, from its node
    node_of = torch.repeat_interleave(torch.tensor(order), torch.tensor([size[node] for node in order]))
    here = torch.arange(length)
    first = torch.tensor(start)[node_of]
    # A node's first token is predicted by the last one before the node, every other one by its left neighbour.
    before_node = torch.tensor([-1, *(last[above] for above in parent[1:])])[node_of]
    if types is None:
        packed_types = torch.zeros(length, dtype=torch.int64)
    else:
        packed_types = torch.cat([types[node] for node in order])
    return Packed(
        ids=torch.cat([ids[node] for node in order]),
        node=node_of,
        path=torch.tensor(depth)[node_of] + here - first,
        end=first + torch.tensor(subtree)[node_of],
        pred=torch.where(here == first, before_node, here - 1),
        types=packed_types,
        start=torch.tensor(start),
        last=torch.tensor(last),
        prompt=size[0],
    )


def tree_mask(packed: Packed, take: Tensor | None = None) -> Tensor:
    """(n, n) bool over the packed indices `take` (default all T), True where query i may see key j: j <= i < end[j].

    Over all tokens its row sums are path + 1.
    """
    i = torch.arange(len(packed)) if take is None else take
    return (i[None] <= i[:, None]) & (i[:, None] < packed.end[i][None])


def leaf_rows(packed: Packed, leaves: Sequence[int]) -> list[Tensor]:
    """The packed indices along the path of each leaf (prompt included), ascending: what a row-wise trainer runs."""
    here = torch.arange(len(packed))
    rows = []
    for leaf in leaves:
        last = int(packed.last[leaf])
        on_path = (here <= last) & (last < packed.end)
        rows.append(on_path.nonzero().flatten())
    return rows


def rows_of(packed: Packed, parent: Sequence[int], mode: Mode) -> list[Tensor]:
    """The packed indices of each network row of `mode`. For prefix_packed the prompt is a pass of its own.

    rows: a path per leaf. packed: everything. prefix_packed: each subtree that hangs from the prompt.
    """
    if mode == "packed":
        return [torch.arange(len(packed))]
    if mode == "prefix_packed":
        return [torch.arange(a, b) for a, b in _top_level(packed, parent)]
    inner = set(parent)
    leaves = [node for node in range(len(parent)) if node not in inner] or [0]
    return leaf_rows(packed, leaves)


def _top_level(packed: Packed, parent: Sequence[int]) -> list[tuple[int, int]]:
    """Intervals of the subtrees below the prompt; empty nodes hand their children up, so starts decide, not nodes."""
    intervals = []
    start = packed.prompt
    while start < len(packed):
        end = int(packed.end[start])
        intervals.append((start, end))
        start = end
    return intervals


def cost(packed: Packed, parent: Sequence[int], mode: Mode, hidden: int) -> float:
    """Arbitrary units per layer: 12 h^2 per token and 2 h per visible pair (dense masks pay for every pair)."""
    sizes = [len(row) for row in rows_of(packed, parent, mode)]
    if mode == "prefix_packed":
        # Rows are padded to the longest, and every one of their tokens sees the prompt's cache as well.
        prompt, widest = packed.prompt, max(sizes, default=0)
        tokens = float(prompt + widest * len(sizes))
        pairs = float(prompt * prompt + len(sizes) * widest * (prompt + widest))
    else:
        tokens = float(sum(sizes))
        pairs = float(sum(n * n for n in sizes))
    return 12 * hidden**2 * tokens + 2 * hidden * pairs


def choose_mode(trees: Sequence[tuple[Packed, Sequence[int]]], allowed: Sequence[Mode], hidden: int) -> Mode:
    """The cheapest allowed mode for these trees by the cost model; the earlier one wins a tie."""
    costs = {mode: sum(cost(packed, parent, mode, hidden) for packed, parent in trees) for mode in allowed}
    return min(allowed, key=costs.__getitem__)


def split(parent: Sequence[int], sizes: Sequence[int], wanted: Sequence[int], budget: int) -> list[list[int]]:
    """Cut `wanted` nodes of one tree into parts whose closure under ancestors has at most `budget` tokens.

    Exact: a node's log-probs depend on its ancestors alone, which every part repeats. Depth-first, so that a part
    shares as much as it can. A single path longer than the budget is a part of its own.
    """
    to_place = set(wanted)
    parts: list[list[int]] = []
    closure: set[int] = set()  # nodes of the last part, ancestors included
    total = 0  # its tokens
    for node in _depth_first(parent):
        if node not in to_place:
            continue
        path = ancestors(parent, node)
        added = [above for above in path if above not in closure]
        added_tokens = sum(sizes[above] for above in added)
        if not parts or total + added_tokens > budget:
            parts.append([])
            closure, total = set(path), sum(sizes[above] for above in path)
        else:
            closure.update(added)
            total += added_tokens
        parts[-1].append(node)
    return parts


def _depth_first(parent: Sequence[int]) -> list[int]:
    """Nodes in pre-order, siblings as they come."""
    children: list[list[int]] = [[] for _ in parent]
    for child, above in enumerate(parent[1:], 1):
        children[above].append(child)
    order, stack = [], [0]
    while stack:
        node = stack.pop()
        order.append(node)
        stack.extend(reversed(children[node]))
    return order


def ancestors(parent: Sequence[int], node: int) -> list[int]:
    """The node and everything above it, up to the root."""
    path = [node]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path
