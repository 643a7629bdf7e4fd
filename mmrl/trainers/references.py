"""Learning from written solutions: prompts whose tree found no right answer imitate their reference (PROPA)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from mmrl.capabilities import LimitedWriter, OutputWriter, require
from mmrl.config import Section
from mmrl.rollout import Policy, Prompt, Rollout, reference_solution
from mmrl.tree import StepTree

log = logging.getLogger(__name__)


class ReferenceConfig(Section):
    """After the policy update, prompts without a right answer learn their reference solution (PROPA)."""

    weight: float = Field(0.0, ge=0)  # of the negative log-likelihood per token; 0 = off
    solved_at: float = 1.0  # outcome from which an answer counts as right


def unsolved(rollout: Rollout, solved_at: float) -> list[Prompt]:
    """Prompts none of whose finished leaves reaches `solved_at`; a prompt without finished leaves is unsolved."""
    tree = rollout.tree
    right = tree.is_finished & (tree.outcome >= solved_at)
    solved = set(tree.group[right].tolist())
    return [p for i, p in enumerate(rollout.prompts) if i not in solved]


def references(policy: Policy, prompts: Sequence[Prompt]) -> Rollout | None:
    """The written solutions of those prompts that have one, None when none has.

    Raises:
        ComponentError: the policy cannot write.
    """
    writer: OutputWriter = require("imitation", OutputWriter, policy, "policies")
    known = [(p, text) for p in prompts if (text := reference_solution(p)) is not None]
    return writer.write([p for p, _ in known], [t for _, t in known]) if known else None


_CHECKED = 2000  # references that are tokenised to see whether they fit


def cut_references(policy: Policy, prompts: Sequence[Prompt]) -> float:
    """Share of the written solutions, of the first ones, that are longer than the policy may sample; warns of them.

    A model that learns them is cut whenever it writes what it has learnt.
    """
    if not isinstance(policy, LimitedWriter):
        return 0.0
    known = [(p.id, text) for p in prompts if (text := reference_solution(p)) is not None][:_CHECKED]
    reasons = policy.beyond_limits([text for _, text in known])
    cut = [(id, reason) for (id, _), reason in zip(known, reasons, strict=True) if reason]
    if cut:
        log.warning(
            "%d of %d reference solutions are longer than sampling may write, so what is learnt from them is cut; "
            "raise the limit. The first: prompt %r, %s", len(cut), len(known), *cut[0],
        )  # fmt: skip
    return len(cut) / max(len(known), 1)


def best_leaves(tree: StepTree, above: float, per_prompt: int = 1) -> Tensor:
    """(L,) ascending finished leaves with an outcome above `above`, of each prompt at most the `per_prompt` best.

    Equal outcomes: the earlier leaf first.
    """
    leaves = (tree.is_finished & (tree.outcome > above)).nonzero().flatten()
    leaves = leaves[torch.argsort(tree.outcome[leaves], descending=True, stable=True)]
    leaves = leaves[torch.argsort(tree.group[leaves], stable=True)]
    count = torch.bincount(tree.group[leaves], minlength=tree.num_groups)
    rank = torch.arange(len(leaves)) - (count.cumsum(0) - count)[tree.group[leaves]]
    return leaves[rank < per_prompt].sort().values


def imitation_losses(
    policy: Policy,
    rollout: Rollout,
    denominator: float,
    *,
    weight: Tensor | None = None,
    sums: list[Tensor] | None = None,
) -> list[Callable[[], Tensor]]:
    """Per micro-batch, the weighted negative log-likelihood of the rollout's trainable actions over `denominator`.

    weight: (N,) of each step's actions, by default 1; steps of weight 0 are not run. sums: collects what the losses
        were.
    """
    tree, trainable = rollout.tree, rollout.actions.trainable
    owner = tree.step_of_action(trainable.numel())
    each = torch.ones(len(tree)) if weight is None else weight
    steps = torch.unique(owner[trainable & (owner >= 0)])
    steps = steps[each[steps] > 0]
    parts = policy.micro_batches(rollout, steps) if len(steps) else []
    per_action = each[owner.clamp(min=0)].float()
    return [partial(_loss, policy, rollout, denominator, per_action, part, sums) for part in parts]


def _loss(
    policy: Policy, rollout: Rollout, denominator: float, weight: Tensor, steps: Tensor, sums: list[Tensor] | None
) -> Tensor:
    new = policy.log_probs(rollout, steps)
    loss = -(weight[new.index].to(new.logp.device) * new.logp).sum() / denominator
    if sums is not None:
        sums.append(loss.detach().cpu())
    return loss
