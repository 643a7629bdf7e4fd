"""Growing trees of steps or turns: where paths fork, end and go on, whatever samples their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from mmrl.finite import check_finite
from vision.forward.packing import ancestors
from vision.growth.requests import Engine, GrowthRequest, Node, SampleRequest, Session, TokenSample
from vision.inputs.step_rule import UnsureRule
from vision.inputs.tokens import PromptTokens


def grow(engine: Engine, request: GrowthRequest) -> list[Node]:
    """Sample the tree of every prompt; parents come before children.

    A step forks the moment it ends, and no path waits for another; conversations take their turns together.

    Raises:
        NotFiniteError: the log-probs of what was sampled are not finite; the network is named.
    """
    nodes = _Growth(engine.open(request), request).run() if request.prompts else []
    logp = torch.tensor([x for node in nodes for x in node.logp])
    check_finite(logp, "the language model", "sampled tokens")
    return nodes


@dataclass(slots=True)
class _Place(SampleRequest):
    """Where samples begin as children of `parent`, or where an open node goes on. nodes: those that the samples write;
    the rest are made when their samples arrive."""

    parent: int = -1
    depth: int = 0
    nodes: list[int] = field(default_factory=list)


class _ClosedTurn(NamedTuple):
    """A turn that waits for the environment's answer."""

    node: int
    slot: int
    sampled: int
    state: Any


class _Growth:
    """The state of one request."""

    def __init__(self, session: Session, request: GrowthRequest) -> None:
        self.session, self.request = session, request
        self.plan, self.sampling, self.rule = request.plan, request.sampling, request.rule
        self.nodes: list[Node] = []
        self.closed: list[_ClosedTurn] = []
        self.eos = frozenset(self.sampling.eos)
        self.last_fork = max((d for d in self.plan.splits if d < self.sampling.max_steps), default=0)

    def run(self) -> list[Node]:
        starts = self.request.starts
        if starts is None:
            places = [self._fork(g, -1, 0, 0, 0, None) for g in range(len(self.request.prompts))]
        else:
            places = [self._fork(s.prompt, -1, s.depth, s.slot, s.sampled, s.state) for s in starts]
        while places:
            samples = self.session.generate(places)
            if isinstance(self.rule, UnsureRule) and not self.request.responders:
                places, samples = self._fork_before(self.rule, places, samples)
            places = [new for p, own in zip(places, samples, strict=True) for new in self._attach(p, own)]
            places = places or self._answered()
        return self.nodes

    # ---- forks ------------------------------------------------------------------------------------------------------

    def _fork(
        self, prompt: int, parent: int, depth: int, slot: int, sampled: int, state: Any,
        observation: PromptTokens | None = None,
    ) -> _Place:  # fmt: skip
        """The place where the children of `parent` begin."""
        d, stride = self.sampling, self.plan.leaves // self.plan.width(depth + 1)
        slots = range(slot, slot + self.plan.factor(depth) * stride, stride)
        room = d.max_new_tokens - (0 if self.request.responders else sampled)
        is_behind_forks = depth >= self.last_fork and d.stop_after is None
        step_by_step = not self.request.responders and depth + 1 < d.max_steps and not is_behind_forks
        return _Place(prompt, slots, sampled, room, state, observation, step_by_step, parent, depth)

    def _child(self, place: _Place) -> int:
        """A new node of a place."""
        self.nodes.append(Node(place.prompt, place.parent, place.depth))
        place.nodes.append(len(self.nodes) - 1)
        return place.nodes[-1]

    def _fork_before(
        self, rule: UnsureRule, places: list[_Place], samples: list[list[TokenSample]]
    ) -> tuple[list[_Place], list[list[TokenSample]]]:
        """The places with nodes whose next token was unsure replaced by forks, and samples of all, drawn again: the
        same ones where nothing forked."""
        first = [own[0] for own in samples]
        unsure = rule.unsure(torch.tensor([s.logp[0] for s in first]), torch.tensor([s.entropy for s in first]))
        forks = [
            is_unsure and bool(p.nodes and self.nodes[p.nodes[0]].ids) and p.depth + 1 < self.sampling.max_steps
            for p, is_unsure in zip(places, unsure.tolist(), strict=True)
        ]
        if not any(forks):
            return places, samples
        going = []
        for place, sample, forked in zip(places, first, forks, strict=True):
            if not forked:
                place.state = sample.state
                going.append(place)
                continue
            (at,) = place.nodes
            self.nodes[at].end = "step"
            if place.depth + 1 != self.sampling.stop_after:
                going.append(
                    self._fork(place.prompt, at, place.depth + 1, place.slots[0], place.sampled, sample.state)
                )
        return going, self.session.generate(going, again=True) if going else []

    # ---- samples ----------------------------------------------------------------------------------------------------

    def _attach(self, place: _Place, samples: Sequence[TokenSample]) -> list[_Place]:
        """Write the samples of a place into the tree; returns where it grows on."""
        going = []
        for i, (slot, sample) in enumerate(zip(place.slots, samples, strict=True)):
            node = place.nodes[i] if i < len(place.nodes) else self._child(place)
            going += self._write(place, node, slot, sample)
        return going

    def _write(self, place: _Place, at: int, slot: int, sample: TokenSample) -> list[_Place]:
        """Cut one sample of a place into nodes, the first of which is `at`."""
        node, sampled = self.nodes[at], place.sampled
        for k, (token, logp) in enumerate(zip(sample.ids, sample.logp, strict=True), start=1):
            node.ids.append(token)
            node.logp.append(logp)
            node.end = self._end(node, sampled + k)
            if node.end == "step":
                if node.depth + 1 == self.sampling.stop_after:
                    return []
                place = self._fork(node.prompt, at, node.depth + 1, slot, sampled + k, sample.state)
                if self.session.whole_steps:
                    at = self._child(place)
                    node = self.nodes[at]
                if k == len(sample.ids):
                    return [place]
        sampled += len(sample.ids)
        if node.end == "open":
            place = replace(place, slots=[slot], nodes=[at]) if len(place.slots) > 1 else place
            place.room -= sampled - place.sampled
            place.sampled, place.state, place.observation = sampled, sample.state, None
            return [place]
        if node.end == "eos" and self.request.responders and node.depth + 1 < self.sampling.max_steps:
            self.closed.append(_ClosedTurn(at, slot, sampled, self.session.keep(sample.state)))
        return []

    def _end(self, node: Node, sampled: int) -> Literal["open", "step", "eos", "length"]:
        """Why a node stops at its last token; `sampled` tokens are on its path."""
        d, turns = self.sampling, bool(self.request.responders)
        if node.ids[-1] in self.eos:
            return "eos"
        if (len(node.ids) if turns else sampled) == d.max_new_tokens:
            return "length"
        if not turns and node.depth + 1 < d.max_steps and self.rule.ends_step(node.ids):
            return "step"
        return "open"

    def _answered(self) -> list[_Place]:
        """Ask the environment after every turn that was closed; the places where conversations go on."""
        closed, self.closed = sorted(self.closed, key=lambda turn: turn.node), []
        parent = [n.parent for n in self.nodes]
        places = []
        for turn in closed:
            node = self.nodes[turn.node]
            turns = [self.nodes[v].ids for v in reversed(ancestors(parent, turn.node))]
            observation = self.request.responders[node.prompt](turns)
            if observation is not None:
                node.end, node.observed = "step", len(observation.ids)
                after = (turn.slot, turn.sampled, turn.state, observation)
                places.append(self._fork(node.prompt, turn.node, node.depth + 1, *after))
        return places
