"""The forward of a rank that has nothing to train, so that collectives stay in step."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.rollout import Policy, Rollout


def some_part(policy: Policy, rollout: Rollout) -> Tensor:
    """One micro-batch of trainable steps, whatever they are worth."""
    owner = rollout.tree.step_of_action(rollout.actions.logp.numel())
    return policy.micro_batches(rollout, torch.unique(owner[rollout.actions.trainable & (owner >= 0)]))[0]


def idle_loss(policy: Policy, rollout: Rollout, *, reference: bool = False) -> Tensor:
    """A forward through every trained weight; the loop multiplies it by 0. reference: as on the other ranks."""
    return policy.log_probs(rollout, some_part(policy, rollout), reference=reference).logp.sum()
