"""The common part of a policy and a process reward model: a model that runs trees of tokens, in parts that fit."""

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
from vision.forward.lora import LoraOptions, adapter_rank, add_lora, image_parameters, load_adapter
from vision.forward.network import Network, freeze_idle
from vision.forward.packing import Mode, choose_mode, rows_of, split
from vision.forward.passes import Job, TokenTree
from vision.inputs.loading import adapter_base, load_model, tokenizer_of
from vision.inputs.options import PolicyOptions
from vision.inputs.prompts import PromptEncoder, PromptError

log = logging.getLogger(__name__)

# Memory for pictures of earlier iterations, as a frozen encoder made them.
FEATURE_BYTES = 2**30


class Backbone:
    """A transformers image-text (or text) model with its processor, ready to run packed trees.

    encode: prompts to tokens. style, modes: how attention is masked and which layouts are possible.
    features: encoded pictures where the encoder is frozen, else None; then `blank` is a picture for ranks without one.

    Raises:
        ValueError: a mode the model cannot take.
    """

    def __init__(
        self,
        network: Network,
        processor: Any,
        options: PolicyOptions,
        *,
        keep_images: bool = False,
        opening: str | None = None,
        encode: PromptEncoder | None = None,
    ) -> None:
        hf = network.hf
        self.hf, self.processor, self.options = hf, processor, options
        self.tokenizer = tokenizer_of(processor)
        self.encode = encode or PromptEncoder(hf, processor, options, keep_images=keep_images, opening=opening)
        self.style = style_of(bare(hf))
        self.modes = _allowed(options.mode, self.style.plain, options.gradient_checkpointing, bare(hf))
        # A frozen encoder makes the same features every time, so they are kept. A trained one runs in every update,
        # and on ranks without a picture it runs on a blank one: collectives need a gradient from every rank.
        trained_images = any(weight.requires_grad for weight in image_parameters(bare(hf)))
        self.features = None if trained_images else ByteCache(FEATURE_BYTES, name="features of pictures")
        self.blank = self.encode.blank() if trained_images else None
        if self.blank is not None:
            freeze_idle(hf, self.blank, image_parameters(bare(hf)))
        self._logged: set[str] = set()

    def begin_iteration(self) -> None:
        """Give up the last iteration's prompts and pictures; see `mmrl.capabilities.EncodingCache`."""
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
                self.log_once(f"quarantined: {error}", logging.WARNING)
        return good

    def job(self, trees: Sequence[TokenTree], build: Callable[[Mode], Job], *, sharded: bool) -> Job:
        """`build` of the cheapest possible layout of `trees`. The first use of a layout is logged."""
        layouts = [(tree.packed, tree.parent) for tree in trees]
        modes = _equal_calls(self.modes) if sharded else self.modes
        job = build(choose_mode(layouts, modes, bare(self.hf).config.get_text_config().hidden_size))
        if job.mode not in self._logged:
            unique = sum(len(tree.packed) for tree in trees)
            separate = 0  # tokens that the same work would take as separate rows
            for packed, parent in layouts:
                separate += sum(len(row) for row in rows_of(packed, parent, "rows"))
            self.log_once(
                job.mode,
                logging.INFO,
                f"layout {job.mode}: {separate / unique:.1f} tokens of separate rows per unique token, "
                f"{job.row_tokens} run for {unique}",
            )
        return job

    def log_once(self, key: str, level: int, message: str | None = None) -> None:
        """Log `message` (by default the key itself), the first time that `key` is given."""
        if key not in self._logged:
            self._logged.add(key)
            log.log(level, "%s", message or key)


