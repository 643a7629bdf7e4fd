"""LoRA on any denoiser: added, read, and saved in the format that diffusers' pipelines load."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers names the projections of an attention


def add_lora(
    model: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] | str | None = None
) -> Any:
    """The model as PEFT wraps it, with LoRA on some of its linear layers; the rest is frozen.

    Args:
        alpha: by default twice the rank.
        targets: ends of module names, or "all-linear"; by default the projections of attention.
    Raises:
        ValueError: no layer of the model has such a name.
    """
    from peft import LoraConfig, get_peft_model

    names = "all-linear" if targets == "all-linear" else [targets] if isinstance(targets, str) else targets
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank if alpha is None else alpha, init_lora_weights="gaussian",
        target_modules=list(ATTENTION) if names is None else names if isinstance(names, str) else list(names),
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a recipe's LoRA starts from the same weights in every run and process
            return get_peft_model(model, config).eval()
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        raise ValueError(
            f"policy.lora_targets={targets!r}: {error}; linear layers of {type(model).__name__} end in "
            f"{', '.join(sorted(linear))}"
        ) from error


def checkpoint_gradients(model: nn.Module) -> None:
    """Recompute activations in the backward pass.

    Raises:
        ValueError: no network of the model can.
    """
    from diffusers import ModelMixin

    able = [m for m in model.modules() if isinstance(m, ModelMixin) and m._supports_gradient_checkpointing]
    if not able:
        raise ValueError(f"policy.gradient_checkpointing: {type(model).__name__} cannot; leave it out")
    for network in able:
        network.enable_gradient_checkpointing()


def lora_weights(model: Any) -> dict[str, Tensor]:
    """The LoRA of a PEFT model by the names of the model inside it, such as `blocks.0.to_q.lora_A.weight`."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model)
    return {k.removeprefix("base_model.model."): v.detach().cpu().contiguous() for k, v in weights.items()}


def save_lora(model: Any, folder: Path, pipeline: Any, denoisers: Sequence[str]) -> None:
    """Write the LoRA with its configuration, without which a pipeline would take alpha = rank.

    One denoiser: `folder/pytorch_lora_weights.safetensors`; several: a folder of that kind for each. Of a pipeline
    that loads no LoRA: as PEFT writes it.
    """
    from diffusers.loaders.lora_base import LoraBaseMixin

    if not isinstance(pipeline, LoraBaseMixin):
        model.save_pretrained(str(folder))
        return
    weights, config = lora_weights(model), model.peft_config["default"].to_dict()
    for name in denoisers:
        prefix = _prefix(name, denoisers)
        layers = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        _write(layers, config, folder if not prefix else folder / name, pipeline, name)


def _write(layers: dict[str, Tensor], config: dict[str, Any], folder: Path, pipeline: Any, name: str) -> None:
    """In the format of the pipeline's own `save_lora_weights`."""
    from diffusers.utils import convert_state_dict_to_diffusers

    part = "unet" if name == "unet" else "transformer"
    layers = convert_state_dict_to_diffusers(layers) if part == "unet" else layers
    save = type(pipeline).save_lora_weights
    options: dict[str, Any] = {f"{part}_lora_layers": layers}
    metadata = f"{part}_lora_adapter_metadata"
    if metadata in inspect.signature(save).parameters:
        options[metadata] = config
    save(folder, **options)


def load_lora(model: Any, source: str | Path, pipeline: Any, denoisers: Sequence[str]) -> None:
    """Read a LoRA in diffusers' format, or as PEFT saved it, into the LoRA of a PEFT model.

    Args:
        source: a folder, file or hub name; of several denoisers a folder with one of each name, as `save_lora` writes.
    Raises:
        ValueError: it has layers that the model's LoRA lacks, or lacks some, or is of another rank.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    weights: dict[str, Tensor] = {}
    for name in denoisers:
        prefix = _prefix(name, denoisers)
        place = Path(source) / name if prefix else source
        read = type(pipeline).lora_state_dict(str(place), local_files_only=Path(place).exists())
        layers = read[0] if isinstance(read, tuple) else read
        for key, weight in layers.items():
            part, _, layer = key.partition(".")
            if part == "unet":
                # its layers have names of an older kind on disk
                ((layer, weight),) = convert_unet_state_dict_to_peft({layer: weight}).items()
            if part in ("unet", "transformer"):
                weights[prefix + layer] = weight
    _set_lora(model, weights, source)


def _prefix(name: str, denoisers: Sequence[str]) -> str:
    """Before the names of a denoiser's layers: several are one module, `Experts`."""
    return "" if len(denoisers) == 1 else f"networks.{name}."


def load_peft_lora(model: Any, folder: str | Path) -> None:
    """Read a LoRA that PEFT saved, as those of a bare transformer without a pipeline are, into that of a PEFT model.

    Raises:
        ValueError: it has layers that the model's LoRA lacks, or lacks some, or is of another rank.
    """
    from peft import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
    _set_lora(model, {k.removeprefix("base_model.model."): v for k, v in weights.items()}, folder)


def _set_lora(model: Any, theirs: Mapping[str, Tensor], source: str | Path) -> None:
    from peft import set_peft_model_state_dict

    mine = lora_weights(model)
    off = {k for k in {*mine, *theirs} if k not in mine or k not in theirs or mine[k].shape != theirs[k].shape}
    if off:
        raise ValueError(
            f"policy.lora_start={str(source)!r}: {len(off)} of its layers do not fit, such as {sorted(off)[0]}; set "
            "policy.lora_rank and policy.lora_targets to its own"
        )
    set_peft_model_state_dict(model, {f"base_model.model.{k}": v for k, v in theirs.items()})


def merged(model: Any) -> nn.Module:
    """The model with its LoRA added to its weights; the pipeline that holds it has them too.

    Raises:
        ValueError: it has none.
    """
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        raise ValueError("the model has no LoRA to merge: all its weights were trained; leave --merge out")
    return model.merge_and_unload()
