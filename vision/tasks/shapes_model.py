"""The tiny Qwen2.5-VL of the shapes task: its words, its template, and a fast forward over known sprites.

Patch and image token are one cell of 16 pixels, so a picture of n x n cells is n * n image tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vision import tiny_models
from vision.tasks.shapes_scene import OPERATIONS, WORDS, sprites
from vision.tiny_models import END, IMAGE, MARKS, PAD, SPECIAL, UNKNOWN, Vocabulary, rows_and_columns, tower_features

__all__ = ["END", "IMAGE", "MARKS", "PAD", "UNKNOWN", "VOCABULARY"]

LARGEST = 48  # numbers up to here are words: three counts of a full 4 x 4 grid
VOCABULARY = (
    *SPECIAL, "\n", *WORDS, "empty", "describe", *OPERATIONS, "of", "and", "?", "answer",
    *("=", "+", "-", "|"), *map(str, range(LARGEST + 1)),
)  # fmt: skip
CHAT_TEMPLATE = tiny_models.chat_template("image")

_WORDS = Vocabulary(VOCABULARY)
encode, decode = _WORDS.encode, _WORDS.decode


def new_tokenizer() -> Any:
    """Words, whole numbers, signs and the newline are one token each."""
    return tiny_models.new_tokenizer(_WORDS)


def new_processor() -> Any:
    """Tokenizer and picture part; a cell is a patch, nothing is resized."""
    return tiny_models.new_processor(_WORDS, CHAT_TEMPLATE)


def new_model(width: int = 128, layers: int = 3) -> Any:
    """Untrained, float32, 0.6 M parameters."""
    return tiny_models.new_model(_WORDS, width=width, layers=layers)


def encode_picture(cells: int) -> list[int]:
    """The tokens of a picture of `cells` cells, ahead of its question."""
    return _WORDS.encode_media(IMAGE, cells)


def patch_table() -> Tensor:
    """(sprites, 3 * 2 * 16 * 16) float32: every sprite, the empty cell last, as the image processor would give it."""
    x = tiny_models.normalise(torch.from_numpy(sprites())).permute(0, 3, 1, 2)
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), -1)


def cell_features(model: Any, table: Tensor, cells: Tensor) -> Tensor:
    """The vision tower on (B, n*n) cells of square pictures -> (B, n*n, width), one image token a cell.

    Each sprite is projected once; index -1 is the empty cell.
    """
    return tower_features(model, model.model.visual.patch_embed(table)[cells])


def hidden_states(model: Any, table: Tensor, cells: Tensor, ids: Tensor) -> Tensor:
    """(B, T) ids that start with the picture's tokens, (B, n*n) cells -> (B, T, width), before the output matrix."""
    area = cells.shape[1]
    text = model.get_input_embeddings()(ids)
    embeds = torch.cat([text[:, :1], cell_features(model, table, cells), text[:, area + 1 :]], dim=1)
    positions = picture_positions(area, ids.shape[1])[:, None].expand(3, len(ids), -1)
    return model.model.language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False).last_hidden_state


def picture_positions(area: int, length: int) -> Tensor:
    """(3, length) M-RoPE positions (time, row, column): a mark, the picture, then text that goes on after its side."""
    side = round(area**0.5)
    row, column = rows_and_columns(side)
    picture = torch.stack([torch.zeros_like(row), row, column]) + 1
    after = torch.arange(length - area - 1) + side + 1
    return torch.cat([torch.zeros(3, 1, dtype=torch.long), picture, after.expand(3, -1)], dim=1)
