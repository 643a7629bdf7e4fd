"""Sampled or given steps become a `Rollout`: the tree of steps, with their tokens, log-probabilities and texts.

A grown node is one step, such as Node(prompt=0, parent=-1, ids=[5, 9, 2], logp=[-.1, -.7, -.2]). In the rollout every
node is a step of the `StepTree`, and the tokens of all steps lie one behind the other in `actions`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmrl.rollout import Actions, Continuation, Prompt, Rollout
from mmrl.tree import INTERNAL, UNFINISHED, StepTree
from vision.forward.packing import ancestors
from vision.growth.dialogue import Dialogue
from vision.growth.requests import Node
from vision.inputs.tokens import PromptTokens


class RolloutBuilder:
    """Makes rollouts of one policy.

    Args:
        tokenizer: between ids and texts.
        dialogue: adds to a rollout what an environment answered to its steps.
        banned: ids that a step may not hold, such as image placeholders.
        eos: ids that end a completion, ascending.
    """

    def __init__(self, tokenizer: Any, dialogue: Dialogue, banned: Sequence[int], eos: Sequence[int]) -> None:
        self._tokenizer, self._dialogue = tokenizer, dialogue
        self._banned = frozenset(banned)
        # The tokenizer's own end mark, unless the model does not end with it.
        self.end: int = tokenizer.eos_token_id if tokenizer.eos_token_id in eos else eos[0]

    def ids_of(self, text: str) -> Tensor:
        """(L,) int64 ids of a text. A placeholder in it is spelt letter by letter, as no picture belongs to it."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._banned.isdisjoint(ids):
            ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return torch.tensor(ids, dtype=torch.int64)

    def of_nodes(
        self, prompts: Sequence[Prompt], tokens: Sequence[PromptTokens], nodes: Sequence[Node], about: dict[str, Any]
    ) -> Rollout:
        """The rollout of grown nodes, in which the steps of a prompt lie together.

        Args:
            tokens: the encoded prompts.
            about: facts of the rollout, such as its seed and temperature.
        """
        # Sorting is stable, so parents stay before their children.
        order = sorted(range(len(nodes)), key=lambda index: nodes[index].prompt)
        new_index = {old: new for new, old in enumerate(order)}
        new_index[-1] = -1
        nodes = [nodes[index] for index in order]
        parents = [new_index[node.parent] for node in nodes]
        groups = [node.prompt for node in nodes]
        texts = [self._tokenizer.decode(node.ids, skip_special_tokens=True) for node in nodes]

        sizes = torch.tensor([len(node.ids) for node in nodes])
        ends = sizes.cumsum(0)
        parent = torch.tensor(parents)
        is_inner = torch.zeros(len(nodes), dtype=torch.bool)
        is_inner[parent[parent >= 0]] = True
        truncated = torch.tensor([node.end == "length" for node in nodes])
        tree = StepTree(
            parent,
            torch.tensor(groups),
            torch.where(is_inner, INTERNAL, UNFINISHED),
            torch.full((len(nodes),), torch.nan),
            logp=torch.tensor([sum(node.logp) for node in nodes]),
            tok_start=ends - sizes,
            tok_end=ends,
            tags={"truncated": truncated},
            **text_states(parents, groups, texts),
        )

        # (A,) log-probs and ids of all tokens, step by step
        logp = torch.tensor([value for node in nodes for value in node.logp], dtype=torch.float32)
        ids = torch.tensor([token for node in nodes for token in node.ids])
        actions = Actions(logp, torch.ones(len(ids), dtype=torch.bool), {"token": ids})
        observed = torch.tensor([node.observed for node in nodes])
        counts = {
            "calls": len(nodes),
            "leaves": int((~is_inner).sum()),
            "tokens": len(ids),
            "truncated": int(truncated.sum()),
            "prompt_tokens": sum(len(prompt.ids) for prompt in tokens),
            "observed_tokens": int(observed.sum()),
        }
        payload = {"prompt_tokens": torch.tensor([len(prompt.ids) for prompt in tokens])}
        rollout = Rollout(list(prompts), tree, actions, payload, counts, about, texts)
        return self._dialogue.annotated(rollout, observed)

    def of_steps(self, written: Rollout, tokens: Sequence[PromptTokens], temperature: float) -> Rollout:
        """A rollout of steps as texts with the tokens of this policy; see `mmrl.capabilities.StepWriter`.

        Steps that have tokens keep them and their log-probs. Of steps with a text alone, every one but a leaf ends
        with the line break that separates steps, and a leaf that is not tagged `open` with the end of the answer.
        """
        tree = written.tree
        ids, logps = self._step_tokens(written)
        texts = [self._tokenizer.decode(own, skip_special_tokens=True) for own in ids]
        sizes = torch.tensor([len(own) for own in ids])
        ends = sizes.cumsum(0)
        return replace(
            written,
            tree=tree.replace(
                logp=torch.tensor([sum(own) for own in logps]),
                tok_start=ends - sizes,
                tok_end=ends,
                tags={"truncated": torch.zeros(len(tree), dtype=torch.bool)} | tree.tags,
                **text_states(tree.parent.tolist(), tree.group.tolist(), texts),
            ),
            actions=Actions(
                torch.tensor([value for own in logps for value in own], dtype=torch.float32),
                torch.ones(int(sizes.sum()), dtype=torch.bool),
                {"token": torch.tensor([token for own in ids for token in own], dtype=torch.int64)},
            ),
            prompt_payload={"prompt_tokens": torch.tensor([len(prompt.ids) for prompt in tokens])},
            about={"temperature": temperature, "written": True} | dict(written.about),
            texts=texts,
        )

    def _step_tokens(self, written: Rollout) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and log-probs of every step; of steps with a text alone the log-probs are 0."""
        tree, actions = written.tree, written.actions
        is_open = tree.tags.get("open", torch.zeros(len(tree), dtype=torch.bool)).tolist()
        is_leaf = tree.is_leaf.tolist()
        ids: list[list[int]] = []
        logps: list[list[float]] = []
        for step, (start, end) in enumerate(zip(tree.tok_start.tolist(), tree.tok_end.tolist(), strict=True)):
            if "token" in actions.payload and start < end:
                ids.append(actions.payload["token"][start:end].tolist())
                logps.append(actions.logp[start:end].tolist())
                continue
            if is_leaf[step]:
                own = self.ids_of(written.texts[step]).tolist()
                if not is_open[step]:
                    own.append(self.end)
            else:
                own = self.ids_of(written.texts[step].removesuffix("\n") + "\n").tolist()
            ids.append(own)
            logps.append([0.0] * len(own))
        return ids, logps

    def respelt(
        self, rollout: Rollout, step_ids: Sequence[Tensor], encode: Callable[[Prompt], PromptTokens]
    ) -> Rollout:
        """The rollout in this policy's own tokens, where another tokenizer sampled it.

        Args:
            step_ids: the ids of each step. encode: prompts to tokens.
        Raises:
            ValueError: a conversation in other tokens, whose observations would be others too.
        """
        decoded = self._tokenizer.batch_decode([ids.tolist() for ids in step_ids], skip_special_tokens=True)
        if decoded == list(rollout.texts):
            return rollout
        self._dialogue.need_single_turn(
            "these conversations were sampled with another tokenizer; take a model that shares it"
        )
        tree = rollout.tree
        nodes = []
        places = zip(tree.group.tolist(), tree.parent.tolist(), tree.depth.tolist(), rollout.texts, strict=True)
        for group, parent, depth, text in places:
            ids = self.ids_of(text).tolist()
            nodes.append(Node(group, parent, depth, ids, [0.0] * len(ids), "step"))
        tokens = [encode(prompt) for prompt in rollout.prompts]
        return self.of_nodes(rollout.prompts, tokens, nodes, dict(rollout.about))

    def continuations(self, nodes: Sequence[Node], num_states: int) -> list[list[Continuation]]:
        """The paths of grown nodes from root to leaf, for each of the states that they were grown from."""
        texts = self._tokenizer.batch_decode([node.ids for node in nodes], skip_special_tokens=True)
        parents = [node.parent for node in nodes]
        inner = set(parents)
        continuations: list[list[Continuation]] = [[] for _ in range(num_states)]
        for leaf, node in enumerate(nodes):
            if leaf in inner:
                continue
            path = ancestors(parents, leaf)[::-1]
            continuations[node.prompt].append(
                Continuation(
                    tuple(texts[index] for index in path),
                    tuple(tuple(nodes[index].logp) for index in path),
                    node.end in ("eos", "length"),
                    node.end == "length",
                    tuple(tuple(nodes[index].ids) for index in path),
                )
            )
        return continuations


def text_states(parents: Sequence[int], groups: Sequence[int], texts: Sequence[str]) -> dict[str, list[int]]:
    """state_key and edge_key of steps that are texts: a state is what was written before a step, white space apart.

    Chains of one prompt that wrote the same lines are in the same state, which is what GiGPO and SALT compare.

    Args:
        parents: (N,) parent of each step, -1 at roots. groups: (N,) prompt of each step.
    """
    # A state is named by the state above it and the text that led here; a prompt's own is (-1 - group, "").
    key_of: dict[tuple[int, str], int] = {}
    states: list[int] = []
    edges: list[int] = []
    for parent, group, text in zip(parents, groups, texts, strict=True):
        if parent >= 0:
            state = edges[parent]
        else:
            state = key_of.setdefault((-1 - group, ""), len(key_of))
        states.append(state)
        edges.append(key_of.setdefault((state, " ".join(text.split())), len(key_of)))
    return {"state_key": states, "edge_key": edges}
