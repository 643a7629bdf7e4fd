"""Learning from written solutions: prompts whose tree found no right answer imitate their reference (PROPA)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mmrl.rollout import Policy, Prompt, Rollout


@runtime_checkable
class Writer(Protocol):
    """A policy that can turn a given output into actions of its own."""

    def write(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> Rollout:
        """A rollout of given outputs, one per prompt."""


def unsolved(rollout: Rollout, solved_at: float) -> list[Prompt]:
    """Prompts none of whose finished leaves reaches `solved_at`; a prompt without finished leaves is unsolved."""
    tree = rollout.tree
    right = tree.is_finished & (tree.outcome >= solved_at)
    solved = set(tree.group[right].tolist())
    return [p for i, p in enumerate(rollout.prompts) if i not in solved]


def solution(prompt: Prompt) -> str | None:
    """The reference solution: `reference["solution"]`, or the lines of `reference["steps"]`; None without either."""
    reference = prompt.reference if isinstance(prompt.reference, dict) else {}
    if isinstance(reference.get("solution"), str):
        return str(reference["solution"])
    steps = reference.get("steps")
    return "\n".join(map(str, steps)) if isinstance(steps, list) and steps else None


def references(policy: Policy, prompts: Sequence[Prompt]) -> Rollout | None:
    """The written solutions of those prompts that have one, None when none has.

    Raises:
        ValueError: the policy cannot write.
    """
    if not isinstance(policy, Writer):
        raise ValueError("imitation needs a policy that writes; set imitation.weight=0 for this one")
    known = [(p, text) for p in prompts if (text := solution(p)) is not None]
    return policy.write([p for p, _ in known], [t for _, t in known]) if known else None


def imitation_losses(policy: Policy, rollout: Rollout, denominator: float) -> list[Callable[[], Tensor]]:
    """Per micro-batch, the negative log-likelihood of the rollout's actions over `denominator` actions in all."""
    parts = policy.micro_batches(rollout, torch.arange(len(rollout.tree)))
    return [partial(_loss, policy, rollout, denominator, steps) for steps in parts]


def _loss(policy: Policy, rollout: Rollout, denominator: float, steps: Tensor) -> Tensor:
    return -policy.log_probs(rollout, steps).logp.sum() / denominator
