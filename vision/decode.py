"""Sampling trees of steps with a transformers model: prompts once, caches forked where the plan branches.

All rows advance together, one token a call; a row forks the moment its step ends and leaves when it is done, so no
row waits for another. What a prompt samples depends on its own seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from mmrl.rollout import BranchPlan
from vision.growth import Decoding, Node, PromptTokens
from vision.network import encode_images, encoder_outputs, masked_scores
from vision.passes import left_pad, pad_positions
from vision.step_rule import StepRule, UnsureRule


@dataclass(frozen=True)
class Opened:
    """Prompts that have been run: (G, V) logits after each, the cache, its mask, and for each how many of its last
    tokens count as sampled already."""

    logits: Tensor
    past: Any
    mask: Tensor | None
    written: Sequence[int]


@dataclass
class _Row:
    """A live sequence: the node it is writing, its place in the prompt's noise table, tokens sampled so far."""

    node: int
    slot: int
    length: int


def grow(
    hf: Any,
    prompts: Sequence[PromptTokens],
    plan: BranchPlan,
    decoding: Decoding,
    rule: StepRule,
    seeds: Sequence[int],
    cache: ByteCache | None = None,
    opened: Opened | None = None,
) -> list[Node]:
    """Sample the tree of every prompt under `plan`; parents come before children.

    A step at depth d that ends as a step gets plan.factor(d + 1) children. The last token of a path is never run
    through the network, and a node's logp are those of the sampling distribution (temperature, banned ids), float32.
    opened: the prompts as they have been run already.
    """
    with torch.no_grad():
        if opened is None:
            opened = Opened(*prefill(hf, prompts, cache), [0] * len(prompts))
        return _Decoder(hf, prompts, plan, decoding, rule, seeds, opened).run()


class _Decoder:
    """The state of one batch: rows, their cache and their next positions."""

    def __init__(
        self, hf: Any, prompts: Sequence[PromptTokens], plan: BranchPlan,
        decoding: Decoding, rule: StepRule, seeds: Sequence[int], opened: Opened,
    ) -> None:  # fmt: skip
        self.hf, self.device, self.opened = hf, bare(hf).device, opened
        self.prompts, self.plan, self.decoding, self.rule = prompts, plan, decoding, rule
        self.nodes: list[Node] = []
        self.eos = set(decoding.eos)
        self.noise = torch.stack([noise_table(s, decoding.max_new_tokens, plan.leaves) for s in seeds])

    def run(self) -> list[Node]:
        logits, past, mask = self.opened.logits, self.opened.past, self.opened.mask
        rows: list[_Row] = []
        origin: list[int] = []
        for g in range(len(self.prompts)):
            children = self._children(g, -1, 0, 0, self.opened.written[g])
            rows += children
            origin += [g] * len(children)
        logits, mask = logits[origin], None if mask is None else mask[origin]
        past.batch_select_indices(torch.tensor(origin, device=self.device))
        while rows:
            tokens, logp = self._draw(rows, logits)
            if isinstance(self.rule, UnsureRule):
                unsure = self.rule.unsure(logp, entropy(logits, self.decoding))
                rows, origin = self._forked_before(rows, unsure.tolist())
                if not rows:
                    break
                index = torch.tensor(origin, device=self.device)
                past.batch_select_indices(index)
                logits, mask = logits[index], None if mask is None else mask[index]
                tokens, logp = self._draw(rows, logits)  # the same for rows that were sure, by their noise
            rows, origin = self._advance(rows, tokens.tolist(), logp.tolist())
            if not rows:
                break
            index = torch.tensor(origin, device=self.device)
            if origin != list(range(len(tokens))):
                past.batch_select_indices(index)
                mask = None if mask is None else mask[index]
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            out = self.hf(
                input_ids=tokens[index][:, None], past_key_values=past, attention_mask=mask,
                position_ids=self._positions(rows), use_cache=True,
            )  # fmt: skip
            logits, past = out.logits[:, -1], out.past_key_values
        return self.nodes

    def _children(self, prompt: int, parent: int, depth: int, slot: int, length: int) -> list[_Row]:
        stride = self.plan.leaves // self.plan.width(depth + 1)
        rows = []
        for j in range(self.plan.factor(depth)):
            self.nodes.append(Node(prompt, parent, depth))
            rows.append(_Row(len(self.nodes) - 1, slot + j * stride, length))
        return rows

    def _forked_before(self, rows: Sequence[_Row], unsure: Sequence[bool]) -> tuple[list[_Row], list[int]]:
        """The rows with those that are unsure of their next token replaced by children, and the row of each."""
        live: list[_Row] = []
        origin: list[int] = []
        for r, (row, is_unsure) in enumerate(zip(rows, unsure, strict=True)):
            node = self.nodes[row.node]
            depth = node.depth + 1
            own = [row]
            if is_unsure and node.ids and depth < self.decoding.max_steps:
                node.end = "step"
                stops = depth == self.decoding.stop_after
                own = [] if stops else self._children(node.prompt, row.node, depth, row.slot, row.length)
            live += own
            origin += [r] * len(own)
        return live, origin

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> tuple[Tensor, Tensor]:
        where = torch.tensor([[self.nodes[r.node].prompt, r.length, r.slot] for r in rows])
        return draw(logits, self.noise[tuple(where.T)], self.decoding)

    def _advance(
        self, rows: Sequence[_Row], tokens: Sequence[int], logp: Sequence[float]
    ) -> tuple[list[_Row], list[int]]:
        """Write the drawn tokens; the rows that go on and, for each, the row it continues."""
        d, live, origin = self.decoding, [], []
        for r, (row, token, lp) in enumerate(zip(rows, tokens, logp, strict=True)):
            node = self.nodes[row.node]
            node.ids.append(token)
            node.logp.append(lp)
            row.length += 1
            if token in self.eos:
                node.end = "eos"
            elif row.length == d.max_new_tokens:
                node.end = "length"
            elif node.depth + 1 < d.max_steps and self.rule.ends_step(node.ids):
                node.end = "step"
                if node.depth + 1 == d.stop_after:
                    continue
                children = self._children(node.prompt, row.node, node.depth + 1, row.slot, row.length)
                live += children
                origin += [r] * len(children)
            else:
                live.append(row)
                origin.append(r)
        return live, origin

    def _positions(self, rows: Sequence[_Row]) -> Tensor:
        """Rotary positions of each row's newest token, (R, 1) or (3, R, 1)."""
        owners = [self.nodes[r.node].prompt for r in rows]
        new = [r.length - self.opened.written[g] for r, g in zip(rows, owners, strict=True)]
        at = [self.prompts[g].next_position + n - 1 for g, n in zip(owners, new, strict=True)]
        where = torch.tensor(at, device=self.device)[:, None]
        return where if self.prompts[0].positions.ndim == 1 else where.expand(3, -1, -1)


