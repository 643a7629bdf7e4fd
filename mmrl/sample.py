"""Prompt and Sample, the arguments of rewards.

This file does not import torch, so that a worker process that only checks texts starts fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """The start of a rollout: a question with its media, or a text to draw.

    id: unique within a run; it names the group of samples that are compared, and seeds what is sampled.
    inputs, reference: JSON values; media are paths below a media root. The policy reads `inputs`, rewards read both.
    """

    id: str
    inputs: Mapping[str, Any]
    reference: Any = None


@dataclass(frozen=True)
class Sample:
    """One decoded leaf, the argument of a reward.

    output: a picture, a text or a video. step: index of the leaf in the tree.
    """

    prompt: Prompt
    output: Any
    step: int
