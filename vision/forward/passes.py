"""Network passes: trees of token lists become batches of rows in one of four layouts, all with the same result."""

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
        """The tree laid out."""
        given = {0: self.prompt, **self.shown}
        types = [given[v].types if v in given else torch.zeros_like(x) for v, x in enumerate(self.ids)]
        return pack(self.parent, self.ids, types)

    @cached_property
    def images(self) -> dict[int, Pixels]:
        """Images and films by the node they stand in, the prompt's included."""
        given = {0: self.prompt, **self.shown}
        return {v: piece.pixels for v, piece in given.items() if piece.pixels is not None}

    def images_along(self, take: Tensor) -> list[Pixels]:
        """Images whose placeholders lie in these packed indices, in their order."""
        images = self.images
        return [images[v] for v in torch.unique_consecutive(self.packed.node[take]).tolist() if v in images]

    @cached_property
    def positions(self) -> Tensor:
        """(T,) or (3, T) rotary positions: every node goes on where its parent ended, observations by their own."""
        packed, prompt = self.packed, self.prompt
        if prompt.positions.ndim == 1:
            return packed.path
        after = [prompt.next_position]
        out = torch.empty((3, len(packed)), dtype=torch.int64)
        out[:, : packed.prompt] = prompt.positions
        for v in range(1, len(self.parent)):
            start, piece, n = after[self.parent[v]], self.shown.get(v), len(self.ids[v])
            at = int(packed.start[v])
            out[:, at : at + n] = start + (torch.arange(n) if piece is None else piece.positions)
            after.append(start + (n if piece is None else piece.next_position))
        return out


@dataclass(frozen=True)
class Pass:
    """One call of the model. ids (B, L); positions (B, L) or (3, B, L); keep: columns whose logits are wanted."""

    ids: Tensor
    positions: Tensor
    attention: Any
    images: Sequence[Pixels]
    keep: Tensor


@dataclass(frozen=True)
class Job:
    """Everything one micro-batch asks of the network: log-probs of A tokens.

    prefix: the prompts, run once with a cache (prefix_packed only); cache_rows (B,): which prompt each row continues.
    rows: the main pass, None when every wanted token follows a prompt directly. source (A,): row of the logits,
    prefix logits first, then rows x keep flattened. tokens (A,): the ids, none where only outputs are read.
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
    reads = [t.packed.pred[w] for t, w in zip(trees, wanted, strict=True)]
    tokens = torch.cat([t.packed.ids[w] for t, w in zip(trees, wanted, strict=True)])
    return _lay_out(trees, reads, tokens, mode, style)


def build_reading(
    trees: Sequence[TokenTree], reads: Sequence[Tensor], mode: Mode, style: AttentionStyle,
    wanted: Sequence[Tensor] = (),
) -> Job:  # fmt: skip
    """Lay out `trees` so that the outputs at packed indices `reads[i]` of tree i can be read, and behind them those
    that predict the tokens at `wanted[i]`, if any; `tokens` are these alone."""
    ahead = [t.packed.pred[w] for t, w in zip(trees, wanted, strict=bool(wanted))]
    tokens = [t.packed.ids[w] for t, w in zip(trees, wanted, strict=bool(wanted))]
    none = torch.empty(0, dtype=torch.int64)
    return _lay_out(trees, [*reads, *ahead], torch.cat([none, *tokens]), mode, style)


def _lay_out(
    trees: Sequence[TokenTree], reads: Sequence[Tensor], tokens: Tensor,
    mode: Mode, style: AttentionStyle,
) -> Job:  # fmt: skip
    picked = [(i, take) for i, t in enumerate(trees) for take in rows_of(t.packed, t.parent, mode)]
    positions = [t.positions for t in trees]
    ahead = mode == "prefix_packed"
    place = _Places(trees, picked, ahead)
    source = torch.cat([place.find(i % len(trees), r) for i, r in enumerate(reads)])  # once or twice around
    keep = torch.unique(source[source >= 0] % place.width) if bool((source >= 0).any()) else None
    prefix = _prefix(trees, positions) if ahead else None
    rows = None if keep is None else _rows(trees, picked, positions, mode, style, keep)
    row_of, column = source.div(place.width, rounding_mode="floor"), source % place.width
    after = len(trees) if ahead else 0
    if keep is not None:
        where = torch.searchsorted(keep, column)
        inside = after + row_of * len(keep) + where
        source = torch.where(source >= 0, inside, -1 - source)
    else:
        source = -1 - source
    size = (0 if prefix is None else prefix.ids.numel()) + (0 if rows is None else rows.ids.numel())
    return Job(mode, prefix, torch.tensor([i for i, _ in picked]) if ahead else None, rows, source, tokens, size)


class _Places:
    """Where a packed index of a tree lies: row * width + column of the main pass, or -1 - tree for a prompt's end."""

    def __init__(self, trees: Sequence[TokenTree], picked: Sequence[tuple[int, Tensor]], ahead: bool) -> None:
        self.width = max((len(take) for _, take in picked), default=1)
        self.at = [torch.full((len(t.packed),), torch.iinfo(torch.int64).min) for t in trees]
        for row, (i, take) in reversed(list(enumerate(picked))):  # the first row that holds a token wins
            self.at[i][take] = row * self.width + torch.arange(len(take))
        if ahead:
            for i, t in enumerate(trees):
                self.at[i][t.packed.prompt - 1] = -1 - i

    def find(self, tree: int, pred: Tensor) -> Tensor:
        out = self.at[tree][pred]
        if bool((pred < 0).any()) or bool((out == torch.iinfo(torch.int64).min).any()):
            raise ValueError("a wanted token has no predecessor in the network rows; prompt tokens have no log-prob")
        return out


