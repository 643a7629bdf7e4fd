"""Trees while they grow: searches and annotations append steps to them, and `rollout_of` makes a rollout of them.

tree = GrowingTree(prompt)
first = tree.add(ROOT, "2 + 2 = 4\\n")
answer = tree.add(first, "answer 4")
tree.numbers["outcome"][answer] = 1.0
rollout = rollout_of([tree])
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmrl.capabilities import StepWriter
from mmrl.rollout import Actions, Continuation, Prompt, Rollout, State
from mmrl.tree import FINISHED, INTERNAL, UNFINISHED, StepTree

# The node of a GrowingTree that stands for the prompt.
ROOT = 0

# Numbers of a growing tree that have a column of their own in the rollout, or the tags `visits` and `q_sum`.
_STANDARD_NUMBERS = frozenset({"outcome", "step_reward", "value", "visits", "q_sum"})


class GrowingTree:
    """The steps that were written after one prompt. Node 0 stands for the prompt, the others are steps.

    Every draw gets new nodes, also when its text was drawn before: how often a text was drawn estimates its
    probability.

    Attributes:
        parent, texts: per node.
        ids, logps: per node, token ids of the step and their log-probs as sampled; () = unknown.
        ended: per node: the policy ended there, by itself or (`truncated`) at its length limit.
            Other leaves are open.
        numbers: name -> node -> number: `outcome`, `step_reward`, `value`, `visits`, `q_sum`; any other name becomes a
            tag. A node that is missing has no such number.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.parent: list[int] = [-1]
        self.texts: list[str] = [""]
        self.ids: list[tuple[int, ...]] = [()]
        self.logps: list[tuple[float, ...]] = [()]
        self.ended: list[bool] = [False]
        self.truncated: list[bool] = [False]
        self.numbers: dict[str, dict[int, float]] = defaultdict(dict)
        # Per node, all that has been written from the first step to it; and the first node with such a text.
        self._whole: list[str] = [""]
        self._first: dict[str, int] = {"": ROOT}

    def __len__(self) -> int:
        """Steps, the prompt not counted."""
        return len(self.parent) - 1

    def add(self, parent: int, text: str, ids: Sequence[int] = (), logps: Sequence[float] = ()) -> int:
        """Append a step after `parent`; returns its node."""
        node = len(self.parent)
        self.parent.append(parent)
        self.texts.append(text)
        self.ids.append(tuple(ids))
        self.logps.append(tuple(logps))
        self.ended.append(False)
        self.truncated.append(False)
        self._whole.append(self._whole[parent] + text)
        self._first.setdefault(self._whole[-1], node)
        return node

    def grow(self, parent: int, new: Continuation) -> list[int]:
        """Append the steps of a continuation below `parent`; returns their nodes.

        A continuation that ends without a word becomes one empty step, because its end needs a node.
        """
        nodes: list[int] = []
        steps = new.steps or ("",)
        for i, text in enumerate(steps):
            ids = new.ids[i] if new.ids else ()
            logps = new.logps[i] if new.logps else ()
            parent = self.add(parent, text, ids, logps)
            nodes.append(parent)
        self.ended[parent] = new.done
        self.truncated[parent] = new.truncated
        return nodes

    def path(self, node: int) -> list[int]:
        """The nodes from the first step to `node`; empty for the prompt."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def text(self, node: int) -> str:
        """All that has been written from the first step to `node`."""
        return self._whole[node]

    def first(self, text: str) -> int | None:
        """The first node at which `text` had been written, None without one."""
        return self._first.get(text)

    def state(self, node: int) -> State:
        """The state at a node."""
        path = tuple(self.path(node))
        texts = tuple(self.texts[step] for step in path)
        ids = tuple(self.ids[step] for step in path)
        # Only an empty step has no ids by right; when those of another step are unknown, the policy starts from text.
        all_ids_known = all(step_ids or not text for step_ids, text in zip(ids, texts, strict=True))
        return State(self.prompt, texts, self.ended[node], ids if all_ids_known else (), path)

    def node(self, state: State) -> int:
        """The node of a state: the end of its path, or without one the first node with its text.

        Raises:
            ValueError: the state is not part of this tree.
        """
        node = state.path[-1] if state.path else self.first(state.text)
        if node is None:
            raise ValueError(
                f"prompt {state.prompt.id!r}: the state ending in {state.text[-60:]!r} is not part of the tree; take "
                "states from propose()"
            )
        return node

    @property
    def leaves(self) -> list[int]:
        """Steps without a child, in order."""
        inner = set(self.parent)
        return [node for node in range(1, len(self.parent)) if node not in inner]

    def back_up(self) -> None:
        """Fill in `visits` and `q_sum` of the steps that have none, as a Monte-Carlo search would have counted them.

        A leaf counts as visited once, with its value, or without one its outcome; a leaf with neither as not visited.
        Inner steps get the sums of their children, so q_sum / visits is the mean result below a step. This mean
        becomes the prompt's value, unless it has one.
        """
        visits, total = self.numbers["visits"], self.numbers["q_sum"]
        for leaf in self.leaves:
            result = self.numbers["value"].get(leaf, self.numbers["outcome"].get(leaf))
            if leaf not in visits:
                visits[leaf] = 0.0 if result is None else 1.0
                total[leaf] = result or 0.0
        # Children come behind their parent, so backwards every step is complete before it is added to its parent.
        below: dict[str, dict[int, float]] = {"visits": defaultdict(float), "q_sum": defaultdict(float)}
        for node in range(len(self.parent) - 1, -1, -1):
            for name, sums in below.items():
                self.numbers[name].setdefault(node, sums[node])
                sums[self.parent[node]] += self.numbers[name][node]
        if visits[ROOT]:
            self.numbers["value"].setdefault(ROOT, total[ROOT] / visits[ROOT])


def rollout_of(trees: Sequence[GrowingTree], about: Mapping[str, Any] | None = None) -> Rollout:
    """The trees as one rollout; those without a step are left out.

    Leaves with an outcome are finished. `value`, `root_value`, `step_reward` and the tags `visits` and `q_sum` are the
    trees' numbers. The tags `open` (a leaf that did not end) and `truncated` tell how a step ended. Actions are the
    sampled tokens, payload `token`, of the steps whose ids are known.
    """
    grown = [tree for tree in trees if len(tree)]
    tag_names: set[str] = set()
    for tree in grown:
        tree.back_up()
        tag_names |= set(tree.numbers) - _STANDARD_NUMBERS
    fields: dict[str, list[Any]] = defaultdict(list)
    columns = ["step_reward", "value", "visits", "q_sum", *sorted(tag_names)]
    nodes_before = 0
    for group, tree in enumerate(grown):
        leaves = set(tree.leaves)
        for node in range(1, len(tree.parent)):
            fields["group"].append(group)
            _append_step(fields, tree, node, node in leaves, nodes_before)
            for name in columns:
                fields[name].append(tree.numbers[name].get(node, math.nan))
        fields["root_value"].append(tree.numbers["value"].get(ROOT, math.nan))
        nodes_before += len(tree)
    return _rollout(grown, fields, sorted(tag_names), dict(about or {}))


def _append_step(fields: dict[str, list[Any]], tree: GrowingTree, node: int, is_leaf: bool, nodes_before: int) -> None:
    """Append one step to the columns of a rollout; `nodes_before` steps of other trees stand before this tree's."""
    outcome = tree.numbers["outcome"].get(node, math.nan) if is_leaf else math.nan
    if not is_leaf:
        status = INTERNAL
    else:
        status = UNFINISHED if math.isnan(outcome) else FINISHED
    # Node 0 is the prompt and no step, so a step's index is one less than its node.
    parent = tree.parent[node]
    fields["parent"].append(-1 if parent == ROOT else parent - 1 + nodes_before)
    fields["status"].append(status)
    fields["outcome"].append(outcome)
    fields["open"].append(is_leaf and not tree.ended[node])
    fields["truncated"].append(tree.truncated[node])
    fields["texts"].append(tree.texts[node])
    # A step becomes actions only where each of its tokens has a log-prob.
    ids, logps = tree.ids[node], tree.logps[node]
    if len(ids) != len(logps):
        ids = ()
    fields["span"].append(len(ids))
    fields["token"] += ids
    fields["logps"] += logps[: len(ids)]
    fields["logp"].append(math.fsum(logps) if logps else math.nan)


