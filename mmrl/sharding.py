"""Weights that FSDP2 keeps in parts: who has them, and how to see them whole.

Every function here that gathers is a collective: all ranks must call it, in the same order.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mmrl.config import ConfigError
from mmrl.registry import find

WAY_OUT = "start plain processes (tools/launch.sh without ACCELERATE_CONFIG)"


def check_launcher(kind: str, section: str, name: str) -> None:
    """Refuse what `accelerate launch` was told to do where it could not be right; called before a model is loaded.

    Args:
        kind, section, name: the row of what is trained, and where the recipe names it.

    Raises:
        ConfigError: DeepSpeed, Megatron-LM or FSDP 1; or weights in parts, for a row that declares `shardable=False`.
    """
    for variable, strategy in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if _is_set(variable):
            raise ConfigError(
                f"{strategy} takes a step at every backward, while here a step has several and their number varies; "
                f"shard by FSDP2 instead (ACCELERATE_CONFIG=configs/accelerate/fsdp2.yaml), or {WAY_OUT}"
            )
    if not sharding_asked():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError(
            "FSDP 1 is not supported; set fsdp_version: 2 in the file of ACCELERATE_CONFIG, as in "
            "configs/accelerate/fsdp2.yaml"
        )
    if not find(kind, name).facts.get("shardable", True):
        raise ConfigError(f"{section}.name={name!r} cannot be trained with sharded weights; {WAY_OUT}")


def sharding_asked() -> bool:
    """Whether `accelerate launch` was told to shard; it does not where processes run on a CPU, or there is one."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of `model` is held in parts. Every forward of such a model is a collective."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def whole(x: Tensor) -> Tensor:
    """The full tensor; a tensor that is not sharded as it is, without communication."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_part(x: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def tied_names(model: nn.Module) -> set[str]:
    """The further names of parameters that have several."""
    return {n for n, _ in model.named_parameters(remove_duplicate=False)} - {n for n, _ in model.named_parameters()}


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights of a sharded model by name, on the CPU of rank 0; empty on the other ranks. All ranks call it.

    Tied weights appear once, under their first name: gathered, they no longer share memory, and would be saved twice.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    again = tied_names(model)
    state: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {name: w for name, w in state.items() if name not in again}


def keep_float32(plugin: Any) -> None:
    """Let accelerate's FSDP2 plugin compute in low precision, but neither return nor reduce in it.

    Its own policy rounds whatever the model returns. Here that is log-probs: in bfloat16 a log-prob of -5 is off by
    up to 0.016, and ratios of old and new ones would be noise.
    """
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)
