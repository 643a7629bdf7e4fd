"""Sampling trees of turns with a transformers model: an environment answers between them, caches are never recomputed.

All conversations of a batch take their turns together. A turn is decoded token by token; when it ends, its row leaves
with its cache. The observations of those that go on are then run in one batch behind their caches, and the next turn
forks where the plan branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from mmrl.rollout import BranchPlan
from vision.decode import draw, noise_table, prefill
from vision.growth import Decoding, Node, PromptTokens
from vision.kv import Layers, check_cache, cut, join
from vision.network import encode_images, encoder_outputs
from vision.passes import left_pad, pad_positions

# (all nodes, the index of one that just ended) -> the observation after it, None = the conversation is over
Answer = Callable[[list[Node], int], PromptTokens | None]


@dataclass
class Talk:
    """A conversation whose next turn begins: the node before it, its column of noise, tokens sampled so far, what the
    network remembers of it, the logits (V,) of its next token and that token's rotary position."""

    prompt: int
    node: int
    depth: int
    slot: int
    length: int
    memory: Layers
    logits: Tensor
    position: int


@dataclass
class _Row:
    """A turn that is being written."""

    node: int
    slot: int
    length: int  # of all turns
    position: int  # of the token drawn next


def grow_turns(
    hf: Any,
    prompts: Sequence[PromptTokens],
    plan: BranchPlan,
    decoding: Decoding,
    seeds: Sequence[int],
    answer: Answer,
    cache: ByteCache | None = None,
    talks: Sequence[Talk] | None = None,
) -> list[Node]:
    """Sample the tree of every prompt under `plan`, where a step is a turn of at most `max_new_tokens` that ends with
    an end mark, and a conversation has at most `max_steps`.

    The last token of a turn is run together with the observation behind it, that of a conversation never; a node's
    logp are those of the sampling distribution (temperature, banned ids), float32.

    Args:
        talks: conversations under way to go on with, in place of the prompts' first turns.
    Raises:
        ValueError: a model that forgets (sliding windows), whose caches cannot be cut and joined.
    """
    with torch.no_grad():
        return _Turns(hf, prompts, plan, decoding, seeds, answer, cache).run(talks)


