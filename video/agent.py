"""The video agent as a Policy: a Qwen-VL model in conversation with a clip, one manipulation a turn.

    policy:
      name: video
      model: Qwen/Qwen2.5-VL-3B-Instruct
      max_steps: 6
      views: {frames: 32, segment_frames: 16}

It is a `VisionPolicy` with an encoder that takes clips (`video.encoding`) and an environment that answers turns
(`video.environment`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Literal

from mmrl.capabilities import Extender, StepWriter
from mmrl.model_names import model_name
from mmrl.reference import bare
from mmrl.registry import declares
from video.encoding import VideoEncoder, Views
from video.environment import Syntax, VideoEnvironment
from video.reading.reader import VideoReader
from vision import (
    TOKEN_DEFAULTS,
    LoraOptions,
    PolicyOptions,
    VisionPolicy,
    load_processor,
    step_rule,
    tokenizer_of,
    trainable_model,
    trained_options,
    vllm_engine,
)


@declares(
    writes=("logp", "texts", "state_key", "edge_key", "ok", "tags.truncated", "tags.observed", "actions.token"),
    modality="conversation",
    # a state or a step as text lacks the frames that the environment showed
    lacks=(Extender, StepWriter),
    recipe=TOKEN_DEFAULTS,
    steps="max_steps",
    trained=trained_options,
    options_of=PolicyOptions,
)
def video_agent(
    model: Annotated[str, model_name("clips")] = "clips",
    dtype: str = "float32",
    attn: str = "sdpa",
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_targets: list[str] | str | None = None,
    train_vision: bool = False,
    engine: Literal["transformers", "vllm"] = "transformers",
    engine_memory: float = 0.4,
    syntax: Syntax = "videocom",
    coords: Literal["norm1000", "unit", "pixels"] = "pixels",
    hints: bool = True,
    max_context: int = 16384,
    views: Views | None = None,
    manipulations: tuple[str, ...] = (),
    decode_timeout_s: float = 60.0,
    frame_cache_mb: int = 512,
    **options: Any,
) -> VisionPolicy:
    """From a recipe's `policy:` section, name `video`.

    Args:
        model: "clips" (the built-in tiny model, made on first use), a folder, or a hub name of a Qwen-VL model.
        dtype, attn, lora_rank, lora_alpha, lora_targets, train_vision, engine, engine_memory: as in
            `VisionPolicy.build`.
        syntax: videocom (`FIND_FRAME(..) = 57`) or tool_call (Qwen's JSON).
        coords: unit of boxes: pixels of the frame the model saw, thousandths, or shares.
        hints: write a sentence beside every observation.
        max_context: most tokens of a conversation, observations included.
        views: how many frames are shown, how large; see `video.encoding.Views`.
        manipulations: modules to import whose `@manipulation` functions the agent may call too.
        decode_timeout_s: of one read of a clip. frame_cache_mb: decoded frames kept.
        options: fields of `vision.PolicyOptions`: at most `max_steps` turns of at most `max_new_tokens`
        tokens.
    """
    chosen = PolicyOptions(**options)
    if chosen.max_prompt_tokens >= max_context:
        raise ValueError(
            f"policy.max_context={max_context} must exceed policy.max_prompt_tokens={chosen.max_prompt_tokens}: a "
            "conversation begins with its prompt"
        )
    # before the model: a module that cannot be imported is told at once
    for module in manipulations:
        import_module(module)
    # made on first use, which takes minutes; nobody else pays for importing it
    if model == "clips":
        from video.tasks.clips_base import clips_base

        model = str(clips_base())
    processor = load_processor(model)
    lora = LoraOptions(lora_rank, lora_alpha, lora_targets)
    hf = trainable_model(model, dtype, attn, lora, train_vision, chosen.gradient_checkpointing)
    # frames are decoded in a process of their own, which a damaged film can only end for itself
    reader = VideoReader(cache_bytes=frame_cache_mb * 2**20, timeout_s=decode_timeout_s)
    encoder = VideoEncoder(hf, processor, chosen, reader, views or Views())
    environment = VideoEnvironment(
        encoder,
        syntax=syntax,
        coords=coords,
        turns=chosen.max_steps,
        max_context=max_context,
        reserve=chosen.max_new_tokens,
        hints=hints,
    )
    rule = step_rule(tokenizer_of(processor), "line", bare(hf).config.get_text_config().vocab_size)
    # transformers samples with the very weights that are trained; vLLM gets them after every update
    sampling_engine = None
    if engine == "vllm":
        sampling_engine = vllm_engine(
            model,
            "",
            "",
            max_model_len=max_context + chosen.max_new_tokens,
            memory=engine_memory,
            lora_rank=lora_rank,
            dtype=dtype,
            films=True,
        )
    return VisionPolicy(hf, processor, rule, chosen, sampling_engine, environment, encoder)
