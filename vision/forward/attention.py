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

# FlexAttention for the update on a GPU. It needs the layout `packed`; sampling takes sdpa in its place.
FLEX = "mmrl_flex"


@dataclass(frozen=True)
class AttentionStyle:
    """The kind of attention of a model. window: tokens seen by sliding layers, None = all layers see everything.

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
    """The attention style of a loaded transformers model; `attn_implementation` was fixed when it was loaded."""
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
    length = max(len(take) for _, take in rows)
    # Padding sees itself alone: a softmax over nothing would be NaN.
    full = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1)
    near = full.clone() if style.window is not None else full
    for row, (packed, take) in enumerate(rows):
        n = len(take)
        visible = tree_mask(packed, take)
        block = _same_image(packed, take) if style.image_blocks else torch.zeros_like(visible)
        full[row, :n, :n] = visible | block
        if style.window is not None:
            path = packed.path[take]
            in_window = path[:, None] - path[None] < style.window
            near[row, :n, :n] = (visible & in_window) | block
    longest_prefix = max(prefix or [0])
    if longest_prefix:
        # (B, longest prefix): the prompts lie on the right of the cache, padding on the left
        cached = torch.arange(longest_prefix)[None] >= longest_prefix - torch.tensor(prefix)[:, None]
        full = torch.cat([cached[:, None].expand(-1, length, -1), full], 2)
    return full, near


def _same_image(packed: Packed, take: Tensor) -> Tensor:
    """(n, n) bool, True between the placeholders of one image: one run of type 1 in the packed row."""
    is_image = packed.types == 1
    starts_run = is_image & ~torch.cat([is_image.new_zeros(1), is_image[:-1]])
    run = starts_run.cumsum(0)[take]
    in_image = is_image[take]
    return in_image[None] & in_image[:, None] & (run[None] == run[:, None])


def _as_input(visible: Tensor, style: AttentionStyle) -> Tensor:
    """(B, 1, L, K) as the attention function takes it: bool for sdpa, else 0 where visible and the lowest number."""
    mask = visible[:, None]
    if style.implementation == "sdpa":
        return mask
    lowest = torch.finfo(style.dtype).min
    return torch.zeros(mask.shape, dtype=style.dtype).masked_fill(~mask, lowest)


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
    length, longest_prefix = max(len(take) for _, take in rows), max(prefix or [0])
    # (B, L) per column its packed index and the end of its subtree; -1 at padding, which is in no tree
    place = torch.full((len(rows), length), -1, device=device)
    end = torch.full((len(rows), length), -1, device=device)
    for row, (packed, take) in enumerate(rows):
        place[row, : len(take)] = take.to(device)
        end[row, : len(take)] = packed.end[take].to(device)
    first_cached = longest_prefix - torch.tensor(prefix or [0] * len(rows), device=device)

    # b: row, h: head, q: query column, k: key column, the cache's columns first; names of `create_block_mask`
    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column = (k - longest_prefix).clamp(min=0)
        in_tree = (column <= q) & (place[b, column] <= place[b, q]) & (place[b, q] < end[b, column])
        return torch.where(k < longest_prefix, k >= first_cached[b], in_tree | (column == q))

    return create_block_mask(visible, len(rows), None, length, longest_prefix + length, device=device)
