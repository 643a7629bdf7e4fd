"""PixArt-Sigma, added from outside: `policy.adapter: "family_pipelines.pixart:PixArtAdapter"`."""

import torch
from diffusers import DDIMScheduler

from diffusion.adapters.base import Level, text_of
from diffusion.adapters.pipeline import PipelineAdapter
from diffusion.kernels import to_x0_eps


class PixArtAdapter(PipelineAdapter):
    """A `PixArtSigmaPipeline`: it predicts noise, and a variance that is not used; sampling is DDIM's grid."""

    prediction = "epsilon"

    def __init__(self, pipeline, guidance_scale=4.5, negative_prompt="", height=1024, width=1024, **options):
        super().__init__(pipeline, ["transformer"], ["text_encoder"], **options)
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        self.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        scale = pipeline.vae_scale_factor
        self.shape = (pipeline.transformer.config.in_channels, height // scale, width // scale)

    @torch.no_grad()
    def encode(self, prompts):
        texts = [text_of(p) for p in prompts]
        with self.encoding():
            out = self.pipeline.encode_prompt(
                texts, negative_prompt=self.negative_prompt, device=self.device, do_classifier_free_guidance=True
            )
        return dict(zip(("text", "mask", "null_text", "null_mask"), out, strict=True))

    def unconditional(self, cond):
        return cond | {"text": cond["null_text"], "mask": cond["null_mask"]}

    def schedule(self, num_steps):
        self.scheduler.set_timesteps(num_steps)
        times = self.scheduler.timesteps.tolist()
        abar = [*self.scheduler.alphas_cumprod[times].double().tolist(), float(self.scheduler.final_alpha_cumprod)]
        return [Level(b**0.5, (1 - b) ** 0.5, t) for b, t in zip(abar, [*times, 0], strict=True)]

    def init(self, generator):
        return torch.randn(self.shape, generator=generator)

    def predict(self, model, x, level, cond, own):
        rows = {name: value.to(x.device)[own] for name, value in cond.items()}
        text, mask, latents = rows["text"], rows["mask"], x
        if guided := self.guidance_scale != 1:
            text, mask = torch.cat([rows["null_text"], text]), torch.cat([rows["null_mask"], mask])
            latents = torch.cat([x, x])
        dtype = self.pipeline.transformer.dtype
        noise = model(
            latents.to(dtype), encoder_hidden_states=text.to(dtype), encoder_attention_mask=mask,
            timestep=torch.full((len(latents),), level.t, device=x.device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.float()  # fmt: skip
        if guided:
            null, full = noise.chunk(2)
            noise = null + self.guidance_scale * (full - null)
        return to_x0_eps(x, noise[:, : self.shape[0]], level.a, level.s, self.prediction)

    def decode(self, x0):
        vae = self.pipeline.vae.to(x0.device)
        pictures = [vae.decode(x[None].to(vae.dtype) / vae.config.scaling_factor).sample for x in x0]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1)
