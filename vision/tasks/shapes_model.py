"""The tiny Qwen2.5-VL of the shapes task: tokenizer, processor, network, and a fast forward over known sprites.

Patch and image token are one cell of 16 pixels, so a picture of n x n cells is n * n image tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.loading import image_only
from vision.tasks.shapes_scene import CELL, OPERATIONS, WORDS, sprites

END, PAD, UNKNOWN = "<|im_end|>", "<|pad|>", "<|unk|>"
IMAGE = "<|image_pad|>"
MARKS = ("<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>")
LARGEST = 48  # numbers up to here are words: three counts of a full 4 x 4 grid
VOCABULARY = (
    *(PAD, UNKNOWN, END, *MARKS), "\n", *WORDS, "empty", "describe", *OPERATIONS, "of", "and", "?", "answer",
    *("=", "+", "-", "|"), *map(str, range(LARGEST + 1)),
)  # fmt: skip

# The user's turn is the picture and the question, the reply starts on a new line.
CHAT_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '\\n' }}{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part.type == 'text' %}{{ part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n' }}{% endif %}
""".strip()


def new_tokenizer() -> Any:
    """Words, whole numbers, signs and the newline are one token each. Lines of known words survive a round trip,
    also when every line is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    spaced = decoders.WordPiece(prefix="##", cleanup=False)  # a blank before every word but the first
    words.decoder = decoders.Sequence(
        [spaced, decoders.Fuse(), decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")]
    )
    # transformers 5 cuts marks into characters unless this object knows them
    words.add_special_tokens([PAD, UNKNOWN, END, *MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def new_processor() -> Any:
    """Tokenizer and picture part; a cell is a patch, nothing is resized."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    pictures = Qwen2VLImageProcessorPil(
        patch_size=CELL, merge_size=1, temporal_patch_size=2,
        size={"shortest_edge": CELL * CELL, "longest_edge": 64 * CELL * CELL},
    )  # fmt: skip
    kind = image_only(Qwen2_5_VLProcessor)
    return kind(image_processor=pictures, tokenizer=new_tokenizer(), chat_template=CHAT_TEMPLATE)


def new_model(width: int = 128, layers: int = 3) -> Any:
    """Untrained, float32, 0.6 M parameters. With an initializer_range of .02 it does not learn to count."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    text = {
        "vocab_size": len(VOCABULARY), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": layers, "num_attention_heads": width // 32, "num_key_value_heads": width // 64,
        "max_position_embeddings": 1024, "initializer_range": 0.05, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None, "eos_token_id": ids[END], "pad_token_id": ids[PAD],
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": CELL,
        "spatial_merge_size": 1, "window_size": 4 * CELL, "out_hidden_size": width, "fullatt_block_indexes": [0],
        "initializer_range": 0.05,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        vision_start_token_id=ids[MARKS[0]], vision_end_token_id=ids[MARKS[1]],
        image_token_id=ids[IMAGE], video_token_id=ids[MARKS[3]],
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids[END], ids[PAD]
    return model


def save(model: Any, folder: Path) -> None:
    """Model and processor in one folder, for `vision.loading` and any program that reads transformers' format."""
    model.save_pretrained(folder)
    new_processor().save_pretrained(folder)


def encode(text: str) -> list[int]:
    """Token ids of known words, as the tokenizer gives them, in a tenth of its time.

    Raises:
        KeyError: a word outside the vocabulary.
    """
    return [_IDS[word] for word in text.replace("\n", " \n ").split(" ") if word]


def decode(ids: list[int]) -> str:
    """Words up to the first END, as the tokenizer would write them."""
    ids = ids[: ids.index(_IDS[END])] if _IDS[END] in ids else ids
    return " ".join(VOCABULARY[i] for i in ids).replace(" \n", "\n").replace("\n ", "\n")


def encode_picture(cells: int) -> list[int]:
    """The tokens of a picture of `cells` cells, ahead of its question."""
    return [_IDS[MARKS[0]], *[_IDS[IMAGE]] * cells, _IDS[MARKS[1]]]


def patch_table() -> Tensor:
    """(sprites, 3 * 2 * 16 * 16) float32: every sprite, the empty cell last, as the image processor would give it."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    x = torch.from_numpy(sprites()).float()
    x = ((x / 255 - mean) / std).permute(0, 3, 1, 2)
    return x[:, :, None].expand(-1, -1, 2, -1, -1).reshape(len(x), -1)


def cell_features(model: Any, table: Tensor, cells: Tensor) -> Tensor:
    """The vision tower on (B, n*n) cells of square pictures -> (B, n*n, width), one image token a cell.

    Equal to the tower's own forward, in a third of its time: pictures are a batch dimension, and each sprite is
    projected once.
    """
    tower = model.model.visual
    batch, area = cells.shape
    x = tower.patch_embed(table)[cells]  # index -1 is the empty cell
    for block in tower.blocks:
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(block.norm1(x)).view(batch, area, 3, heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = _axial_angles(round(area**0.5), q.shape[-1])
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + block.attn.proj(y.transpose(1, 2).reshape(batch, area, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x).view(batch, area, -1)


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
    row, column = _rows_and_columns(side)
    picture = torch.stack([torch.zeros_like(row), row, column]) + 1
    after = torch.arange(length - area - 1) + side + 1
    return torch.cat([torch.zeros(3, 1, dtype=torch.long), picture, after.expand(3, -1)], dim=1)


def _axial_angles(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos, sin (side^2, head_dim) of the tower's rotary embedding: half the frequencies follow rows, half columns."""
    frequency = 1e4 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = _rows_and_columns(side)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _rows_and_columns(side: int) -> tuple[Tensor, Tensor]:
    cell = torch.arange(side * side)
    return cell // side, cell % side


_IDS = {word: i for i, word in enumerate(VOCABULARY)}
