"""Key-value caches cut into rows and joined again, so that tokens that were run once are continued in many places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision.inputs.foreign import attribute

# The cache of one row: per layer its keys and values, (heads, L, d) each.
Layers = list[tuple[Tensor, Tensor]]


def check_cache(past: Any) -> None:
    """Raises ValueError for a cache that forgets."""
    if any(attribute(layer, "is_sliding") for layer in past.layers):
        raise ValueError(
            "this model's cache is a sliding window, which cannot be kept between turns; use policy.engine: vllm"
        )


def cut(past: Any, row: int, columns: Tensor | slice = slice(None)) -> Layers:
    """Some columns (indices or a mask) of one row of a cache."""
    layers = []
    for layer in past.layers:
        # Copies, since the cache itself grows and forks on.
        layers.append((layer.keys[row][:, columns].clone(), layer.values[row][:, columns].clone()))
    return layers


def join(rows: Sequence[Layers], device: torch.device) -> tuple[Any, Tensor]:
    """A cache of several rows, padded on the left, and its mask (R, L) bool."""
    from transformers import DynamicCache

    length = torch.tensor([layers[0][0].shape[1] for layers in rows], device=device)
    longest = int(length.max())
    past = DynamicCache()
    for layer in range(len(rows[0])):
        keys = [layers[layer][0] for layers in rows]
        values = [layers[layer][1] for layers in rows]
        past.update(_stack(keys, longest), _stack(values, longest), layer)
    return past, torch.arange(longest, device=device)[None] >= longest - length[:, None]


def _stack(rows: Sequence[Tensor], longest: int) -> Tensor:
    """(R, heads, longest, d) from (heads, L, d), zeros in front."""
    stacked = rows[0].new_zeros(len(rows), rows[0].shape[0], longest, rows[0].shape[2])
    for index, row in enumerate(rows):
        stacked[index, :, longest - row.shape[1] :] = row
    return stacked