def trainable_model(
    folder: str, dtype: str, attn: str, lora: LoraOptions, train_vision: bool, gradient_checkpointing: bool
) -> Any:
    """The model in `folder` with the weights that shall train marked, inside PEFT where LoRA trains.

    A folder with an adapter is its base with that adapter, which trains on.

    Raises:
        ValueError: LoRA and `train_vision`; only the adapter would be saved.
    """
    saved = adapter_base(folder) is not None
    if train_vision and (lora.rank or saved):
        rank = lora.rank or adapter_rank(folder)
        raise ValueError(f"lora_rank={rank} trains the language model alone; set train_vision: false")
    # FlexAttention is switched on behind loading: only the language model has it, the image encoder keeps sdpa.
    hf = load_model(folder, dtype=dtype, attn="sdpa" if attn == FLEX else attn)
    if attn == FLEX:
        attend_by(hf, FLEX)
    for weight in image_parameters(hf):
        weight.requires_grad_(train_vision)
    if saved:
        hf = load_adapter(hf, folder, lora)
    elif lora.rank:
        hf = add_lora(hf, lora)
    if gradient_checkpointing:
        bare(hf).gradient_checkpointing_enable({"use_reentrant": False})
    return hf


def micro_batches(
    tree: StepTree,
    steps: Tensor,
    sizes: Sequence[int],
    prompt_sizes: Mapping[int, int],
    limit: int,
    whole_prompts: bool = False,
) -> list[Tensor]:
    """Steps of whole prompts while their trees fit in `limit` tokens; a larger tree is cut along its branches.

    Args:
        sizes: (N,) tokens of each step. prompt_sizes: tokens of each prompt that has one of `steps`, by group.
        whole_prompts: never cut a tree.
    """
    parts: list[list[int]] = []
    used = 0  # tokens of the last part
    for group, own in by_prompt(tree, steps):
        nodes, parent = closure(tree, own)
        lengths = [prompt_sizes[group], *(sizes[step] for step in nodes)]
        total = sum(lengths)
        # Whole prompts share a part while they fit, as a prompt that is cut is run once in every part.
        if total > limit and not whole_prompts:
            place = {step: index for index, step in enumerate(nodes, 1)}
            for part in split(parent, lengths, [place[step] for step in own], limit):
                parts.append([nodes[index - 1] for index in part])
            used = limit  # the next prompt starts a part of its own
        elif parts and used + total <= limit:
            parts[-1] += own
            used += total
        else:
            parts.append(own)
            used = total
    return [torch.tensor(sorted(part)) for part in parts]


def by_prompt(tree: StepTree, steps: Tensor) -> list[tuple[int, list[int]]]:
    """(prompt, its steps in their order) for every prompt that has one of `steps`, ascending."""
    groups: dict[int, list[int]] = {}
    for group, step in zip(tree.group[steps].tolist(), steps.tolist(), strict=True):
        groups.setdefault(group, []).append(step)
    return sorted(groups.items())


def closure(tree: StepTree, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Steps and their ancestors ascending, and the parents of the prompt and these: 0 is the prompt, the i-th step is
    i + 1. The steps [4] of a chain 2 -> 4 give [2, 4] and [-1, 0, 1].

    Takes as long as there are such steps, however large the forest.
    """
    above = tree.parents
    nodes: set[int] = set()
    for step in steps:
        while step >= 0 and step not in nodes:
            nodes.add(step)
            step = above[step]
    order = sorted(nodes)
    place = {-1: 0}
    for index, step in enumerate(order, 1):
        place[step] = index
    return order, [-1, *(place[above[step]] for step in order)]


def _equal_calls(modes: Sequence[Mode]) -> list[Mode]:
    """The modes without prefix_packed: it makes one call or two, and with sharded weights each is a collective."""
    equal: list[Mode] = [mode for mode in modes if mode != "prefix_packed"]
    if not equal:
        raise ValueError("policy.mode: prefix_packed cannot run with sharded weights; use auto")
    return equal


def _allowed(mode: str, plain: bool, checkpointing: bool, hf: Any) -> list[Mode]:
    """The modes that `auto` chooses from, the simplest first; a named mode must be possible."""
    implementation = hf.config.get_text_config()._attn_implementation
    if implementation == FLEX:
        # Its only mask is the block mask of packed trees; without one every token would see all others.
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
