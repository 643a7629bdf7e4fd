"""Network passes: trees of token lists become batches of rows in one of four layouts, all with the same result.

A prompt P with the steps A, B below it and C below A, as the rows of each layout:

    rows, rows_shared_image   [P A C]  [P B]          a row per leaf
    packed                    [P A C B]               every token once; a mask hides B from A and C, and the other way
    prefix_packed             [P], then [A C]  [B]    the prompt first, its cache is continued by the rows below it

`rows` encodes a picture in every row, the other three once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vision.forward.attention import AttentionStyle, tree_attention
from vision.forward.packing import Mode, Packed, pack, rows_of
from vision.inputs.tokens import Pixels, PromptTokens


@dataclass(frozen=True)
class TokenTree:
    """A prompt (node 0) and steps below it. ids: token lists per node. shown: nodes that are observations.

    Tokens of an observation are those of its entry in `shown`; the list in `ids` must be the same.
    """

    prompt: PromptTokens
    parent: Sequence[int]
    ids: Sequence[Tensor]
    shown: Mapping[int, PromptTokens] = field(default_factory=dict)

    @cached_property
    def packed(self) -> Packed:
        """The tree with every token once, in depth-first order."""
        types = [torch.zeros_like(ids) for ids in self.ids]
        for node, tokens in self._encoded.items():
            types[node] = tokens.types
        return pack(self.parent, self.ids, types)

    @property
    def _encoded(self) -> dict[int, PromptTokens]:
        """The nodes that may hold pictures: the prompt and the observations."""
        return {0: self.prompt, **self.shown}

    @cached_property
    def images(self) -> dict[int, Pixels]:
        """Images and films by the node they stand in, the prompt's included."""
        return {node: tokens.pixels for node, tokens in self._encoded.items() if tokens.pixels is not None}

    def images_along(self, take: Tensor) -> list[Pixels]:
        """Images whose placeholders lie in these packed indices, in their order."""
        nodes = torch.unique_consecutive(self.packed.node[take]).tolist()
        return [self.images[node] for node in nodes if node in self.images]

    @cached_property
    def positions(self) -> Tensor:
        """(T,) or (3, T) rotary positions: every node goes on where its parent ended, observations by their own."""
        packed, prompt = self.packed, self.prompt
        if prompt.positions.ndim == 1:
            return packed.path
        positions = torch.empty((3, len(packed)), dtype=torch.int64)
        positions[:, : packed.prompt] = prompt.positions
        next_position = [prompt.next_position]  # of each node, what a child's first token gets
        for node in range(1, len(self.parent)):
            begin = next_position[self.parent[node]]
            length = len(self.ids[node])
            observation = self.shown.get(node)
            columns = slice(int(packed.start[node]), int(packed.start[node]) + length)
            if observation is None:
                positions[:, columns] = begin + torch.arange(length)
                next_position.append(begin + length)
            else:
                positions[:, columns] = begin + observation.positions
                next_position.append(begin + observation.next_position)
        return positions


@dataclass(frozen=True)
class Pass:
    """One call of the model. ids (B, L); positions (B, L) or (3, B, L); keep: columns whose outputs are read."""

    ids: Tensor
    positions: Tensor
    attention: Any
    images: Sequence[Pixels]
    keep: Tensor


@dataclass(frozen=True)
class Job:
    """All network calls of one micro-batch, and where in their outputs the log-probs of A tokens are read.

    prefix: the prompts, run once with a cache (prefix_packed only); cache_rows (B,): which prompt each row continues.
    rows: the main pass, None when every token that is read follows a prompt directly. source (A,): row of the outputs,
    prefix outputs first, then rows x keep flattened. tokens (A,): the ids, none where only outputs are read.
    row_tokens: tokens run, padding included.
    """

    mode: Mode
    prefix: Pass | None
    cache_rows: Tensor | None
    rows: Pass | None
    source: Tensor
    tokens: Tensor
    row_tokens: int


def build_job(trees: Sequence[TokenTree], wanted: Sequence[Tensor], mode: Mode, style: AttentionStyle) -> Job:
    """Lay out `trees` so that the tokens at packed indices `wanted[i]` of tree i get their log-probs.

    Raises:
        ValueError: an attention implementation without tree masks, or a wanted token without predecessor.
    """
    reads, tokens = _predictions(trees, wanted)
    return _lay_out(trees, reads, tokens, mode, style)


def build_reading(
    trees: Sequence[TokenTree],
    reads: Sequence[Tensor],
    mode: Mode,
    style: AttentionStyle,
    wanted: Sequence[Tensor] = (),
) -> Job:
    """Lay out `trees` so that the outputs at packed indices `reads[i]` of tree i can be read, and behind them those
    that predict the tokens at `wanted[i]`, if any; `Job.tokens` are these alone."""
    outputs = list(enumerate(reads))
    if not wanted:
        return _lay_out(trees, outputs, torch.empty(0, dtype=torch.int64), mode, style)
    predictions, tokens = _predictions(trees, wanted)
    return _lay_out(trees, outputs + predictions, tokens, mode, style)


def _predictions(trees: Sequence[TokenTree], wanted: Sequence[Tensor]) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """(tree, packed indices whose outputs predict its wanted tokens), and the ids of all wanted tokens."""
    reads = []
    tokens = []
    for index, (tree, places) in enumerate(zip(trees, wanted, strict=True)):
        reads.append((index, tree.packed.pred[places]))
        tokens.append(tree.packed.ids[places])
    return reads, torch.cat(tokens)


@dataclass(frozen=True)
class _Row:
    """A network row: the index of its tree, and the packed indices (n,) of its tokens."""

    tree: int
    tokens: Tensor


