"""Which weights train: LoRA on the language model, image encoder frozen or not."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmrl.reference import bare

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def image_parameters(hf: Any) -> list[nn.Parameter]:
    """Parameters outside the language model and its output layer: image encoder and projector."""
    inner = bare(hf)
    language = {id(p) for part in (inner.get_decoder(), inner.get_output_embeddings()) for p in part.parameters()}
    return [p for p in inner.parameters() if id(p) not in language]


def add_lora(hf: Any, rank: int) -> Any:
    """A PEFT model with LoRA of this rank (alpha twice the rank, no dropout) on the language model's projections.

    Dropout must stay 0: siblings share tokens, so a draw would be shared too and rows would differ from trees.

    Raises:
        ValueError: rank below 1.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise ValueError(f"policy.lora_rank={rank}: at least 1")
    decoder = next(name for name, module in hf.named_modules() if module is hf.get_decoder())
    targets = rf"{decoder}\..*\.({'|'.join(PROJECTIONS)})"
    return get_peft_model(hf, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM"))
