"""A rollout's prompts, steps and observations as trees of tokens, which updates and readings run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.rollout import Place, Rollout
from vision.forward.backbone import by_prompt, closure, micro_batches
from vision.forward.passes import TokenTree
from vision.growth.dialogue import Dialogue
from vision.inputs.prompts import PromptEncoder
from vision.inputs.tokens import PromptTokens


@dataclass(frozen=True)
class LaidOut:
    """One prompt's tree of tokens.

    node: step -> its node in the tree. after: step -> the node that its continuation hangs from, which is the
    observation behind it or the step itself; -1 stands for the prompt. tails: nodes that were hung behind places, in
    the order of the places.
    """

    tree: TokenTree
    node: Mapping[int, int]
    after: Mapping[int, int]
    tails: Sequence[int]

    def end(self, step: int) -> int:
        """Packed index of the last token before what follows `step`, or the prompt for -1."""
        return int(self.tree.packed.last[self.after[step]])

    def tokens(self, node: int) -> Tensor:
        """Packed indices of a node's own tokens."""
        return self.tree.packed.start[node] + torch.arange(len(self.tree.ids[node]))


class RolloutTrees:
    """Lays rollouts out for a model.

    Args:
        encode: prompts to tokens.
        dialogue: gives the observations between steps.
    """

    def __init__(self, encode: PromptEncoder, dialogue: Dialogue) -> None:
        self._encode, self._dialogue = encode, dialogue

    def of_steps(
        self, rollout: Rollout, steps: Tensor, *, blank: bool = False, reworded: bool = False
    ) -> tuple[list[TokenTree], list[Tensor], Tensor]:
        """The trees that `steps` need, the packed indices of their tokens, and the actions these are.

        Args:
            steps: (S,) of any prompts.
            blank: every picture has nothing to see. reworded: prompts may have other lengths than when sampled.
        Returns:
            A tree and packed indices per prompt, and (A,) the places of these tokens in `rollout.actions`.
        """
        tree = rollout.tree
        trees, wanted, actions = [], [], []
        for group, own in by_prompt(tree, steps):
            prompt = self._encode(rollout.prompts[group]) if reworded else self.checked_prompt(rollout, group)
            laid_out = self.lay_out(rollout, prompt, own, blank=blank)
            trees.append(laid_out.tree)
            wanted.append(torch.cat([laid_out.tokens(laid_out.node[step]) for step in own]))
            for step in own:
                actions.append(torch.arange(int(tree.tok_start[step]), int(tree.tok_end[step])))
        return trees, wanted, torch.cat(actions)

    def lay_out(
        self,
        rollout: Rollout,
        prompt: PromptTokens,
        steps: Sequence[int],
        *,
        blank: bool = False,
        open_ended: bool = False,
        tails: Sequence[tuple[int, Tensor]] = (),
    ) -> LaidOut:
        """The prompt, `steps` and what comes before them.

        Args:
            open_ended: `steps` are followed by their observations even where no other step follows.
            tails: (step or -1, ids) of tokens that are hung behind states, each as a child of its own.
        """
        closed_steps, closed_parents = closure(rollout.tree, steps)
        has_child = set(closed_parents)
        opened = set(steps) if open_ended else set()
        # A step becomes one node, or two where an observation follows it: the step, and the observation below it.
        ids = [prompt.ids]
        parents = [-1]
        shown: dict[int, PromptTokens] = {}
        node_of: dict[int, int] = {}
        after = {-1: 0}
        for place, step in enumerate(closed_steps, 1):
            above = closed_parents[place]
            parents.append(after[closed_steps[above - 1] if above else -1])
            node_of[step] = after[step] = len(ids)
            ids.append(self.ids(rollout, step))
            if place not in has_child and step not in opened:
                continue
            observation = self._dialogue.observation(rollout, step)
            if observation is not None:
                after[step] = len(ids)
                shown[len(ids)] = observation.blank if blank else observation
                ids.append(observation.ids)
                parents.append(node_of[step])
        num_nodes = len(ids)
        for step, tail in tails:
            ids.append(tail)
            parents.append(after[step])
        tree = TokenTree(prompt.blank if blank else prompt, parents, ids, shown)
        return LaidOut(tree, node_of, after, range(num_nodes, len(ids)))

    def checked_prompt(self, rollout: Rollout, group: int) -> PromptTokens:
        """The prompt's tokens.

        Raises:
            ValueError: they are more or fewer than when the rollout was made.
        """
        prompt, size = self._encode(rollout.prompts[group]), int(rollout.prompt_payload["prompt_tokens"][group])
        if len(prompt.ids) != size:
            raise ValueError(
                f"prompt {rollout.prompts[group].id!r} has {len(prompt.ids)} tokens now and had {size} when the "
                "rollout was made; use the processor, instruction and pictures of that run"
            )
        return prompt

    @staticmethod
    def ids(rollout: Rollout, step: int) -> Tensor:
        """(n,) ids of one step."""
        start, end = int(rollout.tree.tok_start[step]), int(rollout.tree.tok_end[step])
        return rollout.actions.payload["token"][start:end]


def step_batches(rollout: Rollout, steps: Tensor, limit: int, *, whole_prompts: bool = False) -> list[Tensor]:
    """Steps of whole prompts while their trees fit in `limit` tokens; a larger tree is cut along its branches."""
    prompts = dict(enumerate(rollout.prompt_payload["prompt_tokens"].tolist()))
    return micro_batches(rollout.tree, steps, _sizes(rollout, 0), prompts, limit, whole_prompts)


def open_places(rollout: Rollout, places: Sequence[Place]) -> list[int]:
    """Positions of the places that a step follows; a place behind a leaf is an end."""
    is_leaf = rollout.tree.is_leaf
    return [index for index, place in enumerate(places) if place.step < 0 or not bool(is_leaf[place.step])]


def place_batches(
    rollout: Rollout, places: Sequence[Place], limit: int, *, extra: int = 0, most: int
) -> list[list[int]]:
    """Positions of `places` in parts that share what leads to them: at most `limit` tokens and `most` places each.

    extra: further tokens behind every place.
    """
    # Positions by the step behind which they lie, or by their prompt where nothing was written yet.
    by_step: dict[int, int] = {}
    roots: dict[int, int] = {}
    for position, place in enumerate(places):
        if place.step >= 0:
            by_step[place.step] = position
        else:
            roots[place.prompt] = position
    prompt_sizes = {group: n + extra for group, n in enumerate(rollout.prompt_payload["prompt_tokens"].tolist())}

    parts: list[list[int]] = []
    steps = torch.tensor(sorted(by_step), dtype=torch.long)
    if len(steps):
        for part in micro_batches(rollout.tree, steps, _sizes(rollout, extra), prompt_sizes, limit, False):
            # A prompt's own place goes with the first part that runs the prompt anyway.
            groups = dict.fromkeys(rollout.tree.group[part].tolist())
            positions = [roots.pop(group) for group in groups if group in roots]
            parts.append(positions + [by_step[step] for step in part.tolist()])
    # The remaining prompts have no other place; they fill parts of their own.
    room = 0
    for group, position in roots.items():
        if prompt_sizes[group] > room:
            parts.append([])
            room = limit
        parts[-1].append(position)
        room -= prompt_sizes[group]
    return [part[start : start + most] for part in parts for start in range(0, len(part), most)]


def _sizes(rollout: Rollout, extra: int) -> list[int]:
    """(N,) tokens of each step, its observation and the `extra` ones behind it."""
    tree = rollout.tree
    sizes: list[int] = (tree.span + tree.tags.get("observed", 0) + extra).tolist()
    return sizes
