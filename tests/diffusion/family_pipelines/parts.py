"""Tiny random text encoders, tokenizers and decoders of real classes, made without any download."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
WORDS = len(SPECIAL) + 256  # entries of every vocabulary


def tokenizer(length=24, side="right"):
    """A token per byte, in the class that every pipeline loads; `length` tokens at most."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    table = {word: i for i, word in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocab=table, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>",
        model_max_length=length, padding_side=side, chat_template=CHAT,
    )  # fmt: skip


def clip(width=16, projection=False, length=24):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    return kind(CLIPTextConfig(
        vocab_size=WORDS, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=length, projection_dim=width, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip


def t5(width=16, kind="T5"):
    import transformers

    options = {"vocab_size": WORDS, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**options, feed_forward_proj="gated-gelu")
    return getattr(transformers, f"{kind}EncoderModel")(config)


# of the decoder-only text models
QWEN = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 2048,
}  # fmt: skip


def vae(channels=4, **options):
    """A picture decoder: twice the latents' height and width."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, **options,
    )  # fmt: skip


def flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def stir(module, scale=0.3):
    """Fill what a family starts with zeros (output layers, gates), so that its prediction depends on every weight."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=scale)
    return module