def _rows(
    trees: Sequence[TokenTree], picked: Sequence[tuple[int, Tensor]], positions: Sequence[Tensor],
    mode: Mode, style: AttentionStyle, keep: Tensor,
) -> Pass:  # fmt: skip
    ids = pad_sequence([trees[i].packed.ids[take] for i, take in picked], batch_first=True)
    where = pad_positions([positions[i][..., take] for i, take in picked])
    images = [p for i, take in picked for p in trees[i].images_along(take)]
    if mode in ("rows", "rows_shared_image") and style.plain:
        length = torch.tensor([len(take) for _, take in picked])
        full = bool((length == ids.shape[1]).all())
        attention: Any = None if full else (torch.arange(ids.shape[1])[None] < length[:, None]).long()
    else:
        prefix = [trees[i].packed.prompt for i, _ in picked] if mode == "prefix_packed" else None
        attention = tree_attention([(trees[i].packed, take) for i, take in picked], style, prefix)
    return Pass(ids, where, attention, images, keep)


def _prefix(trees: Sequence[TokenTree], positions: Sequence[Tensor]) -> Pass:
    """The prompts, left-padded so that the last column is every prompt's last token."""
    prompts = [t.packed.prompt for t in trees]
    ids, attention = left_pad([t.packed.ids[:n] for t, n in zip(trees, prompts, strict=True)])
    where = pad_positions([p[..., :n] for p, n in zip(positions, prompts, strict=True)], left=True)
    images = [i for t, n in zip(trees, prompts, strict=True) for i in t.images_along(torch.arange(n))]
    return Pass(ids, where, attention, images, torch.tensor([ids.shape[1] - 1]))


def left_pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(B, L) with padding on the left, and the attention mask, None where nothing is padded."""
    ids = pad_sequence([r.flip(0) for r in rows], batch_first=True).flip(1)
    length = torch.tensor([len(r) for r in rows])
    if bool((length == ids.shape[1]).all()):
        return ids, None
    return ids, (torch.arange(ids.shape[1])[None] >= ids.shape[1] - length[:, None]).long()


def pad_positions(rows: Sequence[Tensor], left: bool = False) -> Tensor:
    """(B, L) or (3, B, L) from (n,) or (3, n) per row."""
    side = "left" if left else "right"
    flat = pad_sequence([r.movedim(-1, 0) for r in rows], batch_first=True, padding_side=side)
    return flat if flat.ndim == 2 else flat.permute(2, 0, 1).contiguous()
