"""Losses of step reward models: pointwise on labelled steps, on whole solutions, on pairs.

Logits are (S, C), one row per step: C = 1 the logit of "good"; C >= 2 the columns good, bad, then any other classes of
the softmax (a buffer class, the rest of the vocabulary). Labels are (S,) in [0, 1], NaN = unlabelled. Whatever the
loss, sigmoid of `good_logit` is the score. All of it is computed in float32.

A trainer takes `step_loss(name)`, which gives one number per step, adds up, and divides by the weights of the labelled
steps of all micro-batches and processes, so neither accumulation nor sharding changes the objective. A new loss is one
function of the labelled rows, a row of the registry kind `step_losses`; `path` is a parameter of those that compare
the steps of a solution.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor
from torch.nn import functional as F

from mmrl.config import Component
from mmrl.losses.preference import Share, value_ranking
from mmrl.registry import build, register


class RewardLossConfig(Component):
    """The loss of a step reward model, a row of `step_losses`; its own options stand beside these."""

    name: str = "bce"
    # Equal weight of every labelled step, of the two classes, or of every solution.
    balance: Literal["none", "class", "solution"] = "none"
    smoothing: float = Field(0.0, ge=0, lt=1)
    # Label the last step alone, with the outcome: an outcome reward model.
    last_step_only: bool = False
    # The steps that a loss on pairs compares: those of a solution (in stored trees, those after one state), or all
    # labelled ones of a prompt, which with last_step_only are its solutions.
    among: Literal["solution", "prompt"] = "solution"


@dataclass(frozen=True)
class StepLoss:
    """A loss on all steps of a batch, labelled or not, around a function of the labelled ones.

    function: (logits (L, C), labels (L,)) of L labelled steps -> (L,) losses. A function that compares the steps of a
        solution takes `path` (L,) too, the solution of each step.
    """

    function: Callable[..., Tensor]

    @cached_property
    def needs_path(self) -> bool:
        """True for a loss that compares the steps of a solution: they must stay in one micro-batch, in order."""
        return "path" in inspect.signature(self.function).parameters

    def __call__(
        self, logits: Tensor, labels: Tensor, weight: Tensor | None = None, path: Tensor | None = None
    ) -> Tensor:
        """(S, C) logits, (S,) labels, (S,) weights (default 1), (S,) int solution ids -> (S,) float32.

        Unlabelled steps get 0 and exactly no gradient, whatever their logits are; without any labelled step the
        result is 0 with a graph.

        Raises:
            ValueError: a label outside [0, 1], or no `path` where it is needed.
        """
        labels = labels.to(logits.device, torch.float32)
        labelled = (~labels.isnan()).nonzero().flatten()
        given_labels = labels[labelled]
        _check_labels(given_labels, labelled)
        if self.needs_path and path is None:
            raise ValueError("this loss compares the steps of a solution: give `path`, the solution of each step")
        extra = {}
        if self.needs_path and path is not None:
            extra["path"] = path.to(logits.device)[labelled]
        losses = self.function(logits[labelled], given_labels, **extra)
        if weight is not None:
            losses = losses * weight.to(losses)[labelled]
        # Unlabelled rows never enter the function, so that even NaN logits there cannot reach a gradient.
        return torch.zeros_like(labels).index_put((labelled,), losses)


def step_loss(name: str, **options: Any) -> StepLoss:
    """The loss called `name` with its options set.

    Raises:
        ComponentError: an unknown name or option, or a value out of range.
    """
    return StepLoss(build("step_losses", "loss", name, options))


# --- labels and weights, made once for a whole rollout -----------------------------------------------------------


def smooth(labels: Tensor, eps: float) -> Tensor:
    """(S,) labels drawn towards 1/2: y (1 - eps) + eps / 2, eps in [0, 1). Unlabelled stays NaN."""
    if not 0 <= eps < 1:
        raise ValueError(f"label smoothing {eps} must be in [0, 1)")
    return labels * (1 - eps) + eps / 2


def last_labels(labels: Tensor, path: Tensor) -> Tensor:
    """(S,) labels of the last step of every solution only, the others NaN. Rows of one `path` are in step order."""
    _, solution = torch.unique(path, return_inverse=True)
    row = torch.arange(len(path), device=path.device)
    last = torch.full_like(row, -1).scatter_reduce(0, solution, row, "amax")[solution]
    return labels.where(row == last, torch.nan)


# --- pointwise: (L, C) logits and (L,) labels of labelled steps -> (L,) ------------------------------------------


def good_logit(logits: Tensor) -> Tensor:
    """(S,) float32 whose sigmoid is the probability of "good": the logit itself, or good minus bad.

    With a buffer class this is p_right / (p_right + p_wrong), the score FreePRM reads.
    """
    logits = logits.float()
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[:, 0] - logits[:, 1]


@register("step_losses", "bce", source="MM-PRM, URSA")
def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """-(y ln p + (1 - y) ln(1 - p)), labels may be soft: the two-token softmax (MM-PRM) and the scalar head (URSA)."""
    return F.binary_cross_entropy_with_logits(good_logit(logits), labels, reduction="none")


@register("step_losses", "bce_two_sided", source="CoS")
def bce_two_sided(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of both classes' probabilities, added (CoS): twice `bce`, as the two add up to one."""
    return 2 * bce(logits, labels)


