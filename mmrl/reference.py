"""The model before training, for the KL: adapters switched off, or a frozen copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmrl.sharding import is_sharded, tied_names


@runtime_checkable
class Adapted(Protocol):
    """A model with adapters, as PEFT wraps it."""

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Without the adapters inside the block."""

    def get_base_model(self) -> Any:
        """The model without the wrapper; its adapters stay in force."""


def bare(model: Any) -> Any:
    """The model without PEFT's wrapper; its adapters stay in force."""
    return model.get_base_model() if isinstance(model, Adapted) else model


def unwrap(model: nn.Module) -> nn.Module:
    """Without the DDP wrapper, whose forward synchronises: ranks make unequal numbers of rollout calls."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


class Reference:
    """Remembers the initial weights once and lends the model that has them, without gradients."""

    def __init__(self) -> None:
        self._copy: nn.Module | None = None
        # weights of adapters that were trained before, by name; empty where new ones begin as no change at all
        self._adapters: dict[str, torch.Tensor] = {}

    def freeze(self, model: nn.Module, adapters: nn.Module) -> None:
        """Keep a frozen copy of `model`, unless `adapters` (the module PEFT wraps) can be switched off.

        Adapters that go on from an earlier run change the model from the start, so they are copied and lent.
        It is made before FSDP shards the weights, so every rank has a whole copy, which it runs without the others.
        """
        if not isinstance(adapters, Adapted):
            self._copy = copy.deepcopy(unwrap(model)).requires_grad_(False)
        elif _changes_something(adapters):
            self._adapters = {name: w.detach().clone() for name, w in _adapter_weights(adapters)}

    @torch.no_grad()
    def move(self, model: nn.Module, share: float) -> None:
        """Bring the copy closer to the present weights: copy = (1 - share) copy + share model."""
        present = unwrap(model).state_dict()
        for name, kept in self.tensors().items():
            now = present[name].to(kept)
            if share < 1 and kept.is_floating_point():
                now = torch.lerp(kept, now, share)
            kept.copy_(now)

    def tensors(self) -> dict[str, Tensor]:
        """The copy's weights by name, tied ones once; written to, they change the copy.

        Raises:
            ValueError: there is none: the initial model is the present one without its LoRA.
        """
        if self._copy is None:
            raise ValueError(
                "loss.reference_every: with LoRA the reference is the base model, which stays; take it out, or train "
                "all weights (policy.lora_rank: 0)"
            )
        again = tied_names(self._copy)
        return {name: w for name, w in self._copy.state_dict().items() if name not in again}

    @contextmanager
    def applied(self, model: nn.Module, adapters: nn.Module) -> Iterator[nn.Module]:
        """The initial model inside the block.

        Raises:
            RuntimeError: neither a copy nor adapters to switch off, or the adapters' weights are sharded.
        """
        if self._copy is None and not isinstance(adapters, Adapted):
            raise RuntimeError("call freeze_reference() before training starts; the KL needs the initial weights")
        if self._copy is None and is_sharded(model):  # one more collective than the ranks with nothing to train make
            raise RuntimeError("the KL of a LoRA model cannot run sharded; set loss.kl=0 or unset ACCELERATE_CONFIG")
        if self._copy is not None:  # it was copied before the model moved to its device
            self._copy.to(next(model.parameters()).device)
        with self._lent(adapters), torch.no_grad():
            yield self._copy if self._copy is not None else unwrap(model)

    @contextmanager
    def _lent(self, adapters: nn.Module) -> Iterator[None]:
        """The adapters of the start inside the block, switched off where they were new."""
        if not isinstance(adapters, Adapted):
            yield
        elif not self._adapters:
            with adapters.disable_adapter():
                yield
        else:
            now = {name: weight.data for name, weight in _adapter_weights(adapters)}
            try:
                for name, weight in _adapter_weights(adapters):
                    # moved once, to where the model is by now
                    self._adapters[name] = self._adapters[name].to(weight.device)
                    weight.data = self._adapters[name]
                yield
            finally:
                for name, weight in _adapter_weights(adapters):
                    weight.data = now[name]


def _adapter_weights(adapters: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in adapters.named_parameters() if ".lora_" in name]


def _changes_something(adapters: nn.Module) -> bool:
    """Whether an adapter is more than a new one, whose second factor is zero."""
    return any(bool(weight.any()) for name, weight in _adapter_weights(adapters) if ".lora_B" in name)
