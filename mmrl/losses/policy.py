"""Policy losses per action, and the weights that aggregate them.

An aggregation is a weight per action, made once for a whole rollout (`action_weights`), and one global denominator.
A micro-batch adds the weighted sum of its actions divided by that denominator, so accumulation, packing and the
number of processes cannot change the objective.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from mmrl.config import Component, Section
from mmrl.registry import ComponentError, find
from mmrl.tree import StepTree
from mmrl.tree_ops import path_sum

Ratio = Literal["action", "step", "trajectory"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "step-mean"]
KlForm = Literal["exact", "k1", "k2", "k3"]


class LossConfig(Section):
    """The policy loss."""

    # The unit that has one importance ratio; step and trajectory are the GSPO form.
    ratio: Literal["action", "step", "trajectory"] = "action"
    surrogate: Literal["clip", "unclipped", "cispo", "sapo"] = "clip"
    # Rows of `mmrl list loss_rules`, in order; they change ratios and weights of actions before the surrogate.
    rules: list[Component] = Field(default_factory=list)
    # PPO's range; a policy whose log-probs are of another size declares its own (denoising: 0.001).
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: float | None = Field(None, gt=1)
    # Weight of the divergence from the initial model.
    kl: float = Field(0.0, ge=0)
    # After every so many iterations the reference moves to the policy (TR-DPO), by this share of the way. Readings
    # that keep a reference see the same one.
    reference_every: PositiveInt | None = None
    reference_share: float = Field(1.0, gt=0, le=1)
    kl_form: Literal["exact", "k1", "k2", "k3"] = "exact"
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant", "step-mean"] = (
        "token-mean"
    )
    # The longest row allowed, for the aggregation `constant`.
    max_len: PositiveInt | None = None
    # Leave groups with equal rewards out of the denominator as well.
    drop_zero_spread: bool = False
    # Train no step all of whose completions were cut at their longest length (DAPO's overlong filtering).
    mask_truncated: bool = False
    # Train this share of the actions alone, those of the highest entropy before the update; one extra forward pass.
    top_entropy: float | None = Field(None, gt=0, lt=1)
    # One extra forward pass before the update, for engines whose log-probs differ from the trainer's.
    recompute_old_logp: bool = False
    # When set, actions are weighted by min(trainer probability / engine probability, cap).
    importance_cap: PositiveFloat | None = None


class LossRule(Protocol):
    """A row of `loss_rules`: a policy-gradient method's change of each action's log-ratio and weight.

    Called as `rule(log_ratio, weight, advantage, extra)`: the first three are (A,), the log-ratio differentiable, and
    extra is `ActionLogProbs.extra`. The row's fact `extra` maps the names of the tensors that the rule needs to what
    a user can do where one is missing.
    """

    def __call__(
        self, log_ratio: Tensor, weight: Tensor, advantage: Tensor, extra: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]: ...


def loss_rules(config: LossConfig) -> list[LossRule]:
    """The rules of a recipe; each raises ComponentError when the policy does not give the tensors that it needs."""
    return [_checked_rule(entry.name, entry.options, f"loss.rules.{i}") for i, entry in enumerate(config.rules)]


def _checked_rule(name: str, options: Mapping[str, Any], where: str) -> LossRule:
    """The rule called `name`, checked at each call; `where` is its place in the recipe, for messages."""
    row = find("loss_rules", name)
    rule: LossRule = row.build(options, where)
    needs: Mapping[str, str] = row.facts.get("extra", {})

    def checked(
        log_ratio: Tensor, weight: Tensor, advantage: Tensor, extra: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        for key, remedy in needs.items():
            if key not in extra:
                given = ", ".join(extra) or "none"
                raise ComponentError(
                    f"{where}: {name!r} needs {key!r} of every action; this policy gives {given}. {remedy}"
                )
        return rule(log_ratio, weight, advantage, extra)

    return checked


def clipped_surrogate(
    log_ratio: Tensor, adv: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """(A,) PPO loss max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)), rho = exp(clamp(log_ratio, -20, 20)).

    With `dual_clip` c, negative advantages are bounded: min(loss, -A c). c must exceed 1.
    """
    ratio = log_ratio.clamp(-20, 20).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-adv * ratio, -adv * clipped_ratio)
    if dual_clip is None:
        return loss
    if dual_clip <= 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1")
    return torch.where(adv < 0, torch.minimum(loss, -adv * dual_clip), loss)


def cispo(log_ratio: Tensor, adv: Tensor, logp: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """(A,) CISPO: -sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logp. Every action keeps a gradient.

    `logp` (A,) is the current log-prob and carries it; the clipped ratio is a constant weight (Minimax-M1; verl).
    """
    weight = log_ratio.detach().clamp(-20, 20).exp().clamp(1 - clip_low, 1 + clip_high)
    return -weight * adv * logp


def sapo(log_ratio: Tensor, adv: Tensor, tau_positive: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """(A,) SAPO: -A (4/tau) sigmoid(tau (rho - 1)), tau by the sign of A: a soft gate in place of the clip."""
    tau = torch.where(adv >= 0, tau_positive, tau_negative)
    ratio = log_ratio.clamp(-20, 20).exp()
    return -adv * (4 / tau) * torch.sigmoid(tau * (ratio - 1))


def pooled_log_ratio(log_ratio: Tensor, segment: Tensor) -> Tensor:
    """(A,) every entry replaced by the mean of its segment, gradient through each entry's own value.

    The GSPO form: exp of it is one ratio per segment (a step, a trajectory). The gradient of one entry's loss reaches
    only that entry's log-prob, as in the published token form.

    Args:
        log_ratio: (A,). segment: (A,) int >= 0, dense or not.
    """
    _, inverse = torch.unique(segment, return_inverse=True)
    inverse = inverse.to(log_ratio.device)
    total = log_ratio.new_zeros(int(inverse.max()) + 1 if inverse.numel() else 0)
    count = total.index_add(0, inverse, torch.ones_like(log_ratio))
    mean = total.index_add(0, inverse, log_ratio.detach()) / count.clamp(min=1)
    # The last two terms cancel in value and carry the gradient.
    return mean[inverse] + log_ratio - log_ratio.detach()


def kl_estimate(logp: Tensor, ref_logp: Tensor, form: Literal["k1", "k2", "k3"] = "k3") -> Tensor:
    """(A,) estimate of KL(policy || reference) from one sample, d = logp - ref_logp.

    k1 = d: unbiased, may be negative; its expected gradient is 0 on-policy, so use it as a reward penalty, not as a
    loss. k2 = d^2/2: its gradient is that of KL(policy || reference). k3 = exp(-d) - 1 + d >= 0; clamped to 10.
    """
    d = logp - ref_logp
    if form == "k1":
        return d
    if form == "k2":
        return d**2 / 2
    if form == "k3":
        return torch.clamp(torch.exp((-d).clamp(-20, 20)) - 1 + d, max=10.0)
    raise ValueError(f"KL form {form!r} is none of k1, k2, k3")


def action_weights(
    tree: StepTree,
    owner: Tensor,
    mask: Tensor,
    aggregation: Aggregation,
    count: Tensor,
    max_len: int | None = None,
) -> tuple[Tensor, float]:
    """Weights (T,) float64 and the denominator such that the aggregated loss is sum(weight * loss) / denominator.

    Rows are root-to-leaf paths (finished leaves); an action shared by m of them counts `count` times: m with leaf
    counting, 1 with node counting.

    token-mean: every action alike. seq-mean-token-mean: mean over the actions of a row, then over rows.
    seq-mean-token-sum: sum over a row, mean over rows. constant: sum / (rows * max_len) (Dr. GRPO).
    step-mean: mean inside each step, then over steps. Rows or steps without an unmasked action leave the denominator.

    Args:
        owner: (T,) int, step of each action, -1 = none. mask: (T,) bool, actions in the loss.
        count: (N,) float, how often each step counts (`StepAdvantage.weight`).
        max_len: only for `constant`, the longest row allowed.

    Raises:
        ValueError: unknown aggregation, or `constant` without max_len.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation {aggregation!r} is none of {', '.join(get_args(Aggregation))}")
    mask = mask & (owner >= 0)
    step = owner.clamp(min=0)
    mask = mask & (count[step] > 0)
    # (N,) actions of each step that are in the loss
    num_actions = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, step, mask.double())
    if aggregation == "step-mean":
        num_steps = ((num_actions > 0).double() * count).sum()
        per_action = count / num_actions.clamp(min=1)
        return torch.where(mask, per_action[step], 0.0), float(num_steps)
    if aggregation == "token-mean":
        weight = torch.where(mask, count[step], 0.0)
        return weight, float(weight.sum())
    # (N,) actions in the loss on the path to each step; at a finished leaf, the length of its row
    length = path_sum(tree, num_actions)
    if aggregation == "seq-mean-token-mean":
        inverse = torch.where(tree.is_finished & (length > 0), 1 / length.clamp(min=1), 0.0)
        # Summed over the rows through the step: each gives its actions the weight 1 / length.
        share = tree.accumulate(inverse) * count / tree.leaves_below.clamp(min=1)
        weight = torch.where(mask, share[step], 0.0)
        return weight, float(weight.sum())
    denominator = float((tree.is_finished & (length > 0)).sum())
    if aggregation == "constant":
        if max_len is None:
            raise ValueError("aggregation 'constant' divides by rows * max_len: set loss.max_len")
        denominator *= max_len
    return torch.where(mask, count[step], 0.0), denominator
