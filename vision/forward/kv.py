"""Key-value caches cut into rows and joined again, so that what was run once goes on in many places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vision.inputs.foreign import attribute

Layers = list[tuple[Tensor, Tensor]]  # of one row: per layer keys and values, (heads, L, d) each


def check_cache(past: Any) -> None:
    """Raises ValueError for a cache that forgets."""
    if any(attribute(layer, "is_sliding") for layer in past.layers):
        raise ValueError(
            "this model's cache is a sliding window, which cannot be kept between turns; use policy.engine: vllm"
        )


def cut(past: Any, row: int, columns: Tensor | slice = slice(None)) -> Layers:
    """Some columns (indices or a mask) of one row of a cache."""
    return [(layer.keys[row][:, columns].clone(), layer.values[row][:, columns].clone()) for layer in past.layers]


def join(rows: Sequence[Layers], device: torch.device) -> tuple[Any, Tensor]:
    """A cache of several rows, padded on the left, and its mask (R, L) bool."""
    from transformers import DynamicCache

    length = torch.tensor([memory[0][0].shape[1] for memory in rows], device=device)
    longest = int(length.max())
    past = DynamicCache()
    for i in range(len(rows[0])):
        past.update(_stack([m[i][0] for m in rows], longest), _stack([m[i][1] for m in rows], longest), i)
    return past, torch.arange(longest, device=device)[None] >= longest - length[:, None]


def _stack(rows: Sequence[Tensor], longest: int) -> Tensor:
    """(R, heads, longest, d) from (heads, L, d), zeros in front."""
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], longest, rows[0].shape[2])
    for r, x in enumerate(rows):
        out[r, :, longest - x.shape[1] :] = x
    return out
