"""What a generation engine takes and gives: encoded prompts in, trees of sampled steps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

from mmrl.rollout import BranchPlan
from vision.step_rule import StepRule


@dataclass(frozen=True)
class Pixels:
    """The images of one prompt (or one observation) as the model's image processor made them.

    tensors: what `get_image_features` takes. key: hash of the pictures' contents; equal keys are encoded once.
    """

    key: str
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class PromptTokens:
    """One encoded prompt.

    ids: (P,) int64, placeholders expanded: what the model sees. types: (P,) int64, 1 at image placeholders.
    positions: (P,) or (3, P) int64 rotary positions. next_position: what the first completion token gets.
    text: the rendered template with one placeholder per image; images: RGB pictures in order, for other engines.
    """

    ids: Tensor
    types: Tensor
    positions: Tensor
    next_position: int
    text: str = ""
    images: Sequence[Image.Image] = ()
    pixels: Pixels | None = None


@dataclass(frozen=True)
class Decoding:
    """How tokens are drawn. temperature 0 is greedy; above 0 it divides the logits, in the update as well.

    banned: ids that may never be sampled (image placeholders). eos: ids that end a completion.
    max_steps: depth from which a completion is no longer cut into steps.
    """

    temperature: float
    max_new_tokens: int
    max_steps: int
    banned: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()


@dataclass
class Node:
    """One sampled step. `end` says why it stopped; only a node that ended as a step has children."""

    prompt: int  # index into the prompts
    parent: int  # index into the list of nodes, -1 = the prompt
    depth: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # under the sampling distribution, banned ids removed
    end: Literal["open", "step", "eos", "length"] = "open"


class Engine(Protocol):
    """Grows the trees of some prompts; parents come before children."""

    def grow(
        self,
        prompts: Sequence[PromptTokens],
        plan: BranchPlan,
        decoding: Decoding,
        rule: StepRule,
        seeds: Sequence[int],
    ) -> list[Node]: ...
