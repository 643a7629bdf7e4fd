"""Tiny random models of every supported family: two layers, hidden 64, heads of 16, characters as tokens, a picture of
64 x 64 costs 4 to 16 tokens. `make` writes one folder; `family_folder` keeps one per family and process."""

from __future__ import annotations

import functools
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

VLM_FAMILIES = (
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "smolvlm", "idefics3", "internvl", "gemma3",
)  # fmt: skip
FAMILIES = (*VLM_FAMILIES, "text")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2
STD = 0.1  # wide enough that masks and positions move the logits visibly
WINDOW = 8  # gemma3's sliding window: shorter than any row

CHARACTERS = sorted(set(string.printable) - set("\t\r\x0b\x0c"))
QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", "<row_1_col_1>"]
SPECIAL: dict[str, list[str]] = {
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN, "llava": ["<image>"],
    "llava_onevision": ["<image>", "<video>"], "smolvlm": IDEFICS, "idefics3": IDEFICS,
    "internvl": ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"], "text": [],
}  # fmt: skip
# what stands for a picture in the rendered chat, before the processor repeats it
IN_CHAT = {
    "qwen2_vl": "".join([QWEN[0], QWEN[2], QWEN[1]]), "internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>",
}  # fmt: skip
IN_CHAT |= {"qwen2_5_vl": IN_CHAT["qwen2_vl"], "qwen3_vl": IN_CHAT["qwen2_vl"]}
NAMED = {
    "internvl": {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    },
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
)


_KEPT = tempfile.TemporaryDirectory(prefix="mmrl-families-")  # removed when the process ends


@functools.cache
def family_folder(family: str) -> Path:
    """The folder of a family with default settings; do not write into it."""
    return make(family, Path(_KEPT.name) / family)


@functools.cache
def saved_prm(family: str, head: str = "linear") -> Path:
    """The folder of a step scorer on this family, as training would leave it; do not write into it."""
    from vision.prm import VisionPrm

    folder = Path(_KEPT.name) / f"{family}-prm-{head}"
    verdicts = {"marker": "#", "positive": "+", "negative": "-", "read_offset": -1} if head == "tokens" else None
    VisionPrm.build(str(family_folder(family)), head, verdicts).save(folder)
    return folder


def make(family: str, folder: Path, *, seed: int = 0, std: float = STD) -> Path:
    """Write a random model of this family with processor, chat template and generation config; returns the folder.

    All matrices and embeddings are drawn with standard deviation `std`; equal seeds give equal weights.
    """
    from transformers import GenerationConfig

    tokenizer = tokenizer_for(family)
    torch.manual_seed(seed)
    model = _MODELS[family](tokenizer).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0.0, std)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor_for(family, tokenizer).save_pretrained(folder)
    return Path(folder)


def picture(seed: int = 0, size: int = 64) -> Image.Image:
    """A square picture with three coloured shapes; equal seeds give equal pictures."""
    g = torch.Generator().manual_seed(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for k, colour in enumerate(("red", "green", "blue")):
        x, y = torch.randint(0, size * 3 // 4, (2,), generator=g).tolist()
        box = (x, y, x + size // 4, y + size // 4)
        (draw.rectangle if k % 2 else draw.ellipse)(box, fill=colour)
    return image


def question(family: str, text: str = "what is 2 + 3?") -> list[dict[str, Any]]:
    """One user turn; with a picture first, except in the text family."""
    parts = [{"type": "text", "text": text}]
    return [{"role": "user", "content": parts if family == "text" else [{"type": "image"}, *parts]}]


def prompt_inputs(family: str, processor: Any, *, seed: int = 0, text: str = "what is 2 + 3?") -> Any:
    """Model inputs of one prompt, tensors of batch 1, ready for `model(**inputs)`."""
    rendered = processor.apply_chat_template(question(family, text), tokenize=False, add_generation_prompt=True)
    if family == "text":
        return processor(rendered, return_tensors="pt")
    return processor(text=[rendered], images=[picture(seed)], return_tensors="pt")


# ---- tokenizer and processor ----------------------------------------------------------------------------------


def tokenizer_for(family: str) -> Any:
    """One token per character; <|unk|> 0, <|pad|> 1, <|end|> 2, <|begin|> 3, then the family's own, then characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|unk|>", "<|pad|>", "<|end|>", "<|begin|>", *SPECIAL[family]]
    vocabulary = {token: i for i, token in enumerate(special + CHARACTERS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<|unk|>", pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|begin|>",
        padding_side="left", clean_up_tokenization_spaces=False, extra_special_tokens=NAMED.get(family, {}),
        chat_template=TEMPLATE.replace("PICTURE", IN_CHAT.get(family, "<image>")),
    )  # fmt: skip


def processor_for(family: str, tokenizer: Any) -> Any:
    """The family's image-only processor; the tokenizer itself for text."""
    import transformers

    from vision.inputs.loading import image_only

    if family == "text":
        return tokenizer
    kind, image_kind, image_options, options = _PROCESSORS[family]
    images = getattr(transformers, image_kind)(**image_options)
    return image_only(getattr(transformers, kind))(images, tokenizer, chat_template=tokenizer.chat_template, **options)


_SQUARE = {"size": {"height": 32, "width": 32}}
_QWEN_IMAGES = {"patch_size": 16, "merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 4096}}
_IDEFICS_IMAGES = {
    "do_image_splitting": False, "size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32},
}  # fmt: skip
_PROCESSORS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessorPil", _QWEN_IMAGES, {}),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessorPil", _QWEN_IMAGES, {}),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessorPil", _QWEN_IMAGES, {}),
    "llava": (
        "LlavaProcessor", "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
    ),
    "llava_onevision": (
        "LlavaOnevisionProcessor", "LlavaOnevisionImageProcessorPil", _SQUARE | {"image_grid_pinpoints": [[32, 32]]},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessorPil", _IDEFICS_IMAGES, {"image_seq_len": 4}),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessorPil", _IDEFICS_IMAGES, {"image_seq_len": 4}),
    "internvl": (
        "InternVLProcessor", "GotOcr2ImageProcessorPil", _SQUARE | {"min_patches": 1, "max_patches": 1},
        {"image_seq_length": 4},
    ),
    "gemma3": ("Gemma3Processor", "Gemma3ImageProcessorPil", _SQUARE, {"image_seq_length": 4}),
}  # fmt: skip


# ---- models ---------------------------------------------------------------------------------------------------


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer), "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 2048, "initializer_range": STD, "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, **more,
    }  # fmt: skip