@register("step_losses", "ce_full", source="VisualPRM, VL-PRM")
def ce_full(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of good and bad in the softmax over all columns, e.g. the vocabulary (VisualPRM, VL-PRM).

    Raises:
        ValueError: fewer than three columns, where it would be `bce`.
    """
    _need_columns(logits, 3, "ce_full")
    logp = logits.float().log_softmax(1)
    return -(labels * logp[:, 0] + (1 - labels) * logp[:, 1])


@register("step_losses", "mse")
def mse(logits: Tensor, labels: Tensor) -> Tensor:
    """(p - y)^2, for soft labels."""
    return (good_logit(logits).sigmoid() - labels) ** 2


@register("step_losses", "atanh_mse", source="MASPRM")
def atanh_mse(logits: Tensor, labels: Tensor, *, margin: Share = 0.05) -> Tensor:
    """Squared distance of signed values before the tanh (MASPRM): (z / 2 - atanh v)^2, v = 2 y - 1.

    v is clipped to +-(1 - margin), margin in (0, 1). The value of a step is tanh(z / 2) = 2 p - 1, so sigmoid(z) stays
    the score. MASPRM's other loss, cross-entropy on (v + 1) / 2, is `bce`.
    """
    return (good_logit(logits) / 2 - atanh_target(2 * labels - 1, margin=margin)) ** 2


@register("step_losses", "atanh_huber", source="MASPRM")
def atanh_huber(logits: Tensor, labels: Tensor, *, margin: Share = 0.05) -> Tensor:
    """`atanh_mse` with Huber's loss (delta 1): linear beyond a distance of 1."""
    target = atanh_target(2 * labels - 1, margin=margin)
    return F.huber_loss(good_logit(logits) / 2, target, reduction="none")


def atanh_target(value: Tensor, *, margin: float = 0.05) -> Tensor:
    """atanh of a signed value in [-1, 1] clipped to +-(1 - margin), margin in (0, 1) (MASPRM)."""
    if not 0 < margin < 1:
        raise ValueError(f"margin {margin} must be in (0, 1): atanh of +-1 is infinite")
    return value.float().clamp(margin - 1, 1 - margin).atanh()


@register("step_losses", "free_prm", source="FreePRM")
def free_prm(logits: Tensor, labels: Tensor) -> Tensor:
    """FreePRM: `buffered_nll` in expectation over a ~ Bernoulli(1/2), so nothing is drawn.

    Columns right, wrong, buffer; every step carries the label of its solution's outcome.
    """
    zero = torch.zeros_like(labels)
    return (buffered_nll(logits, labels, zero) + buffered_nll(logits, labels, zero + 1)) / 2


def buffered_nll(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
    """-ln(p_target + a p_buffer), target right or wrong by label (FreePRM, the logarithm as defined here).

    share: a (L,) in [0, 1]; a random one keeps p_buffer = 1 from being a solution.
    """
    _need_columns(logits, 3, "free_prm")
    logp = logits.float().log_softmax(1)
    # Where a is 0 this is -inf, and logaddexp adds nothing.
    buffer = logp[:, 2] + share.log()
    right = torch.logaddexp(logp[:, 0], buffer)
    wrong = torch.logaddexp(logp[:, 1], buffer)
    return -(labels * right + (1 - labels) * wrong)


def _need_columns(logits: Tensor, least: int, name: str) -> None:
    if logits.shape[1] < least:
        raise ValueError(
            f"{name} needs logits (S, C) with C >= {least} (good, bad, others) and got C = {logits.shape[1]}; "
            "give the scorer such a head, or use bce"
        )


# --- whole solutions ---------------------------------------------------------------------------------------------


@register("step_losses", "q_rank", source="PQM")
def q_rank(logits: Tensor, labels: Tensor, path: Tensor, *, zeta: float = 4.0, anchor: bool = True) -> Tensor:
    """Q-ranking: a right step's q exceeds those of the right steps before it and, by `zeta`, of all wrong ones.

    With C the right (label >= 1/2) and W the wrong steps of a solution, a right step c has the term
    -ln( e^{q_c} / (e^{q_c} + sum of e^{q_j} over right j before c + sum of e^{q_w + zeta} over W) ).
    `anchor` (PQM's published form) adds the initial state's e^0 = 1 to every denominator and, where W is not empty,
    the term ln(1 + sum of e^{q_w + zeta}). A solution's loss is the mean of its terms, 0 without any.

    Every step carries the loss of its solution, so weights mean the same as in the pointwise losses.

    Args:
        path: (L,) int, the solution of each row; rows of one solution are in step order.
    """
    q, right = good_logit(logits), labels >= 0.5
    row = torch.arange(len(q), device=q.device)
    # (L, L) entry [i, j]: step j is a wrong step of i's solution, or a right one before i or i itself.
    same = path[:, None] == path[None, :]
    wrong = same & ~right
    before = same & right & (row[None, :] <= row[:, None])
    # (L,) q of right steps, q + zeta of wrong ones, as they stand in the denominators
    rival = q + zeta * ~right
    # One term per right step: -ln of its share of the denominator.
    terms = _logsumexp(rival, before | wrong, anchor)[right] - q[right]
    _, solution = torch.unique(path, return_inverse=True)
    total = q.new_zeros(len(q)).index_add(0, solution[right], terms)
    count = q.new_zeros(len(q)).index_add(0, solution[right], torch.ones_like(terms))
    if anchor:
        # One further term per solution with a wrong step; its first row stands for the solution.
        first = _first_rows(solution)
        has_wrong = wrong[first].any(1)
        first = first[has_wrong]
        total = total.index_add(0, solution[first], _logsumexp(rival, wrong[first], True))
        count = count.index_add(0, solution[first], torch.ones_like(q[first]))
    return (total / count.clamp(min=1))[solution]


@register("step_losses", "preference", source="Bradley-Terry; LRM; Eisenstein et al. 2023")
def preference(logits: Tensor, labels: Tensor, path: Tensor, *, center: NonNegativeFloat = 0.0) -> Tensor:
    """Bradley-Terry on the steps of a path, which are alternatives to each other: KL(labels || softmax of logits).

    A pair labelled 1, 0 gives -ln sigmoid(q_1 - q_0), a tie 1/2, 1/2 at least 0 (LRM's loss); labels are divided by
    their sum. Every step carries the loss of its path, so weights mean the same as in the pointwise losses.
    center: adds center times the squared mean logit of the path. The loss itself reads differences only; with it,
    sigmoid(logit) is the probability of beating an average alternative (Eisenstein et al. 2023, Helping or Herding).

    Raises:
        ValueError: a path whose labels are all 0.
    """
    q = good_logit(logits)
    _, pair = torch.unique(path, return_inverse=True)
    size = torch.bincount(pair)
    mass = labels.new_zeros(len(size)).index_add(0, pair, labels)
    if bool((mass == 0).any()):
        first_path = int(path[(mass == 0)[pair]][0])
        raise ValueError(
            f"path {first_path} has no label above 0: a preference needs a better step, or a tie of 1/2 each"
        )
    target = labels / mass[pair]
    # (L,) log-softmax of q inside each path; its largest entry is taken off first, so that exp cannot overflow.
    lowest = q.detach().new_full((len(size),), -math.inf)
    top = lowest.scatter_reduce(0, pair, q.detach(), "amax")[pair]
    total = q.new_zeros(len(size)).index_add(0, pair, (q - top).exp())
    logp = q - top - total.log()[pair]
    # (L,) terms of KL(target || softmax); xlogy reads 0 ln 0 as 0
    terms = torch.xlogy(target, target) - target * logp
    divergence = q.new_zeros(len(size)).index_add(0, pair, terms)
    mean = q.new_zeros(len(size)).index_add(0, pair, q) / size
    return (divergence + center * mean**2)[pair]


@register("step_losses", "value_margin", source="SVPO, 2024")
def value_margin(
    logits: Tensor, labels: Tensor, path: Tensor, *, margin: NonNegativeFloat = 0.1, weight: NonNegativeFloat = 1.0
) -> Tensor:
    """SVPO's value head on the children of a state, the steps of a path: regression to their values, and their order.

    With p = sigmoid of the logit and y the value of the state after a step, in [0, 1] (mean outcome below it, a
    search's q), a path has mean (p_i - y_i)^2 + weight * mean over its pairs of max(0, margin - (p_w - p_l)), 0
    without a pair. Pairs are those with y_w - y_l >= margin, so that p = y costs nothing. Every step carries the loss
    of its path. SVPO (2024) names both terms; margin and weight are set here.
    """
    p = good_logit(logits).sigmoid()
    _, fork = torch.unique(path, return_inverse=True)
    count = torch.bincount(fork).float()
    squares = p.new_zeros(len(count)).index_add(0, fork, (p - labels) ** 2)
    better, worse = _ordered_pairs(labels, fork, margin)
    ranking = value_ranking(p[better], p[worse], margin=margin)
    shortfall = p.new_zeros(len(count)).index_add(0, fork[better], ranking)
    num_pairs = torch.bincount(fork[better], minlength=len(count)).clamp(min=1)
    return (squares / count + weight * shortfall / num_pairs)[fork]


@register("step_losses", "bradley_terry", source="rStar-Math, OPRL, SWEET-RL")
def bradley_terry(
    logits: Tensor,
    labels: Tensor,
    path: Tensor,
    *,
    margin: float = 0.0,
    gamma: NonNegativeFloat = 0.0,
    gap: NonNegativeFloat = 0.0,
) -> Tensor:
    """Bradley-Terry on the ordered pairs of a path: mean of -ln sigmoid(d - margin), d = q_w - q_l.

    Pairs are those with y_w > y_l and y_w - y_l >= gap; a path without one costs 0. On siblings it is rStar-Math's
    process preference model, on the last steps of a prompt's solutions the DPO objective of an implicit model (OPRL;
    with turns averaged, SWEET-RL's critic). gamma > 0 is the focal form: times (1 - 2 max(0, sigmoid(d) - 1/2))^gamma,
    which fades out pairs already ordered. Every step carries the loss of its path.
    """

    def each(better: Tensor, worse: Tensor) -> Tensor:
        delta = better - worse
        loss = -F.logsigmoid(delta - margin)
        if gamma == 0:
            return loss
        # 1 - 2 (sigmoid(d) - 1/2) = 2 sigmoid(-d); as a logarithm, because its power has no gradient at 0.
        log_factor = (math.log(2) + F.logsigmoid(-delta)).clamp(max=0)
        return loss * (gamma * log_factor).exp()

    return _over_pairs(good_logit(logits), labels, path, gap, each)


@register("step_losses", "nca", source="Implicit PRM; Noise Contrastive Alignment")
def nca(logits: Tensor, labels: Tensor, path: Tensor, *, gap: NonNegativeFloat = 0.0) -> Tensor:
    """NCA on the ordered pairs of a path: mean of -ln s(q_w) - ln s(-q_w) / 2 - ln s(-q_l) / 2, s = sigmoid.

    Pairs as in `bradley_terry`; unlike there a single q matters, not differences alone (Implicit PRM).
    """

    def each(better: Tensor, worse: Tensor) -> Tensor:
        return -F.logsigmoid(better) - F.logsigmoid(-better) / 2 - F.logsigmoid(-worse) / 2

    return _over_pairs(good_logit(logits), labels, path, gap, each)


@register("step_losses", "return_decomposition", source="SPA-RL; RUDDER")
def return_decomposition(logits: Tensor, labels: Tensor, path: Tensor) -> Tensor:
    """SPA's progress estimator: (sum of the contributions of a path - its outcome)^2, a step's logit its contribution.

    Every step of a solution is labelled with the solution's outcome, and carries the loss of its solution. Read the
    contributions as logits: the reading `score` with `form: logit` and `into: tags.contribution`.
    """
    contribution = good_logit(logits)
    _, solution = torch.unique(path, return_inverse=True)
    count = torch.bincount(solution).float()
    total = contribution.new_zeros(len(count)).index_add(0, solution, contribution)
    # All steps of a solution have its outcome as label, so their mean is that outcome.
    outcome = labels.new_zeros(len(count)).index_add(0, solution, labels) / count
    return ((total - outcome) ** 2)[solution]


def _over_pairs(
    q: Tensor, labels: Tensor, path: Tensor, gap: float, each: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(L,) mean of `each` (q of the better ones (P,), q of the worse ones (P,)) over the ordered pairs of a path."""
    _, fork = torch.unique(path, return_inverse=True)
    better, worse = _ordered_pairs(labels, fork, gap)
    total = q.new_zeros(len(q)).index_add(0, fork[better], each(q[better], q[worse]))
    count = torch.bincount(fork[better], minlength=len(q)).clamp(min=1)
    return (total / count)[fork]


def _ordered_pairs(labels: Tensor, path: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """(better, worse), each (P,) int: rows of one path whose labels differ by at least `gap`, and at all."""
    same = path[:, None] == path[None, :]
    above = labels[:, None] > labels[None, :]
    # Labels are float32: a difference of exactly `gap` may come out a little smaller.
    far = labels[:, None] - labels[None, :] >= gap - 1e-6
    better, worse = (same & above & far).nonzero().unbind(1)
    return better, worse


def _logsumexp(x: Tensor, among: Tensor, with_zero: bool) -> Tensor:
    """(R,) ln of the sum of e^{x_j} over the j where `among` (R, L) is True, plus e^0 when `with_zero`.

    A row of `among` without any True needs `with_zero`.
    """
    rows = x.expand(among.shape).masked_fill(~among, -math.inf)
    if with_zero:
        rows = F.pad(rows, (0, 1))
    return rows.logsumexp(1)


def _first_rows(solution: Tensor) -> Tensor:
    """Index of the first row of every solution; ids are dense."""
    row = torch.arange(len(solution), device=solution.device)
    first = torch.full_like(row, len(row)).scatter_reduce(0, solution, row, "amin")
    return first[first < len(row)]


def _check_labels(labels: Tensor, labelled: Tensor) -> None:
    """Raises ValueError for a label outside [0, 1]; `labelled` are the step indices, for the message."""
    bad = ((labels < 0) | (labels > 1)).nonzero().flatten()
    if len(bad):
        i = int(bad[0])
        raise ValueError(
            f"label {float(labels[i]):g} of step {int(labelled[i])} is outside [0, 1] ({len(bad)} in all); an "
            "unlabelled step is NaN, a signed value v is (v + 1) / 2"
        )
