"""Images and films as vLLM's vision tower takes them: our own pixels, grids and rotary positions.

vLLM would expand placeholders, resize frames and count positions by its own rules, which are not always those of
transformers: behind a film it goes on after the last moment, transformers 5 after the height and width. So a request
here carries expanded ids, patches and positions, and vLLM neither processes nor places anything itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from vision.inputs.foreign import attribute
from vision.inputs.tokens import PromptTokens

_POSITIONS = "given_positions"  # a field beside those the model knows, which it ignores


@dataclass(frozen=True)
class Medium:
    """An image or a film in a request.

    key: hash of contents and positions; equal keys are encoded once and may share cached blocks.
    start: where it begins in the request's ids, n tokens long. pads: (n,) bool, where its features go; between a
        film's frames there may be text. values: (rows, d) patches. grid: (3,) patches in time, down, across.
    positions: (3, n + 1) rotary positions counted from its beginning, the last of what follows it.
    """

    key: str
    kind: Literal["image", "video"]
    start: int
    pads: Tensor
    values: Tensor
    grid: Tensor
    positions: Tensor

    def at(self, offset: int) -> Medium:
        """The same one, `offset` tokens later."""
        return replace(self, start=self.start + offset)


def media_of(piece: PromptTokens) -> list[Medium]:
    """The media of a prompt or observation, `start` counted from its first token.

    Raises:
        ValueError: a model whose pictures are not grids of patches, or placeholders that do not fit the grids.
    """
    if piece.pixels is None:
        return []
    tensors = piece.pixels.tensors
    if set(tensors) != {"pixel_values", "image_grid_thw"} or piece.positions.ndim != 2:
        raise ValueError(
            f"vLLM takes conversations with pictures of Qwen-VL models alone, not ones made of {sorted(tensors)}; use "
            "policy.engine: transformers"
        )
    grids = tensors["image_grid_thw"]
    rows = grids.prod(-1).tolist()
    where = (piece.types > 0).nonzero().flatten()
    parts = where.split(_features(rows, len(where)))
    values = tensors["pixel_values"].split(rows)
    return [_medium(piece, i, part, values[i], grids[i]) for i, part in enumerate(parts)]


def _features(rows: Sequence[int], pads: int) -> list[int]:
    """Tokens per medium of so many patches, when all have `pads` tokens together."""
    merged = sum(rows) // pads if pads else 0
    if merged == 0 or any(r % merged for r in rows) or sum(rows) != merged * pads:
        raise ValueError(f"{pads} placeholders for media of {rows} patches: they do not fit together")
    return [r // merged for r in rows]


def _medium(piece: PromptTokens, number: int, where: Tensor, values: Tensor, grid: Tensor) -> Medium:
    assert piece.pixels is not None
    kind = piece.pixels.kind
    start, end = int(where[0]), int(where[-1]) + 1
    pads = piece.types[start:end] > 0
    if kind == "image" and not bool(pads.all()):
        raise ValueError(f"placeholders {start} to {end} belong to one image but text stands between them")
    after = torch.full((3, 1), piece.next_position)
    along = torch.cat([piece.positions, after], -1)[:, start : end + 1]
    positions = along - (piece.positions[:, start - 1 : start].max() + 1 if start else 0)
    told = f"{piece.pixels.key}|{number}|{kind}|{grid.tolist()}|{positions.tolist()}"
    return Medium(hashlib.sha256(told.encode()).hexdigest(), kind, start, pads, values, grid, positions)


def rotary(length: int, media: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, int]:
    """(3, length) positions of a request, and that of the token after it: text counts on by one, each medium (start,
    positions) by its own."""
    parts, at, position = [], 0, 0
    for start, given in [*media, (length, torch.zeros(3, 1, dtype=torch.int64))]:
        text = torch.arange(position, position + start - at).expand(3, -1)
        position += start - at
        parts += [text, given[:, :-1] + position]
        position, at = position + int(given[0, -1]), start + given.shape[1] - 1
    return torch.cat(parts, -1), position


# ---- inside vLLM --------------------------------------------------------------------------------------------------


def engine_input(ids: list[int], media: Sequence[Medium]) -> Any:
    """A request as vLLM's own processors would have made it."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    if not media:
        return tokens_input(ids)
    kinds: dict[str, list[Medium]] = {}
    for m in media:
        kinds.setdefault(m.kind, []).append(m)
    places = {
        kind: [PlaceholderRange(m.start, len(m.pads), None if bool(m.pads.all()) else m.pads) for m in own]
        for kind, own in kinds.items()
    }
    items = MultiModalKwargsItems({kind: [_item(m) for m in own] for kind, own in kinds.items()})
    return mm_input(ids, items, {kind: [m.key for m in own] for kind, own in kinds.items()}, places)


def _item(medium: Medium) -> Any:
    from vllm.multimodal.inputs import MultiModalFieldConfig as Config
    from vllm.multimodal.inputs import MultiModalKwargsItems

    kind = medium.kind
    values, grid = ("pixel_values" if kind == "image" else "pixel_values_videos"), f"{kind}_grid_thw"
    told: Mapping[str, Tensor] = {
        values: medium.values, grid: medium.grid[None], _POSITIONS: medium.positions[None],
    }  # fmt: skip
    fields = {
        values: Config.flat_from_sizes(kind, torch.tensor([len(medium.values)])),
        grid: Config.batched(kind, keep_on_cpu=True),
        _POSITIONS: Config.batched(kind, keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs(told, fields)[kind][0]


def take_positions(model: Any) -> None:
    """Let this vLLM model place media by the positions that requests bring; others are placed by its own rule."""
    own = attribute(model, "get_mrope_input_positions")
    if own is None:
        return

    def placed(tokens: list[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        if not all(_POSITIONS in f.data for f in features):
            return own(tokens, features)
        ordered = sorted(features, key=lambda f: f.mm_position.offset)
        media = [(f.mm_position.offset, f.data[_POSITIONS].data) for f in ordered]
        positions, after = rotary(len(tokens), media)
        return positions, after - len(tokens)

    model.get_mrope_input_positions = placed
