"""The model before training, for the KL: adapters switched off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from mmrl.sharding import is_sharded


def unwrap(model: nn.Module) -> nn.Module:
    """Without the DDP wrapper, whose forward synchronises: ranks make unequal numbers of rollout calls."""
    inner = getattr(model, "module", model)
    return inner if isinstance(inner, nn.Module) else model


class Reference:
    """Remembers the initial weights once and lends the model that has them, without gradients."""

    def __init__(self) -> None:
        self._copy: nn.Module | None = None

    def freeze(self, model: nn.Module, adapters: nn.Module) -> None:
        """Keep a frozen copy of `model`, unless `adapters` (the module PEFT wraps) can be switched off.

        It is made before FSDP shards the weights, so every rank has a whole copy, which it runs without the others.
        """
        if not hasattr(adapters, "disable_adapter"):
            self._copy = copy.deepcopy(unwrap(model)).requires_grad_(False)

    @contextmanager
    def applied(self, model: nn.Module, adapters: nn.Module) -> Iterator[nn.Module]:
        """The initial model inside the block.

        Raises:
            RuntimeError: neither a copy nor adapters to switch off, or the adapters' weights are sharded.
        """
        off = getattr(adapters, "disable_adapter", None)
        if self._copy is None and off is None:
            raise RuntimeError("call freeze_reference() before training starts; the KL needs the initial weights")
        if self._copy is None and is_sharded(model):  # one more collective than the ranks with nothing to train make
            raise RuntimeError("the KL of a LoRA model cannot run sharded; set loss.kl=0 or unset ACCELERATE_CONFIG")
        if self._copy is not None:  # it was copied before the model moved to its device
            self._copy.to(next(model.parameters()).device)
        with off() if off is not None else nullcontext(), torch.no_grad():
            yield self._copy if self._copy is not None else unwrap(model)
