"""Which prompts an iteration sees: a pure function of the iteration, so resuming needs no loader state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch

from mmrl.rollout import Prompt
from mmrl.seeding import named_generator

log = logging.getLogger(__name__)


def prompt_batch(prompts: Sequence[Prompt], size: int, iteration: int, seed: int) -> list[Prompt]:
    """`size` distinct prompts: a fresh permutation per epoch, its remainder below `size` left out.

    Raises:
        ValueError: fewer prompts than `size`.
    """
    if size > len(prompts):
        raise ValueError(
            f"run.prompts_per_iteration={size} but the task has {len(prompts)} prompts; lower it or add prompts"
        )
    epoch, k = divmod(iteration, len(prompts) // size)
    order = torch.randperm(len(prompts), generator=named_generator(seed, "epoch", epoch)).tolist()
    return [prompts[i] for i in order[k * size : (k + 1) * size]]


class Admission:
    """Keeps prompts that the policy cannot take out of the run: left out, counted, and a clear end if they are many.

    Args:
        admit: prompts -> those the policy can take; it logs why the others fail.
        limit: share of unusable prompts among those seen at which the run stops.
    """

    def __init__(self, admit: Callable[[Sequence[Prompt]], list[Prompt]], limit: float) -> None:
        self._admit, self._limit = admit, limit
        self.seen: set[str] = set()
        self.bad: set[str] = set()

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Leave out prompts (id -> why) that are known to be useless before anything is sampled."""
        self.bad |= set(reasons)
        self.seen |= set(reasons)
        for reason in list(reasons.values())[:5]:
            log.warning("left out: %s", reason)
        if reasons:
            log.warning("%d prompts are left out", len(reasons))

    def good(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The usable ones, in order.

        Raises:
            ValueError: more than `limit` of all prompts seen so far are unusable.
        """
        kept = self._admit([p for p in prompts if p.id not in self.bad])
        ids = {p.id for p in kept}
        self.seen |= {p.id for p in prompts}
        self.bad |= {p.id for p in prompts if p.id not in ids}
        if len(self.bad) > max(1.0, self._limit * len(self.seen)):
            raise ValueError(
                f"{len(self.bad)} of {len(self.seen)} prompts cannot be used (limit run.max_unusable={self._limit}); "
                f"the first: {sorted(self.bad)[:3]}. Their reasons are logged above: mend the data, or raise the limit"
            )
        return kept

    def fill(self, prompts: Sequence[Prompt], others: Sequence[Prompt]) -> list[Prompt]:
        """`prompts` with the unusable ones replaced by the first usable ones of `others`.

        Raises:
            ValueError: none is usable.
        """
        kept = self.good(prompts)
        asked = {p.id for p in prompts}
        spare = iter([p for p in others if p.id not in asked | self.bad])
        while len(kept) < len(prompts) and (p := next(spare, None)) is not None:
            kept += self.good([p])
        if not kept:
            raise ValueError(f"none of {len(self.seen)} prompts can be used; their reasons are logged above")
        return kept
