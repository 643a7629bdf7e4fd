"""Models and processors from folders: any vision-language family of transformers, without torchvision, without code
from the folder.

    hf, processor = load_model("folder"), load_processor("folder")
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.reference import bare
from vision.inputs.foreign import attribute

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Text of tokens that stand for pictures, films or sound, or frame them: <image>, <|vision_start|>, <IMG_CONTEXT>,
# </img>, <global-img>, <row_1_col_2>, <fake_token_around_image>, <start_of_image>, [IMG_BREAK], ...
_PLACEHOLDER = re.compile(r"[<\[].*(image|img|video|vision|audio|row_\d+_col_\d+).*[>\]]", re.IGNORECASE)

# Names of a configuration's fields that hold the ids of such tokens: image_token_id, vision_start_token_id, ...
_MEDIA_ID = re.compile(r"(image|video|audio|vision_\w+|boi|eoi|boa|eoa)_token_(id|index)")


def is_vision(config: Any) -> bool:
    """True for the configuration of a model that reads pictures."""
    return attribute(config, "vision_config") is not None


def load_model(folder: str | Path, *, dtype: str = "float32", attn: str = "sdpa") -> Any:
    """The model in a folder (or of a hub name), in eval mode, on the CPU; of an adapter's folder, its base.

    Args:
        dtype: one of `DTYPES`.
        attn: transformers' attention implementation; "sdpa" and "eager" take the 4D masks of tree packing.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without config.json.
        ValueError: an unknown dtype.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    folder = adapter_base(folder) or folder
    config = _config(folder)
    if Path(folder).is_dir():
        # an adapter names its base so, wherever the program that loads it may run
        folder = Path(folder).absolute()
    kind = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    model = kind.from_pretrained(
        str(folder), config=config, dtype=DTYPES[dtype], attn_implementation=attn, **_local(folder)
    )
    return model.eval()


def load_processor(folder: str | Path) -> Any:
    """The processor, which turns text and pictures into model inputs; the tokenizer where the model reads text only.

    Processors that also read films want a video processor, which needs torchvision. Here every processor is put
    together from tokenizer and image processor (PIL backend) alone. Pixels are then those of Pillow, whatever else a
    machine has; run folders record its version, since its resizing has changed before (from 12 to 13). Saved again, a
    processor names the library's own class, so that other programs load the folder.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without config.json.
        ValueError: the folder of a vision model has no usable processor, image processor or image token.
    """
    from transformers import AutoImageProcessor

    base = adapter_base(folder)
    if base is not None:
        # an adapter that another trainer wrote may have no processor, or a tokenizer alone
        whole = any((Path(folder) / name).is_file() for name in ("processor_config.json", "preprocessor_config.json"))
        config = _config(base)
        folder = folder if whole or (not is_vision(config) and (Path(folder) / "tokenizer.json").is_file()) else base
    else:
        config = _config(folder)
    where = _local(folder)
    if not is_vision(config):
        return _tokenizer(folder)
    kind = image_only(_processor_class(folder, config))
    try:
        tokenizer = _tokenizer(folder)
        image_processor = AutoImageProcessor.from_pretrained(str(folder), backend="pil", **where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: a {config.model_type} model needs a tokenizer and an image processor ({error}). "
            "Copy processor_config.json or preprocessor_config.json and the tokenizer files of the original model "
            "into the folder"
        ) from error
    _check_image_token(folder, config, tokenizer)
    settings, _ = kind.get_processor_dict(str(folder), **where)
    return kind.from_args_and_dict([image_processor, tokenizer], settings | _video_file(folder))


