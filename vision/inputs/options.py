"""Options of a vision-language policy beside its model: the part of a recipe's `policy:` that needs no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Defaults of a recipe whose policy writes tokens: PPO's clip range, the learning rate that TRL's trainers of rewards
# and preferences have, and the estimate of the divergence that needs no closed form.
TOKEN_DEFAULTS = {"loss.clip_low": 0.2, "loss.clip_high": 0.2, "loss.kl_form": "k3", "optim.lr": 1e-6}


@dataclass(frozen=True)
class PolicyOptions:
    """Options for prompts, for sampling and for the layout of updates.

    temperature: above 0; divides the logits in rollout and update. eval_temperature: 0 evaluates greedily.
    max_new_tokens: longest completion. max_steps: depth from which a completion is no longer cut into steps.
    instruction: follows every question. system: goes before the conversation.
    max_prompt_tokens: prompts longer than this are left out, never cut.
    max_batch: most leaves sampled at once. max_tokens: most unique tokens of one micro-batch of the update.
    mode: layout of the update (docs/results/tree_packing.md); auto takes the cheapest possible one.
    gradient_checkpointing: less memory, one more forward; excludes prefix_packed.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    temperature: float = 1.0
    eval_temperature: float = 0.0
    max_new_tokens: int = 512
    max_steps: int = 32
    instruction: str = ""
    system: str = ""
    max_prompt_tokens: int = 2048
    max_batch: int = 256
    max_tokens: int = 16384
    mode: Literal["auto", "rows", "rows_shared_image", "packed", "prefix_packed"] = "auto"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"policy.temperature={self.temperature}: rollouts need a temperature above 0")
        for name in ("max_new_tokens", "max_steps", "max_prompt_tokens", "max_batch", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"policy.{name}={getattr(self, name)}: at least 1")
