"""Trees while they grow: what searches and annotations append steps to, and the rollout that comes of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch

from mmrl.capabilities import StepWriter
from mmrl.rollout import Actions, Continuation, Prompt, Rollout, State
from mmrl.tree import FINISHED, INTERNAL, UNFINISHED, StepTree

ROOT = 0


class GrowingTree:
    """The steps that were written after one prompt. Node 0 stands for the prompt, the others are steps.

    Every draw has nodes of its own, whatever it says: how often a step was drawn is part of what is known about it.

    Attributes:
        parent, texts, ids, logps: per node. ids and logps: of its own tokens as sampled, () = unknown.
        ended: the policy ended there, by itself or (truncated) at its longest length; other leaves are open.
        numbers: name -> node -> number: `outcome`, `step_reward`, `value`, `visits`, `q_sum`; any other name becomes a
            tag. A node without a number has none.
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
        self._whole: list[str] = [""]  # what has been written up to each node
        self._first: dict[str, int] = {"": ROOT}  # by that, the first node

    def __len__(self) -> int:
        """Steps, the prompt not counted."""
        return len(self.parent) - 1

    def add(self, parent: int, text: str, ids: Sequence[int] = (), logps: Sequence[float] = ()) -> int:
        """A new step after `parent`; returns its node."""
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
        """The steps of a continuation below `parent`; returns their nodes.

        A continuation that ends without a word is one empty step, since an end needs a place in the tree.
        """
        nodes: list[int] = []
        steps = new.steps or ("",)
        for t, text in enumerate(steps):
            ids = new.ids[t] if new.ids else ()
            logps = new.logps[t] if new.logps else ()
            parent = self.add(parent, text, ids, logps)
            nodes.append(parent)
        self.ended[parent] = new.done
        self.truncated[parent] = new.truncated
        return nodes

    def path(self, node: int) -> list[int]:
        """The steps that lead to a node, the first one first; of the prompt, none."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def text(self, node: int) -> str:
        """What has been written when a node is reached."""
        return self._whole[node]

    def first(self, text: str) -> int | None:
        """The first node at which `text` had been written, None without one."""
        return self._first.get(text)

    def state(self, node: int) -> State:
        """The state at a node."""
        path = self.path(node)
        ids = tuple(self.ids[v] for v in path)
        known = all(i or not self.texts[v] for i, v in zip(ids, path, strict=True))
        texts = tuple(self.texts[v] for v in path)
        return State(self.prompt, texts, self.ended[node], ids if known else (), tuple(path))

    def node(self, state: State) -> int:
        """Where a state is: by its path, or by what it says.

        Raises:
            ValueError: it was not written here.
        """
        found = state.path[-1] if state.path else self.first(state.text)
        if found is None:
            raise ValueError(
                f"prompt {state.prompt.id!r}: the state ending in {state.text[-60:]!r} is not part of the tree; take "
                "states from propose()"
            )
        return found

    @property
    def leaves(self) -> list[int]:
        """Steps that nothing follows, in order."""
        inner = set(self.parent)
        return [v for v in range(1, len(self.parent)) if v not in inner]

    def back_up(self) -> None:
        """Give every step that has none `visits` and `q_sum`.

        A leaf was visited once, for its value, or where it has none for its outcome; without either it counts as not
        visited. Other steps have the sums of those below. So q_sum / visits is the mean of what a step led to. The
        prompt's own value is this mean, unless it has one.
        """
        visits, total = self.numbers["visits"], self.numbers["q_sum"]
        for leaf in self.leaves:
            worth = self.numbers["value"].get(leaf, self.numbers["outcome"].get(leaf))
            if leaf not in visits:
                visits[leaf], total[leaf] = float(worth is not None), worth or 0.0
        below: dict[str, dict[int, float]] = {"visits": defaultdict(float), "q_sum": defaultdict(float)}
        for v in range(len(self.parent) - 1, -1, -1):
            for name, sums in below.items():
                self.numbers[name].setdefault(v, sums[v])
                sums[self.parent[v]] += self.numbers[name][v]
        if visits[ROOT]:
            self.numbers["value"].setdefault(ROOT, total[ROOT] / visits[ROOT])


def rollout_of(trees: Sequence[GrowingTree], about: Mapping[str, Any] | None = None) -> Rollout:
    """The trees as one rollout; those without a step are left out.

    Leaves with an outcome are finished. `value`, `root_value`, `step_reward` and the tags `visits` and `q_sum` are the
    trees' numbers; tags `open` (a leaf where nobody went on) and `truncated` say how it ended. Actions are the sampled
    tokens, payload `token`, of the steps whose ids are known.
    """
    grown = [t for t in trees if len(t)]
    for tree in grown:
        tree.back_up()
    fields: dict[str, list[Any]] = defaultdict(list)
    names = {n for t in grown for n in t.numbers} - {"outcome", "step_reward", "value", "visits", "q_sum"}
    columns = ["step_reward", "value", "visits", "q_sum", *sorted(names)]
    offset = 0
    for group, tree in enumerate(grown):
        leaves = set(tree.leaves)
        for v in range(1, len(tree.parent)):
            outcome = tree.numbers["outcome"].get(v, math.nan) if v in leaves else math.nan
            fields["parent"].append(tree.parent[v] - 1 + offset if tree.parent[v] != ROOT else -1)
            fields["group"].append(group)
            scored = FINISHED if outcome == outcome else UNFINISHED
            fields["status"].append(scored if v in leaves else INTERNAL)
            fields["open"].append(v in leaves and not tree.ended[v])
            fields["truncated"].append(tree.truncated[v])
            sampled = len(tree.ids[v]) if len(tree.ids[v]) == len(tree.logps[v]) else 0
            fields["span"].append(sampled)
            fields["token"] += tree.ids[v][:sampled]
            fields["logps"] += tree.logps[v][:sampled]
            fields["logp"].append(math.fsum(tree.logps[v]) if tree.logps[v] else math.nan)
            fields["texts"].append(tree.texts[v])
            fields["outcome"].append(outcome)
            for name in columns:
                fields[name].append(tree.numbers[name].get(v, math.nan))
        fields["root_value"].append(tree.numbers["value"].get(ROOT, math.nan))
        offset += len(tree)
    return _rollout(grown, fields, sorted(names), dict(about or {}))


def rollout_for(policy: object, trees: Sequence[GrowingTree], about: Mapping[str, Any]) -> Rollout:
    """The trees as what `policy` trains on, where it can make given steps its own actions; else as they are."""
    rollout = rollout_of(trees, about)
    return policy.write_steps(rollout) if isinstance(policy, StepWriter) else rollout


def _rollout(
    trees: Sequence[GrowingTree], fields: Mapping[str, list[Any]], names: Sequence[str], about: dict[str, Any]
) -> Rollout:
    def floats(name: str) -> torch.Tensor:
        return torch.tensor(fields[name], dtype=torch.float64)

    def ints(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64)

    end = list(accumulate(fields["span"]))
    tags = {n: floats(n) for n in ("q_sum", *names)} | {"visits": floats("visits").long()}
    tags |= {n: torch.tensor(fields[n], dtype=torch.bool) for n in ("open", "truncated")}
    tree = StepTree(
        ints(fields["parent"]), ints(fields["group"]), ints(fields["status"]), floats("outcome"),
        step_reward=floats("step_reward"), value=floats("value"), root_value=floats("root_value"),
        logp=floats("logp"), tok_start=ints(end) - ints(fields["span"]), tok_end=ints(end), tags=tags,
    )  # fmt: skip
    logp = torch.tensor(fields["logps"], dtype=torch.float32)
    payload = {"token": ints(fields["token"])} if fields["token"] else {}
    actions = Actions(logp, torch.ones(len(logp), dtype=torch.bool), payload)
    counts = {"leaves": int(tree.is_leaf.sum()), "tokens": len(logp)}
    return Rollout([t.prompt for t in trees], tree, actions, counts=counts, about=about, texts=fields["texts"])
