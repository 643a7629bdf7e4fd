"""Sana, added from outside: `policy.adapter: "family_pipelines.sana:SanaAdapter"`."""

import torch

from diffusion.adapters.base import Level, text_of
from diffusion.adapters.pipeline import PipelineAdapter
from diffusion.kernels import to_x0_eps


class SanaAdapter(PipelineAdapter):
    """A `SanaPipeline`: flow matching, linear attention, classifier-free guidance in one batch of two halves."""

    prediction = "flow"

    def __init__(self, pipeline, guidance_scale=4.5, negative_prompt="", height=1024, width=1024, **options):
        super().__init__(pipeline, ["transformer"], ["text_encoder"], **options)
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
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
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(num_steps)
        times = [*scheduler.timesteps.tolist(), 0]
        return [Level(1 - s, s, t) for s, t in zip(scheduler.sigmas.double().tolist(), times, strict=True)]

    def init(self, generator):
        return torch.randn(self.shape, generator=generator)

    def predict(self, model, x, level, cond, own):
        rows = {name: value.to(x.device)[own] for name, value in cond.items()}
        text, mask, latents = rows["text"], rows["mask"], x
        if guided := self.guidance_scale != 1:
            text, mask = torch.cat([rows["null_text"], text]), torch.cat([rows["null_mask"], mask])
            latents = torch.cat([x, x])
        network = self.pipeline.transformer
        time = torch.full((len(latents),), level.t * network.config.timestep_scale, device=x.device)
        velocity = model(
            latents.to(network.dtype), encoder_hidden_states=text.to(network.dtype), encoder_attention_mask=mask,
            timestep=time,
        ).sample.float()  # fmt: skip
        if guided:
            null, full = velocity.chunk(2)
            velocity = null + self.guidance_scale * (full - null)
        return to_x0_eps(x, velocity[:, : self.shape[0]], level.a, level.s, self.prediction)

    def decode(self, x0):
        vae = self.pipeline.vae.to(x0.device)
        pictures = [vae.decode(x[None].to(vae.dtype) / vae.config.scaling_factor).sample for x in x0]
        return (torch.cat(pictures).float() / 2 + 0.5).clamp(0, 1)
