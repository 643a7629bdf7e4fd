"""Latent rewards on families that go through diffusers' blocks: their transformer is read through its adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.adapters.base import Cond, Level
from diffusion.adapters.blocks import BlocksAdapter
from diffusion.latent.features import Family, Features, caught

TAIL = ("norm_out", "proj_out")  # behind the last block; they run, but nothing trains them


def load_denoiser(model: str, options: Mapping[str, Any]) -> BlocksAdapter:
    """The adapter of a pipeline without guidance and without text encoders: a rollout brings what they made.

    Args:
        options: `height`, `width`, `num_frames` and `call` of the policy whose samples are judged.
    """
    adapter = BlocksAdapter.from_pretrained(model, **options)
    adapter.without_guidance()
    adapter.drop_encoders()
    return adapter


def family_of(adapter: BlocksAdapter) -> Family:
    """How the transformer of an adapter is read: the mean over tokens of four blocks at even depths, layer-normalised,
    and the mean of the prompt's embeddings."""
    text_width = adapter.text_width

    def features(denoiser: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Features:
        parts, order = [], []
        for time in t.unique():  # the blocks take one time a call
            rows = (t == time).nonzero().flatten()
            mine = {name: value[rows] for name, value in cond.items()}
            s = float(time) / adapter.num_train_timesteps
            with caught(read_blocks(denoiser)) as outputs:
                own = torch.arange(len(rows), device=x.device)
                adapter.predict(denoiser, x[rows], Level(1 - s, s, float(time)), mine, own)
            parts.append([_pooled(output) for output in outputs])
            order.append(rows)
        back = torch.cat(order).argsort()
        return Features([torch.cat(depth)[back] for depth in zip(*parts, strict=True)], _mean_text(cond))

    def widths(denoiser: nn.Module) -> tuple[list[int], int]:
        c: Any = denoiser.config
        width = c.dim if "dim" in c else c.num_attention_heads * c.attention_head_dim
        return [width] * len(read_blocks(denoiser)), text_width

    def freeze_tail(denoiser: nn.Module) -> None:
        for name, module in denoiser.named_children():
            if name in TAIL:
                module.requires_grad_(False)

    def null(denoiser: nn.Module, cond: Cond) -> Cond:
        return adapter.unconditional(cond)

    return Family(("prompt_embeds",), (), freeze_tail, features, widths, null)


def read_blocks(denoiser: nn.Module) -> list[nn.Module]:
    """Four blocks at even distances, the last included; all of a shallower model."""
    stacks = [m for m in denoiser.children() if isinstance(m, nn.ModuleList)]
    blocks = [block for stack in stacks for block in stack]
    return [blocks[i] for i in sorted({-(-len(blocks) * k // 4) - 1 for k in range(1, 5)})]


def _pooled(output: Any) -> Tensor:
    """(N, C) of what a block gives: tokens of the picture, which stand last where it has two streams."""
    tokens: Tensor = output[-1] if isinstance(output, tuple) else output
    return F.layer_norm(tokens.float().mean(1), tokens.shape[-1:])


def _mean_text(cond: Cond) -> Tensor:
    """(N, P) mean of the prompt's embeddings without padding, which is zeros."""
    text = cond["prompt_embeds"].float()
    real = text.abs().sum(-1, keepdim=True) > 0
    return (text * real).sum(1) / real.sum(1).clamp(min=1)
