"""Tree packing: every unique token of a prompt's tree once in one row (arrays, masks, costs; no network here).

Nodes lie in depth-first pre-order, so every subtree is one interval and the tree mask is two comparisons.
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

    ids: tokens. node: owner (index of the caller). path: index of the token in its leaf row.
    end: exclusive packed end of the owner's subtree. pred: packed index whose output predicts the token, -1 for the
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
    for v, p in enumerate(parent[1:], 1):
        if not 0 <= p < v:
            raise ValueError(f"node {v} has parent {p}; parents come before children and all hang from node 0")
    size = [len(x) for x in ids]
    order = _depth_first(parent)
    subtree = list(size)
    for v in range(len(parent) - 1, 0, -1):
        subtree[parent[v]] += subtree[v]
    start, last, above = [0] * len(parent), [0] * len(parent), [0] * len(parent)
    at = 0
    for v in order:
        start[v] = at
        at += size[v]
        above[v] = 0 if v == 0 else above[parent[v]] + size[parent[v]]
        last[v] = at - 1 if size[v] else last[parent[v]]
    node = torch.repeat_interleave(torch.tensor(order), torch.tensor([size[v] for v in order]))
    first = torch.tensor(start)[node]
    here = torch.arange(at)
    before = torch.tensor([-1, *(last[p] for p in parent[1:])])[node]
    kinds = torch.cat([types[v] for v in order]) if types is not None else torch.zeros(at, dtype=torch.int64)
    return Packed(
        torch.cat([ids[v] for v in order]), node, torch.tensor(above)[node] + here - first,
        first + torch.tensor(subtree)[node], torch.where(here == first, before, here - 1), kinds,
        torch.tensor(start), torch.tensor(last), size[0],
    )  # fmt: skip


def tree_mask(packed: Packed, take: Tensor | None = None) -> Tensor:
    """(n, n) bool over the packed indices `take` (default all T), True where query i may see key j: j <= i < end[j].

    Over all tokens its row sums are path + 1.
    """
    i = torch.arange(len(packed)) if take is None else take
    return (i[None] <= i[:, None]) & (i[:, None] < packed.end[i][None])


def leaf_rows(packed: Packed, leaves: Sequence[int]) -> list[Tensor]:
    """The packed indices along the path of each leaf (prompt included), ascending: what a row-wise trainer runs."""
    i = torch.arange(len(packed))
    return [((i <= int(packed.last[v])) & (int(packed.last[v]) < packed.end)).nonzero().flatten() for v in leaves]


def rows_of(packed: Packed, parent: Sequence[int], mode: Mode) -> list[Tensor]:
    """Which packed indices each network row of `mode` holds. For prefix_packed the prompt is a pass of its own.

    rows: a path per leaf. packed: everything. prefix_packed: each subtree that hangs from the prompt.
    """
    if mode == "packed":
        return [torch.arange(len(packed))]
    if mode == "prefix_packed":
        return [torch.arange(a, b) for a, b in _top_level(packed, parent)]
    inner = set(parent)
    leaves = [v for v in range(len(parent)) if v not in inner] or [0]
    return leaf_rows(packed, leaves)


def _top_level(packed: Packed, parent: Sequence[int]) -> list[tuple[int, int]]:
    """Intervals of the subtrees below the prompt; empty nodes hand their children up, so starts decide, not nodes."""
    at, out = packed.prompt, []
    while at < len(packed):
        end = int(packed.end[at])
        out.append((at, end))
        at = end
    return out


def cost(packed: Packed, parent: Sequence[int], mode: Mode, hidden: int) -> float:
    """Arbitrary units per layer: 12 h^2 per token and 2 h per visible pair (dense masks pay for every pair)."""
    sizes = [len(r) for r in rows_of(packed, parent, mode)]
    tokens, pairs = float(sum(sizes)), float(sum(n * n for n in sizes))
    if mode == "prefix_packed":
        p = packed.prompt
        widest = max(sizes, default=0)  # rows are padded to the longest
        tokens = p + widest * len(sizes)
        pairs = p * p + len(sizes) * widest * (p + widest)
    return 12 * hidden**2 * tokens + 2 * hidden * pairs


def choose_mode(trees: Sequence[tuple[Packed, Sequence[int]]], allowed: Sequence[Mode], hidden: int) -> Mode:
    """The cheapest allowed mode for these trees by the cost model; the earlier one wins a tie."""
    return min(allowed, key=lambda mode: sum(cost(p, parent, mode, hidden) for p, parent in trees))


def split(parent: Sequence[int], sizes: Sequence[int], wanted: Sequence[int], budget: int) -> list[list[int]]:
    """Cut `wanted` nodes of one tree into parts whose closure under ancestors has at most `budget` tokens.

    Exact: a node's log-probs depend on its ancestors alone, which every part repeats. Depth-first, so that a part
    shares as much as it can. A single path longer than the budget is a part of its own.
    """
    asked = set(wanted)
    parts: list[list[int]] = []
    inside: set[int] = set()
    total = 0
    for v in _depth_first(parent):
        if v not in asked:
            continue
        path = ancestors(parent, v)
        new = [u for u in path if u not in inside]
        more = sum(sizes[u] for u in new)
        if not parts or (total + more > budget and parts[-1]):
            parts.append([])
            inside, total = set(path), sum(sizes[u] for u in path)
        else:
            inside.update(new)
            total += more
        parts[-1].append(v)
    return parts


def _depth_first(parent: Sequence[int]) -> list[int]:
    """Nodes in pre-order, siblings as they come."""
    children: list[list[int]] = [[] for _ in parent]
    for v, p in enumerate(parent[1:], 1):
        children[p].append(v)
    order, stack = [], [0]
    while stack:
        v = stack.pop()
        order.append(v)
        stack.extend(reversed(children[v]))
    return order


def ancestors(parent: Sequence[int], v: int) -> list[int]:
    """v and everything above it up to the root."""
    out = [v]
    while parent[out[-1]] >= 0:
        out.append(parent[out[-1]])
    return out
