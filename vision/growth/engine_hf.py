"""A transformers model as the engine that grows trees: prompts run once, caches fork where a path does.

All rows advance together, one token a call; a row forks the moment its step ends and leaves when it is done, so no row
waits for another. A turn that is closed leaves with its cache; when all are, the observations behind them are run in
one batch, and the next turns fork there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from vision.forward.attention import FLEX, attend_by
from vision.forward.kv import Layers, check_cache, cut, join
from vision.forward.network import encode_images, encoder_outputs, masked_scores
from vision.forward.passes import left_pad, pad_positions
from vision.growth.driver import grow
from vision.growth.requests import GrowthRequest, Node, SampleRequest, SamplingOptions, TokenSample
from vision.inputs.step_rule import UnsureRule
from vision.inputs.tokens import PromptTokens


@dataclass(frozen=True)
class State:
    """What the network remembers of one sequence. position: rotary, of what comes next: a token to be drawn from
    `logits` (V,), or `token`, which is drawn already and not run."""

    memory: Layers
    position: int
    logits: Tensor | None = None
    token: int = -1


class TransformersEngine:
    """Samples with a transformers (or PEFT) model in eval mode.

    features: encoded pictures by key, of a frozen encoder.
    """

    def __init__(self, hf: Any, features: ByteCache | None = None) -> None:
        self._hf, self._features = hf, features

    def open(self, request: GrowthRequest) -> Decoder:
        """See `vision.growth.requests.Engine`; conversations with a model that forgets (sliding windows) are a
        ValueError."""
        return Decoder(self._hf, self._features, request)


def grow_in_parts(hf: Any, request: GrowthRequest, features: ByteCache | None, max_rows: int) -> list[Node]:
    """Grow trees in parts of at most `max_rows` leaves, or one prompt; the order of prompts is kept."""
    size = max(1, max_rows // request.plan.leaves)
    nodes: list[Node] = []
    for a in range(0, len(request.prompts), size):
        first = len(nodes)
        for node in grow(TransformersEngine(hf, features), request.part(a, a + size)):
            node.prompt += a
            node.parent += first if node.parent >= 0 else 0
            nodes.append(node)
    return nodes


@contextmanager
def sampling_mode(hf: Any, implementation: str) -> Iterator[None]:
    """The model in eval mode, where its attention is FlexAttention with sdpa in its place inside the block."""
    hf.eval()
    if implementation != FLEX:
        yield
        return
    attend_by(bare(hf), "sdpa")
    try:
        yield
    finally:
        attend_by(bare(hf), FLEX)


class Decoder:
    """A batch of rows, their cache and the logits of their next tokens. The state of a sample is its row."""

    whole_steps = False

    def __init__(self, hf: Any, features: ByteCache | None, request: GrowthRequest) -> None:
        self._hf, self._features, self._request = hf, features, request
        self._device, self._sampling = bare(hf).device, request.sampling
        room = self._sampling.max_new_tokens * (self._sampling.max_steps if request.responders else 1)
        self._noise = torch.stack([noise_table(s, room, request.plan.leaves) for s in request.seeds])
        self._past: Any = None
        self._mask: Tensor | None = None
        self._logits = torch.empty(0)
        self._tokens = torch.empty(0)  # drawn last, on the device
        self._drawn: list[int] = []  # the same on the host
        self._position: list[int] = []  # rotary, of the token that is drawn next or was drawn last

    @torch.no_grad()
    def generate(self, requests: Sequence[SampleRequest], *, again: bool = False) -> list[list[TokenSample]]:
        """One token per sample."""
        copies = [i for i, r in enumerate(requests) for _ in r.slots]
        if not isinstance(requests[0].state, int):
            self._begin(requests)
            self._logits = self._logits[self._select(copies)]
        else:
            index = self._select([requests[i].state for i in copies])
            if again:
                self._logits = self._logits[index]
            else:
                self._run_drawn(index)
        return self._draw(requests)

    def keep(self, state: int) -> State:
        """The cache of a row, and the token drawn behind it."""
        columns = slice(None) if self._mask is None else self._mask[state].bool()
        return State(cut(self._past, state, columns), self._position[state], token=self._drawn[state])

    def _select(self, rows: list[int]) -> Tensor:
        """Make these rows the batch, in this order; returns them as an index."""
        index = torch.tensor(rows, device=self._device)
        if rows != list(range(len(self._position))):
            self._past.batch_select_indices(index)
            self._mask = None if self._mask is None else self._mask[index]
            self._position = [self._position[r] for r in rows]
        return index

    # ---- the network ------------------------------------------------------------------------------------------------

    def _begin(self, requests: Sequence[SampleRequest]) -> None:
        """Put a row per request in place of the batch: a prompt, or a kept state and what follows it."""
        states: list[State | None] = [r.state for r in requests]
        if states[0] is None:
            prompts = [self._request.prompts[r.prompt] for r in requests]
            self._logits, self._past, self._mask = prefill(self._hf, prompts, self._features)
            self._position = [p.next_position for p in prompts]
            if self._request.responders:
                check_cache(self._past)
            return
        kept = [s for s in states if s is not None]
        self._join([s.memory for s in kept])
        shown = [r.observation for r in requests if r.observation is not None]
        if shown:
            self._run_observations(kept, shown)
        else:
            self._logits = torch.stack([s.logits for s in kept if s.logits is not None])
            self._position = [s.position for s in kept]

    def _join(self, rows: Sequence[Layers]) -> None:
        self._past, mask = join(rows, self._device)
        self._mask = mask.long()

    def _run_observations(self, kept: Sequence[State], shown: Sequence[PromptTokens]) -> None:
        """Run the last token of every turn together with the observation behind it."""
        ids, fresh = left_pad([torch.cat([torch.tensor([s.token]), o.ids]) for s, o in zip(kept, shown, strict=True)])
        where = pad_positions([_behind(s.position, o) for s, o in zip(kept, shown, strict=True)], left=True)
        fresh = torch.ones_like(ids) if fresh is None else fresh
        assert self._mask is not None
        self._mask = torch.cat([self._mask, fresh.to(self._device)], 1)
        extra: dict[str, Any] = {"logits_to_keep": 1}
        images = [o.pixels for o in shown if o.pixels is not None]
        if images:
            features = encode_images(self._hf, images, self._features)
            extra["mm_encoder_outputs"] = encoder_outputs(images, [features[p.key] for p in images])
        self._run(ids.to(self._device), where.to(self._device), **extra)
        # columns that are padding between a history and what it was shown would stay in the cache for good
        self._join([cut(self._past, r, own.bool()) for r, own in enumerate(self._mask)])
        self._position = [s.position + 1 + o.next_position for s, o in zip(kept, shown, strict=True)]

    def _run_drawn(self, index: Tensor) -> None:
        """Run the token that was drawn last in each of the rows before they were selected."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(index), 1)], 1)
        where = torch.tensor(self._position, device=self._device)[:, None]
        flat = self._request.prompts[0].positions.ndim == 1
        self._run(self._tokens[index][:, None], where if flat else where.expand(3, -1, -1))
        self._position = [p + 1 for p in self._position]

    def _run(self, ids: Tensor, positions: Tensor, **extra: Any) -> None:
        out = self._hf(
            input_ids=ids, past_key_values=self._past, attention_mask=self._mask, position_ids=positions,
            use_cache=True, **extra,
        )  # fmt: skip
        self._logits, self._past = out.logits[:, -1], out.past_key_values

    def _draw(self, requests: Sequence[SampleRequest]) -> list[list[TokenSample]]:
        where = torch.tensor([[r.prompt, r.sampled, slot] for r in requests for slot in r.slots])
        self._tokens, logp = draw(self._logits, self._noise[tuple(where.T)], self._sampling)
        self._drawn = self._tokens.tolist()
        unsure = isinstance(self._request.rule, UnsureRule)
        entropies = entropy(self._logits, self._sampling).tolist() if unsure else [float("nan")] * len(where)
        drawn = zip(self._drawn, logp.tolist(), entropies, strict=True)
        samples = (TokenSample([token], [lp], row, h) for row, (token, lp, h) in enumerate(drawn))
        return [list(islice(samples, len(r.slots))) for r in requests]


