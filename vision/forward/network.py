"""The language model as one module whose forward applies a function to it, and the functions that are applied.

    network = Network(hf)
    out = network(run_job, job, temperature, banned, None, None)  # run_job(hf, job, ...): logp and entropy, (A,)

Whatever wraps the module (DDP, autocast, FSDP) sees one call per micro-batch, images included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.byte_cache import ByteCache
from mmrl.reference import bare
from vision.forward.passes import Job, Pass
from vision.inputs.foreign import attribute
from vision.inputs.tokens import Pixels


class Network(nn.Module):
    """`network(run, *args)` is `run(hf, *args)`; `hf` is a transformers (or PEFT) model."""

    def __init__(self, hf: nn.Module) -> None:
        super().__init__()
        self.hf = hf
        # FSDP wraps the modules of these names.
        self._no_split_modules = attribute(hf, "_no_split_modules")

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Apply `run` to the model."""
        return run(self.hf, *args, **kwargs)


# ---- images ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """Encoded images of one prompt: tokens (n, h) or (tiles, n, h); deep: one (n, h) per deep-stack layer."""

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return sum(t.numel() * t.element_size() for t in (self.tokens, *self.deep))

    def to(self, device: torch.device | str) -> Features:
        """The same on a device."""
        return Features(self.tokens.to(device), tuple(t.to(device) for t in self.deep))

    def sum(self) -> Tensor:
        """() float32, depends on everything that was encoded."""
        return torch.stack([t.float().sum() for t in (self.tokens, *self.deep)]).sum()


def encode_images(hf: Any, images: Iterable[Pixels], cache: ByteCache | None = None) -> dict[str, Features]:
    """Features by key; each distinct key is encoded once, those in `cache` not at all.

    A cache is for frozen encoders alone. What it has lies in host memory: an iteration's pictures can be more than a
    device has room for beside the model.
    """
    distinct = {pixels.key: pixels for pixels in images}
    by_key: dict[str, Features] = {}
    if cache is not None:
        for key in distinct:
            cached: Features | None = cache.get(key)
            if cached is not None:
                by_key[key] = cached.to(bare(hf).device)
    missing = [pixels for key, pixels in distinct.items() if key not in by_key]
    for part in _stackable(missing):
        for pixels, features in zip(part, _encode(bare(hf), part), strict=True):
            by_key[pixels.key] = features
            if cache is not None:
                cache.put(pixels.key, features.to("cpu"), features.nbytes)
    return by_key


def freeze_idle(hf: Any, blank: Pixels, parameters: Iterable[nn.Parameter]) -> None:
    """Stop training the image weights that no feature depends on (LLaVA reads an inner layer of its tower): they
    would never have a gradient, and DDP waits for one."""
    trained = [weight for weight in parameters if weight.requires_grad]
    with torch.enable_grad():
        features = encode_images(hf, [blank])[blank.key]
        grads = torch.autograd.grad(features.sum(), trained, allow_unused=True)
    # Without a path to the features there is no gradient, not even 0.
    for weight, grad in zip(trained, grads, strict=True):
        weight.requires_grad_(grad is not None)


def _stackable(images: Sequence[Pixels]) -> list[list[Pixels]]:
    """Parts that one encoder call can take: equal shapes but for the first dimension of images, tiles or patches."""
    parts: dict[Any, list[Pixels]] = {}
    for pixels in images:
        first = 2 if _by_tile(pixels) else 1
        shapes = [(name, tensor.ndim, *tensor.shape[first:]) for name, tensor in sorted(pixels.tensors.items())]
        parts.setdefault(tuple(shapes), []).append(pixels)
    return list(parts.values())


def _by_tile(pixels: Pixels) -> bool:
    """True for pixels of shape (1, tiles, C, H, W), as those of Idefics3 and SmolVLM."""
    return "pixel_attention_mask" in pixels.tensors


def _encode(model: Any, part: Sequence[Pixels]) -> list[Features]:
    """Features of images that can be stacked, by one call of the encoder."""
    device, dtype = model.device, next(model.parameters()).dtype
    dim = 1 if _by_tile(part[0]) else 0
    tensors = {}
    for name in part[0].tensors:
        tensors[name] = torch.cat([pixels.tensors[name] for pixels in part], dim).to(device)
    tensors["pixel_values"] = tensors["pixel_values"].to(dtype)
    encoded = model.get_image_features(**tensors, return_dict=True)

    pooled = encoded.pooler_output
    if isinstance(pooled, Tensor) and pooled.ndim == 3:
        # (tiles, n, h), tiles of all images in order
        tiles = [pixels.tensors["pixel_values"].shape[dim] for pixels in part]
        return [Features(tokens) for tokens in pooled.split(tiles)]
    # One (n, h) per picture, or per row of a grid; and per deep-stack layer likewise.
    deep = attribute(encoded, "deepstack_features") or []
    features = []
    start = 0
    for pixels in part:
        end = start + len(pixels.tensors.get("image_grid_thw", pixels.tensors["pixel_values"]))
        layers = tuple(torch.cat(list(layer[start:end])) for layer in deep)
        features.append(Features(torch.cat(list(pooled[start:end])), layers))
        start = end
    return features


