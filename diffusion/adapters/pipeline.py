"""What adapters of whole diffusers pipelines share: loading, frozen parts, devices, saving."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
from torch import nn

from diffusion.lora import save_lora

Dtype = Literal["float32", "bfloat16", "float16"]

# Names under which pipelines hold what denoises, and trains.
DENOISERS = ("unet", "transformer", "transformer_2")


@runtime_checkable
class LoraFormats(Protocol):
    """An adapter that knows a pipeline class with diffusers' formats of LoRA."""

    # a pipeline with `lora_state_dict` and `save_lora_weights`
    lora_formats: Any
    # names of the networks that have a LoRA, as the pipeline's components are called
    denoisers: list[str]


class PipelineAdapter:
    """The base of adapters that hold a diffusers pipeline; what remains of `Adapter` is encode, unconditional,
    schedule, init, predict and decode.

    Args:
        pipeline: with its components.
        denoisers: names of those that train; the others are frozen.
        encoders: names of those that only read prompts. offload_encoders: keep them on the CPU but while they do.
    """

    def __init__(
        self,
        pipeline: Any,
        denoisers: Sequence[str] = ("transformer",),
        encoders: Sequence[str] = (),
        offload_encoders: bool = False,
    ) -> None:
        self.pipeline = self.lora_formats = pipeline
        self.denoisers = list(denoisers)
        networks = {name: pipeline.components[name] for name in denoisers}
        self.model: nn.Module = networks[self.denoisers[0]] if len(networks) == 1 else Experts(networks)
        self.model.eval()
        modules = {n: m for n, m in pipeline.components.items() if isinstance(m, nn.Module) and n not in networks}
        for module in modules.values():
            module.eval().requires_grad_(False)
        self._encoders = [module for name, module in modules.items() if name in encoders]
        self._offload = offload_encoders

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, dtype: Dtype = "float32", frozen_dtype: Dtype | None = None, **options: Any
    ) -> Self:
        """The pipeline of a folder or hub name; options of the class are keys of a recipe's policy."""
        return cls(load_pipeline(folder, dtype, frozen_dtype), **options)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is; everything else follows when it is used."""
        return next(self.model.parameters()).device

    @contextmanager
    def encoding(self) -> Iterator[None]:
        """The encoders on the denoiser's device inside the block; with `offload_encoders`, on the CPU after it."""
        for encoder in self._encoders:
            encoder.to(self.device)
        yield
        if self._offload:
            for encoder in self._encoders:
                encoder.to("cpu")

    def save(self, model: nn.Module, folder: Path) -> None:
        """The whole pipeline, or the LoRA alone as `folder/lora`, for the pipeline's `load_lora_weights`."""
        from peft import PeftModel

        if isinstance(model, PeftModel):
            save_lora(model, folder / "lora", self.lora_formats, self.denoisers)
        else:
            self.pipeline.save_pretrained(folder)  # it holds the very module that trained


class Experts(nn.Module):
    """Several denoisers as one module, so that whatever wraps it sees all of them; called by name."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, name: str, *args: Any, **options: Any) -> Any:
        """What the denoiser of that name gives."""
        return self.networks[name](*args, **options)


def pipeline_index(model: str | Path) -> dict[str, Any]:
    """What a pipeline says of itself: its class and its parts; empty for a folder without an index.

    Args:
        model: a folder, or a hub name such as `stabilityai/stable-diffusion-3.5-medium`.
    Raises:
        ValueError: neither a folder nor a hub name that can be read.
    """
    from diffusers import DiffusionPipeline, ModularPipeline

    for kind in (DiffusionPipeline, ModularPipeline):
        if not Path(model).is_dir() or (Path(model) / kind.config_name).exists():
            try:
                return dict(kind.load_config(str(model), local_files_only=Path(model).is_dir()))
            except OSError as error:
                reason = str(error).splitlines()[0]
    if Path(model).is_dir():
        return {}
    raise ValueError(f"policy.model={str(model)!r} is neither a folder nor a pipeline that the hub has ({reason})")


def modular_class(index: Mapping[str, Any]) -> Any:
    """The class of the modular pipeline for an index, ordinary or modular; None where diffusers has no blocks."""
    import diffusers
    from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING
    from diffusers.pipelines.auto_pipeline import _get_model

    name = str(index.get("_class_name"))
    if "_blocks_class_name" not in index:
        find = MODULAR_PIPELINE_MAPPING.get(_get_model(name))
        # the mapping lacks families that have one pipeline alone, such as HunyuanVideo 1.5
        name = name.removesuffix("Pipeline") + "ModularPipeline" if find is None else find(dict(index))
    return getattr(diffusers, name) if name in dir(diffusers) else None


def load_pipeline(model: str | Path, dtype: Dtype = "float32", frozen_dtype: Dtype | None = None, **parts: Any) -> Any:
    """The ordinary pipeline in a folder or of a hub name, on the CPU.

    Args:
        dtype: of what denoises. frozen_dtype: of encoders and decoder, by default the same.
        parts: components to use, or to leave out (None).
    """
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(
        str(model), dtype=dtypes(dtype, frozen_dtype), local_files_only=Path(model).is_dir(), **parts
    )


def dtypes(dtype: Dtype, frozen_dtype: Dtype | None = None) -> dict[str, torch.dtype]:
    """Dtype by component: `dtype` of what denoises, `frozen_dtype` (by default the same) of the others."""
    return {"default": getattr(torch, frozen_dtype or dtype)} | dict.fromkeys(DENOISERS, getattr(torch, dtype))