def _behind(position: int, observation: PromptTokens) -> Tensor:
    """(n + 1,) or (3, n + 1) positions of a turn's last token and the observation after it."""
    last = torch.full((*observation.positions.shape[:-1], 1), position)
    return torch.cat([last, observation.positions + position + 1], -1)


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


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingOptions) -> tuple[Tensor, Tensor]:
    """(R,) tokens from (R, V) logits by inverse transform of (R,) uniform numbers, and their log-probs."""
    scores = masked_scores(logits, sampling.temperature or 1.0, sampling.banned)
    logp = scores.log_softmax(-1)
    if sampling.temperature == 0:
        tokens = scores.argmax(-1)
    else:
        total = logp.exp().cumsum(-1)
        # the first token whose cumulated probability exceeds u; banned ids have none and are never first
        u = uniform.to(logits.device) * total[:, -1] * (1 - 1e-6)
        # logits that are not finite find no token: any will do, their log-prob tells (`vision.growth.driver.grow`)
        tokens = torch.searchsorted(total, u[:, None], right=True)[:, 0].clamp(max=total.shape[-1] - 1)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


def entropy(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """(R,) float32 entropies in nats of the distributions that tokens are drawn from."""
    logp = masked_scores(logits, sampling.temperature or 1.0, sampling.banned).log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)  # banned ids: 0 * -inf is no number


def noise_table(seed: int, tokens: int, leaves: int) -> Tensor:
    """(tokens, leaves) uniform numbers of one prompt; every path reads its own column."""
    return torch.rand((tokens, leaves), generator=torch.Generator().manual_seed(seed))
