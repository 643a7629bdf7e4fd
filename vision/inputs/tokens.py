"""Encoded prompts: token ids with their positions, and the pixels behind the placeholders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """The images, or one film, of one prompt or observation, as the model's encoder takes them.

    tensors: what `get_image_features` takes; a film's grid has several rows in time. key: hash of the contents; equal
    keys are encoded once. seconds: of a film, between its rows in time; 0 for images.
    """

    key: str
    tensors: Mapping[str, Tensor]
    seconds: float = 0.0

    @property
    def kind(self) -> Literal["image", "video"]:
        """The kind of placeholder that stands for it."""
        return "video" if self.seconds else "image"

    @property
    def blank(self) -> Pixels:
        """Pixels of the same size with nothing to see: 0, which normalisation makes of the mean colour."""
        values = torch.zeros_like(self.tensors["pixel_values"])
        return replace(self, key=f"{self.key}/blank", tensors={**self.tensors, "pixel_values": values})


@dataclass(frozen=True)
class PromptTokens:
    """One encoded prompt, or an observation that stands between two steps; then positions count from its own start.

    ids: (P,) int64, placeholders expanded: what the model sees. types: (P,) int64, 1 at image and 2 at film
        placeholders.
    positions: (P,) or (3, P) int64 rotary positions. next_position: what the first token after it gets.
    text: the rendered template with one placeholder per image; images: RGB pictures in order, for other engines.
    written: tokens at the end that were sampled or written behind the template, and are not in `text`.
    """

    ids: Tensor
    types: Tensor
    positions: Tensor
    next_position: int
    text: str = ""
    images: Sequence[Image.Image] = ()
    pixels: Pixels | None = None
    written: int = 0

    @property
    def blank(self) -> PromptTokens:
        """The same tokens with nothing to see in their pictures."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.blank, images=())

    def followed_by(self, ids: Tensor) -> PromptTokens:
        """The same prompt with tokens (n,) already written after it."""
        if not len(ids):
            return self
        next_position = self.next_position + len(ids)
        # (n,) or (3, n): a text token has the same position in time, row and column
        positions = torch.arange(self.next_position, next_position).expand(*self.positions.shape[:-1], -1)
        return replace(
            self,
            ids=torch.cat([self.ids, ids]),
            types=torch.cat([self.types, torch.zeros_like(ids)]),
            positions=torch.cat([self.positions, positions], -1),
            next_position=next_position,
            written=self.written + len(ids),
        )
