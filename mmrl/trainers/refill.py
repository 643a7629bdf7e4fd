"""Refilling: prompts whose rewards do not differ teach nothing, so further ones are sampled in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mmrl.credit.budget import informative_groups
from mmrl.rollout import Prompt, Rollout


def refill(
    first: Rollout,
    prompts: Sequence[Prompt],
    sample: Callable[[Sequence[Prompt], int], Rollout | None],
    limit: int,
) -> tuple[Rollout, int]:
    """Replace uninformative prompts of `first` by further ones, in at most `limit` rounds (DAPO style).

    Each round samples as many prompts as are missing: those of `prompts` not tried in this iteration first, then the
    dropped ones again. When nothing informative was found at all, `first` is returned as it is.

    Args:
        first: a rewarded rollout of the wanted number of prompts.
        sample: (prompts, round) -> rewarded rollout, None when none of them can be used.
    Returns:
        the rollout and the number of rounds used.
    """
    wanted = len(first.prompts)
    kept = _informative(first)
    seen = {p.id for p in first.prompts}
    queue = [p for p in prompts if p.id not in seen] + list(first.prompts)
    used = 0
    while used < limit:
        have = {p.id for p in kept.prompts} if kept else set()
        open_ = [p for p in queue if p.id not in have]
        missing = min(wanted - len(have), len(open_))
        if missing <= 0:
            break
        used += 1
        batch, queue = open_[:missing], open_[missing:] + open_[:missing]
        sampled = sample(batch, used)
        more = None if sampled is None else _informative(sampled)
        kept = more if kept is None else kept if more is None else Rollout.concatenate([kept, more])
    return (kept or first), used


def _informative(rollout: Rollout) -> Rollout | None:
    groups = torch.nonzero(informative_groups(rollout.tree)).flatten().tolist()
    if len(groups) == len(rollout.prompts):
        return rollout
    return rollout.select(groups) if groups else None
