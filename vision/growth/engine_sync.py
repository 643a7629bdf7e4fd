"""A generation engine with the trainer's weights: it wakes to sample, and takes over what the last update changed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mmrl.reference import Adapted, bare
from mmrl.sharding import is_sharded, whole
from vision.forward.lora import adapter_rank
from vision.growth.driver import grow
from vision.growth.engine_vllm import VllmEngine
from vision.growth.requests import GrowthRequest, Node
from vision.inputs.loading import adapter_base


class SyncedEngine:
    """Hands changed weights to the engine before it samples: all of them, or the adapter where LoRA is trained."""

    def __init__(self, engine: VllmEngine, shared: bool) -> None:
        """shared: one server for all processes, which only a single process may feed."""
        self.engine, self._shared = engine, shared
        self._stamp = -1

    def grow(self, hf: Any, request: GrowthRequest) -> list[Node]:
        """The trees of `request`, by the engine with the weights of `hf`.

        The first call after an update hands the weights over. Where they are sharded that gathers them, one tensor
        at a time, on every rank: all ranks must make this call, and may differ in how many they make after it.

        Raises:
            ValueError: several processes train against one server, or a request that the engine cannot sample.
        """
        with self._awake():
            self._follow(hf)
            return grow(self.engine, request)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The engine, awake inside the block: outside of it the trainer needs the device's memory."""
        self.engine.wake()
        try:
            yield
        finally:
            self.engine.sleep()

    def _follow(self, hf: Any) -> None:
        """Hand the weights over if they have changed since the last time."""
        # Every in-place update of a tensor counts its version up.
        stamp = sum(weight._version for weight in hf.parameters() if weight.requires_grad)
        if stamp == self._stamp:
            return
        if self._shared and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError("several processes cannot feed one vLLM server; leave policy.engine_url empty")
        # Apart from the `if`, which would narrow the type of `hf` to the protocol.
        has_adapters = isinstance(hf, Adapted)
        if has_adapters:
            with tempfile.TemporaryDirectory() as folder:
                hf.save_pretrained(folder, state_dict=_adapter(hf) if is_sharded(hf) else None)
                self.engine.sync_lora(Path(folder))
        else:
            self.engine.sync((name, whole(weight)) for name, weight in bare(hf).state_dict().items())
        self._stamp = stamp


def _adapter(hf: Any) -> dict[str, torch.Tensor]:
    """The trained weights whole, by the names PEFT gives them."""
    trained = {name for name, weight in hf.named_parameters() if weight.requires_grad}
    return {name: whole(weight) for name, weight in hf.state_dict().items() if name in trained}


def vllm_engine(
    folder: str,
    url: str,
    exchange: str,
    *,
    max_model_len: int,
    memory: float,
    lora_rank: int,
    dtype: str,
    films: bool = False,
) -> SyncedEngine:
    """vLLM in this process, or the server at `url`; see `VllmEngine.in_process` and `VllmEngine.server`.

    Of a folder with an adapter it holds the base; the adapter follows with the first trees.
    """
    folder, lora_rank = adapter_base(folder) or folder, lora_rank or adapter_rank(folder)
    if url:
        return SyncedEngine(VllmEngine.server(url, folder=folder, exchange=exchange or None), shared=True)
    engine = VllmEngine.in_process(
        folder,
        max_model_len=max_model_len,
        gpu_memory_utilization=memory,
        lora_rank=lora_rank,
        dtype=dtype,
        films=films,
    )
    return SyncedEngine(engine, shared=False)
