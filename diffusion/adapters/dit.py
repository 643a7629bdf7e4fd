"""Class-conditional DiT on pixels or latents, trained by flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from diffusion.adapters.base import Cond, Level
from diffusion.kernels import Prediction, shifted_sigmas, to_x0_eps
from mmrl.registry import register
from mmrl.rollout import Prompt


@register("adapters", "DiTTransformer2DModel")
class DiTAdapter:
    """`DiTTransformer2DModel` with `FlowMatchEulerDiscreteScheduler`; prompts carry `inputs["label"]`.

    guidance_scale 1 is plain conditional sampling; above 1 the null class doubles every batch, in the update too.
    The model runs in eval() for rollout and update: in train() it drops labels, and the first ratio is not 1.
    """

    prediction: Prediction = "flow"

    def __init__(
        self,
        model: DiTTransformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        self.model: nn.Module = model.eval()
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.0)
        self.guidance_scale = guidance_scale
        c = model.config
        self.shape = (c.in_channels, c.sample_size, c.sample_size)
        self.num_classes: int = c.num_embeds_ada_norm

    @classmethod
    def from_pretrained(cls, folder: Path | str, guidance_scale: float = 1.0) -> DiTAdapter:
        """Load `folder/transformer` and `folder/scheduler`, the layout of a diffusers pipeline."""
        model = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", local_files_only=True)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        return cls(model, scheduler, guidance_scale)

    def encode(self, prompts: Sequence[Prompt]) -> Cond:
        """{"label": (B,) int}; raises ValueError for a label the model does not know."""
        labels = [p.inputs.get("label") for p in prompts]
        for p, label in zip(prompts, labels, strict=True):
            if not isinstance(label, int) or not 0 <= label < self.num_classes:
                raise ValueError(
                    f"prompt {p.id!r}: inputs.label is {label!r}; the model has classes 0..{self.num_classes - 1}"
                )
        return {"label": torch.tensor(labels)}

    def unconditional(self, cond: Cond) -> Cond:
        """The null class."""
        return {"label": torch.full_like(cond["label"], self.num_classes)}

    def schedule(self, num_steps: int) -> list[Level]:
        """The scheduler's own levels for explicitly given sigmas (set_timesteps(n) alone shifts end points twice)."""
        self.scheduler.set_timesteps(sigmas=shifted_sigmas(num_steps)[:-1].tolist())
        sigmas = self.scheduler.sigmas.double().tolist()
        scale = self.scheduler.config.num_train_timesteps
        return [Level(1 - s, s, s * scale) for s in sigmas]

    def init(self, generator: torch.Generator) -> Tensor:
        """Standard normal (C, H, W)."""
        return torch.randn(self.shape, generator=generator)

    def predict(self, model: nn.Module, x: Tensor, level: Level, cond: Cond, own: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps) from the predicted velocity."""
        label = cond["label"].to(x.device)[own]
        velocity = self._velocity(model, x, level.t, label)
        if self.guidance_scale != 1.0:
            cond_v, null_v = velocity.chunk(2)
            velocity = null_v + self.guidance_scale * (cond_v - null_v)
        return to_x0_eps(x, velocity, level.a, level.s, self.prediction)

    def _velocity(self, model: nn.Module, x: Tensor, t: float, label: Tensor) -> Tensor:
        if self.guidance_scale != 1.0:
            x, label = torch.cat([x, x]), torch.cat([label, torch.full_like(label, self.num_classes)])
        time = torch.full((x.shape[0],), t, device=x.device)
        out: Tensor = model(x, timestep=time, class_labels=label).sample
        return out[:, : self.shape[0]]  # a learned-variance half, if any, is not used

    def decode(self, x0: Tensor) -> Tensor:
        """[-1, 1] pixels to [0, 1]."""
        return (x0.float() / 2 + 0.5).clamp(0, 1)

    def save(self, model: nn.Module, folder: Path) -> None:
        """`folder/transformer` and `folder/scheduler`; a PEFT model writes its adapter under `folder/lora`."""
        from peft import PeftModel

        if isinstance(model, PeftModel):
            model.save_pretrained(str(folder / "lora"))
            return
        model.save_pretrained(folder / "transformer")  # type: ignore[operator]
        self.scheduler.save_pretrained(folder / "scheduler")
