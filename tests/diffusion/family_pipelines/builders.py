"""One tiny random pipeline per family: real classes, random weights, built offline in a fraction of a second."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from family_pipelines.parts import QWEN, clip, flow, stir, t5, tokenizer, vae


@dataclass(frozen=True)
class Family:
    """A family as tests see it.

    options: of `policy`, in a recipe. plain: what the plain pipeline's call takes for the same; `negative_prompt` and
    sizes are passed to both. film: its outputs have frames. negative: it is guided by a negative prompt.
    """

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    film: bool = False
    negative: bool = True


FAMILIES: dict[str, Family] = {}


def family(**facts):
    """Enter the builder below by its name."""

    def enter(build):
        FAMILIES[build.__name__] = Family(build, **facts)
        return build

    return enter


def short(length=16):
    """Texts of few tokens: what is padded costs time."""
    return {"max_sequence_length": length}


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.5, "call": short()},
    plain=short() | {"guidance_scale": 4.5},
)
def sd3():
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=stir(transformer), scheduler=flow(shift=3.0), vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(projection=True), tokenizer=tokenizer(), text_encoder_2=clip(projection=True),
        tokenizer_2=tokenizer(), text_encoder_3=t5(32), tokenizer_3=tokenizer(),
    )  # fmt: skip


@family(
    options={"height": 16, "width": 24, "guidance_scale": 3.5, "call": short()},
    plain=short() | {"guidance_scale": 3.5},
    negative=False,
)
def flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}
    return FluxPipeline(
        transformer=stir(transformer), scheduler=flow(shift=3.0, **shift), vae=vae(scaling_factor=0.36, shift_factor=0.1),
        text_encoder=clip(), tokenizer=tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.0},
    plain={"true_cfg_scale": 4.0},
)
def qwen_image():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    text = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=QWEN | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vocab_size=QWEN["vocab_size"],
    ))  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "shift_terminal": 0.02}
    return QwenImagePipeline(
        transformer=stir(transformer), scheduler=flow(**shift), text_encoder=text, tokenizer=tokenizer(2048),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 1.0],
        ),
    )  # fmt: skip


def wan_transformer():
    from diffusers import WanTransformer3DModel

    return stir(WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    ))  # fmt: skip


def wan_pipeline(**options):
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

    return WanPipeline(
        tokenizer=tokenizer(512), text_encoder=t5(kind="UMT5"), transformer=wan_transformer(),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.1, 0.9, 1.3, 1.0],
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **options,
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0, "call": short()},
    plain=short() | {"guidance_scale": 5.0},
    film=True,
)
def wan():
    return wan_pipeline()


@family(
    options={"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0, "call": short()},
    plain=short() | {"guidance_scale": 5.0},
    film=True,
)
def wan22():
    return wan_pipeline(transformer_2=wan_transformer(), boundary_ratio=0.875)


@family(
    # its pipeline adds g (prompt - negative) to the prompt's prediction, the blocks to the negative one's
    options={"height": 16, "width": 16, "guidance_scale": 4.0},
    plain={"guidance_scale": 3.0},
)
def z_image():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=stir(transformer), scheduler=flow(shift=3.0), vae=vae(scaling_factor=0.36, shift_factor=0.1),
        text_encoder=Qwen3Model(Qwen3Config(**QWEN)), tokenizer=tokenizer(512),
    )  # fmt: skip


def save_family(name: str, folder: Path) -> Path:
    """Build a family with a fixed seed and save it as diffusers does."""
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(folder)
    return folder
