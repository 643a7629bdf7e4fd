"""Sampling trees of turns with vLLM: a turn of a conversation is a request, its whole history verbatim is the prompt.

The history is ids as they were sampled and shown, never text, and pixels as the encoder made them: what vLLM saw of it
in earlier turns lies in its prefix cache. All conversations take their turns together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmrl.rollout import BranchPlan
from mmrl.seeding import named_generator
from vision.engine_vllm import VllmEngine, sampling
from vision.growth import Decoding, Node, PromptTokens
from vision.turns import Answer
from vision.vllm_backends import Call
from vision.vllm_media import Medium, media_of


@dataclass(frozen=True)
class Talk:
    """A conversation before its next turn: the node before it, its first leaf's number, tokens sampled so far."""

    prompt: int
    node: int
    depth: int
    slot: int
    sampled: int
    ids: list[int]
    media: list[Medium]

    @classmethod
    def begin(cls, g: int, prompt: PromptTokens) -> Talk:
        """The conversation of prompt `g` before its first turn."""
        return cls(g, -1, 0, 0, 0, prompt.ids.tolist(), media_of(prompt))

    def wrote(self, ids: Sequence[int]) -> Talk:
        """What it is once a turn was taken."""
        return replace(self, sampled=self.sampled + len(ids), ids=[*self.ids, *ids])

    def after(self, seen: PromptTokens) -> Talk:
        """What it is once it was shown something, one turn deeper."""
        shown = [m.at(len(self.ids)) for m in media_of(seen)]
        return replace(self, depth=self.depth + 1, ids=self.ids + seen.ids.tolist(), media=self.media + shown)


def grow_turns(
    engine: VllmEngine,
    prompts: Sequence[PromptTokens],
    plan: BranchPlan,
    decoding: Decoding,
    seeds: Sequence[int],
    answer: Answer,
    talks: Sequence[Talk] | None = None,
) -> list[Node]:
    """Sample the tree of every prompt; the same nodes and ends as vision.turns.grow_turns makes, other random numbers.

    `logp` as in `VllmEngine.grow`, whose `counts` are those of this call too. talks: conversations under way to go on
    with, in place of the prompts' first turns.

    Raises:
        ValueError: a conversation that leaves no room for `max_new_tokens`, a fork at temperature 0, a temperature
            that vLLM would change silently, or pictures of a model that is no Qwen-VL.
        RuntimeError: a log-prob that is not finite, or a turn that vLLM broke off.
    """
    engine.begin(prompts, plan, decoding)
    nodes: list[Node] = []
    talks = [Talk.begin(g, p) for g, p in enumerate(prompts)] if talks is None else list(talks)
    while talks:
        for talk in talks:
            engine.check_room(f"prompt {talk.prompt}: the conversation", len(talk.ids), decoding.max_new_tokens)
        replies = engine.backend.generate([_call(t, plan, decoding, seeds[t.prompt]) for t in talks])
        closed: list[Talk] = []
        for talk, reply in zip(talks, replies, strict=True):
            engine.account(talk.prompt, talk.ids, reply)
            closed += _write(nodes, talk, reply.samples, plan, decoding)
        talks = []
        for talk in closed:
            seen = answer(nodes, talk.node) if talk.depth + 1 < decoding.max_steps else None
            if seen is None:
                nodes[talk.node].end = "eos"
            else:
                nodes[talk.node].observed = len(seen.ids)
                talks.append(talk.after(seen))
    return nodes


def _call(talk: Talk, plan: BranchPlan, decoding: Decoding, seed: int) -> Call:
    own = named_generator(seed, talk.slot, talk.sampled).initial_seed()
    told = sampling(decoding, decoding.eos, own, n=plan.factor(talk.depth), max_tokens=decoding.max_new_tokens)
    return Call(talk.ids, (), told, talk.media)


def _write(
    nodes: list[Node], talk: Talk, samples: Sequence[tuple[list[int], list[float]]], plan: BranchPlan, d: Decoding
) -> list[Talk]:
    """A node per sampled turn; the conversations whose turn was closed."""
    stride = plan.leaves // plan.width(talk.depth + 1)
    closed = []
    for j, (ids, logp) in enumerate(samples):
        node = Node(talk.prompt, talk.node, talk.depth, ids, logp)
        nodes.append(node)
        if ids[-1] in d.eos:
            node.end = "step"  # the environment decides whether it was the last
            slot, sampled = talk.slot + j * stride, talk.sampled + len(ids)
            closed.append(Talk(talk.prompt, len(nodes) - 1, talk.depth, slot, sampled, talk.ids + ids, talk.media))
        elif len(ids) == d.max_new_tokens:
            node.end = "length"
        else:
            raise RuntimeError(f"prompt {talk.prompt}: vLLM broke a turn off after {len(ids)} tokens")
    return closed
