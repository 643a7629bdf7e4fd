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
    """One sequence as the network left it.

    memory: its cache. position: the rotary one of the next token, which is drawn from `logits` (V,), or is `token`:
    drawn already, and not run.
    """

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
        """See `vision.growth.requests.Engine`.

        Raises:
            ValueError: conversations with a model whose cache is a sliding window, found at the first prompt.
        """
        return Decoder(self._hf, self._features, request)


def grow_in_parts(hf: Any, request: GrowthRequest, features: ByteCache | None, max_rows: int) -> list[Node]:
    """Grow trees in parts of at most `max_rows` leaves, or one prompt; the order of prompts is kept."""
    prompts_per_part = max(1, max_rows // request.plan.leaves)
    nodes: list[Node] = []
    for start in range(0, len(request.prompts), prompts_per_part):
        part = grow(TransformersEngine(hf, features), request.part(start, start + prompts_per_part))
        # Indices of a part become indices of the whole.
        offset = len(nodes)
        for node in part:
            node.prompt += start
            if node.parent >= 0:
                node.parent += offset
        nodes += part
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
        turns = self._sampling.max_steps if request.responders else 1
        longest_path = self._sampling.max_new_tokens * turns
        # (prompts, tokens, leaves) uniform numbers
        self._noise = torch.stack([noise_table(seed, longest_path, request.plan.leaves) for seed in request.seeds])
        # The batch: a cache of R rows, its mask (R, L) where rows are padded, and (R, V) logits of their next tokens.
        self._past: Any = None
        self._mask: Tensor | None = None
        self._logits = torch.empty(0)
        # The tokens that were drawn last, (R,) on the device and as a list on the host.
        self._tokens = torch.empty(0)
        self._drawn: list[int] = []
        # The rotary position of the token that is drawn next or was drawn last, per row.
        self._position: list[int] = []

    @torch.no_grad()
    def generate(self, requests: Sequence[SampleRequest], *, again: bool = False) -> list[list[TokenSample]]:
        """One token per sample."""
        copies = []  # the request of every sample
        for number, request in enumerate(requests):
            copies += [number] * len(request.slots)
        if not isinstance(requests[0].state, int):
            # Not rows of the batch, but prompts or kept states.
            self._begin(requests)
            self._logits = self._logits[self._select(copies)]
        else:
            index = self._select([requests[number].state for number in copies])
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
        # In most rounds no row forks or leaves, and the cache is not copied.
        if rows != list(range(len(self._position))):
            self._past.batch_select_indices(index)
            if self._mask is not None:
                self._mask = self._mask[index]
            self._position = [self._position[row] for row in rows]
        return index

    # ---- the network ------------------------------------------------------------------------------------------------

    def _begin(self, requests: Sequence[SampleRequest]) -> None:
        """Put a row per request in place of the batch: a prompt, or a kept state and what follows it."""
        states: list[State | None] = [request.state for request in requests]
        if states[0] is None:
            prompts = [self._request.prompts[request.prompt] for request in requests]
            self._logits, self._past, self._mask = prefill(self._hf, prompts, self._features)
            self._position = [prompt.next_position for prompt in prompts]
            if self._request.responders:
                check_cache(self._past)
            return
        kept = [state for state in states if state is not None]
        self._join([state.memory for state in kept])
        observations = [request.observation for request in requests if request.observation is not None]
        if observations:
            self._run_observations(kept, observations)
        else:
            self._logits = torch.stack([state.logits for state in kept if state.logits is not None])
            self._position = [state.position for state in kept]

    def _join(self, rows: Sequence[Layers]) -> None:
        """Put the caches of these rows in place of the batch's."""
        self._past, mask = join(rows, self._device)
        self._mask = mask.long()

    def _run_observations(self, kept: Sequence[State], observations: Sequence[PromptTokens]) -> None:
        """Run the last token of every turn together with the observation behind it."""
        new_ids = []
        new_positions = []
        next_positions = []
        for state, observation in zip(kept, observations, strict=True):
            new_ids.append(torch.cat([torch.tensor([state.token]), observation.ids]))
            new_positions.append(_behind(state.position, observation))
            next_positions.append(state.position + 1 + observation.next_position)
        ids, new_mask = left_pad(new_ids)
        positions = pad_positions(new_positions, left=True)
        if new_mask is None:
            new_mask = torch.ones_like(ids)
        assert self._mask is not None
        self._mask = torch.cat([self._mask, new_mask.to(self._device)], 1)
        extra: dict[str, Any] = {"logits_to_keep": 1}
        images = [observation.pixels for observation in observations if observation.pixels is not None]
        if images:
            features = encode_images(self._hf, images, self._features)
            extra["mm_encoder_outputs"] = encoder_outputs(images, [features[pixels.key] for pixels in images])
        self._run(ids.to(self._device), positions.to(self._device), **extra)
        # Columns that are padding between a history and its observation would stay in the cache for good.
        self._join([cut(self._past, row, visible.bool()) for row, visible in enumerate(self._mask)])
        self._position = next_positions

    def _run_drawn(self, index: Tensor) -> None:
        """Run the token that was drawn last in each of the rows before they were selected."""
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(index), 1)], 1)
        positions = torch.tensor(self._position, device=self._device)[:, None]
        if self._request.prompts[0].positions.ndim == 2:
            # (3, R, 1): a text token has the same position in time, row and column
            positions = positions.expand(3, -1, -1)
        self._run(self._tokens[index][:, None], positions)
        self._position = [position + 1 for position in self._position]

    def _run(self, ids: Tensor, positions: Tensor, **extra: Any) -> None:
        """Run (R, n) tokens behind the cache."""
        out = self._hf(
            input_ids=ids,
            past_key_values=self._past,
            attention_mask=self._mask,
            position_ids=positions,
            use_cache=True,
            **extra,
        )
        self._logits, self._past = out.logits[:, -1], out.past_key_values

    def _draw(self, requests: Sequence[SampleRequest]) -> list[list[TokenSample]]:
        """Draw the next token of every row; a sample's uniform number lies at (prompt, tokens so far, slot)."""
        places = []
        for request in requests:
            places += [(request.prompt, request.sampled, slot) for slot in request.slots]
        uniform = self._noise[tuple(torch.tensor(places).T)]
        self._tokens, logp = draw(self._logits, uniform, self._sampling)
        self._drawn = self._tokens.tolist()
        entropies = [float("nan")] * len(places)
        if isinstance(self._request.rule, UnsureRule):
            entropies = entropy(self._logits, self._sampling).tolist()
        samples = []
        for row, (token, token_logp) in enumerate(zip(self._drawn, logp.tolist(), strict=True)):
            samples.append(TokenSample([token], [token_logp], row, entropies[row]))
        remaining = iter(samples)
        return [list(islice(remaining, len(request.slots))) for request in requests]


