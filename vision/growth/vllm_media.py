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

# A field beside those that a vLLM model reads; models pass over it, `take_positions` reads it.
_POSITIONS = "given_positions"


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
        """The medium, `offset` tokens later."""
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
    placeholders = (piece.types > 0).nonzero().flatten()
    parts = placeholders.split(_features(rows, len(placeholders)))
    values = tensors["pixel_values"].split(rows)
    return [_medium(piece, number, part, values[number], grids[number]) for number, part in enumerate(parts)]


def _features(rows: Sequence[int], pads: int) -> list[int]:
    """Tokens of each medium. rows: patches of each; pads: tokens of all together."""
    merged = sum(rows) // pads if pads else 0  # patches that become one token
    if merged == 0 or any(patches % merged for patches in rows) or sum(rows) != merged * pads:
        raise ValueError(f"{pads} placeholders for media of {rows} patches: they do not fit together")
    return [patches // merged for patches in rows]


def _medium(piece: PromptTokens, number: int, placeholders: Tensor, values: Tensor, grid: Tensor) -> Medium:
    assert piece.pixels is not None
    kind = piece.pixels.kind
    start, end = int(placeholders[0]), int(placeholders[-1]) + 1
    pads = piece.types[start:end] > 0
    if kind == "image" and not bool(pads.all()):
        raise ValueError(f"placeholders {start} to {end} belong to one image but text stands between them")
    # (3, n + 1) positions of the medium and of the token behind it, counted from its beginning
    next_position = torch.full((3, 1), piece.next_position)
    positions = torch.cat([piece.positions, next_position], -1)[:, start : end + 1]
    if start:
        positions = positions - (piece.positions[:, start - 1 : start].max() + 1)
    content = f"{piece.pixels.key}|{number}|{kind}|{grid.tolist()}|{positions.tolist()}"
    return Medium(hashlib.sha256(content.encode()).hexdigest(), kind, start, pads, values, grid, positions)


def rotary(length: int, media: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, int]:
    """(3, length) positions of a request, and that of the token after it: text counts on by one, each medium (start,
    positions) by its own."""
    parts = []
    index, position = 0, 0  # of the next token
    end = (length, torch.zeros(3, 1, dtype=torch.int64))  # a medium without tokens, behind the last text
    for start, own_positions in [*media, end]:
        text_tokens = start - index
        parts.append(torch.arange(position, position + text_tokens).expand(3, -1))
        position += text_tokens
        parts.append(own_positions[:, :-1] + position)
        position += int(own_positions[0, -1])
        index = start + own_positions.shape[1] - 1
    return torch.cat(parts, -1), position


# ---- inside vLLM --------------------------------------------------------------------------------------------------


def engine_input(ids: list[int], media: Sequence[Medium]) -> Any:
    """A request as vLLM's own processors would have made it."""
    from vllm.inputs import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    if not media:
        return tokens_input(ids)
    items: dict[str, list[Any]] = {}
    keys: dict[str, list[str]] = {}
    places: dict[str, list[Any]] = {}
    for medium in media:
        is_embedding = None if bool(medium.pads.all()) else medium.pads
        items.setdefault(medium.kind, []).append(_item(medium))
        keys.setdefault(medium.kind, []).append(medium.key)
        place = PlaceholderRange(medium.start, len(medium.pads), is_embedding)
        places.setdefault(medium.kind, []).append(place)
    return mm_input(ids, MultiModalKwargsItems(items), keys, places)


def _item(medium: Medium) -> Any:
    from vllm.multimodal.inputs import MultiModalFieldConfig as Config
    from vllm.multimodal.inputs import MultiModalKwargsItems

    kind = medium.kind
    values = "pixel_values" if kind == "image" else "pixel_values_videos"
    grid = f"{kind}_grid_thw"
    tensors: Mapping[str, Tensor] = {
        values: medium.values,
        grid: medium.grid[None],
        _POSITIONS: medium.positions[None],
    }
    fields = {
        values: Config.flat_from_sizes(kind, torch.tensor([len(medium.values)])),
        grid: Config.batched(kind, keep_on_cpu=True),
        _POSITIONS: Config.batched(kind, keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs(tensors, fields)[kind][0]


def take_positions(model: Any) -> None:
    """Let this vLLM model place media by the positions that requests bring; others are placed by its own rule."""
    own = attribute(model, "get_mrope_input_positions")
    if own is None:
        return

    def placed(tokens: list[int], features: Sequence[Any]) -> tuple[Tensor, int]:
        if not all(_POSITIONS in feature.data for feature in features):
            return own(tokens, features)
        ordered = sorted(features, key=lambda feature: feature.mm_position.offset)
        media = [(feature.mm_position.offset, feature.data[_POSITIONS].data) for feature in ordered]
        positions, after = rotary(len(tokens), media)
        return positions, after - len(tokens)

    model.get_mrope_input_positions = placed