def _tower(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "image_size": 32, "patch_size": 8, "initializer_range": STD, **more,
    }  # fmt: skip


def _rope(**more: Any) -> dict[str, Any]:
    # halves of one head: 2 for time, 3 for height, 3 for width
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], **more}


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    return {name: _id(tokenizer, token) for name, token in zip(names, QWEN, strict=True)} | {
        "tie_word_embeddings": False
    }


def _qwen2_vl(t: Any) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": LAYERS,
        "embed_dim": 32,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 16,
    }
    text = _text(t, rope_parameters=_rope())
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **_qwen_ids(t)))


def _qwen2_5_vl(t: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": LAYERS, "hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 64, "num_heads": 2,
        "patch_size": 16, "window_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = _text(t, rope_parameters=_rope())
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_qwen_ids(t)))


def _qwen3_vl(t: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = {
        "depth": LAYERS, "hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 64, "num_heads": 2,
        "patch_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = _text(t, head_dim=HEAD_DIM, rope_parameters=_rope(mrope_interleaved=True))
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(t)))


def _llava(t: Any) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=_text(t, model_type="llama"), vision_config=_tower(model_type="clip_vision_model"),
        image_token_index=_id(t, "<image>"), image_seq_length=16, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config)


def _llava_onevision(t: Any) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config=_text(t, model_type="qwen2"), vision_config=_tower(model_type="siglip_vision_model", patch_size=16),
        image_token_index=_id(t, "<image>"), video_token_index=_id(t, "<video>"), image_grid_pinpoints=[[32, 32]],
        vision_feature_select_strategy="full", vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def _idefics(t: Any, name: str) -> Any:
    import transformers

    config = getattr(transformers, f"{name}Config")(
        text_config=_text(t, model_type="llama"), vision_config=_tower(), image_token_id=_id(t, "<image>"),
        scale_factor=2, pad_token_id=t.pad_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    return getattr(transformers, f"{name}ForConditionalGeneration")(config)


def _internvl(t: Any) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config=_text(t, model_type="qwen2"), vision_config=_tower(image_size=[32, 32], patch_size=[8, 8]),
        image_token_id=_id(t, "<IMG_CONTEXT>"), image_seq_length=4, downsample_ratio=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return InternVLForConditionalGeneration(config)


def _gemma3(t: Any) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = _text(
        t, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=_tower(), mm_tokens_per_image=4, tie_word_embeddings=False,
        boi_token_index=_id(t, "<start_of_image>"), eoi_token_index=_id(t, "<end_of_image>"),
        image_token_index=_id(t, "<image_soft_token>"),
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def _causal(t: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_text(t)))


_MODELS: dict[str, Callable[[Any], Any]] = {
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "llava": _llava,
    "llava_onevision": _llava_onevision, "smolvlm": functools.partial(_idefics, name="SmolVLM"),
    "idefics3": functools.partial(_idefics, name="Idefics3"), "internvl": _internvl, "gemma3": _gemma3,
    "text": _causal,
}  # fmt: skip