@functools.cache
def image_only(processor_class: Any) -> Any:
    """A processor class of the same name without its video part; a class without one is returned as it is.

    Its instances refuse videos. When saved they write the video settings they were loaded with, or the picture's
    geometry: with no such section, the library's own class would not load the folder.
    """
    if "video_processor" not in processor_class.get_attributes():
        return processor_class

    # These functions are methods of the new class; `super` needs it by name, which is bound below.
    def to_dict(self: Any) -> dict[str, Any]:
        shared = ("size", "patch_size", "temporal_patch_size", "merge_size")
        pictures = self.image_processor.to_dict()
        video = self.video_settings or {key: pictures[key] for key in shared if key in pictures}
        return super(kind, self).to_dict() | {"video_processor": video}

    def from_args_and_dict(cls: Any, /, args: Any, settings: dict[str, Any], **options: Any) -> Any:
        settings = dict(settings)
        video = settings.pop("video_processor", None)
        processor = super(kind, cls).from_args_and_dict(args, settings, **options)
        processor.video_settings = video
        return processor

    def call(self: Any, images: Any = None, text: Any = None, videos: Any = None, **options: Any) -> Any:
        if videos is not None:
            raise ValueError(f"this {kind.__name__} reads pictures only; give the frames of a video as pictures")
        return super(kind, self).__call__(images=images, text=text, **options)

    body: dict[str, Any] = {
        "__module__": __name__,
        "video_settings": None,
        "__call__": call,
        "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"]),
        "from_args_and_dict": classmethod(from_args_and_dict),
        "to_dict": to_dict,
    }
    if processor_class.__name__ == "SmolVLMProcessor":
        body |= {"__init__": _smolvlm_init, "apply_chat_template": _plain_chat_template}
    kind: Any = type(processor_class.__name__, (processor_class,), body)
    return kind


def _smolvlm_init(
    self: Any, image_processor: Any, tokenizer: Any, image_seq_len: int = 169, chat_template: str | None = None
) -> None:
    """SmolVLM's own __init__ asks for num2words, which only its film captions use."""
    from transformers import ProcessorMixin

    names = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
        "video_token": "<video>",
    }
    for name, default in names.items():
        setattr(self, name, attribute(tokenizer, name, default=default))
    self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
    self.image_seq_len = image_seq_len
    ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _plain_chat_template(self: Any, *args: Any, **options: Any) -> Any:
    """SmolVLM's own method reads the frame rate of the video processor."""
    from transformers import ProcessorMixin

    return ProcessorMixin.apply_chat_template(self, *args, **options)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a tokenizer is returned as it is."""
    return attribute(processor, "tokenizer", default=processor)


def vision_tower(model: Any) -> nn.Module | None:
    """The module that runs on pixels, also inside a PEFT model; None where the model reads text only."""
    if not is_vision(model.config):
        return None
    inner = bare(model)
    tower = inner.get_encoder(modality="image")
    if tower is inner or not isinstance(tower, nn.Module):
        parts = [name for name, _ in inner.named_children()]
        raise ValueError(f"{type(inner).__name__} has no vision tower under a known name; its parts are {parts}")
    return tower


def image_token_id(config: Any) -> int | None:
    """Id of the token that the model replaces by picture features; None where it reads text only."""
    if not is_vision(config):
        return None
    token: int | None = attribute(config, "image_token_id", "image_token_index")
    return token


def eos_ids(model: Any, tokenizer: Any) -> set[int]:
    """Ids that end a completion: those of the generation config and the tokenizer's own.

    Raises:
        ValueError: neither names one, so that no completion would end.
    """
    named = attribute(attribute(model, "generation_config"), "eos_token_id")
    ids = {int(token) for token in (*_as_list(named), tokenizer.eos_token_id) if token is not None}
    if not ids:
        raise ValueError("no end-of-sequence token: set eos_token_id in the model's generation_config.json")
    return ids


def banned_ids(config: Any, tokenizer: Any, *, keep: Collection[int] = ()) -> list[int]:
    """Ids no completion may hold, ascending: placeholders of pictures, films and sound, their frames, and padding.

    A sampled placeholder has no features, and the forward pass of the update would fail or shift every later image.
    End tokens of config and tokenizer stay allowed, even where one doubles as padding, and so do the ids in `keep`:
    give `eos_ids(model, tokenizer)`, since a generation config may name more of them.
    """
    candidates = {tokenizer.pad_token_id, attribute(config, "pad_token_id")}
    for key, value in config.to_dict().items():
        if _MEDIA_ID.fullmatch(key):
            candidates.add(value)
    for text, token in tokenizer.get_added_vocab().items():
        if _PLACEHOLDER.fullmatch(text):
            candidates.add(token)
    text_config = config.get_text_config()
    ends = {tokenizer.eos_token_id, *keep}
    for part in (config, text_config):
        ends |= set(_as_list(attribute(part, "eos_token_id")))
    # Some configurations name ids outside of the vocabulary, such as -1.
    size = max(text_config.vocab_size, len(tokenizer))
    return sorted(int(token) for token in candidates - ends if token is not None and 0 <= token < size)


def save_model(model: Any, processor: Any, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Weights (of a PEFT model: the adapter), configuration and processor into one folder, in transformers' format.

    state_dict: weights to write in place of the model's own, which may be sharded.
    """
    model.save_pretrained(folder, state_dict=state_dict)
    processor.save_pretrained(folder)