def _lay_out(
    trees: Sequence[TokenTree],
    reads: Sequence[tuple[int, Tensor]],
    tokens: Tensor,
    mode: Mode,
    style: AttentionStyle,
) -> Job:
    """The job whose `source` leads to the outputs at `reads`, pairs of (tree, packed indices)."""
    rows = []
    for index, tree in enumerate(trees):
        rows += [_Row(index, take) for take in rows_of(tree.packed, tree.parent, mode)]
    positions = [tree.positions for tree in trees]
    prompts_first = mode == "prefix_packed"

    places = _Places(trees, rows, prompts_first)
    source = torch.cat([places.find(tree, indices) for tree, indices in reads])  # (A,)
    in_rows = source >= 0
    # The output layer runs on the columns that any row is read at, not on all of them.
    keep = torch.unique(source[in_rows] % places.width)

    prefix = _prefix(trees, positions) if prompts_first else None
    main = _main_pass(trees, rows, positions, mode, style, keep) if len(keep) else None
    # Outputs of the prefix come first, one per prompt; then those of the rows, len(keep) each.
    offset = len(trees) if prompts_first else 0
    row, column = source.div(places.width, rounding_mode="floor"), source % places.width
    of_rows = offset + row * len(keep) + torch.searchsorted(keep, column)
    source = torch.where(in_rows, of_rows, -1 - source)

    cache_rows = torch.tensor([row.tree for row in rows]) if prompts_first else None
    size = sum(part.ids.numel() for part in (prefix, main) if part is not None)
    return Job(mode, prefix, cache_rows, main, source, tokens, size)


class _Places:
    """Where a packed index of a tree lies: row * width + column of the main pass, or -1 - tree for a prompt's end."""

    _NOWHERE = torch.iinfo(torch.int64).min

    def __init__(self, trees: Sequence[TokenTree], rows: Sequence[_Row], prompts_first: bool) -> None:
        self.width = max((len(row.tokens) for row in rows), default=1)
        self._places = [torch.full((len(tree.packed),), self._NOWHERE) for tree in trees]
        # Backwards, so that of several rows that hold a token the first one wins.
        for number, row in reversed(list(enumerate(rows))):
            self._places[row.tree][row.tokens] = number * self.width + torch.arange(len(row.tokens))
        if prompts_first:
            for index, tree in enumerate(trees):
                self._places[index][tree.packed.prompt - 1] = -1 - index

    def find(self, tree: int, indices: Tensor) -> Tensor:
        """The places of packed indices.

        Raises:
            ValueError: an index that is -1, the predecessor of the first token, or in no row.
        """
        places = self._places[tree][indices]
        if bool((indices < 0).any()) or bool((places == self._NOWHERE).any()):
            raise ValueError("a wanted token has no predecessor in the network rows; prompt tokens have no log-prob")
        return places


def _main_pass(
    trees: Sequence[TokenTree],
    rows: Sequence[_Row],
    positions: Sequence[Tensor],
    mode: Mode,
    style: AttentionStyle,
    keep: Tensor,
) -> Pass:
    """All rows, padded on the right to the longest."""
    ids = pad_sequence([trees[row.tree].packed.ids[row.tokens] for row in rows], batch_first=True)
    row_positions = pad_positions([positions[row.tree][..., row.tokens] for row in rows])
    images = []
    for row in rows:
        images += trees[row.tree].images_along(row.tokens)
    if mode in ("rows", "rows_shared_image") and style.plain:
        # An ordinary causal batch: the model makes its own mask, and needs one of padding only.
        length = torch.tensor([len(row.tokens) for row in rows])
        padded = bool((length != ids.shape[1]).any())
        attention: Any = (torch.arange(ids.shape[1])[None] < length[:, None]).long() if padded else None
    else:
        prefix = [trees[row.tree].packed.prompt for row in rows] if mode == "prefix_packed" else None
        attention = tree_attention([(trees[row.tree].packed, row.tokens) for row in rows], style, prefix)
    return Pass(ids, row_positions, attention, images, keep)


def _prefix(trees: Sequence[TokenTree], positions: Sequence[Tensor]) -> Pass:
    """The prompts, left-padded so that the last column is every prompt's last token."""
    lengths = [tree.packed.prompt for tree in trees]
    ids, attention = left_pad([tree.packed.ids[:n] for tree, n in zip(trees, lengths, strict=True)])
    prompt_positions = [own[..., :n] for own, n in zip(positions, lengths, strict=True)]
    images = []
    for tree, n in zip(trees, lengths, strict=True):
        images += tree.images_along(torch.arange(n))
    last_column = torch.tensor([ids.shape[1] - 1])
    return Pass(ids, pad_positions(prompt_positions, left=True), attention, images, last_column)


def left_pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(B, L) with padding on the left, and the attention mask, None where nothing is padded."""
    ids = pad_sequence(list(rows), batch_first=True, padding_side="left")
    length = torch.tensor([len(row) for row in rows])
    if bool((length == ids.shape[1]).all()):
        return ids, None
    return ids, (torch.arange(ids.shape[1])[None] >= ids.shape[1] - length[:, None]).long()


def pad_positions(rows: Sequence[Tensor], left: bool = False) -> Tensor:
    """(B, L) or (3, B, L) from (n,) or (3, n) per row."""
    side = "left" if left else "right"
    # `pad_sequence` pads the first dimension: (n, 3) per row become (B, L, 3).
    padded = pad_sequence([row.movedim(-1, 0) for row in rows], batch_first=True, padding_side=side)
    return padded if padded.ndim == 2 else padded.permute(2, 0, 1).contiguous()
