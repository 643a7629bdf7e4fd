"""Rows of conditions: taken apart by prompt, and put together again where their lengths differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion.adapters.base import Cond
from mmrl.rollout import LENGTH, padded_rows

# Zeros behind the real rows of an entry are seen by no network: families mask them (their masks are entries too), or
# get lists without them.


def split_rows(cond: Cond) -> list[Cond]:
    """The conditions of each prompt, copied and without padding."""
    size = len(next(iter(cond.values())))
    rows = []
    for i in range(size):
        row = {}
        for name, values in cond.items():
            real = cond.get(name + LENGTH)
            value = values[i] if real is None else values[i, : int(real[i])]
            row[name] = value.clone()  # a view would keep the whole batch
        rows.append(row)
    return rows


def stack_rows(rows: Sequence[Cond]) -> Cond:
    """Conditions of one row per prompt, padded with zeros where an entry has lengths; the inverse of `split_rows`."""
    cond = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        cond[name] = padded_rows(values) if name + LENGTH in rows[0] else torch.stack(values)
    return cond
