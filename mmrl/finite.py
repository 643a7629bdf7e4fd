"""The check that what a network gave is finite, and the error that names the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """A network gave NaN or infinite numbers: the network is at fault, whatever reads the numbers next."""


def check_finite(x: Tensor, network: str, rows: str, among: Sequence[int] | Tensor | None = None) -> None:
    """Refuse numbers that are not finite. One call for a whole rollout: on a GPU it waits for the device.

    Args:
        x: (N, ...) numbers that came out of a network.
        network: whose they are. rows: what N counts, such as "pictures".
        among: the only rows to look at, (N,) bool or indices; by default all.
    Raises:
        NotFiniteError: some are NaN or infinite; the message names the network and counts the rows.
    """
    chosen = x if among is None else x[torch.as_tensor(among)]
    fine = chosen.isfinite().flatten(1).all(1) if chosen.ndim > 1 else chosen.isfinite()
    bad = int((~fine).sum())
    if bad:
        raise NotFiniteError(
            f"the output of {network} is not finite for {bad} of {len(chosen)} {rows}: its weights hold NaN, or it "
            "overflows in its precision. Load it in float32 or bfloat16 (run.mixed_precision: no) and look at its "
            "folder; where it happens after some iterations, lower optim.lr or go on from an earlier checkpoint"
        )
