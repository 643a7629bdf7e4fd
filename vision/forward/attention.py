"""Attention masks of packed trees for the attention implementations of transformers.

A rank-4 mask reaches the attention function unchanged, so nothing is patched. sdpa takes booleans; eager would add
them as 0 and 1, so it gets 0 and -inf; flex gets a block mask; flash attention takes no such mask and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision.forward.packing import Packed, tree_mask
from vision.inputs.foreign import attribute

FLEX = "mmrl_flex"  # for the update on a GPU; needs layout `packed`, sampling takes sdpa


@dataclass(frozen=True)
class AttentionStyle:
    """What the model's attention needs. window: tokens seen by sliding layers, None = all layers see everything.

    image_blocks: tokens of one image see each other in both directions (Gemma 3).
    """

    implementation: str = "sdpa"
    dtype: torch.dtype = torch.float32
    window: int | None = None
    image_blocks: bool = False

    @property
    def plain(self) -> bool:
        """Causal attention in every layer: key-value caches only grow."""
        return self.window is None and not self.image_blocks


def style_of(model: Any) -> AttentionStyle:
    """From a loaded transformers model; `attn_implementation` was fixed when it was loaded."""
    text = model.config.get_text_config()
    layers = set(attribute(text, "layer_types") or ["full_attention"])
    unknown = layers - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(f"layers of kind {sorted(unknown)} cannot be packed; use policy.mode: rows")
    window = text.sliding_window if "sliding_attention" in layers else None
    blocks = model.config.model_type.startswith("gemma3")
    dtype = next(model.get_decoder().parameters()).dtype
    return AttentionStyle(text._attn_implementation or "sdpa", dtype, window, blocks)


def check_packable(style: AttentionStyle) -> None:
    """Raises ValueError for an implementation that takes no tree mask."""
    if "flash" in style.implementation:
        raise ValueError(
            f"attention {style.implementation!r} takes no tree mask; load the model with attn: sdpa (or {FLEX} on a "
            "GPU), or set policy.mode: rows_shared_image"
        )


def tree_attention(
    rows: Sequence[tuple[Packed, Tensor]], style: AttentionStyle, prefix: Sequence[int] | None = None
) -> Any:
    """The mask of a batch of packed rows, as the model takes it.

    Args:
        rows: (tree, packed indices of the row) for each of B rows, right-padded to the longest, L.
        prefix: for prefix_packed, prompt tokens of each row; they are left-padded in the key-value cache.
    Returns:
        (B, 1, L, K) bool or float, a dict of two for sliding layers, or a BlockMask; K = longest prefix + L.
    """
    check_packable(style)
    if style.implementation == FLEX:
        return _flex(rows, style, prefix)
    full, near = _visible(rows, style, prefix)
    if style.window is None:
        return _as_input(full, style)
    return {"full_attention": _as_input(full, style), "sliding_attention": _as_input(near, style)}


def _visible(
    rows: Sequence[tuple[Packed, Tensor]], style: AttentionStyle, prefix: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """(B, L, K) bool for full layers and for sliding layers."""
    length, ahead = max(len(take) for _, take in rows), max(prefix or [0])
    full = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: no empty softmax
    near = full.clone() if style.window is not None else full
    for b, (packed, take) in enumerate(rows):
        n = len(take)
        seen = tree_mask(packed, take)
        block = _same_image(packed, take) if style.image_blocks else torch.zeros_like(seen)
        full[b, :n, :n] = seen | block
        if style.window is not None:
            path = packed.path[take]
            near[b, :n, :n] = (seen & (path[:, None] - path[None] < style.window)) | block
    if ahead:
        cached = torch.arange(ahead)[None] >= ahead - torch.tensor(prefix)[:, None]
        full = torch.cat([cached[:, None].expand(-1, length, -1), full], 2)
    return full, near


def _same_image(packed: Packed, take: Tensor) -> Tensor:
    """True between the placeholders of one image: one run of type 1 in the packed row."""
    image = packed.types == 1
    run = (image & ~torch.cat([image.new_zeros(1), image[:-1]])).cumsum(0)
    own, on = run[take], image[take]
    return on[None] & on[:, None] & (own[None] == own[:, None])


def _as_input(visible: Tensor, style: AttentionStyle) -> Tensor:
    visible = visible[:, None]
    if style.implementation == "sdpa":
        return visible
    lowest = torch.finfo(style.dtype).min
    return torch.zeros(visible.shape, dtype=style.dtype).masked_fill(~visible, lowest)


def attend_by(hf: Any, implementation: str) -> None:
    """Switch the language model's attention; the image encoder keeps sdpa. Flex is registered at first use, under a
    name of ours, since Qwen-VL models refuse the built-in one."""
    if implementation == FLEX:
        from transformers import AttentionInterface
        from transformers.integrations.flex_attention import flex_attention_forward

        AttentionInterface.register(FLEX, flex_attention_forward)
    vision = attribute(hf.config, "vision_config") is not None
    hf.set_attn_implementation({"text_config": implementation, "vision_config": "sdpa"} if vision else implementation)


def _flex(rows: Sequence[tuple[Packed, Tensor]], style: AttentionStyle, prefix: Sequence[int] | None) -> Any:
    """A BlockMask by the same two comparisons; no (L, K) tensor is made. Flex has no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask

    if not style.plain:
        raise ValueError("flex attention is not set up for sliding layers or image blocks; load with attn: sdpa")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, ahead = max(len(take) for _, take in rows), max(prefix or [0])
    place = torch.full((len(rows), length), -1, device=device)  # packed index, -1 = padding
    end = torch.full((len(rows), length), -1, device=device)  # padding is in no tree
    for b, (packed, take) in enumerate(rows):
        place[b, : len(take)], end[b, : len(take)] = take.to(device), packed.end[take].to(device)
    first = ahead - torch.tensor(prefix or [0] * len(rows), device=device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (k - ahead).clamp(min=0)
        tree = (own <= q) & (place[b, own] <= place[b, q]) & (place[b, q] < end[b, own])
        return torch.where(k < ahead, k >= first[b], tree | (own == q))

    return create_block_mask(visible, len(rows), None, length, ahead + length, device=device)
