"""Features of a denoiser for a latent reward: pooled hidden states of some depths, and one of the condition.

A model family is one `Family`: four small functions and nothing else. Features are caught by forward hooks, so the
models run as their library wrote them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.adapters.base import Cond
from mmrl.registry import Kind, add_kind, register

# Named by the class of the denoiser.
add_kind(Kind("latent_families", "family of latent features"))


class Features(NamedTuple):
    """scales: one (N, C_k) per depth, shallow first; the last one is what VFE enhances. condition: (N, P)."""

    scales: list[Tensor]
    condition: Tensor


@dataclass(frozen=True)
class Family:
    """The reading of one kind of denoiser.

    needs, null_needs: entries of the conditions that scoring takes, and further ones for the empty prompt.
    prepare: removes or freezes, in place, what lies behind the last feature.
    features: (denoiser, x (N, *D), t (N,), cond rows) -> Features, differentiable.
    widths: (denoiser) -> the C_k and P. null: (denoiser, cond rows) -> those of the empty prompt.
    enhance: weight of visual feature enhancement by default, 1 = off.
    """

    needs: tuple[str, ...]
    null_needs: tuple[str, ...]
    prepare: Callable[[nn.Module], None]
    features: Callable[[nn.Module, Tensor, Tensor, Cond], Features]
    widths: Callable[[nn.Module], tuple[list[int], int]]
    null: Callable[[nn.Module, Cond], Cond]
    enhance: float = 1.0


@contextmanager
def caught(modules: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """A list that holds, in the order the modules ran, what each gave while the block was active."""
    out: list[Any] = []
    hooks = [m.register_forward_hook(lambda _m, _args, result: out.append(result)) for m in modules]
    try:
        yield out
    finally:
        for h in hooks:
            h.remove()


# ---- UNet (SD 1.5, 2.1, SDXL) -----------------------------------------------------------------------------------


def _trim_unet(unet: Any) -> None:
    """Down and mid blocks only, as LRM: the up blocks would cost half of every forward and train on nothing."""
    unet.up_blocks, unet.conv_out = nn.ModuleList(), nn.Identity()
    unet.conv_norm_out = unet.conv_act = None


def _unet_features(unet: Any, x: Tensor, t: Tensor, cond: Cond) -> Features:
    """Mean over space of the last resnet (or attention) output of each down block before its downsampler, and of mid.

    In SD 1.5 these are the residuals 2, 5, 8, 11 and the mid block (4800 channels), in SDXL 2, 5, 8 and mid (3520).
    """
    added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "time_ids" in cond else None
    with caught([*unet.down_blocks, unet.mid_block]) as got:
        unet(x, t, encoder_hidden_states=cond["text"], added_cond_kwargs=added)
    last = [residuals[len(b.resnets) - 1] for b, (_, residuals) in zip(unet.down_blocks, got, strict=False)]
    return Features([h.float().mean((2, 3)) for h in (*last, got[-1])], cond["pooled"].float())


def _unet_widths(unet: Any) -> tuple[list[int], int]:
    c = unet.config
    channels = list(c.block_out_channels)
    if c.addition_embed_type == "text_time":  # SDXL: what its added embedding takes, less six embedded time ids
        return [*channels, channels[-1]], c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    return [*channels, channels[-1]], c.cross_attention_dim


def _unet_null(unet: Any, cond: Cond) -> Cond:
    return cond | {"text": cond["null_text"], "pooled": cond["null_pooled"]}


# ---- class-conditional DiT --------------------------------------------------------------------------------------


def _freeze_tail(dit: Any) -> None:
    """The output layers run, but nothing trains them: without a gradient DDP would wait for them."""
    for m in (dit.norm_out, dit.proj_out_1, dit.proj_out_2):
        m.requires_grad_(False)


def _dit_blocks(dit: Any) -> list[nn.Module]:
    """Four blocks at even distances, the last included; all of a shallower model."""
    blocks = dit.transformer_blocks
    return [blocks[i] for i in sorted({-(-len(blocks) * k // 4) - 1 for k in range(1, 5)})]


def _dit_features(dit: Any, x: Tensor, t: Tensor, cond: Cond) -> Features:
    """Mean over tokens of each block, layer-normalised (a residual stream grows with depth), and the label embedding.

    For classes the label embedding is what the pooled text is for prompts.
    """
    with caught(_dit_blocks(dit)) as got:
        dit(x, timestep=t, class_labels=cond["label"])
    label = dit.transformer_blocks[0].norm1.emb.class_embedder(cond["label"])
    return Features([F.layer_norm(h.float().mean(1), h.shape[-1:]) for h in got], label.float())


def _dit_widths(dit: Any) -> tuple[list[int], int]:
    width = dit.config.num_attention_heads * dit.config.attention_head_dim
    return [width] * len(_dit_blocks(dit)), width


def _dit_null(dit: Any, cond: Cond) -> Cond:
    return cond | {"label": torch.full_like(cond["label"], dit.config.num_embeds_ada_norm)}


register("latent_families", "UNet2DConditionModel", source="LRM, 2025")(
    Family(
        ("text", "pooled"),
        ("null_text", "null_pooled"),
        _trim_unet,
        _unet_features,
        _unet_widths,
        _unet_null,
        enhance=7.5,
    )
)
register("latent_families", "DiTTransformer2DModel")(
    Family(("label",), (), _freeze_tail, _dit_features, _dit_widths, _dit_null)
)