def encoder_outputs(shown: Sequence[Pixels], features: Sequence[Features]) -> dict[str, Any]:
    """Features as the model takes them in place of pixels, by kind of placeholder and in the order of these."""
    kinds: dict[str, list[Features]] = {}
    for pixels, one in zip(shown, features, strict=True):
        kinds.setdefault(pixels.kind, []).append(one)
    return {kind: _encoder_output(own) for kind, own in kinds.items()}


def _encoder_output(features: Sequence[Features]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    tokens = torch.cat([one.tokens for one in features])
    output = BaseModelOutputWithPooling(pooler_output=tokens if tokens.ndim == 3 else [tokens])
    if features[0].deep:
        # Per layer the (n, h) of all images, one behind the other; models take each in a tuple.
        layers = zip(*(one.deep for one in features), strict=True)
        output["deepstack_features"] = [(torch.cat(layer),) for layer in layers]
    return output


# ---- log-probs -------------------------------------------------------------------------------------------------


def run_job(
    hf: Any, job: Job, temperature: float, banned: Sequence[int], cache: ByteCache | None, blank: Pixels | None
) -> dict[str, Tensor]:
    """Log-probs of the job's tokens under logits / temperature without the banned ids, in float32.

    blank: an image whose features enter with weight 0 when the job shows none, so that a trained image encoder has
        a gradient on every rank; None when the encoder is frozen.
    Returns:
        logp and entropy, (A,) float32 each.
    """
    logits, idle = _outputs(hf, job, cache, blank)
    device = logits[0].device
    logp, entropy = _score(logits, job.source.to(device), job.tokens.to(device), temperature, banned)
    return {"logp": logp if idle is None else logp + idle, "entropy": entropy}


def run_trees(hf: Any, job: Job, cache: ByteCache | None) -> tuple[Tensor, Any]:
    """(A, V) logits at the places of a job of layout `packed`, and the cache of its rows, a tree each."""
    assert job.rows is not None and job.prefix is None
    by_key = encode_images(hf, job.rows.images, cache)
    out = _call(hf, job.rows, [by_key[p.key] for p in job.rows.images], None, True, False)
    return out.logits.flatten(0, 1)[job.source.to(out.logits.device)], out.past_key_values


def kl_job(hf: Any, job: Job, other: Job, cache: ByteCache | None) -> Tensor:
    """(A,) float32 KL(p || q) at the job's tokens, temperature 1; q from `other`, the same job with other pictures."""
    logits = torch.cat(_outputs(hf, job, cache, None)[0])
    other_logits = torch.cat(_outputs(hf, other, cache, None)[0])
    # In parts, as every token takes a vocabulary in float32 three times.
    parts = []
    for places in job.source.to(logits.device).split(512):
        parts.append(token_kl(logits[places], other_logits[places]))
    return torch.cat(parts)


def token_kl(logits: Tensor, other: Tensor) -> Tensor:
    """(...,) KL(softmax(logits) || softmax(other)) over the last dimension, float32.

    The divergence of a step is its mean over the step's tokens, `other` from inputs made unreadable (pDPO).
    """
    p, q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


class StepHead(nn.Module):
    """(S, H) last hidden states at the slots -> (S, C) float32, linear; float32 whatever the backbone.

    likelihood: add a learned multiple, at first 4, of the mean log-prob of the step's own tokens under the model
        (C = 1). A small or frozen backbone knows at the position *before* a token which one is right, and a slot after
        it cannot see that knowledge, which lies in the last layer. As defined here; mean log-prob as a step's
        confidence is DRM's.
    """

    def __init__(self, width: int, outputs: int, likelihood: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        nn.init.normal_(self.linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.linear.bias)
        self.likelihood = nn.Parameter(torch.full((1,), 4.0)) if likelihood else None

    def forward(self, hidden: Tensor, logp: Tensor | None = None) -> Tensor:
        """logp: (S,) mean log-probs, for a head that takes them."""
        scores: Tensor = self.linear(hidden.float())
        if self.likelihood is None or logp is None:
            return scores
        return scores + self.likelihood * logp[:, None]


def read_job(
    hf: Any,
    head: StepHead | None,
    job: Job,
    tokens: Sequence[int],
    owner: Tensor,
    cache: ByteCache | None,
    blank: Pixels | None,
) -> Tensor:
    """(S, C) float32 outputs at the job's slots: `head` on the last hidden states, or without a head the logits of
    two `tokens` as one difference, first minus second (C = 1).

    owner (A,): the slot that each of the job's own tokens belongs to, for a head that takes likelihoods. blank as in
    `run_job`.
    """
    rows, idle = _outputs(hf, job, cache, blank, hidden=head is not None)
    # (S + A, V or H): first at the S slots, then where the A own tokens are predicted
    read = torch.cat(rows)[job.source.to(rows[0].device)]
    if head is None:
        scores = read[:, tokens[0]].float()[:, None] - read[:, tokens[1]].float()[:, None]
    else:
        slots = len(read) - len(job.tokens)
        logp = _likelihood(hf, read[slots:], job.tokens, owner, slots) if len(job.tokens) else None
        scores = head(read[:slots], logp)
    return scores if idle is None else scores + idle


def _likelihood(hf: Any, hidden: Tensor, tokens: Tensor, owner: Tensor, slots: int) -> Tensor:
    """(S,) float32 mean log-prob of each slot's tokens, from the hidden states that predict them; 0 without tokens."""
    logp = bare(hf).get_output_embeddings()(hidden).float().log_softmax(-1)
    of_tokens = logp.gather(1, tokens.to(logp.device)[:, None])[:, 0]
    owner = owner.to(of_tokens.device)
    total = of_tokens.new_zeros(slots).index_add(0, owner, of_tokens)
    return total / torch.bincount(owner, minlength=slots).clamp(min=1)


def _outputs(
    hf: Any, job: Job, cache: ByteCache | None, blank: Pixels | None, hidden: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Logits, or last hidden states, of the job's passes as (rows, V or H) each, and a 0 that depends on the image
    encoder where the job shows no image."""
    passes = [one for one in (job.prefix, job.rows) if one is not None]
    images = [pixels for one in passes for pixels in one.images]
    dummy = [blank] if blank is not None and not images else []
    if job.mode == "rows":
        # As an ordinary trainer does: every row encodes its own images.
        features = [_encode(bare(hf), [pixels])[0] for pixels in [*images, *dummy]]
    else:
        by_key = encode_images(hf, [*images, *dummy], cache)
        features = [by_key[pixels.key] for pixels in [*images, *dummy]]

    outputs = []
    past = None
    start = 0
    for one in passes:
        end = start + len(one.images)
        is_prefix = one is job.prefix
        out = _call(hf, one, features[start:end], past, is_prefix, hidden)
        start = end
        if hidden:
            states = out.last_hidden_state
            outputs.append(states[:, one.keep.to(states.device)].flatten(0, 1))
        else:
            outputs.append(out.logits.flatten(0, 1))
        if is_prefix and job.rows is not None:
            past = _fork(out.past_key_values, job, hf)
    idle = 0.0 * features[0].sum() if dummy else None
    return outputs, idle


def _fork(past: Any, job: Job, hf: Any) -> Any:
    """The cache of the prompts with a row for each row of the main pass."""
    if past is None:
        raise RuntimeError("the model returned no cache (gradient checkpointing is on); use policy.mode: packed")
    past.batch_select_indices(job.cache_rows.to(bare(hf).device))  # type: ignore[union-attr]
    return past


def _call(hf: Any, one: Pass, features: Sequence[Features], past: Any, caching: bool, hidden: bool) -> Any:
    """The model's output for one pass, behind the cache `past` if there is one."""
    device = bare(hf).device
    extra: dict[str, Any] = {}
    if features:
        extra["mm_encoder_outputs"] = encoder_outputs(one.images, features)
    if past is not None:
        extra["past_key_values"] = past
    if hidden:
        model = bare(hf).base_model  # without the output layer; PEFT's adapters lie inside
    else:
        model = hf
        extra["logits_to_keep"] = one.keep.to(device)
    return model(
        input_ids=one.ids.to(device),
        position_ids=one.positions.to(device),
        attention_mask=to_device(one.attention, device),
        use_cache=caching or past is not None,
        **extra,
    )


def to_device(attention: Any, device: torch.device) -> Any:
    """A mask, a dict of masks, or None on `device`; block masks are made there already."""
    if isinstance(attention, Mapping):
        return {kind: mask.to(device) for kind, mask in attention.items()}
    return attention.to(device) if isinstance(attention, Tensor) else attention


def _score(
    rows: Sequence[Tensor], source: Tensor, tokens: Tensor, temperature: float, banned: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(A,) log-probs and entropies; a row of logits that several tokens read, such as the first ones of siblings, is
    normalised once."""
    needed, inverse = torch.unique(source, return_inverse=True)
    parts = []
    offset = 0  # of the first row of a pass among all rows
    for logits in rows:
        own = needed[(needed >= offset) & (needed < offset + len(logits))] - offset
        # Where every row is needed nothing is copied: logits are the largest tensors of an update.
        parts.append(logits if len(own) == len(logits) else logits[own])
        offset += len(logits)
    scores = masked_scores(torch.cat(parts) if len(parts) > 1 else parts[0], temperature, banned)
    total = scores.logsumexp(-1)
    logp = scores[inverse, tokens] - total[inverse]
    with torch.no_grad():
        # H = log Z - sum p * score; banned ids, whose score is -inf, count 0.
        p = torch.softmax(scores.detach(), -1)
        entropy = total.detach() - (p * scores.detach().masked_fill(p == 0, 0.0)).sum(-1)
    return logp, entropy[inverse]


def masked_scores(logits: Tensor, temperature: float, banned: Sequence[int]) -> Tensor:
    """(..., V) float32 logits / temperature with the banned ids at -inf; rollout and update share this line."""
    scores = logits.float() / temperature
    if banned:
        scores = scores.index_fill(-1, torch.tensor(banned, device=scores.device), -torch.inf)
    return scores