class _Turns:
    """The state of one batch."""

    def __init__(
        self, hf: Any, prompts: Sequence[PromptTokens], plan: BranchPlan, decoding: Decoding, seeds: Sequence[int],
        answer: Answer, cache: ByteCache | None,
    ) -> None:  # fmt: skip
        self.hf, self.device, self.cache = hf, bare(hf).device, cache
        self.prompts, self.plan, self.decoding, self.answer = prompts, plan, decoding, answer
        self.nodes: list[Node] = []
        self.eos = set(decoding.eos)
        tokens = decoding.max_new_tokens * decoding.max_steps
        self.noise = torch.stack([noise_table(s, tokens, plan.leaves) for s in seeds])

    def run(self, begun: Sequence[Talk] | None) -> list[Node]:
        talks = self._open() if begun is None else list(begun)
        while talks:
            ended = self._turn(talks)
            talks = self._observe(ended)
        return self.nodes

    def _open(self) -> list[Talk]:
        logits, past, mask = prefill(self.hf, self.prompts, self.cache)
        check_cache(past)
        return [
            Talk(
                g,
                -1,
                0,
                0,
                0,
                cut(past, g, slice(None) if mask is None else mask[g].bool()),
                logits[g],
                p.next_position,
            )
            for g, p in enumerate(self.prompts)
        ]

    # ---- a turn ---------------------------------------------------------------------------------------------------

    def _fork(self, talks: Sequence[Talk]) -> tuple[list[_Row], list[int]]:
        """A row per child, and the conversation it continues."""
        rows, origin = [], []
        for t, talk in enumerate(talks):
            stride = self.plan.leaves // self.plan.width(talk.depth + 1)
            for j in range(self.plan.factor(talk.depth)):
                self.nodes.append(Node(talk.prompt, talk.node, talk.depth))
                rows.append(_Row(len(self.nodes) - 1, talk.slot + j * stride, talk.length, talk.position))
                origin.append(t)
        return rows, origin

    def _turn(self, talks: Sequence[Talk]) -> list[tuple[_Row, Layers]]:
        """Write one turn of every conversation; those whose turn was closed, with their caches (the closing token is
        not in them yet)."""
        rows, origin = self._fork(talks)
        past, mask = join([talks[t].memory for t in origin], self.device)
        logits = torch.stack([talks[t].logits for t in origin])
        closed: list[tuple[_Row, Layers]] = []
        while rows:
            tokens, logp = self._draw(rows, logits)
            live = self._write(rows, tokens.tolist(), logp.tolist())
            for r, row in enumerate(rows):
                if self.nodes[row.node].end == "step":
                    closed.append((row, cut(past, r, mask[r])))
            if not live:
                break
            rows = [rows[r] for r in live]
            index = torch.tensor(live, device=self.device)
            if len(live) < len(tokens):
                past.batch_select_indices(index)
                mask = mask[index]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            where = torch.tensor([row.position - 1 for row in rows], device=self.device)[:, None]
            out = self.hf(
                input_ids=tokens[index][:, None], past_key_values=past, attention_mask=mask.long(),
                position_ids=where if self._flat else where.expand(3, -1, -1), use_cache=True,
            )  # fmt: skip
            logits, past = out.logits[:, -1], out.past_key_values
        return sorted(closed, key=lambda c: c[0].node)

    @property
    def _flat(self) -> bool:
        return self.prompts[0].positions.ndim == 1

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.tensor([[self.nodes[r.node].prompt, r.length, r.slot] for r in rows])
        return draw(logits, self.noise[tuple(where.T)], self.decoding)

    def _write(self, rows: Sequence[_Row], tokens: Sequence[int], logp: Sequence[float]) -> list[int]:
        """Note the drawn tokens; the rows whose turn goes on."""
        live = []
        for r, (row, token, lp) in enumerate(zip(rows, tokens, logp, strict=True)):
            node = self.nodes[row.node]
            node.ids.append(token)
            node.logp.append(lp)
            row.length, row.position = row.length + 1, row.position + 1
            if token in self.eos:
                node.end = "step"  # the environment decides whether it was the last
            elif len(node.ids) == self.decoding.max_new_tokens:
                node.end = "length"
            else:
                live.append(r)
        return live

    # ---- the answer ------------------------------------------------------------------------------------------------

    def _observe(self, closed: Sequence[tuple[_Row, Layers]]) -> list[Talk]:
        """Ask the environment after every closed turn and run what it shows; the conversations that go on."""
        going: list[tuple[_Row, Layers, PromptTokens]] = []
        for row, memory in closed:
            node = self.nodes[row.node]
            last = node.depth + 1 >= self.decoding.max_steps
            seen = None if last else self.answer(self.nodes, row.node)
            if seen is None:
                node.end = "eos"
            else:
                node.observed = len(seen.ids)
                going.append((row, memory, seen))
        return self._run_observations(going) if going else []

    def _run_observations(self, going: Sequence[tuple[_Row, Layers, PromptTokens]]) -> list[Talk]:
        past, before = join([memory for _, memory, _ in going], self.device)
        ids, _ = left_pad([torch.cat([torch.tensor(self.nodes[r.node].ids[-1:]), s.ids]) for r, _, s in going])
        length = torch.tensor([1 + len(s.ids) for _, _, s in going])
        fresh = (torch.arange(ids.shape[1])[None] >= ids.shape[1] - length[:, None]).to(self.device)
        where = pad_positions([_behind(r.position - 1, s) for r, _, s in going], left=True)
        shown = [s.pixels for _, _, s in going if s.pixels is not None]
        extra: dict[str, Any] = {}
        if shown:
            features = encode_images(self.hf, shown, self.cache)
            extra["mm_encoder_outputs"] = encoder_outputs(shown, [features[p.key] for p in shown])
        mask = torch.cat([before, fresh], 1)
        out = self.hf(
            input_ids=ids.to(self.device), past_key_values=past, attention_mask=mask.long(),
            position_ids=where.to(self.device), use_cache=True, logits_to_keep=1, **extra,
        )  # fmt: skip
        talks = []
        for r, (row, _, seen) in enumerate(going):
            node = self.nodes[row.node]
            memory, at = cut(out.past_key_values, r, mask[r]), row.position + seen.next_position
            talk = Talk(node.prompt, row.node, node.depth + 1, row.slot, row.length, memory, out.logits[r, -1], at)
            talks.append(talk)
        return talks


def _behind(position: int, seen: PromptTokens) -> Tensor:
    """(n + 1,) or (3, n + 1) positions of a turn's last token and the observation after it."""
    last = torch.full((*seen.positions.shape[:-1], 1), position)
    return torch.cat([last, seen.positions + position + 1], -1)
