"""Which prompts an iteration sees: a pure function of the iteration, so resuming needs no loader state."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmrl.rollout import Prompt
from mmrl.seeding import named_generator


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
