"""Growing trees of steps or turns: where paths fork, end and go on, whatever samples their tokens.

    plan {0: 2, 1: 2}          the prompt gets two first steps, and each of them two second steps
    leaves 0 1 2 3             numbered in advance; a place serves one or more of them, its slots
    place of the prompt        slots 0 and 2, the first leaf below each first step
    place behind a first step  slots 0 and 1, or 2 and 3

A sample draws from the seed of its prompt and its slot, so it is the same in whatever order paths grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from mmrl.finite import check_finite
from vision.forward.packing import ancestors
from vision.growth.requests import Engine, GrowthRequest, Node, SampleRequest, Session, Start, TokenSample
from vision.inputs.step_rule import UnsureRule
from vision.inputs.tokens import PromptTokens


def grow(engine: Engine, request: GrowthRequest) -> list[Node]:
    """Sample the tree of every prompt; parents come before children.

    A step forks the moment it ends, and no path waits for another; conversations take their turns together.

    Raises:
        NotFiniteError: the log-probs of what was sampled are not finite; the network is named.
    """
    nodes = _Growth(engine.open(request), request).run() if request.prompts else []
    logp = torch.tensor([value for node in nodes for value in node.logp])
    check_finite(logp, "the language model", "sampled tokens")
    return nodes


@dataclass(slots=True)
class _Place(SampleRequest):
    """The place where samples begin as children of `parent`, or where an open node goes on.

    nodes: those that the samples write; the rest are made when their samples arrive.
    """

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
        # Below this depth no path forks, so that an engine may sample to the end of a completion in one go.
        self.last_fork = max((depth for depth in self.plan.splits if depth < self.sampling.max_steps), default=0)

    def run(self) -> list[Node]:
        """Sample round by round until no place is left."""
        starts = self.request.starts
        if starts is None:
            starts = [Start(prompt) for prompt in range(len(self.request.prompts))]
        places = []
        for start in starts:
            places.append(self._fork(start.prompt, -1, start.depth, start.slot, start.sampled, start.state))
        while places:
            samples = self.session.generate(places)
            if isinstance(self.rule, UnsureRule) and not self.request.responders:
                places, samples = self._fork_before(self.rule, places, samples)
            going = []
            for place, own in zip(places, samples, strict=True):
                going += self._attach(place, own)
            # Conversations take their turns together: the environment is asked when no turn is open any more.
            places = going or self._answered()
        return self.nodes

    # ---- forks ------------------------------------------------------------------------------------------------------

    def _fork(
        self,
        prompt: int,
        parent: int,
        depth: int,
        slot: int,
        sampled: int,
        state: Any,
        observation: PromptTokens | None = None,
    ) -> _Place:
        """The place where the children of `parent` begin.

        depth: of the children. slot: the first leaf below `parent`.
        """
        leaves_per_child = self.plan.leaves // self.plan.width(depth + 1)
        slots = range(slot, slot + self.plan.factor(depth) * leaves_per_child, leaves_per_child)
        in_turns = bool(self.request.responders)
        # Each turn has the whole room, the steps of one text share it.
        room = self.sampling.max_new_tokens - (0 if in_turns else sampled)
        is_behind_forks = depth >= self.last_fork and self.sampling.stop_after is None
        step_by_step = not in_turns and depth + 1 < self.sampling.max_steps and not is_behind_forks
        return _Place(prompt, slots, sampled, room, state, observation, step_by_step, parent, depth)

    def _child(self, place: _Place) -> int:
        """A new node of a place."""
        self.nodes.append(Node(place.prompt, place.parent, place.depth))
        place.nodes.append(len(self.nodes) - 1)
        return place.nodes[-1]

    def _fork_before(
        self, rule: UnsureRule, places: list[_Place], samples: list[list[TokenSample]]
    ) -> tuple[list[_Place], list[list[TokenSample]]]:
        """The places, of which those whose next token was unsure are forks, and samples of all.

        Where anything forked, all samples are drawn again; they are the same ones where nothing forked.
        """
        first = [own[0] for own in samples]
        logp = torch.tensor([sample.logp[0] for sample in first])
        unsure = rule.unsure(logp, torch.tensor([sample.entropy for sample in first])).tolist()
        forks = []
        for place, is_unsure in zip(places, unsure, strict=True):
            has_tokens = bool(place.nodes and self.nodes[place.nodes[0]].ids)
            forks.append(is_unsure and has_tokens and place.depth + 1 < self.sampling.max_steps)
        if not any(forks):
            return places, samples
        going = []
        for place, sample, forked in zip(places, first, forks, strict=True):
            if not forked:
                place.state = sample.state
                going.append(place)
                continue
            (node,) = place.nodes
            self.nodes[node].end = "step"
            depth = place.depth + 1
            if depth != self.sampling.stop_after:
                going.append(self._fork(place.prompt, node, depth, place.slots[0], place.sampled, sample.state))
        return going, self.session.generate(going, again=True) if going else []

    # ---- samples ----------------------------------------------------------------------------------------------------

    def _attach(self, place: _Place, samples: Sequence[TokenSample]) -> list[_Place]:
        """Write the samples of a place into the tree; returns where it grows on."""
        going = []
        for number, (slot, sample) in enumerate(zip(place.slots, samples, strict=True)):
            node = place.nodes[number] if number < len(place.nodes) else self._child(place)
            going += self._write(place, node, slot, sample)
        return going

    def _write(self, place: _Place, index: int, slot: int, sample: TokenSample) -> list[_Place]:
        """Cut one sample of a place into nodes, the first of which is `index`; returns where its path grows on."""
        node, sampled = self.nodes[index], place.sampled
        for count, (token, logp) in enumerate(zip(sample.ids, sample.logp, strict=True), start=1):
            node.ids.append(token)
            node.logp.append(logp)
            node.end = self._end(node, sampled + count)
            if node.end == "step":
                if node.depth + 1 == self.sampling.stop_after:
                    return []
                place = self._fork(node.prompt, index, node.depth + 1, slot, sampled + count, sample.state)
                if self.session.whole_steps:
                    index = self._child(place)
                    node = self.nodes[index]
                if count == len(sample.ids):
                    return [place]
        sampled += len(sample.ids)
        if node.end == "open":
            if len(place.slots) > 1:
                # Siblings end their steps at different times, so each goes on at a place of its own.
                place = replace(place, slots=[slot], nodes=[index])
            place.room -= sampled - place.sampled
            place.sampled, place.state, place.observation = sampled, sample.state, None
            return [place]
        if node.end == "eos" and self.request.responders and node.depth + 1 < self.sampling.max_steps:
            self.closed.append(_ClosedTurn(index, slot, sampled, self.session.keep(sample.state)))
        return []

    def _end(self, node: Node, sampled: int) -> Literal["open", "step", "eos", "length"]:
        """The reason to stop a node at its last token; `sampled` tokens are on its path."""
        in_turns = bool(self.request.responders)
        if node.ids[-1] in self.eos:
            return "eos"
        used = len(node.ids) if in_turns else sampled
        if used == self.sampling.max_new_tokens:
            return "length"
        if not in_turns and node.depth + 1 < self.sampling.max_steps and self.rule.ends_step(node.ids):
            return "step"
        return "open"

    def _answered(self) -> list[_Place]:
        """Ask the environment after every turn that was closed; the places where conversations go on."""
        closed, self.closed = sorted(self.closed, key=lambda turn: turn.node), []
        parents = [node.parent for node in self.nodes]
        places = []
        for turn in closed:
            node = self.nodes[turn.node]
            turns = [self.nodes[index].ids for index in reversed(ancestors(parents, turn.node))]
            observation = self.request.responders[node.prompt](turns)
            if observation is None:
                continue
            node.end, node.observed = "step", len(observation.ids)
            depth = node.depth + 1
            places.append(self._fork(node.prompt, turn.node, depth, turn.slot, turn.sampled, turn.state, observation))
        return places
