"""A rollout's prompts, steps and observations as trees of tokens: what an update and a second look run."""

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
    """One prompt's tree of tokens. node: of each step. after: what a step's continuation hangs from, the observation
    behind it or the step itself; -1 is the prompt. tails: nodes of what was hung behind places, in their order."""

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
        dialogue: brings the observations between steps.
    """

    def __init__(self, encode: PromptEncoder, dialogue: Dialogue) -> None:
        self._encode, self._dialogue = encode, dialogue

    def of_steps(
        self, rollout: Rollout, steps: Tensor, *, blank: bool = False, reworded: bool = False
    ) -> tuple[list[TokenTree], list[Tensor], Tensor]:
        """The trees that `steps` need, the packed indices of their tokens, and the actions these are.

        blank: with nothing to see in any picture. reworded: the prompts may have other lengths than when sampled.
        """
        tree = rollout.tree
        trees, wanted, index = [], [], []
        for g, own in by_prompt(tree, steps):
            prompt = self._encode(rollout.prompts[g]) if reworded else self.checked_prompt(rollout, g)
            laid = self.lay_out(rollout, prompt, own, blank=blank)
            wanted.append(torch.cat([laid.tokens(laid.node[v]) for v in own]))
            index.append(torch.cat([torch.arange(int(tree.tok_start[v]), int(tree.tok_end[v])) for v in own]))
            trees.append(laid.tree)
        return trees, wanted, torch.cat(index)

    def lay_out(
        self, rollout: Rollout, prompt: PromptTokens, steps: Sequence[int], *, blank: bool = False,
        open_ended: bool = False, tails: Sequence[tuple[int, Tensor]] = (),
    ) -> LaidOut:  # fmt: skip
        """The prompt, `steps` and what comes before them.

        Args:
            open_ended: `steps` are followed by their observations even where no other step follows.
            tails: (step or -1, ids) of what is hung behind states, as children of their own.
        """
        nodes, parent = closure(rollout.tree, steps)
        ids, above, shown = [prompt.ids], [-1], {}
        node: dict[int, int] = {}
        below = [0]  # by place in `parent`: what a child hangs from
        inner = set(parent)
        opened = set(steps) if open_ended else set()
        for i, v in enumerate(nodes, 1):
            node[v] = len(ids)
            ids.append(self.ids(rollout, v))
            above.append(below[parent[i]])
            seen = self._dialogue.observation(rollout, v) if i in inner or v in opened else None
            if seen is not None:
                shown[len(ids)] = seen.blank if blank else seen
                ids.append(seen.ids)
                above.append(node[v])
            below.append(len(ids) - 1)
        after = {-1: 0} | dict(zip(nodes, below[1:], strict=True))
        first = len(ids)
        for step, tail in tails:
            ids.append(tail)
            above.append(after[step])
        tree = TokenTree(prompt.blank if blank else prompt, above, ids, shown)
        return LaidOut(tree, node, after, range(first, len(ids)))

    def checked_prompt(self, rollout: Rollout, g: int) -> PromptTokens:
        """The prompt's tokens.

        Raises:
            ValueError: they are more or fewer than when the rollout was made.
        """
        prompt, size = self._encode(rollout.prompts[g]), int(rollout.prompt_payload["prompt_tokens"][g])
        if len(prompt.ids) != size:
            raise ValueError(
                f"prompt {rollout.prompts[g].id!r} has {len(prompt.ids)} tokens now and had {size} when the rollout "
                "was made; use the processor, instruction and pictures of that run"
            )
        return prompt

    @staticmethod
    def ids(rollout: Rollout, v: int) -> Tensor:
        """The ids of one step."""
        return rollout.actions.payload["token"][int(rollout.tree.tok_start[v]) : int(rollout.tree.tok_end[v])]


def step_batches(rollout: Rollout, steps: Tensor, limit: int, *, whole_prompts: bool = False) -> list[Tensor]:
    """Steps of whole prompts while their trees fit in `limit` tokens; a larger tree is cut along its branches."""
    prompts = dict(enumerate(rollout.prompt_payload["prompt_tokens"].tolist()))
    return micro_batches(rollout.tree, steps, _sizes(rollout, 0), prompts, limit, whole_prompts)


def open_places(rollout: Rollout, places: Sequence[Place]) -> list[int]:
    """Positions of the places that something followed: a state of tokens that nothing follows is an end."""
    return [i for i, p in enumerate(places) if p.step < 0 or not bool(rollout.tree.is_leaf[p.step])]


def place_batches(
    rollout: Rollout, places: Sequence[Place], limit: int, *, extra: int = 0, most: int
) -> list[list[int]]:
    """Positions of `places` in parts that share what leads to them: at most `limit` tokens and `most` places each.

    extra: further tokens behind every place.
    """
    by_step = {p.step: i for i, p in enumerate(places) if p.step >= 0}
    roots = {p.prompt: i for i, p in enumerate(places) if p.step < 0}
    prompts = {g: n + extra for g, n in enumerate(rollout.prompt_payload["prompt_tokens"].tolist())}
    steps = torch.tensor(sorted(by_step), dtype=torch.long)
    parts: list[list[int]] = []
    if len(steps):
        for part in micro_batches(rollout.tree, steps, _sizes(rollout, extra), prompts, limit, False):
            groups = dict.fromkeys(rollout.tree.group[part].tolist())
            parts.append([roots.pop(g) for g in groups if g in roots] + [by_step[v] for v in part.tolist()])
    room = 0
    for g, i in roots.items():
        if prompts[g] > room:
            parts.append([])
            room = limit
        parts[-1].append(i)
        room -= prompts[g]
    return [part[a : a + most] for part in parts for a in range(0, len(part), most)]


def _sizes(rollout: Rollout, extra: int) -> list[int]:
    """Tokens of each step, its observation and what is hung behind it."""
    tree = rollout.tree
    sizes: list[int] = (tree.span + tree.tags.get("observed", 0) + extra).tolist()
    return sizes
