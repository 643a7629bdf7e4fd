"""Stable Diffusion 1.5, 2.1 and SDXL: a UNet on latents, with its text encoders and VAE, from a diffusers folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from diffusion.adapters.base import Cond, Level, text_of
from diffusion.adapters.pipeline import Dtype, PipelineAdapter, load_pipeline, pipeline_index
from diffusion.kernels import Prediction, to_x0_eps
from mmrl.registry import register
from mmrl.rollout import Prompt

log = logging.getLogger(__name__)

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
ENCODED_AT_ONCE = 32  # texts; the states of all layers are kept meanwhile
DECODED_AT_ONCE = 8  # pictures; a VAE takes more memory for a picture of 512 pixels than the UNet for its latent


@register("adapters", "UNet2DConditionModel")
class UNetAdapter(PipelineAdapter):
    """A `StableDiffusionPipeline` or `StableDiffusionXLPipeline`; prompts carry `inputs["prompt"]`.

    Written by hand: Stable Diffusion 1.5 and 2.1 have no modular blocks, and SDXL's step along their scheduler, while
    here a latent reward and its policy share one noise schedule.

    Only the UNet trains. Sampling is DDIM's grid on the folder's own schedule, latents are never clipped.

    Args:
        guidance_scale: 1 is plain conditional sampling; above 1 the negative prompt doubles every batch, in the update
            too.
        negative_prompt: the empty one is the pipeline's: encoded, or zeros where it says force_zeros_for_empty_prompt.
        height, width: of pictures; by default the UNet's own.
        offload_encoders: see `PipelineAdapter`.
    """

    def __init__(
        self,
        pipeline: Any,
        guidance_scale: float = 1.0,
        *,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        offload_encoders: bool = False,
    ) -> None:
        from diffusers import DDIMScheduler

        self.xl = "text_encoder_2" in pipeline.components
        super().__init__(pipeline, ["unet"], ["text_encoder", "text_encoder_2"], offload_encoders)
        self.guidance_scale, self._negative_prompt = guidance_scale, negative_prompt
        # DDIMScheduler would clip latents to [-1, 1] where a folder does not say otherwise
        self.scheduler: Any = DDIMScheduler.from_config(
            pipeline.scheduler.config, clip_sample=False, thresholding=False
        )
        self.prediction = _prediction(pipeline)
        c, scale = pipeline.unet.config, pipeline.vae_scale_factor
        own = c.sample_size if isinstance(c.sample_size, Sequence) else (c.sample_size, c.sample_size)
        size = (height // scale if height else own[0], width // scale if width else own[1])
        if (height or 0) % scale or (width or 0) % scale:
            raise ValueError(f"policy.height={height}, policy.width={width}: multiples of {scale} are needed")
        self.shape: tuple[int, int, int] = (c.in_channels, *size)
        self._cut: set[str] = set()  # prompts that were reported as too long

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        guidance_scale: float = 1.0,
        *,
        dtype: Dtype = "float32",
        frozen_dtype: Dtype | None = None,
        **options: Any,
    ) -> Self:
        """A saved pipeline or its hub name, without its safety checker.

        Raises:
            ValueError: a folder of another pipeline, or of one whose noise this adapter cannot place.
        """
        name = pipeline_index(folder).get("_class_name")
        if name not in PIPELINES:
            told = f"model_index.json says {name}" if name else "there is no model_index.json"
            raise ValueError(f"policy.model={str(folder)!r}: {told}; it must be a saved {' or '.join(PIPELINES)}")
        unused: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
        if name == PIPELINES[0]:
            unused |= {"safety_checker": None, "requires_safety_checker": False}
        return cls(load_pipeline(folder, dtype, frozen_dtype, **unused), guidance_scale, **options)

    # ---- text -------------------------------------------------------------------------------------------------

    def _text_models(self) -> list[tuple[Any, Any]]:
        """(tokenizer, text encoder), two of each in SDXL."""
        p = self.pipeline
        first = [(p.tokenizer, p.text_encoder)]
        return [*first, (p.tokenizer_2, p.text_encoder_2)] if self.xl else first

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt]) -> Cond:
        """Text, pooled text and those of the negative prompt, one row per prompt; a latent reward reads them too.

        text, null_text: (B, L, C). pooled, null_pooled: (B, P). time_ids, with SDXL: (B, 6), its size conditions for
        a whole picture of the UNet's own size.

        Raises:
            ValueError: a prompt without text.
        """
        self._tell_cut(prompts)
        texts = [*(text_of(p) for p in prompts), self._negative_prompt]
        starts = range(0, len(texts), ENCODED_AT_ONCE)
        with self.encoding():
            parts = [self._encode_texts(texts[i : i + ENCODED_AT_ONCE]) for i in starts]
        text, pooled = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
        null_text, null_pooled = text[-1:], pooled[-1:]
        if self.xl and not self._negative_prompt and self.pipeline.config.force_zeros_for_empty_prompt:
            null_text, null_pooled = torch.zeros_like(null_text), torch.zeros_like(null_pooled)
        n = len(prompts)
        cond = {"text": text[:-1], "pooled": pooled[:-1]}
        cond |= {"null_text": null_text.repeat(n, 1, 1), "null_pooled": null_pooled.repeat(n, 1)}
        if self.xl:
            height, width = (v * self.pipeline.vae_scale_factor for v in self.shape[1:])
            ids = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
            cond["time_ids"] = ids.repeat(n, 1)
        return cond

    def unconditional(self, cond: Cond) -> Cond:
        """The negative prompt, by default the pipeline's empty one."""
        return {**cond, "text": cond["null_text"], "pooled": cond["null_pooled"]}

    def _encode_texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, L, C) and (B, P): the last states and their pooled one, in SDXL the last but one of both encoders."""
        device = self.device
        out = []
        for tokenizer, encoder in self._text_models():
            room = {"truncation": True, "padding": "max_length", "max_length": tokenizer.model_max_length}
            ids = tokenizer(list(texts), return_tensors="pt", **room)
            mask = ids.get("attention_mask") if encoder.config.to_dict().get("use_attention_mask", False) else None
            mask = None if mask is None else mask.to(device)
            out.append(encoder(ids["input_ids"].to(device), attention_mask=mask, output_hidden_states=True))
        if self.xl:
            return torch.cat([o.hidden_states[-2] for o in out], -1), out[-1].text_embeds
        return out[0].last_hidden_state, out[0].pooler_output

    def _tell_cut(self, prompts: Sequence[Prompt]) -> None:
        """Warn, once per prompt, of words the text encoder will not see."""
        tokenizer = self.pipeline.tokenizer
        for p in prompts:
            n = len(tokenizer(text_of(p), verbose=False)["input_ids"])  # its own warning speaks of errors to come
            if n > tokenizer.model_max_length and p.id not in self._cut:
                self._cut.add(p.id)
                told = "prompt %r has %d tokens; the text encoder reads the first %d"
                log.warning(told, p.id, n, tokenizer.model_max_length)

    # ---- denoising --------------------------------------------------------------------------------------------

    def schedule(self, num_steps: int) -> list[Level]:
        """The scheduler's own times, and last the level that its DDIM ends at: for Stable Diffusion that of t = 0.

        20 steps of Stable Diffusion are t = 951, 901, .. 1 ("leading" with an offset of 1).
        """
        self.scheduler.set_timesteps(num_steps)
        times = self.scheduler.timesteps.tolist()
        abar = [*self.scheduler.alphas_cumprod[times].double().tolist(), float(self.scheduler.final_alpha_cumprod)]
        return [Level(b**0.5, (1 - b) ** 0.5, float(t)) for b, t in zip(abar, [*times, 0], strict=True)]

    def init(self, generator: torch.Generator) -> Tensor:
        """Standard normal (C, H, W)."""
        return torch.randn(self.shape, generator=generator)

    def predict(self, model: nn.Module, x: Tensor, level: Level, cond: Cond, own: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from what the UNet predicts, guided in its own terms as the pipelines do."""
        dtype = next(self.model.parameters()).dtype
        rows = {k: v.to(x.device)[own].to(dtype) for k, v in cond.items()}
        text, pooled = rows["text"], rows["pooled"]
        guided = self.guidance_scale != 1.0
        latents = x
        if guided:
            latents = torch.cat([x, x])
            text, pooled = torch.cat([rows["null_text"], text]), torch.cat([rows["null_pooled"], pooled])
        added = None
        if self.xl:
            ids = rows["time_ids"]
            added = {"text_embeds": pooled, "time_ids": torch.cat([ids, ids]) if guided else ids}
        time = torch.full((len(latents),), level.t, device=x.device)
        out: Tensor = model(latents.to(dtype), time, encoder_hidden_states=text, added_cond_kwargs=added).sample
        if guided:
            null, full = out.float().chunk(2)
            out = null + self.guidance_scale * (full - null)
        return to_x0_eps(x, out, level.a, level.s, self.prediction)

    def decode(self, x0: Tensor) -> Tensor:
        """(N, 3, H, W) pictures in [0, 1] of latents, a few at a time; gradients flow."""
        vae: Any = self.pipeline.vae.to(x0.device)
        latents = x0.float() / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        pictures = [vae.decode(part.to(vae.dtype)).sample for part in latents.split(DECODED_AT_ONCE)]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1)


def _prediction(pipeline: Any) -> Prediction:
    """What the UNet predicts, by its scheduler.

    Raises:
        ValueError: noise that is no table of alphas (EDM, flow), or latents whose scale is more than one factor.
    """
    scheduler, c = pipeline.scheduler, pipeline.vae.config
    kind = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}.get(
        scheduler.config.get("prediction_type", "epsilon")
    )
    if kind is None or "alphas_cumprod" not in vars(scheduler):
        raise ValueError(
            f"policy.model: {type(scheduler).__name__} with prediction_type "
            f"{scheduler.config.get('prediction_type')!r} is no schedule of epsilon, v_prediction or sample models "
            "with alphas_cumprod; use a folder whose scheduler/ is such a one"
        )
    if c.get("latents_mean") is not None:
        raise ValueError("policy.model: a VAE with latents_mean is not supported; its latents are scaled per channel")
    return cast(Prediction, kind)