def prefill(hf: Any, prompts: Sequence[PromptTokens], cache: ByteCache | None) -> tuple[Tensor, Any, Tensor | None]:
    """(G, V) logits after each prompt, the cache, the mask of left-padded prompts."""
    device = bare(hf).device
    ids, mask = left_pad([p.ids for p in prompts])
    positions = pad_positions([p.positions for p in prompts], left=True)
    images = [p.pixels for p in prompts if p.pixels is not None]
    extra: dict[str, Any] = {}
    if images:
        features = encode_images(hf, images, cache)
        extra["mm_encoder_outputs"] = encoder_outputs(images, [features[p.key] for p in images])
        if bare(hf).config.model_type.startswith("gemma3"):  # images are bidirectional blocks of the mask
            extra["token_type_ids"] = left_pad([p.types for p in prompts])[0].to(device)
    mask = None if mask is None else mask.to(device)
    out = hf(
        input_ids=ids.to(device), position_ids=positions.to(device), attention_mask=mask,
        use_cache=True, logits_to_keep=1, **extra,
    )  # fmt: skip
    if out.past_key_values is None:
        raise RuntimeError("the model keeps no cache in this mode; put it in eval mode before sampling")
    return out.logits[:, -1], out.past_key_values, mask


def draw(logits: Tensor, uniform: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """(R,) tokens from (R, V) logits by inverse transform of (R,) uniform numbers, and their log-probs."""
    scores = masked_scores(logits, decoding.temperature or 1.0, decoding.banned)
    logp = scores.log_softmax(-1)
    if decoding.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        total = logp.exp().cumsum(-1)
        # the first token whose cumulated probability exceeds u; banned ids have none and are never first
        u = uniform.to(logits.device) * total[:, -1] * (1 - 1e-6)
        tokens = torch.searchsorted(total, u[:, None], right=True)[:, 0]
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


def entropy(logits: Tensor, decoding: Decoding) -> Tensor:
    """(R,) float32 entropies in nats of the distributions that tokens are drawn from."""
    logp = masked_scores(logits, decoding.temperature or 1.0, decoding.banned).log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)  # banned ids: 0 * -inf is no number


def noise_table(seed: int, tokens: int, leaves: int) -> Tensor:
    """(tokens, leaves) uniform numbers of one prompt; every path reads its own column."""
    return torch.rand((tokens, leaves), generator=torch.Generator().manual_seed(seed))
