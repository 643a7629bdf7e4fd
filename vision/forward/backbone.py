"""What a policy and a process reward model share: a model that reads trees of tokens, and how its work is cut."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from mmrl.rollout import Prompt
from mmrl.tree import StepTree
from vision.forward.attention import FLEX, attend_by, style_of
from vision.forward.lora import add_lora, image_parameters
from vision.forward.network import Network, freeze_idle
from vision.forward.packing import Mode, choose_mode, rows_of, split
from vision.forward.passes import Job, TokenTree
from vision.inputs.loading import load_model, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.prompts import PromptEncoder, PromptError

log = logging.getLogger(__name__)

# of pictures as a frozen encoder made them, kept from earlier iterations
FEATURE_BYTES = 2**30


class Backbone:
    """A transformers image-text (or text) model with its processor, ready to run packed trees.

    encode: prompts to tokens. style, modes: how attention is masked and which layouts are possible.
    features: encoded pictures where the encoder is frozen, else None; then `blank` is a picture for ranks without one.

    Raises:
        ValueError: a mode the model cannot take.
    """

    def __init__(
        self, network: Network, processor: Any, options: PolicyOptions, *, keep_images: bool = False,
        opening: str | None = None, encode: PromptEncoder | None = None,
    ) -> None:  # fmt: skip
        hf = network.hf
        self.hf, self.processor, self.options = hf, processor, options
        self.tokenizer = tokenizer_of(processor)
        self.encode = encode or PromptEncoder(hf, processor, options, keep_images=keep_images, opening=opening)
        self.style = style_of(bare(hf))
        self.modes = _allowed(options.mode, self.style.plain, options.gradient_checkpointing, bare(hf))
        trained_images = any(p.requires_grad for p in image_parameters(bare(hf)))
        self.features = None if trained_images else ByteCache(FEATURE_BYTES, name="features of pictures")
        self.blank = self.encode.blank() if trained_images else None
        if self.blank is not None:
            freeze_idle(hf, self.blank, image_parameters(bare(hf)))
        self._told: set[str] = set()

    def begin_iteration(self) -> None:
        """Let go of the last iteration's prompts and pictures; see `mmrl.capabilities.EncodingCache`."""
        self.encode.begin_iteration()
        if self.features is not None:
            self.features.begin_iteration()

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that can be encoded; each other one is logged with its reason, once."""
        good = []
        for prompt in prompts:
            try:
                self.encode(prompt)
                good.append(prompt)
            except PromptError as error:
                self.tell(f"quarantined: {error}", logging.WARNING)
        return good

    def job(self, trees: Sequence[TokenTree], build: Callable[[Mode], Job], *, sharded: bool) -> Job:
        """`build` the cheapest possible layout of `trees`; says once which one it is."""
        shown = [(t.packed, t.parent) for t in trees]
        modes = _equal_calls(self.modes) if sharded else self.modes
        job = build(choose_mode(shown, modes, bare(self.hf).config.get_text_config().hidden_size))
        if job.mode not in self._told:
            unique = sum(len(t.packed) for t in trees)
            rows = sum(len(r) for packed, parent in shown for r in rows_of(packed, parent, "rows"))
            self.tell(
                job.mode, logging.INFO,
                f"layout {job.mode}: {rows / unique:.1f} tokens of separate rows per unique token, {job.row_tokens} "
                f"run for {unique}",
            )  # fmt: skip
        return job

    def tell(self, key: str, level: int, message: str | None = None) -> None:
        """Log `message` (by default the key itself) the first time `key` is seen."""
        if key not in self._told:
            self._told.add(key)
            log.log(level, "%s", message or key)


def trainable_model(
    folder: str, dtype: str, attn: str, lora_rank: int, train_vision: bool, gradient_checkpointing: bool
) -> Any:
    """The model in `folder` with the weights that shall train marked, inside PEFT where LoRA trains.

    Raises:
        ValueError: LoRA and `train_vision`; only the adapter would be saved.
    """
    if lora_rank and train_vision:
        raise ValueError(f"lora_rank={lora_rank} trains the language model alone; set train_vision: false")
    hf = load_model(folder, dtype=dtype, attn="sdpa" if attn == FLEX else attn)
    if attn == FLEX:
        attend_by(hf, FLEX)
    for p in image_parameters(hf):
        p.requires_grad_(train_vision)
    if lora_rank:
        hf = add_lora(hf, lora_rank)
    if gradient_checkpointing:
        bare(hf).gradient_checkpointing_enable({"use_reentrant": False})
    return hf


def micro_batches(
    tree: StepTree, steps: Tensor, sizes: Sequence[int], prompt_sizes: Mapping[int, int], limit: int,
    whole_prompts: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Steps of whole prompts while their trees fit in `limit` tokens; a larger tree is cut along its branches.

    Args:
        sizes: (N,) tokens of each step. prompt_sizes: tokens of each prompt that has one of `steps`, by group.
        whole_prompts: never cut a tree.
    """
    parts: list[list[int]] = []
    used = 0
    for g, own in by_prompt(tree, steps):
        nodes, parent = closure(tree, own)
        lengths = [prompt_sizes[g], *(sizes[v] for v in nodes)]
        total = sum(lengths)
        place = {v: i + 1 for i, v in enumerate(nodes)}
        if total > limit and not whole_prompts:
            cut = split(parent, lengths, [place[v] for v in own], limit)
            parts += [[nodes[i - 1] for i in part] for part in cut]
            used = limit  # the next prompt starts a part of its own
        elif parts and used + total <= limit:
            parts[-1] += own
            used += total
        else:
            parts.append(own)
            used = total
    return [torch.tensor(sorted(p)) for p in parts]


