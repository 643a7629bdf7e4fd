"""Exponential moving average of the trained weights only: with LoRA, a few megabytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.registry import register
from mmrl.sharding import local_part
from mmrl.trainers.callback import Callback

if TYPE_CHECKING:
    from mmrl.trainers.loop import Loop


class Ema:
    """shadow = decay * shadow + (1 - decay) * weight, in float32."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = list(parameters)
        self.shadow = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Call once after every optimizer step."""
        # by local parts: one call cannot mix sharded and whole tensors
        shadow = [local_part(s) for s in self.shadow]
        torch._foreach_lerp_(shadow, [local_part(p.detach()).float() for p in self.parameters], 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model carries the average; afterwards its own weights again, bit for bit."""
        own = [p.detach().clone() for p in self.parameters]
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for p, v in zip(self.parameters, values, strict=True):
            p.copy_(v)

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint, by the place of the parameter."""
        return {str(i): s for i, s in enumerate(self.shadow)}


@register("callbacks", "ema")
class AverageWeights(Callback):
    """Evaluates and exports an exponential moving average of the trained weights (`optim.ema`), kept in float32."""

    def __init__(self, decay: Annotated[float, Field(gt=0, lt=1)]) -> None:
        self.decay = decay

    def setup(self, loop: Loop) -> None:
        """Begin with the weights at hand; every checkpoint keeps the average."""
        self._ema = Ema(loop.parameters, self.decay)
        loop.remember_tensors("ema", self._ema.tensors)

    def on_update(self) -> None:
        """Move the average."""
        self._ema.update()

    def evaluating(self) -> AbstractContextManager[None]:
        """The average in place of the trained weights."""
        return self._ema.applied()
