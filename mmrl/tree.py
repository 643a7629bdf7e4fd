"""StepTree: a forest of steps per prompt, as flat arrays.

A node is a step: an action and the transition it causes. The prompt is a virtual root and never a node; independent
rollouts are chains that hang from it. Nothing downstream distinguishes a chain from a tree.

One prompt, a first step with two alternatives after it, of which the first is right:

    StepTree(parent=[-1, 0, 0], group=[0, 0, 0], status=[0, 1, 1], outcome=[nan, 1.0, 0.0])

Shapes: N steps, G prompts, T actions (tokens or noise draws). A step owns a run of actions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Values of `StepTree.status`.
INTERNAL, FINISHED, UNFINISHED = 0, 1, 2

_NODE_FLOATS = ("outcome", "step_reward", "value", "logp")
_NODE_KEYS = ("state_key", "edge_key")
_NODE_FIELDS = ("parent", "group", "status", *_NODE_FLOATS, *_NODE_KEYS, "tok_start", "tok_end")
# Cached properties that depend on parents, groups and spans alone; `replace` keeps them when those stay.
_STRUCTURE = ("depth", "level_order", "level_ptr", "num_children", "is_chains", "sibling_set", "span", "parents")


class StepTree:
    """N steps of G prompts in arrays; immutable. Float arrays, and Python floats in tags, are kept in float64.

    Args:
        parent: (N,) int, index of the parent step, -1 = child of the prompt. Any order; see `order`.
        group: (N,) int, prompt index in 0..G-1, equal to the parent's.
        status: (N,) int, 0 internal, 1 finished leaf, 2 unfinished leaf (truncated, crashed, unscorable).
        outcome: (N,) float, reward of a finished leaf, NaN elsewhere.
        step_reward: (N,) float, NaN = not scored (default).
        value: (N,) float, value of the state after the step, NaN = none.
        root_value: (G,) float, value of the prompt, NaN = none.
        state_key: (N,) int, key of the state before the step, -1 = none.
        edge_key: (N,) int, key of (state, action, next state), -1 = none.
        logp: (N,) float, behaviour log-probability of the step, NaN = no density (an ODE step).
        tok_start, tok_end: (N,) int, half-open span of the step's own actions in the flat action array.
            Default: one action per step, in node order (a latent transition).
        ok: (N,) bool or 0 and 1, the step agreed with a reference; None = unknown.
        tags: name -> (N, ...) numbers, anything else.

    Attributes:
        order: (N,) int, the caller's index of each node. Nodes are re-ordered (by depth, stably) only when some
            parent does not come before its child; otherwise `order` is 0..N-1.

    Raises:
        ValueError: arrays of unequal length or not of numbers, a cycle, a child in another group, group ids that leave
            gaps, an outcome off the finished leaves, a finished leaf without outcome, a leaf with children,
            overlapping spans. The message names the index in the caller's order.
    """

    def __init__(
        self,
        parent: Any,
        group: Any,
        status: Any,
        outcome: Any,
        step_reward: Any = None,
        value: Any = None,
        root_value: Any = None,
        state_key: Any = None,
        edge_key: Any = None,
        logp: Any = None,
        tok_start: Any = None,
        tok_end: Any = None,
        ok: Any = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        self.parent = _ints(parent, "parent")
        n = self.parent.numel()
        self.group = _ints(group, "group")
        self.status = _ints(status, "status").to(torch.int8)
        self.outcome = _floats(outcome, "outcome")
        self.step_reward = _floats(step_reward, "step_reward", n)
        self.value = _floats(value, "value", n)
        self.logp = _floats(logp, "logp", n)
        self.state_key = _ints(state_key, "state_key") if state_key is not None else torch.full((n,), -1)
        self.edge_key = _ints(edge_key, "edge_key") if edge_key is not None else torch.full((n,), -1)
        if (tok_start is None) != (tok_end is None):
            raise ValueError("give both tok_start and tok_end, or neither (one action per step)")
        self.tok_start = _ints(tok_start, "tok_start") if tok_start is not None else torch.arange(n)
        self.tok_end = _ints(tok_end, "tok_end") if tok_end is not None else torch.arange(1, n + 1)
        self.ok = None if ok is None else _flags(ok, "ok")
        self.tags = {name: _tensor(column, f"tags[{name!r}]") for name, column in (tags or {}).items()}
        self._check_lengths()
        self.num_groups = _check_groups(self.group)
        self.root_value = _floats(root_value, "root_value", self.num_groups)
        if self.root_value.numel() != self.num_groups:
            raise ValueError(f"root_value has {self.root_value.numel()} entries for {self.num_groups} prompts")
        # Checks come before sorting, so that messages name the caller's indices.
        self._check_nodes()
        self.order = torch.arange(n)
        if bool((self.parent >= self.order).any()):
            self._sort(torch.argsort(self.depth, stable=True))

    # ---- checks -----------------------------------------------------------------------------------------------

    def _check_lengths(self) -> None:
        n = self.parent.numel()
        columns = {name: getattr(self, name) for name in _NODE_FIELDS} | self.tags
        if self.ok is not None:
            columns["ok"] = self.ok
        for name, column in columns.items():
            if column.shape[:1] != (n,):
                raise ValueError(f"{name} has shape {tuple(column.shape)}, parent has {n} steps: one entry per step")

    def _check_nodes(self) -> None:
        n, parent = self.parent.numel(), self.parent
        outside = (parent < -1) | (parent >= n)
        itself = parent == torch.arange(n)
        _refuse(outside | itself, parent, "parent", f"must be another step in 0..{n - 1}, or -1")
        _refuse((self.status < 0) | (self.status > 2), self.status, "status", "must be 0, 1 or 2")
        # The depth of every node, which also finds cycles; it fills the cached property of that name.
        self.__dict__["depth"] = _depth(parent)

        has_parent = parent >= 0
        above = parent.clamp(min=0)
        _refuse(has_parent & (self.group != self.group[above]), self.group, "group", "differs from its parent's group")
        leaf = self.status != INTERNAL
        _refuse(has_parent & leaf[above], parent, "parent", "is a leaf (status 1 or 2); give it status 0")
        childless = torch.ones(n, dtype=torch.bool)
        childless[parent[has_parent]] = False
        _refuse(childless & ~leaf, self.status, "status", "is 0 (internal) but the step has no child; use 1 or 2")

        finished = self.status == FINISHED
        unscored = "on a finished leaf must be finite; mark an unscorable leaf with status 2"
        _refuse(finished & ~self.outcome.isfinite(), self.outcome, "outcome", unscored)
        _refuse(~finished & ~self.outcome.isnan(), self.outcome, "outcome", "must be NaN except on finished leaves")
        for name in ("step_reward", "value", "logp"):
            column = getattr(self, name)
            _refuse(column.isinf(), column, name, "is infinite; use NaN for 'not scored'")
        _refuse(self.tok_start > self.tok_end, self.tok_start, "tok_start", "lies behind tok_end")
        _refuse(self.tok_start < 0, self.tok_start, "tok_start", "is negative")
        self._check_spans()

    def _check_spans(self) -> None:
        # Sorted by their start, spans are disjoint when each ends before the next one starts.
        nonempty = (self.tok_end > self.tok_start).nonzero().flatten()
        by_start = nonempty[torch.argsort(self.tok_start[nonempty], stable=True)]
        clash = self.tok_start[by_start[1:]] < self.tok_end[by_start[:-1]]
        if bool(clash.any()):
            position = int(clash.nonzero()[0])
            first, second = int(by_start[position]), int(by_start[position + 1])
            raise ValueError(
                f"token spans overlap: step {first} owns [{int(self.tok_start[first])}, {int(self.tok_end[first])}), "
                f"step {second} starts at {int(self.tok_start[second])}; a step owns only its own tokens, not its "
                "prefix"
            )

    # ---- structure --------------------------------------------------------------------------------------------

    def _sort(self, perm: Tensor) -> None:
        """Put the nodes into the order `perm`; parents are renamed."""
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.numel())
        for name in _NODE_FIELDS:
            setattr(self, name, getattr(self, name)[perm])
        self.parent = torch.where(self.parent >= 0, inverse[self.parent.clamp(min=0)], -1)
        if self.ok is not None:
            self.ok = self.ok[perm]
        self.tags = {name: column[perm] for name, column in self.tags.items()}
        self.order = self.order[perm]
        self.__dict__["depth"] = self.depth[perm]

    def __len__(self) -> int:
        return self.parent.numel()

    def __repr__(self) -> str:
        finished, unfinished = int(self.is_finished.sum()), int((self.status == UNFINISHED).sum())
        return f"StepTree({len(self)} steps, {self.num_groups} prompts, {finished} finished, {unfinished} unfinished)"

    @cached_property
    def depth(self) -> Tensor:
        """(N,) int, 0 for first steps."""
        return _depth(self.parent)

    @cached_property
    def parents(self) -> tuple[int, ...]:
        """`parent` as Python numbers, for what walks up the tree step by step."""
        return tuple(self.parent.tolist())

    @cached_property
    def level_order(self) -> Tensor:
        """(N,) int, nodes ordered by depth; level d is level_order[level_ptr[d]:level_ptr[d + 1]]."""
        return torch.argsort(self.depth, stable=True)

    @cached_property
    def level_ptr(self) -> Tensor:
        """(D+2,) int, borders of the levels in `level_order`."""
        return torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(self.depth).cumsum(0)])

    @property
    def levels(self) -> list[Tensor]:
        """Node indices of every depth, first steps first."""
        return list(self.level_order.split(self.level_ptr.diff().tolist()))

    @cached_property
    def num_children(self) -> Tensor:
        """(N,) int, children of any status."""
        return torch.bincount(self.parent[self.parent >= 0], minlength=len(self))

    @cached_property
    def is_chains(self) -> bool:
        """No step has two children: independent rollouts."""
        return len(self) == 0 or int(self.num_children.max()) <= 1

    @property
    def is_leaf(self) -> Tensor:
        """(N,) bool, finished or not."""
        return self.status != INTERNAL

    @cached_property
    def is_finished(self) -> Tensor:
        """(N,) bool, finished leaves."""
        return self.status == FINISHED

    @cached_property
    def leaves_below(self) -> Tensor:
        """(N,) int, number of finished leaves in the subtree of each node, itself included; m in formulas."""
        return self.accumulate(self.is_finished.double()).long()

    @property
    def valid(self) -> Tensor:
        """(N,) bool, nodes with a finished leaf in their subtree: those that enter statistics and the loss."""
        return self.leaves_below > 0

    @cached_property
    def sibling_set(self) -> Tensor:
        """(N,) int, dense id of the sibling set: nodes with the same (group, parent)."""
        # First steps have the parent -1 in every prompt, so theirs is named by the prompt: ids 0..G-1.
        key = torch.where(self.parent >= 0, self.parent + self.num_groups, self.group)
        return torch.unique(key, return_inverse=True)[1]

    @cached_property
    def span(self) -> Tensor:
        """(N,) int, number of own actions."""
        return self.tok_end - self.tok_start

    def step_of_action(self, num_actions: int | None = None) -> Tensor:
        """(T,) int: the step that owns each action, -1 for positions that belong to no step (observations).

        Raises:
            ValueError: a span ends behind `num_actions`.
        """
        end = int(self.tok_end.max()) if len(self) else 0
        total = end if num_actions is None else num_actions
        if end > total:
            raise ValueError(f"a step's span ends at {end} but there are only {total} actions")
        owner = torch.full((total,), -1)
        steps = torch.arange(len(self))
        owner[self.actions_of(steps)] = torch.repeat_interleave(steps, self.span)
        return owner

    def actions_of(self, steps: Tensor) -> Tensor:
        """(A,) int: positions of the actions that `steps` (S,) own, step after step."""
        span = self.span[steps]
        # Output position a of a step that begins at output position b is action tok_start + (a - b).
        begin = span.cumsum(0) - span
        shift = torch.repeat_interleave(self.tok_start[steps] - begin, span)
        return shift + torch.arange(shift.numel())

    def accumulate(self, x: Tensor, coef: Tensor | None = None) -> Tensor:
        """(N,) y(n) = x(n) + sum over children c of coef(c) * y(c), from the leaves up; coef is 1 when None.

        One pass per depth level, or pointer doubling where no step has two children.
        """
        if self.is_chains:
            return self._accumulate_chains(x, coef)
        total = x.clone()
        # Deepest level first: a level's totals are complete when they are added to the level above.
        for level in reversed(self.levels[1:]):
            share = total[level] if coef is None else coef[level] * total[level]
            total.index_add_(0, self.parent[level], share)
        return total

    @property
    def only_child(self) -> Tensor:
        """(N,) int, the child of each step of a forest of chains; -1 at its end."""
        inner = (self.parent >= 0).nonzero().flatten()
        child = torch.full((len(self),), -1)
        child[self.parent[inner]] = inner
        return child

    def _accumulate_chains(self, x: Tensor, coef: Tensor | None) -> Tensor:
        """`accumulate` where no step has two children, by pointer doubling."""
        inner = (self.parent >= 0).nonzero().flatten()
        child = self.only_child
        weight = torch.ones_like(x)
        weight[self.parent[inner]] = 1.0 if coef is None else coef[inner]
        total = x
        # After k rounds total(n) covers 2^k steps from n on, weight(n) is the product of the coefficients that lead
        # to the step behind them, and child(n) is that step.
        while bool((child >= 0).any()):
            live, below = child >= 0, child.clamp(min=0)
            total = total + torch.where(live, weight * total[below], 0.0)
            weight = torch.where(live, weight * weight[below], 0.0)
            child = torch.where(live, child[below], -1)
        return total

    # ---- new trees from old -----------------------------------------------------------------------------------

    def _fields(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in _NODE_FIELDS}
        return fields | {"root_value": self.root_value, "ok": self.ok, "tags": self.tags}

    def replace(self, **changes: Any) -> StepTree:
        """The same forest with some arrays replaced (given in this tree's node order); validated again."""
        new = StepTree(**(self._fields() | changes))
        new.order = self.order[new.order]
        if "parent" not in changes and "group" not in changes and "tok_start" not in changes:
            new.__dict__.update({name: self.__dict__[name] for name in _STRUCTURE if name in self.__dict__})
        return new

    def with_outcomes(self, leaves: Tensor, outcome: Tensor) -> StepTree:
        """Set the reward of each leaf in `leaves` (L,) to `outcome` (L,); NaN makes it an unfinished leaf."""
        scores, status = self.outcome.clone(), self.status.clone()
        outcome = outcome.double()
        scores[leaves] = outcome
        status[leaves] = torch.where(outcome.isnan(), UNFINISHED, FINISHED).to(torch.int8)
        return self.replace(outcome=scores, status=status)

    def select(self, keep: Tensor) -> StepTree:
        """The nodes where `keep` (N,) bool is True, prompts renumbered without gaps, spans packed in node order.

        Raises:
            ValueError: a kept node's parent is dropped, or an internal node loses all its children.
        """
        keep = keep.bool()
        orphan = keep & (self.parent >= 0) & ~keep[self.parent.clamp(min=0)]
        _refuse(orphan, self.parent, "parent", "is dropped while its child is kept; keep whole paths")
        index = keep.nonzero().flatten()
        # (N,) the new index of each node that is kept.
        new_index = torch.cumsum(keep.long(), 0) - 1
        fields = {name: getattr(self, name)[index] for name in _NODE_FIELDS}
        fields["parent"] = torch.where(fields["parent"] >= 0, new_index[fields["parent"].clamp(min=0)], -1)
        groups, fields["group"] = torch.unique(fields["group"], return_inverse=True)
        span = self.span[index]
        new = StepTree(
            **fields | {"tok_start": span.cumsum(0) - span, "tok_end": span.cumsum(0)},
            root_value=self.root_value[groups],
            ok=None if self.ok is None else self.ok[index],
            tags={name: column[index] for name, column in self.tags.items()},
        )
        new.order = self.order[index]
        return new

    @staticmethod
    def concatenate(trees: Sequence[StepTree]) -> StepTree:
        """One forest from several; prompts and action spans are shifted behind one another.

        Raises:
            ValueError: no trees, or trees whose `ok` or tags differ in kind.
        """
        if not trees:
            raise ValueError("nothing to concatenate")
        names = set(trees[0].tags)
        if any(set(t.tags) != names or (t.ok is None) != (trees[0].ok is None) for t in trees):
            raise ValueError("trees to concatenate must carry the same tags, and all or none of them `ok`")
        fields: dict[str, Any] = {name: [getattr(t, name) for t in trees] for name in _NODE_FIELDS}
        # Indices count from 0 in every tree, so each tree's are shifted by what the trees before it hold.
        nodes_before = groups_before = actions_before = 0
        for i, t in enumerate(trees):
            fields["parent"][i] = torch.where(t.parent >= 0, t.parent + nodes_before, -1)
            fields["group"][i] = t.group + groups_before
            fields["tok_start"][i] = t.tok_start + actions_before
            fields["tok_end"][i] = t.tok_end + actions_before
            nodes_before += len(t)
            groups_before += t.num_groups
            actions_before += int(t.tok_end.max()) if len(t) else 0
        return StepTree(
            **{name: torch.cat(parts) for name, parts in fields.items()},
            root_value=torch.cat([t.root_value for t in trees]),
            ok=None if trees[0].ok is None else torch.cat([t.ok for t in trees if t.ok is not None]),
            tags={name: torch.cat([t.tags[name] for t in trees]) for name in sorted(names)},
        )

    # ---- disk -------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write tree.safetensors and tree.json into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in _NODE_FIELDS}
        tensors |= {"root_value": self.root_value, "order": self.order}
        tensors |= {f"tags.{name}": column for name, column in self.tags.items()}
        if self.ok is not None:
            tensors["ok"] = self.ok
        # safetensors refuses two tensors that share memory, and tags may be views of each other.
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "tree.safetensors")
        about = {"format": 1, "steps": len(self), "prompts": self.num_groups}
        (folder / "tree.json").write_text(json.dumps(about, indent=1) + "\n")

    @staticmethod
    def load(folder: str | Path) -> StepTree:
        """Read what `save` wrote.

        Raises:
            ValueError: no tree there, a cut file, or a file of another size than tree.json says.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "tree.json").read_text())
            tensors = load_file(folder / "tree.safetensors")
        except Exception as error:
            raise ValueError(f"{folder} holds no readable StepTree ({error}); write it with tree.save()") from error
        order = tensors.pop("order")
        tags = {key.removeprefix("tags."): tensors.pop(key) for key in list(tensors) if key.startswith("tags.")}
        tree = StepTree(**tensors, tags=tags)
        if len(tree) != about["steps"]:
            raise ValueError(f"{folder}: tree.json says {about['steps']} steps, tree.safetensors has {len(tree)}")
        tree.order = order
        return tree


def _tensor(x: Any, name: str) -> Tensor:
    """`x` as a tensor; Python floats become float64, where torch alone would round them to float32."""
    if isinstance(x, Tensor):
        return x
    try:
        tensor = torch.as_tensor(x)
        if tensor.is_floating_point():
            return torch.as_tensor(x, dtype=torch.float64)
        return tensor
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must hold numbers, rows of equal length ({error})") from None


def _ints(x: Any, name: str) -> Tensor:
    """`x` as a 1-d int64 tensor on the CPU; an empty list, which torch reads as floats, is fine."""
    tensor = _tensor(x, name)
    if tensor.ndim != 1 or (tensor.dtype.is_floating_point and tensor.numel()):
        raise ValueError(f"{name} must be a 1-d integer array, got {tensor.dtype} of shape {tuple(tensor.shape)}")
    return tensor.detach().to("cpu", torch.long)


def _floats(x: Any, name: str, n: int = 0) -> Tensor:
    """`x` as a 1-d float64 tensor on the CPU; `n` times NaN for None."""
    if x is None:
        return torch.full((n,), math.nan, dtype=torch.float64)
    tensor = _tensor(x, name)
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be a 1-d array, got shape {tuple(tensor.shape)}")
    return tensor.detach().to("cpu", torch.float64)


def _flags(x: Any, name: str) -> Tensor:
    """`x`, of True and False or 1 and 0, as a 1-d bool tensor on the CPU."""
    tensor = _tensor(x, name)
    if tensor.ndim != 1:
        raise ValueError(f"{name} must be a 1-d array of True and False, got shape {tuple(tensor.shape)}")
    neither = (tensor != 0) & (tensor != 1)
    _refuse(neither, tensor, name, "is neither true nor false; use 1 or 0, and leave out what is unknown")
    return tensor.detach().to("cpu", torch.bool)


def _refuse(bad: Tensor, x: Tensor, name: str, why: str) -> None:
    """Raise naming the first index where `bad` is True."""
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        others = int(bad.sum()) - 1
        raise ValueError(f"step {i}: {name}={x[i].item()} {why}" + (f" ({others} more)" if others else ""))


def _check_groups(group: Tensor) -> int:
    """The number of prompts; raises ValueError unless the ids are 0..G-1, each with a step."""
    if group.numel() == 0:
        return 0
    if int(group.min()) < 0:
        raise ValueError(f"step {int(group.argmin())}: group {int(group.min())} is negative")
    # Ids far above the number of steps leave gaps for certain; counting them could exhaust the memory.
    counts = torch.bincount(group) if int(group.max()) < 8 * group.numel() + 64 else torch.zeros(1)
    if bool((counts == 0).any()):
        raise ValueError(
            f"group ids are not contiguous: {int(group.max()) + 1} prompts expected, some have no step; number 0..G-1"
        )
    return counts.numel()


def _depth(parent: Tensor) -> Tensor:
    """(N,) depth by pointer doubling; raises on a cycle."""
    ancestor, depth = parent, (parent >= 0).long()
    # Each round looks twice as far up. Without a cycle, log2(N) + 1 rounds lead every node past its first step.
    for _ in range(max(1, parent.numel()).bit_length() + 1):
        live = ancestor >= 0
        if not bool(live.any()):
            return depth
        above = ancestor.clamp(min=0)
        depth = depth + torch.where(live, depth[above], 0)
        ancestor = torch.where(live, ancestor[above], -1)
    on_cycle = int((ancestor >= 0).nonzero()[0])
    raise ValueError(f"step {on_cycle}: its chain of parents is a cycle; parents must lead to -1")
