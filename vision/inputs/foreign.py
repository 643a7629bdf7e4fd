"""Attributes that some objects of transformers, PIL and vLLM have and others lack."""

from __future__ import annotations

from typing import Any


def attribute(owner: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that is there and not None; families of models name them differently."""
    for name in names:
        value = getattr(owner, name, None)
        if value is not None:
            return value
    return default
