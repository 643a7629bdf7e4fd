"""One tiny random pipeline per family: real classes, random weights, built offline in a fraction of a second."""

import tempfile
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
    adapter: "blocks", or whose it is.
    """

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    film: bool = False
    negative: bool = True
    adapter: str = "blocks"


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


def unet_pipeline(kind):
    from diffusers import DiffusionPipeline
    from test_unet import save_pipeline

    with tempfile.TemporaryDirectory() as folder:
        return DiffusionPipeline.from_pretrained(save_pipeline(Path(folder) / kind, kind))


@family(options={"guidance_scale": 5.0}, plain={"guidance_scale": 5.0}, adapter="by hand")
def stable_diffusion():
    return unet_pipeline("sd")


@family(options={"guidance_scale": 5.0}, plain={"guidance_scale": 5.0}, adapter="by hand")
def stable_diffusion_xl():
    return unet_pipeline("xl")


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


def flux2_vae():
    from diffusers import AutoencoderKLFlux2

    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    made.bn.running_mean.normal_(std=0.1)
    made.bn.running_var.uniform_(0.8, 1.2)
    return made


def flux2_transformer(**options):
    from diffusers import Flux2Transformer2DModel

    return stir(Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), **options,
    ))  # fmt: skip


def mistral(**options):
    from transformers import Mistral3Config

    return Mistral3Config(
        text_config={"model_type": "mistral", **QWEN}, image_token_index=3,
        vision_config={"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                       "num_attention_heads": 2, "image_size": 16, "patch_size": 8}, **options,
    )  # fmt: skip


LAYERS = {"text_encoder_out_layers": (0, 1, 2)}
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.0, "call": short(200) | LAYERS},
    plain=short(200) | LAYERS | {"guidance_scale": 4.0},
    negative=False,
)
def flux2():
    from diffusers import Flux2Pipeline
    from transformers import Mistral3ForConditionalGeneration

    return Flux2Pipeline(
        scheduler=flow(**DYNAMIC), vae=flux2_vae(), text_encoder=Mistral3ForConditionalGeneration(mistral()),
        tokenizer=tokenizer(512), transformer=flux2_transformer(),
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.0, "call": short(40) | LAYERS},
    plain=short(40) | LAYERS | {"guidance_scale": 4.0},
    negative=False,
)
def flux2_klein():
    from diffusers import Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Flux2KleinPipeline(
        scheduler=flow(**DYNAMIC), vae=flux2_vae(), text_encoder=Qwen3ForCausalLM(Qwen3Config(**QWEN)),
        tokenizer=tokenizer(512), transformer=flux2_transformer(guidance_embeds=False),
    )  # fmt: skip


# No input of its pipelines sets them, and 2000 tokens a sample take minutes here.
HUNYUAN_LENGTHS = {"tokenizer_max_length": 16, "tokenizer_2_max_length": 8, "vision_num_semantic_tokens": 4}


@family(options={"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 5.0}, film=True)
def hunyuan_video15():
    from diffusers import (
        AutoencoderKLHunyuanVideo15,
        ClassifierFreeGuidance,
        HunyuanVideo15ModularPipeline,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    for name, length in HUNYUAN_LENGTHS.items():  # of its blocks; those of the pipeline are set where it is loaded
        setattr(HunyuanVideo15ModularPipeline, name, length)
    text = Qwen2_5_VLTextConfig(**QWEN, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
    glyphs = t5(16)
    return HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(text), tokenizer=tokenizer(2048), text_encoder_2=glyphs,
        tokenizer_2=ByT5Tokenizer(), scheduler=flow(shift=7.0), guider=ClassifierFreeGuidance(guidance_scale=5.0),
        transformer=stir(HunyuanVideo15Transformer3DModel(
            in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
            num_refiner_layers=1, text_embed_dim=16, text_embed_2_dim=16, image_embed_dim=16,
            rope_axes_dim=(4, 6, 6), target_size=16, task_type="t2v",
        )),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4,
            temporal_compression_ratio=4, downsample_match_channel=False, upsample_match_channel=False,
        ),
    )  # fmt: skip


@family(
    options={"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 3.0, "call": short()},
    plain=short() | {"guidance_scale": 3.0},
    film=True,
)
def ltx():
    from diffusers import AutoencoderKLLTXVideo, LTXPipeline, LTXVideoTransformer3DModel

    decoder = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    decoder.latents_mean.normal_(std=0.1)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    shift = {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "shift_terminal": 0.1}
    return LTXPipeline(
        scheduler=flow(**shift),
        vae=decoder,
        text_encoder=t5(),
        tokenizer=tokenizer(128),
        transformer=stir(transformer),
    )


def qwen3_vl(layers):
    from transformers import Qwen3VLConfig

    text = QWEN | {"num_hidden_layers": layers, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
    return Qwen3VLConfig(
        text_config=text, vocab_size=QWEN["vocab_size"],
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
                       "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    )  # fmt: skip


def qwen_vae():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 1.0],
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.5, "call": short(32)},
    plain=short(32) | {"guidance_scale": 3.5},
)
def krea2():
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel
    from transformers import Qwen3VLModel

    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=12,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return Krea2Pipeline(
        scheduler=flow(**DYNAMIC), vae=qwen_vae(), text_encoder=Qwen3VLModel(qwen3_vl(36)), tokenizer=tokenizer(1024),
        transformer=stir(transformer), text_encoder_select_layers=list(range(2, 36, 3)),
    )  # fmt: skip


@family(options={"height": 16, "width": 16, "guidance_scale": 4.0}, plain={"guidance_scale": 4.0})
def ernie_image():
    from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel
    from transformers import Mistral3Model

    transformer = ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return ErnieImagePipeline(
        transformer=stir(transformer), vae=flux2_vae(), text_encoder=Mistral3Model(mistral()),
        tokenizer=tokenizer(64), scheduler=flow(shift=3.0),
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "guidance_scale": 5.0, "call": short(64)},
    plain=short(64) | {"guidance_scale": 5.0, "guidance_schedule": None},
    negative=False,
)
def ideogram4():
    from diffusers import Ideogram4Pipeline, Ideogram4Transformer2DModel
    from transformers import Qwen3VLModel

    def transformer():
        return stir(Ideogram4Transformer2DModel(
            in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=13 * 16, mrope_section=(4, 2, 2),
        ))  # fmt: skip

    return Ideogram4Pipeline(
        scheduler=flow(), vae=flux2_vae(), text_encoder=Qwen3VLModel(qwen3_vl(36)), tokenizer=tokenizer(512),
        transformer=transformer(), unconditional_transformer=transformer(),
    )  # fmt: skip


@family(
    options={"height": 32, "width": 32, "guidance_scale": 4.5, "adapter": "family_pipelines.sana:SanaAdapter"},
    plain={"guidance_scale": 4.5, "use_resolution_binning": False, "complex_human_instruction": None},
    adapter="from outside",
)
def sana():
    from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    blocks = ("ResBlock", "EfficientViTBlock")
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    decoder = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.5,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokenizer(64), text_encoder=Gemma2Model(Gemma2Config(**QWEN)), vae=decoder,
        transformer=stir(transformer), scheduler=flow(shift=3.0),
    )  # fmt: skip


@family(
    options={"height": 16, "width": 16, "guidance_scale": 4.5, "adapter": "family_pipelines.pixart:PixArtAdapter"},
    plain={"guidance_scale": 4.5, "use_resolution_binning": False},
    adapter="from outside",
)
def pixart_sigma():
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, caption_channels=16, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(
        tokenizer=tokenizer(64), text_encoder=t5(), vae=vae(scaling_factor=0.13), transformer=stir(transformer),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, timestep_spacing="leading"),
    )  # fmt: skip


def save_family(name: str, folder: Path) -> Path:
    """Build a family with a fixed seed and save it as diffusers does."""
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(folder)
    return folder
