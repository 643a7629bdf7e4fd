"""Building blocks of the tiny Qwen2.5-VL models of the built-in tasks: words, tokenizer, processor, network, and the
small parts of their pre-training.

    words = Vocabulary((*SPECIAL, "\\n", "red", "=", "3"))
    model = new_model(words, width=128, layers=3)
    processor = new_processor(words, chat_template("image"))
    words.encode("red = 3")  # [8, 9, 10]: a token per word

A patch is one image token and 16 pixels wide; a vocabulary is a list of whole words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision.inputs.loading import image_only

PATCH = 16  # side in pixels
END, PAD, UNKNOWN = "<|im_end|>", "<|pad|>", "<|unk|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
MARKS = ("<|vision_start|>", "<|vision_end|>", IMAGE, VIDEO)
SPECIAL = (PAD, UNKNOWN, END, *MARKS)

# Token ids, and for each of them whether it is learnt.
Example = tuple[list[int], list[bool]]


@dataclass(frozen=True)
class Vocabulary:
    """Whole words, signs and the newline, one token each; SPECIAL come first."""

    words: tuple[str, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        """Word -> token id."""
        return {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as the tokenizer gives them, in a tenth of its time.

        Raises:
            KeyError: a word outside the vocabulary.
        """
        return [self.ids[word] for word in text.replace("\n", " \n ").split(" ") if word]

    def decode(self, ids: list[int]) -> str:
        """Words up to the first END, as the tokenizer would write them."""
        if self.ids[END] in ids:
            ids = ids[: ids.index(self.ids[END])]
        return " ".join(self.words[token] for token in ids).replace(" \n", "\n").replace("\n ", "\n")

    def encode_media(self, kind: str, tokens: int) -> list[int]:
        """Marks around `tokens` placeholders of a kind: IMAGE or VIDEO."""
        return [self.ids[MARKS[0]], *[self.ids[kind]] * tokens, self.ids[MARKS[1]]]


def chat_template(*kinds: str) -> str:
    """A chat template: the user's turn is media and words, the reply starts on a new line. kinds: `image`, `video`."""
    case = "if part.type == '{0}' %}}{{{{ '<|vision_start|><|{0}_pad|><|vision_end|>' }}}}"
    return _TEMPLATE.replace("MEDIA", "\n{%- el".join(case.format(kind) for kind in kinds))


_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{ '\\n' }}{% endif %}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for part in message.content %}
{%- MEDIA
{%- elif part.type == 'text' %}{{ part.text }}
{%- endif %}
{%- endfor %}
{%- endif %}
{%- if message.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '\\n' }}{% endif %}
""".strip()


def new_tokenizer(vocabulary: Vocabulary) -> Any:
    """A tokenizer of whole words. Lines of its words survive a round trip, also when every line is decoded alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocabulary.ids, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    # A blank before every word but the first.
    spaced = decoders.WordPiece(prefix="##", cleanup=False)
    words.decoder = decoders.Sequence(
        [spaced, decoders.Fuse(), decoders.Replace(" \n", "\n"), decoders.Replace("\n ", "\n")]
    )
    # transformers 5 cuts marks into characters unless this object has them.
    words.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )


def new_processor(vocabulary: Vocabulary, template: str) -> Any:
    """Tokenizer and picture part; pictures of 1 to 64 patches are not resized."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessorPil

    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=1,
        temporal_patch_size=2,
        # areas in pixels, in spite of their names
        size={"shortest_edge": PATCH * PATCH, "longest_edge": 64 * PATCH * PATCH},
    )
    kind = image_only(Qwen2_5_VLProcessor)
    return kind(image_processor=pictures, tokenizer=new_tokenizer(vocabulary), chat_template=template)


def new_model(vocabulary: Vocabulary, *, width: int, layers: int, tokens_per_second: int = 4) -> Any:
    """An untrained Qwen2.5-VL, float32, 0.6 M parameters at width 128 and 3 layers.

    tokens_per_second: steps of the temporal position per second of film (4 is the library's default).
    With an initializer_range of .02 it does not learn to count.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = vocabulary.ids
    text = {
        "vocab_size": len(ids),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 64,
        "max_position_embeddings": 1024,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": ids[END],
        "pad_token_id": ids[PAD],
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": 1,
        "window_size": 4 * PATCH,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.05,
        "tokens_per_second": tokens_per_second,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        vision_start_token_id=ids[MARKS[0]],
        vision_end_token_id=ids[MARKS[1]],
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids[END]
    model.generation_config.pad_token_id = ids[PAD]
    return model


def normalise(pixels: Tensor) -> Tensor:
    """(..., 3) 0..255 -> (..., 3) float32 as the image processor would give it."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return (pixels.float() / 255 - mean) / std


def tower_features(model: Any, x: Tensor) -> Tensor:
    """The vision tower after its patch embedding: (B, n*n, hidden) of square pictures -> (B, n*n, width).

    Equal to the tower's own forward, in a third of its time: pictures are a batch dimension.
    """
    tower = model.model.visual
    batch, area = x.shape[:2]
    for block in tower.blocks:
        heads = block.attn.num_heads
        # (3, B, heads, n*n, d)
        q, k, v = block.attn.qkv(block.norm1(x)).view(batch, area, 3, heads, -1).permute(2, 0, 3, 1, 4)
        cos, sin = _axial_angles(round(area**0.5), q.shape[-1])
        y = F.scaled_dot_product_attention(_rotate(q, cos, sin), _rotate(k, cos, sin), v)
        x = x + block.attn.proj(y.transpose(1, 2).reshape(batch, area, -1))
        x = x + block.mlp(block.norm2(x))
    return tower.merger(x).view(batch, area, -1)


def rows_and_columns(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each cell of a square, in reading order."""
    cell = torch.arange(side * side)
    return cell // side, cell % side


def _axial_angles(side: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos, sin (side^2, head_dim) of the tower's rotary embedding: half the frequencies follow rows, half columns."""
    frequency = 1e4 ** -(torch.arange(0, head_dim // 2, 2) / (head_dim // 2))
    row, column = rows_and_columns(side)
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1).repeat(1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def pad_examples(examples: Sequence[Example], pad: int) -> tuple[Tensor, Tensor]:
    """(B, T) token ids, and which of them are learnt; padding stands behind and is causally invisible."""
    length = max(len(ids) for ids, _ in examples)
    padded_ids = []
    padded_learn = []
    for ids, learn in examples:
        # `learn` may be empty, where nothing is learnt and only the ids matter.
        padded_ids.append([*ids, *[pad] * (length - len(ids))])
        padded_learn.append([*learn, *[False] * (length - len(learn))])
    return torch.tensor(padded_ids), torch.tensor(padded_learn)


def optimizer_of(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """The AdamW optimizer that trains the base models."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)


def update(model: Any, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Make one optimizer step, gradients clipped to norm 1."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine(done: float) -> float:
    """A cosine from 1 at the start to 0.1 at the end. done: share of the steps, in [0, 1]."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def progress(items: range, title: str) -> Iterator[int]:
    """The items, with a progress bar."""
    from rich.progress import track

    tracker: Callable[..., Iterator[int]] = track  # type: ignore[assignment]
    return tracker(items, description=title)
