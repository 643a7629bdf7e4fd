"""Random streams named by what they are for, so that results depend on nothing else: no order, batch or rank."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def named_generator(*name: int | str) -> torch.Generator:
    """A CPU generator seeded by a hash of `name`, such as (seed, iteration, prompt id).

    Hashed because torch's CPU generator reads only the low 32 bits of a seed, so that (seed << 32) + epoch would
    forget the seed.
    """
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def numpy_generator(*name: object) -> np.random.Generator:
    """NumPy's generator seeded by a hash of `name`."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