def adapter_base(folder: str | Path) -> str | None:
    """The model that the PEFT adapter in a folder was trained on, as adapter_config.json names it.

    None: the folder holds a whole model, or it is none.

    Raises:
        FileNotFoundError: that model is a path that does not exist.
    """
    file = Path(folder) / "adapter_config.json"
    if not file.is_file() or (Path(folder) / "config.json").is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    path = Path(base)
    if not base or ((path.is_absolute() or len(path.parts) > 2) and not path.is_dir()):
        raise FileNotFoundError(
            f"{folder} holds a PEFT adapter of the model {base!r}, which does not exist here; put it back, or correct "
            f"base_model_name_or_path in {file}"
        )
    return str(base)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _local(folder: str | Path) -> dict[str, bool]:
    """An existing folder is complete or wrong: nothing is fetched to mend it."""
    return {"local_files_only": Path(folder).is_dir(), "trust_remote_code": False}


def _config(folder: str | Path) -> Any:
    from transformers import AutoConfig

    path = Path(folder)
    looks_local = path.is_absolute() or str(folder).startswith(".") or len(path.parts) > 2
    if looks_local and not path.is_dir():
        raise FileNotFoundError(f"model folder {folder} does not exist")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"model folder {folder} has no config.json; is it a transformers model?")
    return AutoConfig.from_pretrained(str(folder), **_local(folder))


def _tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a folder."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(folder) / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class") if file.is_file() else None
    # Of a folder that names the generic class, tokenizer.json is the authority: for some model types (Qwen2 among
    # them) AutoTokenizer puts the family's own rules in its place, silently, and white space is lost.
    kind = PreTrainedTokenizerFast if named in ("TokenizersBackend", "PreTrainedTokenizerFast") else AutoTokenizer
    return kind.from_pretrained(str(folder), **_local(folder))


def _video_file(folder: str | Path) -> dict[str, Any]:
    """Video settings of a folder that keeps them in a file of their own, as older releases wrote it."""
    file = Path(folder) / "video_preprocessor_config.json"
    return {"video_processor": json.loads(file.read_text(encoding="utf-8"))} if file.is_file() else {}


def _processor_class(folder: str | Path, config: Any) -> Any:
    """The class named by the folder; without a name, the one transformers pairs with the model."""
    import transformers

    settings, _ = transformers.ProcessorMixin.get_processor_dict(str(folder), **_local(folder))
    name = settings.get("processor_class")
    if name is None and type(config) in transformers.PROCESSOR_MAPPING:
        return transformers.PROCESSOR_MAPPING[type(config)]
    kind = attribute(transformers, name) if name else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.ProcessorMixin)):
        raise ValueError(
            f"{folder}: transformers {transformers.__version__} has no processor class {name!r} for a "
            f"{config.model_type} model. Correct `processor_class` in processor_config.json"
        )
    return kind


def _check_image_token(folder: str | Path, config: Any, tokenizer: Any) -> None:
    """Raise ValueError unless the model's image token is one token of the tokenizer.

    If the tokenizer cuts it into characters, that shows only as a count mismatch, much later.
    """
    token = image_token_id(config)
    text = None
    if token is not None and token < len(tokenizer):
        text = tokenizer.convert_ids_to_tokens(token)
    if text is None or tokenizer(text, add_special_tokens=False)["input_ids"] != [token]:
        raise ValueError(
            f"{folder}: the model's image token {token} ({text!r}) is not one token of the tokenizer. "
            "Take config and tokenizer from the same model"
        )
