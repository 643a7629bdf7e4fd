"""Reward machines, also hierarchical: automata whose edges are guarded by events, rewarded on reaching acceptance.

    machine = {
        "events": ["key", "door", "lava"],
        "start": "u0",
        "edges": [["u0", "key & !lava", "u1"], ["u1", "door", "accept"]],
    }

Guards: names, `!`, `&`, `|`, parentheses and `true`. They are parsed here, never given to Python's `eval`. Edges of a
state are tried in order; with none true the machine stays where it is.
`accept` is the accepting state. An edge may call another machine, [u, guard, v, {"call": "name"}]: it is taken when
the called machine accepts; `machines: {name: {"start": ..., "edges": [...]}}` holds the callable ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.tree import StepTree

# Events (M, E) bool of M steps -> (M,) bool.
Guard = Callable[[Tensor], Tensor]
# (from, guard, to) by name.
Edge = tuple[str, str, str]

ACCEPT = "accept"
_TOKEN = re.compile(r"\s*([A-Za-z_][\w.]*|[!&|()])")


@dataclass(frozen=True)
class RewardMachine:
    """A machine without calls. `start` and `accept` are indices into `states`, edges are (from, guard, to)."""

    states: list[str]
    events: list[str]
    edges: list[tuple[int, Guard, int]]
    start: int
    accept: int

    @staticmethod
    def parse(spec: Mapping[str, Any]) -> RewardMachine:
        """From the mapping of the module's docstring; called machines are copied in.

        Raises:
            ValueError: a part is missing, an unknown event, a guard that does not parse, a call of an unknown machine
                or of itself.
        """
        missing = [part for part in ("events", "start", "edges") if part not in spec]
        if missing:
            raise ValueError(
                f"machine has no {', '.join(missing)}; it needs events, start and edges [from, guard, to]"
            )
        events = list(spec["events"])
        flat = _flatten(spec, spec.get("machines", {}), ())
        # State -> its index, in the order of first appearance.
        index: dict[str, int] = {}
        for state in [spec["start"], *(end for source, _, target in flat for end in (source, target)), ACCEPT]:
            index.setdefault(state, len(index))
        states = list(index)
        edges = [(index[source], parse_guard(guard, events), index[target]) for source, guard, target in flat]
        return RewardMachine(states, events, edges, index[spec["start"]], index[ACCEPT])

    def run(self, tree: StepTree, events: Tensor) -> tuple[Tensor, Tensor]:
        """(state after each step (N,) int, reward (N,) 1 on entering acceptance), one pass per depth level."""
        if events.shape != (len(tree), len(self.events)):
            raise ValueError(
                f"tags['events'] is {tuple(events.shape)}; the machine has {len(self.events)} events "
                f"({', '.join(self.events)}) and the tree {len(tree)} steps"
            )
        state = torch.full((len(tree),), self.start)
        before = torch.full((len(tree),), self.start)
        for level in tree.levels:
            parent = tree.parent[level]
            before[level] = torch.where(parent >= 0, state[parent.clamp(min=0)], self.start)
            state[level] = self.step(before[level], events[level])
        return state, ((state == self.accept) & (before != self.accept)).double()

    def step(self, state: Tensor, events: Tensor) -> Tensor:
        """(M,) next states; acceptance is final."""
        after = state.clone()
        # The first edge that applies is taken, after which the row is no longer undecided.
        undecided = state != self.accept
        for source, guard, target in self.edges:
            taken = undecided & (state == source) & guard(events)
            after = torch.where(taken, target, after)
            undecided = undecided & ~taken
        return after

    def potential(self) -> Tensor:
        """(S,) Phi = -(fewest edges to acceptance); unreachable states get -S."""
        far = len(self.states)
        distance = torch.full((far,), far)
        distance[self.accept] = 0
        for _ in range(far):
            for source, _, target in self.edges:
                distance[source] = min(int(distance[source]), int(distance[target]) + 1)
        return -distance.double()


def parse_guard(text: str, events: list[str]) -> Guard:
    """Compile `a & !(b | c)` into a function of the event matrix; `|` binds weaker than `&`.

    Raises:
        ValueError: unknown event or malformed guard, with the position.
    """
    tokens, position = [], 0
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"guard {text!r}: unexpected {text[position:].strip()[:1]!r} at position {position}")
        tokens.append(match.group(1))
        position = match.end()
    guard, rest = _either(tokens, events, text)
    if rest:
        raise ValueError(f"guard {text!r}: unexpected {rest[0]!r} after a complete expression")
    return guard


# A parser by recursive descent: or-expressions of and-expressions of atoms. Each function reads what it can from the
# front of `tokens` and returns it with the tokens that remain; `text` is for messages.


def _either(tokens: list[str], events: list[str], text: str) -> tuple[Guard, list[str]]:
    left, tokens = _both(tokens, events, text)
    if tokens[:1] != ["|"]:
        return left, tokens
    right, tokens = _either(tokens[1:], events, text)
    return (lambda e: left(e) | right(e)), tokens


def _both(tokens: list[str], events: list[str], text: str) -> tuple[Guard, list[str]]:
    left, tokens = _atom(tokens, events, text)
    if tokens[:1] != ["&"]:
        return left, tokens
    right, tokens = _both(tokens[1:], events, text)
    return (lambda e: left(e) & right(e)), tokens


def _atom(tokens: list[str], events: list[str], text: str) -> tuple[Guard, list[str]]:
    if not tokens:
        raise ValueError(f"guard {text!r} ends too early")
    head, rest = tokens[0], tokens[1:]
    if head == "!":
        inner, rest = _atom(rest, events, text)
        return (lambda e: ~inner(e)), rest
    if head == "(":
        inner, rest = _either(rest, events, text)
        if rest[:1] != [")"]:
            raise ValueError(f"guard {text!r}: a parenthesis is not closed")
        return inner, rest[1:]
    if head == "true":
        return (lambda e: torch.ones(len(e), dtype=torch.bool)), rest
    if head not in events:
        raise ValueError(f"guard {text!r}: unknown event {head!r}; known: {', '.join(events)}")
    column = events.index(head)
    return (lambda e: e[:, column]), rest


def _flatten(spec: Mapping[str, Any], machines: Mapping[str, Any], calls: tuple[str, ...]) -> list[Edge]:
    """Edges with every called machine copied in: its start becomes the caller's state, its acceptance the target."""
    edges: list[Edge] = []
    for k, (source, guard, target, *call) in enumerate(spec["edges"]):
        name = call[0]["call"] if call else None
        if name is None:
            edges.append((source, guard, target))
            continue
        if name not in machines:
            raise ValueError(
                f"edge {source} -> {target} calls unknown machine {name!r}; known: {', '.join(machines) or 'none'}"
            )
        if name in calls:
            raise ValueError(f"machine {name!r} calls itself ({' -> '.join([*calls, name])}); recursion has no end")
        inner = machines[name]
        # Other states of the called machine get names that no second call of it shares.
        prefix = f"{source}.{k}.{name}"
        outer_names = {inner["start"]: source, ACCEPT: target}
        for inner_source, inner_guard, inner_target in _flatten(inner, machines, (*calls, name)):
            # The caller's guard decides whether the call begins; later steps of the called machine are free of it.
            if inner_source == inner["start"]:
                inner_guard = f"({guard}) & ({inner_guard})"
            edges.append(
                (
                    outer_names.get(inner_source, f"{prefix}.{inner_source}"),
                    inner_guard,
                    outer_names.get(inner_target, f"{prefix}.{inner_target}"),
                )
            )
    return edges
