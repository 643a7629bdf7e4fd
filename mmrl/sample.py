"""Prompt and Sample, the arguments of rewards. Without torch, so that a process that only checks texts starts fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """What a rollout starts from. `inputs` and `reference` are JSON values (media are paths below a media root)."""

    id: str
    inputs: Mapping[str, Any]
    reference: Any = None


@dataclass(frozen=True)
class Sample:
    """One decoded leaf: what a reward sees. `output` is a picture, a text or a video; `step` its leaf in the tree."""

    prompt: Prompt
    output: Any
    step: int