def rollout_for(policy: object, trees: Sequence[GrowingTree], about: Mapping[str, Any]) -> Rollout:
    """The trees as a rollout that `policy` can train on, if it can make given steps its actions; else as they are."""
    rollout = rollout_of(trees, about)
    if isinstance(policy, StepWriter):
        return policy.write_steps(rollout)
    return rollout


def _rollout(
    trees: Sequence[GrowingTree], fields: Mapping[str, list[Any]], tag_names: Sequence[str], about: dict[str, Any]
) -> Rollout:
    """The rollout of filled columns, one entry per step (`token` and `logps`: per action; `root_value`: per tree)."""

    def floats(name: str) -> torch.Tensor:
        return torch.tensor(fields[name], dtype=torch.float64)

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    span = ints(fields["span"])
    end = span.cumsum(0)
    tags = {name: floats(name) for name in ("q_sum", *tag_names)}
    tags["visits"] = floats("visits").long()
    for name in ("open", "truncated"):
        tags[name] = torch.tensor(fields[name], dtype=torch.bool)
    steps = StepTree(
        ints(fields["parent"]),
        ints(fields["group"]),
        ints(fields["status"]),
        floats("outcome"),
        step_reward=floats("step_reward"),
        value=floats("value"),
        root_value=floats("root_value"),
        logp=floats("logp"),
        tok_start=end - span,
        tok_end=end,
        tags=tags,
    )
    logp = torch.tensor(fields["logps"], dtype=torch.float32)
    payload = {"token": ints(fields["token"])} if fields["token"] else {}
    actions = Actions(logp, torch.ones(len(logp), dtype=torch.bool), payload)
    counts = {"leaves": int(steps.is_leaf.sum()), "tokens": len(logp)}
    return Rollout([tree.prompt for tree in trees], steps, actions, counts=counts, about=about, texts=fields["texts"])