def _behind(position: int, observation: PromptTokens) -> Tensor:
    """(n + 1,) or (3, n + 1) positions of a turn's last token and the observation after it."""
    last = torch.full((*observation.positions.shape[:-1], 1), position)
    return torch.cat([last, observation.positions + position + 1], -1)


def prefill(hf: Any, prompts: Sequence[PromptTokens], cache: ByteCache | None) -> tuple[Tensor, Any, Tensor | None]:
    """(G, V) logits after each prompt, the cache, and the mask (G, L) of left-padded prompts, None without padding."""
    device = bare(hf).device
    ids, mask = left_pad([prompt.ids for prompt in prompts])
    positions = pad_positions([prompt.positions for prompt in prompts], left=True)
    images = [prompt.pixels for prompt in prompts if prompt.pixels is not None]
    extra: dict[str, Any] = {}
    if images:
        features = encode_images(hf, images, cache)
        extra["mm_encoder_outputs"] = encoder_outputs(images, [features[pixels.key] for pixels in images])
        if bare(hf).config.model_type.startswith("gemma3"):
            # Gemma 3 makes its mask from these: tokens of one image see each other in both directions.
            extra["token_type_ids"] = left_pad([prompt.types for prompt in prompts])[0].to(device)
    if mask is not None:
        mask = mask.to(device)
    out = hf(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        attention_mask=mask,
        use_cache=True,
        logits_to_keep=1,
        **extra,
    )
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
        # The first token whose cumulated probability exceeds the number; banned ids add nothing and are never first.
        cumulated = logp.exp().cumsum(-1)
        numbers = uniform.to(logits.device) * cumulated[:, -1] * (1 - 1e-6)
        tokens = torch.searchsorted(cumulated, numbers[:, None], right=True)[:, 0]
        # Logits that are not finite lead to no token. Any will do, as `vision.growth.driver.grow` refuses its
        # log-prob.
        tokens = tokens.clamp(max=cumulated.shape[-1] - 1)
    return tokens, logp.gather(-1, tokens[:, None])[:, 0]


def entropy(logits: Tensor, sampling: SamplingOptions) -> Tensor:
    """(R,) float32 entropies in nats of the distributions that tokens are drawn from."""
    logp = masked_scores(logits, sampling.temperature or 1.0, sampling.banned).log_softmax(-1)
    # Clamped, since for banned ids 0 * -inf is not a number.
    return -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)


def noise_table(seed: int, tokens: int, leaves: int) -> Tensor:
    """(tokens, leaves) uniform numbers of one prompt; every path reads its own column."""
    return torch.rand((tokens, leaves), generator=torch.Generator().manual_seed(seed))
