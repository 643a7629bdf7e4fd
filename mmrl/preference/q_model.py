"""A step-level Q model: a policy trained by step preferences scores candidate actions of another one."""

from __future__ import annotations

import torch
from torch import Tensor


def action_values(
    logp: Tensor, ref_logp: Tensor, candidate: Tensor, num_candidates: int, *, beta: float = 0.1
) -> Tensor:
    """(C,) float32 q = beta * mean log-ratio over each candidate's own actions.

    The mean in place of the sum keeps long candidates from winning or losing by their length.

    Args:
        logp, ref_logp: (A,) log-probs under the trained policy and its reference. candidate: (A,) int in 0..C-1.

    Raises:
        ValueError: a candidate without actions.
    """
    count = torch.bincount(candidate, minlength=num_candidates)
    if bool((count == 0).any()):
        raise ValueError(f"candidate {int((count == 0).nonzero()[0])} has no actions: nothing to score")
    rho = logp.float() - ref_logp.float()
    return beta * rho.new_zeros(num_candidates).index_add(0, candidate, rho) / count


def pick_action(values: Tensor) -> int:
    """The candidate with the highest value; the first of equal ones. It stays apart from the policy that acts.

    Raises:
        ValueError: no candidates, or a value that is NaN.
    """
    if not len(values) or bool(values.isnan().any()):
        raise ValueError(f"cannot choose among values {values.tolist()}: give at least one, none NaN")
    return int(values.argmax())
