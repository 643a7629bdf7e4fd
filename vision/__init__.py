"""Vision-language policies, process reward models and rewards.

The names below are what other packages may import: `from vision import VisionPolicy`. The modules behind them are free
to change; beside them, `vision.tiny_models` is public too. A package for another modality puts a policy together like
this, with a `PromptEncoder` of its own and an `Environment` that answers the model's turns:

    options = PolicyOptions(max_new_tokens=64)
    hf = trainable_model(folder, "float32", "sdpa", LoraOptions(), False, False)
    processor = load_processor(folder)
    rule, encoder = step_rule(tokenizer_of(processor), "line"), FilmEncoder(hf, processor, options)
    policy = VisionPolicy(hf, processor, rule, options, None, environment, encoder)

A module is imported when one of its names is first used: rewards, which run in processes of their own, need no model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# For type checkers alone; `X as X` is how a stub says that it exports X. The same names stand in `_MODULE_OF`.
if TYPE_CHECKING:
    from vision.forward.backbone import trainable_model as trainable_model
    from vision.forward.lora import LoraOptions as LoraOptions
    from vision.forward.lora import trained_options as trained_options
    from vision.growth.engine_sync import vllm_engine as vllm_engine
    from vision.growth.environment import Environment as Environment
    from vision.growth.environment import TurnResult as TurnResult
    from vision.inputs.loading import load_model as load_model
    from vision.inputs.loading import load_processor as load_processor
    from vision.inputs.loading import save_model as save_model
    from vision.inputs.loading import tokenizer_of as tokenizer_of
    from vision.inputs.options import TOKEN_DEFAULTS as TOKEN_DEFAULTS
    from vision.inputs.options import PolicyOptions as PolicyOptions
    from vision.inputs.prompts import PromptEncoder as PromptEncoder
    from vision.inputs.prompts import PromptError as PromptError
    from vision.inputs.prompts import Turn as Turn
    from vision.inputs.prompts import size_in_bytes as size_in_bytes
    from vision.inputs.prompts import turns_of as turns_of
    from vision.inputs.step_rule import StepRule as StepRule
    from vision.inputs.step_rule import step_rule as step_rule
    from vision.inputs.tokens import Pixels as Pixels
    from vision.inputs.tokens import PromptTokens as PromptTokens
    from vision.policy import VisionPolicy as VisionPolicy
    from vision.prm import VisionPrm as VisionPrm
    from vision.rewards import Box as Box
    from vision.rewards import iou as iou
    from vision.rewards import is_think_answer as is_think_answer
    from vision.tasks.jsonl import states_answer as states_answer

_MODULE_OF = {
    "trainable_model": "vision.forward.backbone",
    "LoraOptions": "vision.forward.lora",
    "trained_options": "vision.forward.lora",
    "vllm_engine": "vision.growth.engine_sync",
    "Environment": "vision.growth.environment",
    "TurnResult": "vision.growth.environment",
    "load_model": "vision.inputs.loading",
    "load_processor": "vision.inputs.loading",
    "save_model": "vision.inputs.loading",
    "tokenizer_of": "vision.inputs.loading",
    "TOKEN_DEFAULTS": "vision.inputs.options",
    "PolicyOptions": "vision.inputs.options",
    "PromptEncoder": "vision.inputs.prompts",
    "PromptError": "vision.inputs.prompts",
    "Turn": "vision.inputs.prompts",
    "size_in_bytes": "vision.inputs.prompts",
    "turns_of": "vision.inputs.prompts",
    "StepRule": "vision.inputs.step_rule",
    "step_rule": "vision.inputs.step_rule",
    "Pixels": "vision.inputs.tokens",
    "PromptTokens": "vision.inputs.tokens",
    "VisionPolicy": "vision.policy",
    "VisionPrm": "vision.prm",
    "Box": "vision.rewards",
    "iou": "vision.rewards",
    "is_think_answer": "vision.rewards",
    "states_answer": "vision.tasks.jsonl",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'vision' has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_MODULE_OF[name]), name)
