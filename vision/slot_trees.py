"""Solutions as trees of tokens in which every step has one slot, the place where a process reward model is read.

A prompt P with the steps `a` and `b`, a marker M behind each step:

    nodes    P    a M    b M
    slots           ^      ^
    tokens        a      b       the step's own, for heads that take its likelihood
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.reasoning.slots import SlotIds
from mmrl.rollout import Prompt, Rollout
from vision.forward.backbone import by_prompt, closure
from vision.forward.passes import TokenTree
from vision.inputs.tokens import PromptTokens


@dataclass(frozen=True)
class StepTrees:
    """The trees of some steps, and where these are in them.

    slots, tokens: packed indices per tree of the steps' slots and own tokens. owner: (A,) the slot of each token,
    counted over all trees. order: (S,) the caller's place of each slot.
    """

    trees: list[TokenTree]
    slots: list[Tensor]
    tokens: list[Tensor]
    owner: Tensor
    order: Tensor


class SlotTrees:
    """Lays out prompts with their steps for a process reward model.

    Args:
        encode: prompts to tokens. write: text -> ids. slots: the marks around steps.
        refused: ids that no step may hold.
    """

    def __init__(
        self,
        encode: Callable[[Prompt], PromptTokens],
        write: Callable[[str], list[int]],
        slots: SlotIds,
        refused: Set[int],
    ) -> None:
        self._encode, self._write, self._slots, self._refused = encode, write, slots, refused
        self._cache: dict[str, list[int] | None] = {}

    def step_ids(self, text: str) -> list[int] | None:
        """The ids that a step adds to the context, its closing included; [] for a blank one, None when it holds a
        marker or an image placeholder."""
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            ids = self._write(text.strip()) if text.strip() else []
            if self._refused & set(ids):
                self._cache[text] = None
            else:
                self._cache[text] = self._slots.run(ids, first=True) if ids else []
        return self._cache[text]

    def of_steps(self, rollout: Rollout, steps: Tensor) -> StepTrees:
        """The trees of the prompts of `steps`, with the steps before them."""
        closing = len(self._slots.closing)
        trees: list[TokenTree] = []
        slots: list[Tensor] = []
        tokens: list[Tensor] = []
        owner: list[int] = []
        num_slots = 0
        for group, own in by_prompt(rollout.tree, steps):
            one, node_of = self._tree_of_prompt(rollout, group, own)
            ends = []
            own_tokens = []
            for number, step in enumerate(own, num_slots):
                node = node_of[step]
                end = int(one.packed.start[node]) + len(one.ids[node])
                # A node begins with the marks between two steps, which are not the step's own.
                start = end - len(self.step_ids(rollout.texts[step]) or ())
                ends.append(end)
                own_tokens.append(torch.arange(start, end - closing))
                owner += [number] * len(own_tokens[-1])
            trees.append(one)
            slots.append(torch.tensor(ends) + self._slots.read)
            tokens.append(torch.cat(own_tokens))
            num_slots += len(own)
        order = torch.argsort(rollout.tree.group[steps], stable=True)
        return StepTrees(trees, slots, tokens, torch.tensor(owner), order)

    def of_prompts(self, prompts: Sequence[PromptTokens]) -> StepTrees:
        """The trees of prompts with nothing written yet; each slot is that of an empty first step."""
        closing = list(self._slots.closing)
        trees, slots = [], []
        for prompt in prompts:
            if closing:
                trees.append(TokenTree(prompt, [-1, 0], [prompt.ids, torch.tensor(closing)]))
            else:
                trees.append(TokenTree(prompt, [-1], [prompt.ids]))
            slots.append(torch.tensor([len(prompt.ids) + len(closing) + self._slots.read]))
        none = torch.empty(0, dtype=torch.int64)
        return StepTrees(trees, slots, [none] * len(trees), none, torch.arange(len(trees)))

    def _tree_of_prompt(self, rollout: Rollout, group: int, own: Sequence[int]) -> tuple[TokenTree, dict[int, int]]:
        """The tree of a prompt's steps and of those before them, and the node of each.

        Raises:
            ValueError: a step with a marker inside.
        """
        nodes, parent = closure(rollout.tree, own)
        prompt = self._encode(rollout.prompts[group])
        ids = [prompt.ids]
        # Blank steps take no place, so the first step that is written may have ancestors.
        is_written = [False]
        for step, above in zip(nodes, parent[1:], strict=True):
            step_ids = self.step_ids(rollout.texts[step])
            if step_ids is None:
                raise ValueError(f"step {step} holds a marker: {rollout.texts[step][:60]!r}; score `readable` steps")
            between = self._slots.between if step_ids and is_written[above] else ()
            ids.append(torch.tensor([*between, *step_ids], dtype=torch.int64))
            is_written.append(is_written[above] or bool(step_ids))
        return TokenTree(prompt, parent, ids), {step: node for node, step in enumerate(nodes, 1)}
