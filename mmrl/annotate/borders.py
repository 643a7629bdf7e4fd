"""Where steps begin when no delimiter says so, and how uncertain a step was.

A border is the index i >= 1 of the token that begins a step; the step at token 0 is understood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal


def entropy(probs: Sequence[float]) -> float:
    """-sum p ln p in nats; p = 0 adds nothing."""
    return -math.fsum(p * math.log(p) for p in probs if p > 0)


def entropy_borders(entropies: Sequence[float], limit: float = 1.0) -> list[int]:
    """EDU-PRM: a step begins where the entropy (nats) of the next-token distribution is above `limit`."""
    return [i for i, h in enumerate(entropies) if i and h > limit]


def confidence_threshold(corpus: Sequence[float], quantile: float = 0.02) -> float:
    """AdaptiveStep: the k-th smallest confidence of a whole corpus, k = max(1, floor(quantile * N)).

    Args:
        corpus: probabilities that the policy gave to the tokens it sampled, of many responses.

    Raises:
        ValueError: no confidences, or a quantile outside [0, 1].
    """
    if not corpus or not 0 <= quantile <= 1:
        raise ValueError(f"{len(corpus)} confidences and quantile {quantile}: need at least one, and 0..1")
    k = max(1, math.floor(quantile * len(corpus) + 1e-9))  # 0.29 * 100 is 28.999999999999996
    return sorted(corpus)[k - 1]


def confidence_borders(confidences: Sequence[float], threshold: float) -> list[int]:
    """AdaptiveStep: a step begins at every token whose confidence is <= threshold."""
    return [i for i, c in enumerate(confidences) if i and c <= threshold]


def spans(borders: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Half-open token spans of the steps that ascending `borders` cut a response of `length` >= 1 tokens into.

    Raises:
        ValueError: borders that do not ascend within 1..length-1.
    """
    edges = [0, *borders, length]
    if any(a >= b for a, b in pairwise(edges)):
        raise ValueError(f"borders {list(borders)} must ascend within 1..{length - 1}")
    return list(pairwise(edges))


def step_uncertainty(
    logps: Sequence[float],
    *,
    kind: Literal["entropy", "log_sum"] = "entropy",
    temperature: float = 5.0,
    normalise: bool = False,
) -> float:
    """UnPRM: q = softmax(logps / temperature) over a step's own sampled tokens; -sum q ln q, or -sum ln q (log_sum).

    Both grow with the number of tokens n; `normalise` divides by ln n (as defined here; one token gives 0).

    Raises:
        ValueError: no tokens, or a log-probability that is not finite.
    """
    if not logps or not all(math.isfinite(x) for x in logps):
        raise ValueError(f"uncertainty needs finite log-probabilities of at least one token, not {list(logps)[:5]}")
    scaled = [x / temperature for x in logps]
    top = max(scaled)
    total = top + math.log(math.fsum(math.exp(x - top) for x in scaled))
    logq = [x - total for x in scaled]
    raw = -math.fsum(q if kind == "log_sum" else q * math.exp(q) for q in logq)
    return raw / math.log(len(logps)) if normalise and len(logps) > 1 else raw
