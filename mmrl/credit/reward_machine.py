"""Reward machines, also hierarchical: states, and edges guarded by events. Guards are parsed, never evaluated.

    machine = {
        "events": ["key", "door", "lava"],
        "start": "u0",
        "edges": [["u0", "key & !lava", "u1"], ["u1", "door", "accept"]],
    }

Guards: names, `!`, `&`, `|`, parentheses and `true`. Edges of a state are tried in order; with none true it stays.
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

Guard = Callable[[Tensor], Tensor]  # events (M, E) bool -> (M,) bool
Edge = tuple[str, str, str]

ACCEPT = "accept"
_TOKEN = re.compile(r"\s*([A-Za-z_][\w.]*|[!&|()])")


@dataclass(frozen=True)
class RewardMachine:
    """A flat machine. states[0] is not special; `start` and `accept` are indices into states."""

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
        states = list(dict.fromkeys([spec["start"], *(s for u, _, v in flat for s in (u, v)), ACCEPT]))
        index = {s: i for i, s in enumerate(states)}
        edges = [(index[u], parse_guard(guard, events), index[v]) for u, guard, v in flat]
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
        open_ = state != self.accept
        for u, guard, v in self.edges:
            take = open_ & (state == u) & guard(events)
            after = torch.where(take, v, after)
            open_ = open_ & ~take
        return after

    def potential(self) -> Tensor:
        """(S,) Phi = -(fewest edges to acceptance); unreachable states get -S."""
        far = len(self.states)
        distance = torch.full((far,), far)
        distance[self.accept] = 0
        for _ in range(far):
            for u, _, v in self.edges:
                distance[u] = min(int(distance[u]), int(distance[v]) + 1)
        return -distance.double()


def parse_guard(text: str, events: list[str]) -> Guard:
    """Compile `a & !(b | c)` into a function of the event matrix; `|` binds weaker than `&`.

    Raises:
        ValueError: unknown event or malformed guard, with the position.
    """
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"guard {text!r}: unexpected {text[at:].strip()[:1]!r} at position {at}")
        tokens.append(match.group(1))
        at = match.end()
    guard, rest = _either(tokens, events, text)
    if rest:
        raise ValueError(f"guard {text!r}: unexpected {rest[0]!r} after a complete expression")
    return guard


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
    out: list[Edge] = []
    for k, (u, guard, v, *more) in enumerate(spec["edges"]):
        name = more[0]["call"] if more else None
        if name is None:
            out.append((u, guard, v))
            continue
        if name not in machines:
            raise ValueError(f"edge {u} -> {v} calls unknown machine {name!r}; known: {', '.join(machines) or 'none'}")
        if name in calls:
            raise ValueError(f"machine {name!r} calls itself ({' -> '.join([*calls, name])}); recursion has no end")
        inner = machines[name]
        rename = {inner["start"]: u, ACCEPT: v}
        for a, g, b in _flatten(inner, machines, (*calls, name)):
            g = f"({guard}) & ({g})" if a == inner["start"] else g  # the guard admits the call, not its later steps
            out.append((rename.get(a, f"{u}.{k}.{name}.{a}"), g, rename.get(b, f"{u}.{k}.{name}.{b}")))
    return out
