"""What a model family must offer: seven functions, and what its network predicts. The rest of diffusion/ is shared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion.kernels import Prediction
from mmrl.registry import Kind, add_kind
from mmrl.rollout import Prompt

Cond = dict[str, Tensor]  # every entry has one row per prompt


class Level(NamedTuple):
    """A noise level: x = a x0 + s eps, and the time `t` that the network is told."""

    a: float
    s: float
    t: float


# Named by the class of the denoiser that a folder holds, or `blocks`.
add_kind(Kind("adapters", "model adapter"))


class Adapter(Protocol):
    """N live nodes, B prompts, D any latent shape. `own` (N,) is the prompt of each node.

    One that a recipe names has a classmethod `from_pretrained(folder, **keys)` besides, whose keyword parameters are
    the keys of `DiffusionPolicy.build` that it takes, such as guidance_scale.
    """

    model: nn.Module
    prediction: Prediction  # what the network predicts; a latent reward judges only samples of its own kind

    def encode(self, prompts: Sequence[Prompt]) -> Cond:
        """Conditioning, B rows, computed once and reused by all nodes and all updates."""

    def unconditional(self, cond: Cond) -> Cond:
        """The same rows for the empty prompt."""

    def schedule(self, num_steps: int) -> list[Level]:
        """T+1 levels from pure noise to clean."""

    def init(self, generator: torch.Generator) -> Tensor:
        """One initial latent (*D), float32, on the CPU so that it does not depend on the device."""

    def predict(self, model: nn.Module, x: Tensor, level: Level, cond: Cond, own: Tensor) -> tuple[Tensor, Tensor]:
        """(x0, eps), each (N, *D) float32, guidance inside; one batched call; gradients flow."""

    def decode(self, x0: Tensor) -> Tensor:
        """Pictures (N, C, H, W) float32 in [0, 1]."""

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the model with save_pretrained."""


def text_of(prompt: Prompt) -> str:
    """The text of a prompt; ValueError where it has none."""
    text = prompt.inputs.get("prompt")
    if not isinstance(text, str):
        raise ValueError(f"prompt {prompt.id!r}: inputs.prompt is {text!r}; a text is needed (task text_prompts)")
    return text
