"""From a credited rollout to a differentiable loss: which actions count, with what weight, against which ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from mmrl.credit import StepAdvantage
from mmrl.credit.budget import informative_groups
from mmrl.losses.mismatch import mismatch, truncated_importance
from mmrl.losses.policy import (
    LossConfig,
    LossRule,
    action_weights,
    cispo,
    clipped_surrogate,
    kl_estimate,
    pooled_log_ratio,
    sapo,
)
from mmrl.rollout import ActionLogProbs, Policy, Rollout
from mmrl.trainers.idle import some_part
from mmrl.tree import StepTree
from mmrl.tree_ops import path_pairs


@dataclass(frozen=True)
class Batch:
    """One rollout ready for the update. Per action (T,): adv, weight, old_logp, owner. steps: (S,) to run.

    denominator: this process's share until `with_total` puts the sum over all processes in its place.
    """

    rollout: Rollout
    steps: Tensor
    adv: Tensor
    weight: Tensor
    old_logp: Tensor
    owner: Tensor
    denominator: float

    def with_total(self, denominator: float) -> Batch:
        """The batch with the denominator of all processes."""
        return replace(self, denominator=max(denominator, 1e-12))


@dataclass
class Sums:
    """Weighted sums over the micro-batches of one update, for the log."""

    values: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("loss", "clip_frac", "kl", "log_ratio", "entropy"), 0.0)
    )
    ratio_dev: float = 0.0

    def add(self, weight: Tensor, **terms: Tensor) -> None:
        """Add sum(weight * term) of each term."""
        for name, x in terms.items():
            self.values[name] += float((weight * x.detach()).sum())


def build_batch(rollout: Rollout, credit: StepAdvantage, keep: Tensor, loss: LossConfig, clip: float | None) -> Batch:
    """Select the actions that get a gradient. Rollout, rewards and advantages stay as they are.

    keep: (N,) bool, steps left by pruning. clip: bound on |advantage|.
    """
    tree = rollout.tree
    owner = tree.step_of_action(rollout.actions.logp.numel())
    step = owner.clamp(min=0)
    keep = credit.valid & keep
    if loss.mask_truncated:
        keep = keep & has_uncut_leaf(tree)
    if loss.drop_zero_spread:
        keep = keep & informative_groups(tree)[tree.group]
    mask = rollout.actions.trainable & (owner >= 0) & keep[step]
    weight, denominator = action_weights(tree, owner, mask, loss.aggregation, credit.weight, loss.max_len)
    adv = (credit.adv if clip is None else credit.adv.clamp(-clip, clip))[step].float()
    # a zero advantage has no gradient unless the KL acts on it; it stays in the denominator either way
    run = mask & (weight > 0) & ((adv != 0) | (loss.kl > 0))
    steps = torch.unique(owner[run])
    return Batch(rollout, steps, adv, torch.where(run, weight, 0.0).float(), rollout.actions.logp, owner, denominator)


def has_uncut_leaf(tree: StepTree) -> Tensor:
    """(N,) bool, steps on the way to a leaf that was not cut at the policy's longest length.

    Of chains these are the completions that ended by themselves; a step that several completions share stays while
    one of them did. Rewards of cut ones keep their part in the statistics of the group.
    """
    return tree.accumulate((tree.is_leaf & ~tree.tags["truncated"].bool()).double()) > 0


def most_uncertain(
    policy: Policy,
    batch: Batch,
    fraction: float,
    rounds: Callable[[int], int],
    gather: Callable[[list[float]], list[float]],
) -> Batch:
    """The batch with weight on the actions of the highest entropy alone; the denominator stays ("Beyond the 80/20
    Rule", Wang et al. 2025; TRL's top_entropy_quantile).

    fraction: share of the actions of all ranks. rounds: as in `current_logp`. gather: joins the numbers of every rank.

    Raises:
        ValueError: the policy tells no entropy.
    """
    entropy = torch.full_like(batch.old_logp, torch.nan)
    with torch.no_grad():
        for new in _passes(policy, batch.rollout, batch.steps, rounds):
            if new.entropy is None:
                raise ValueError("loss.top_entropy: this policy tells no entropy of its actions; leave it out")
            entropy[new.index] = new.entropy.float().cpu()
    trained = batch.weight > 0
    known = sorted(gather(entropy[trained].tolist()), reverse=True)
    if not known:
        return batch
    threshold = known[max(1, round(fraction * len(known))) - 1]
    return replace(batch, weight=torch.where(entropy >= threshold, batch.weight, 0.0))


@torch.no_grad()
def current_logp(policy: Policy, rollout: Rollout, steps: Tensor, rounds: Callable[[int], int] = int) -> Tensor:
    """(T,) the rollout's log-probs with those of `steps` recomputed by the training code path.

    rounds: calls to make for a number of micro-batches; the surplus keeps ranks in step where calls are collectives.
    """
    logp = rollout.actions.logp.clone()
    for new in _passes(policy, rollout, steps, rounds):
        logp[new.index] = new.logp.cpu()
    return logp


def _passes(policy: Policy, rollout: Rollout, steps: Tensor, rounds: Callable[[int], int]) -> Iterator[ActionLogProbs]:
    """The densities of `steps`, a micro-batch at a time; see `current_logp`."""
    parts = policy.micro_batches(rollout, steps) if len(steps) else []
    surplus = rounds(len(parts)) - len(parts)  # ranks talk about it, so before any call
    for part in parts:
        yield policy.log_probs(rollout, part)
    for _ in range(surplus):
        policy.log_probs(rollout, some_part(policy, rollout))


def recompute_old_logp(
    policy: Policy, batch: Batch, cap: float | None, rounds: Callable[[int], int] = int
) -> tuple[Batch, dict[str, float]]:
    """Old log-probs from the training code path, for rollouts made by another engine or dtype.

    cap: truncated importance weights correct for actions having been drawn by that engine. Also returns how far the
    two log-probs lie apart (mean, max, k3; empty when nothing is trained). rounds: as in `current_logp`.
    """
    train, rollout = current_logp(policy, batch.rollout, batch.steps, rounds), batch.old_logp
    used = batch.weight > 0
    if not bool(used.any()):
        return batch, {}
    weight = batch.weight.clone()
    if cap is not None:
        weight[used] *= truncated_importance(train[used], rollout[used], cap=cap)
    return replace(batch, old_logp=train, weight=weight), mismatch(train[used], rollout[used])


def policy_loss(
    policy: Policy, batch: Batch, config: LossConfig, steps: Tensor, sums: Sums, rules: Sequence[LossRule] = ()
) -> Tensor:
    """The share of one micro-batch in the global loss; adds to `sums`. rules: of the config, made once."""
    new = policy.log_probs(batch.rollout, steps, reference=config.kl > 0)
    device = new.logp.device
    weight = batch.weight[new.index].to(device)
    log_ratio = new.logp - batch.old_logp[new.index].to(device)
    rows, log_rho, share = ratio_rows(batch, new, log_ratio, config.ratio)
    share, adv = share.to(device), batch.adv[new.index[rows]].to(device)
    extra = {name: x[rows] for name, x in new.extra.items()}
    for rule in rules:
        log_rho, share = rule(log_rho, share, adv, extra)
    w = weight[rows.to(device)] * share
    if config.surrogate == "cispo":
        surrogate = cispo(log_rho, adv, new.logp[rows.to(device)], config.clip_low, config.clip_high)
    elif config.surrogate == "sapo":
        surrogate = sapo(log_rho, adv)
    elif config.surrogate == "unclipped":
        surrogate = -adv * log_rho.clamp(-20, 20).exp()
    else:
        surrogate = clipped_surrogate(log_rho, adv, config.clip_low, config.clip_high, config.dual_clip)
    clipped = (log_rho.exp() - 1 > config.clip_high) | (log_rho.exp() - 1 < -config.clip_low)
    loss = (w * surrogate).sum()
    sums.add(w, clip_frac=clipped.float())
    sums.add(weight, log_ratio=log_ratio)
    if new.entropy is not None:
        sums.add(weight, entropy=new.entropy)
    deviation = float((log_ratio.detach().exp() - 1).abs().max())
    if not deviation <= sums.ratio_dev:  # NaN stays
        sums.ratio_dev = deviation
    if config.kl > 0:
        kl = _kl(new, config.kl_form)
        sums.add(weight, kl=kl)
        loss = loss + config.kl * (weight * kl).sum()
    sums.values["loss"] += float(loss.detach())
    return loss / batch.denominator


def ratio_rows(
    batch: Batch, new: ActionLogProbs, log_ratio: Tensor, ratio: Literal["action", "step", "trajectory"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Entries of the surrogate: position in `new`, pooled log-ratio, share of the action's weight.

    Per action and per step there is one entry an action. Per trajectory an action has one entry for every finished
    leaf below it, each with that path's ratio, sharing its weight equally; `new` must hold whole prompts then.
    """
    every = torch.arange(len(new.index))
    if ratio == "action":
        return every, log_ratio, torch.ones(len(every))
    owner = batch.owner[new.index]
    if ratio == "step":
        return every, pooled_log_ratio(log_ratio, owner), torch.ones(len(every))
    rows, trajectory = _trajectories(batch.rollout.tree, owner)
    return (
        rows,
        pooled_log_ratio(log_ratio[rows], trajectory),
        1 / batch.rollout.tree.leaves_below[owner][rows].float(),
    )


def _trajectories(tree: StepTree, owner: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, leaf): each action, given by its step, once for every finished leaf below that step."""
    leaf, node = path_pairs(tree)
    count = tree.leaves_below[owner]
    rows = torch.repeat_interleave(torch.arange(len(owner)), count)
    offset = torch.arange(len(rows)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    start = tree.leaves_below.cumsum(0) - tree.leaves_below  # a step is on the path of m leaves
    by_node = leaf[torch.argsort(node, stable=True)]
    return rows, by_node[start[owner[rows]] + offset]


def _kl(new: ActionLogProbs, form: Literal["exact", "k1", "k2", "k3"]) -> Tensor:
    if form == "exact":
        if new.kl is None:
            raise ValueError("loss.kl_form='exact': this policy has no closed form; use k3")
        return new.kl
    if new.ref_logp is None:
        raise ValueError(f"loss.kl_form={form!r}: this policy gives no reference log-probs; use exact")
    return kl_estimate(new.logp, new.ref_logp, form)