def by_prompt(tree: StepTree, steps: Tensor) -> list[tuple[int, list[int]]]:
    """(prompt, its steps in their order) for every prompt that has one of `steps`, ascending."""
    groups: dict[int, list[int]] = {}
    for g, step in zip(tree.group[steps].tolist(), steps.tolist(), strict=True):
        groups.setdefault(g, []).append(step)
    return sorted(groups.items())


def closure(tree: StepTree, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Steps and their ancestors ascending, and their parents where 0 is the prompt and node i is place i + 1.

    Takes as long as there are such steps, however large the forest.
    """
    above = tree.parents
    nodes: set[int] = set()
    for s in steps:
        v = s
        while v >= 0 and v not in nodes:
            nodes.add(v)
            v = above[v]
    order = sorted(nodes)
    place = {v: i + 1 for i, v in enumerate(order)} | {-1: 0}
    return order, [-1, *(place[above[v]] for v in order)]


def _equal_calls(modes: Sequence[Mode]) -> list[Mode]:
    """Where weights are sharded a call is a collective; prefix_packed makes one or two of them."""
    left: list[Mode] = [m for m in modes if m != "prefix_packed"]
    if not left:
        raise ValueError("policy.mode: prefix_packed cannot run with sharded weights; use auto")
    return left


def _allowed(mode: str, plain: bool, checkpointing: bool, hf: Any) -> list[Mode]:
    """Modes `auto` chooses from, the simplest first; a named mode must be possible."""
    implementation = hf.config.get_text_config()._attn_implementation
    if implementation == FLEX:  # its mask is the tree's block mask; without one it would see everything
        if mode not in ("auto", "packed"):
            raise ValueError(f"policy.mode={mode!r}: flex attention takes packed alone; use auto")
        return ["packed"]
    possible: list[Mode] = ["rows_shared_image"]
    takes_masks = "flash" not in implementation
    if plain and takes_masks and not checkpointing:
        possible.append("prefix_packed")
    if takes_masks:
        possible.append("packed")
    if mode == "auto":
        return possible
    if mode != "rows" and mode not in possible:
        why = "gradient checkpointing keeps no cache" if checkpointing else "its attention is not plain causal"
        raise ValueError(f"policy.mode={mode!r} is not possible for this model ({why}); use auto")
    return [mode]  # type: ignore[list-item]
