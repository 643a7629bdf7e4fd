"""The weights that train: LoRA on the language model, a saved adapter that trains on, image encoder frozen or not."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mmrl.reference import Adapted, bare
from vision.inputs.loading import adapter_base

log = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """LoRA of a recipe.

    Args:
        rank: 0 trains all weights, or goes on with the adapter that the model's folder holds.
        alpha: by default twice the rank.
        targets: ends of module names in the language model, or "all-linear"; by default the projections of attention
            and MLP (`PROJECTIONS`).
    """

    rank: int = 0
    alpha: float | None = None
    targets: Sequence[str] | str | None = None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora_rank={self.rank}: 0 (no LoRA) or above")
        if not self.rank and (self.alpha, self.targets) != (None, None):
            raise ValueError("lora_alpha and lora_targets are for a new LoRA; set lora_rank")


def image_parameters(hf: Any) -> list[nn.Parameter]:
    """Parameters outside the language model and its output layer: image encoder and projector."""
    inner = bare(hf)
    language: set[int] = set()
    for part in (inner.get_decoder(), inner.get_output_embeddings()):
        language |= {id(weight) for weight in part.parameters()}
    return [weight for weight in inner.parameters() if id(weight) not in language]


def add_lora(hf: Any, options: LoraOptions) -> Any:
    """A PEFT model with a new LoRA on linear layers of the language model.

    Dropout stays 0: siblings share tokens, so a draw would be shared too and rows would differ from trees.

    Raises:
        ValueError: no layer of the language model has such a name.
    """
    from peft import LoraConfig, get_peft_model

    decoder = hf.get_decoder()
    prefix = next(name for name, module in hf.named_modules() if module is decoder)
    linear = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    chosen = sorted(linear) if options.targets == "all-linear" else options.targets or PROJECTIONS
    names = [chosen] if isinstance(chosen, str) else list(chosen)
    # names of a recipe must all be there; of the usual ones, a family with fused projections lacks some
    missing = [name for name in names if name.rpartition(".")[2] not in linear]
    if missing and (options.targets is not None or len(missing) == len(names)):
        raise ValueError(
            f"lora_targets: the language model of {type(hf).__name__} has no linear layer {', '.join(missing)}; its "
            f"linear layers end in {', '.join(sorted(linear))}"
        )
    if missing:
        log.warning(
            "LoRA reaches %s alone: %s has no %s; its linear layers end in %s (policy.lora_targets: all-linear)",
            ", ".join(n for n in names if n not in missing), type(hf).__name__, ", ".join(missing),
            ", ".join(sorted(linear)),
        )  # fmt: skip
    targets = rf"{prefix}\..*\.({'|'.join(re.escape(name) for name in names)})"
    alpha = 2 * options.rank if options.alpha is None else options.alpha
    return get_peft_model(
        hf, LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
    )


def load_adapter(hf: Any, folder: str | Path, named: LoraOptions | None = None) -> Any:
    """A PEFT model with the adapter in a folder, which trains on.

    Args:
        named: a LoRA that the recipe names beside it.
    Raises:
        ValueError: the adapter has another rank, alpha or other targets.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    if named is not None and named.rank and (named.rank, named.alpha, named.targets) != (config.r, None, None):
        raise ValueError(
            f"lora_rank={named.rank}: the adapter in {folder} has rank {config.r} and trains on with its own alpha "
            "and layers; leave lora_rank, lora_alpha and lora_targets out"
        )
    # written by another trainer, it may have dropout: see `add_lora`
    config.lora_dropout = 0.0
    # the same base, by a path that may be absolute now
    config.base_model_name_or_path = hf.config.name_or_path
    return PeftModel.from_pretrained(hf, str(folder), config=config, is_trainable=True)


def adapter_rank(folder: str | Path) -> int:
    """Rank of the adapter in a folder, 0 where it holds none."""
    from peft import PeftConfig

    return 0 if adapter_base(folder) is None else int(PeftConfig.from_pretrained(str(folder)).r)


def merged(hf: Any) -> Any:
    """The model with its adapter added to its weights.

    Raises:
        ValueError: it has none.
    """
    if not isinstance(hf, Adapted):
        raise ValueError("the model has no adapter to merge: all its weights were trained; leave --merge out")
    return hf.merge_and_unload()  # type: ignore[attr-defined]


def trained_options(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Options that read what a run with these options saved: an adapter brings its own rank, alpha and layers."""
    kept = {k: v for k, v in options.items() if k not in ("lora_rank", "lora_alpha", "lora_targets")}
    return {**kept, "model": str(folder)}
