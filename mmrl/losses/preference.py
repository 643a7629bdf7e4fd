"""One preference loss over step segments, and the settings under which it is the published methods.

For a pair (w, l) of segments with actions i, rho_i = ln pi(i) - ln pi_ref(i), step weights a and action weights g:

    S(y) = sum over i of a_step(i) g_i rho_i
    h    = beta (S(w) - S(l)) - margin
    L    = -(1 - eps) ln sigmoid(h) - eps ln sigmoid(-h)  +  nll * mean over i in w of -ln pi(i)  +  regulariser

Weights, margins and eps are constants: no gradient flows through them. It knows no modality: a token and a denoising
transition are both one action with a log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor

from mmrl.registry import build, register

Share = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Preference:
    """Settings of the loss. `mmrl list preferences` has those of the published methods.

    beta: scale of the log-ratio, > 0. form: `sigmoid`, or `ipo`: (S(w) - S(l) - margin / beta - 1 / (2 beta))^2.
    margin: what h must exceed; gap_margin: further margin per unit of the gap between the pair's scores.
    smoothing: eps in [0, 1/2]; above it the pair would be swapped. smooth_by_visits: eps from the visits of both
        branches instead (`visit_smoothing`).
    nll: weight of the chosen segment's mean negative log-likelihood.
    clip: bound c on the ratio exp S(y): S is clamped to [ln(1 - c), ln(1 + c)]. None = none.
    length_power: S is divided by (number of weighted actions)^this.
    reference_free: rho_i = ln pi(i).
    gamma: step weights softmax(gamma r) T for the chosen steps, softmax(-gamma r) T for the rejected ones, r their
        rewards; 0 = all 1 (`reward_weights`).
    guide: action weights 1 + guide beta rho^G (chosen) and 1 - guide beta rho^G (rejected), rho^G the log-ratio of a
        policy trained by DPO (`guide_weights`).
    regulariser: weight of T-REG's token term (`token_regulariser`).
    """

    beta: PositiveFloat = 0.1
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    margin: float = 0.0
    gap_margin: float = 0.0
    smoothing: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    smooth_by_visits: bool = False
    nll: NonNegativeFloat = 0.0
    clip: Share | None = None
    length_power: NonNegativeFloat = 0.0
    reference_free: bool = False
    gamma: float = 0.0
    guide: float = 0.0
    regulariser: float = 0.0

    def __post_init__(self) -> None:
        if self.form == "ipo" and (self.smoothing or self.smooth_by_visits):
            raise ValueError("loss.smoothing belongs to form sigmoid; ipo has no label to smooth")

    @property
    def needs_actions(self) -> str | None:
        """The tensor per action that the loss needs besides log-probs: `guide`, `token_reward`, or None."""
        if self.guide:
            return "guide"
        if self.regulariser:
            return "token_reward"
        return None


P = TypeVar("P", bound=Preference)


@dataclass(frozen=True)
class Side:
    """The actions of one side of P pairs, in any order.

    logp: (A,) log-probs under the policy, differentiable. ref_logp: (A,) under the reference; None without one.
    pair: (A,) int in 0..P-1. step_weight, action_weight: (A,) a of the action's step and its own g, default 1; an
        action of weight 0 has no gradient at all, unless nll asks for it.
    token_reward: (A,) T-REG's reward of each action in (-1/2, 1/2).
    """

    logp: Tensor
    ref_logp: Tensor | None
    pair: Tensor
    step_weight: Tensor | None = None
    action_weight: Tensor | None = None
    token_reward: Tensor | None = None


class PairLoss(NamedTuple):
    """Per pair, (P,) float32: the loss (differentiable); without gradient h before the margin, and beta S of each."""

    loss: Tensor
    margin: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    def metrics(self) -> dict[str, Tensor]:
        """(P,) terms for the log; accuracy is 1 where the chosen segment has the higher implicit reward."""
        return {
            "loss": self.loss.detach(),
            "accuracy": (self.margin > 0).float(),
            "margin": self.margin,
            "chosen_reward": self.chosen_reward,
            "rejected_reward": self.rejected_reward,
        }


def preference_loss(
    chosen: Side,
    rejected: Side,
    num_pairs: int,
    settings: Preference,
    *,
    gap: Tensor | None = None,
    smoothing: Tensor | None = None,
) -> PairLoss:
    """The loss of each of P pairs, by the formulas of the module's docstring. All arithmetic is float32.

    Args:
        gap: (P,) difference of the pair's scores, for settings.gap_margin.
        smoothing: (P,) eps of each pair in [0, 1/2], in place of settings.smoothing.

    Raises:
        ValueError: no reference where one is needed, a pair without actions on a side, or a gap or token reward that
            the settings ask for and nobody gave.
    """
    _check_side("chosen", chosen, num_pairs, settings)
    _check_side("rejected", rejected, num_pairs, settings)
    # (P,) S(w) and S(l) of the module's formula
    chosen_score = _score(chosen, num_pairs, settings)
    rejected_score = _score(rejected, num_pairs, settings)
    h = settings.beta * (chosen_score - rejected_score)
    margin: Tensor | float = settings.margin
    if settings.gap_margin:
        if gap is None:
            raise ValueError(f"loss.gap_margin={settings.gap_margin} needs the gap of each pair's scores")
        margin = settings.margin + settings.gap_margin * gap.to(h)
    loss = _main_loss(h - margin, settings, smoothing)
    if settings.nll:
        loss = loss + settings.nll * _mean_nll(chosen, num_pairs)
    if settings.regulariser:
        loss = loss + settings.regulariser * token_regulariser(chosen, rejected, h, settings.beta)
    return PairLoss(
        loss,
        h.detach(),
        settings.beta * chosen_score.detach(),
        settings.beta * rejected_score.detach(),
    )


def _check_side(name: str, side: Side, num_pairs: int, settings: Preference) -> None:
    if side.ref_logp is None and not settings.reference_free:
        raise ValueError(
            f"the {name} actions have no reference log-probs; the policy must give ref_logp (log_probs with "
            "reference=True), or set loss.reference_free"
        )
    empty = (torch.bincount(side.pair, minlength=num_pairs) == 0).nonzero().flatten()
    if len(empty):
        raise ValueError(f"pair {int(empty[0])} has no {name} action with a density ({len(empty)} such pairs)")
    if settings.regulariser and side.token_reward is None:
        raise ValueError(f"loss.regulariser needs a token reward for the {name} actions (see token_rewards)")


def _weights(side: Side) -> Tensor:
    """(A,) float32 product of step weight and action weight of each action."""
    weight = torch.ones_like(side.logp, dtype=torch.float32)
    if side.step_weight is not None:
        weight = side.step_weight.to(weight)
    if side.action_weight is not None:
        weight = weight * side.action_weight.to(weight)
    return weight


def _score(side: Side, num_pairs: int, settings: Preference) -> Tensor:
    """(P,) S(y), clipped and normalised as the settings say."""
    rho, weight = side.logp.float(), _weights(side)
    if not settings.reference_free:
        assert side.ref_logp is not None
        rho = rho - side.ref_logp.detach().to(rho)
    total = _sum_by(weight.detach() * rho, side.pair, num_pairs)
    if settings.length_power:
        length = _sum_by((weight != 0).float(), side.pair, num_pairs)
        total = total / length.clamp(min=1) ** settings.length_power
    if settings.clip is not None:
        total = total.clamp(math.log1p(-settings.clip), math.log1p(settings.clip))
    return total


def _main_loss(h: Tensor, settings: Preference, smoothing: Tensor | None) -> Tensor:
    """(P,) the sigmoid or ipo term of the loss; h: (P,) after the margin."""
    if settings.form == "ipo":
        return (h / settings.beta - 1 / (2 * settings.beta)) ** 2
    loss = -F.logsigmoid(h)
    if smoothing is None and settings.smoothing == 0:
        return loss
    eps = settings.smoothing if smoothing is None else smoothing.to(h)
    return (1 - eps) * loss - eps * F.logsigmoid(-h)


def _mean_nll(side: Side, num_pairs: int) -> Tensor:
    """(P,) mean -ln pi over the actions of each segment."""
    count = torch.bincount(side.pair, minlength=num_pairs).to(side.logp.device)
    return -_sum_by(side.logp.float(), side.pair, num_pairs) / count


def _sum_by(x: Tensor, pair: Tensor, num_pairs: int) -> Tensor:
    """(P,) sum of `x` (A,) over the actions of each pair."""
    return x.new_zeros(num_pairs).index_add(0, pair.to(x.device), x)


# --- weights -----------------------------------------------------------------------------------------------------


def reward_weights(rewards: Tensor, segment: Tensor, gamma: float) -> Tensor:
    """(M,) step weights softmax(gamma r) T within each segment, T its number of steps; gamma 0 gives exactly 1.

    The factor T keeps the sum of the weights, and with it the meaning of beta. For rejected segments give -gamma: the
    worst step counts most (Full-Step-DPO; from its text, its code was not available).

    Args:
        rewards: (M,) reward of each step. segment: (M,) int, the segment it belongs to.

    Raises:
        ValueError: a step without reward.
    """
    if gamma == 0:
        return torch.ones_like(rewards, dtype=torch.float32)
    if bool(rewards.isnan().any()):
        row = int(rewards.isnan().nonzero()[0])
        raise ValueError(
            f"step weights by reward: a step of segment {int(segment[row])} has no reward; score all steps (by the "
            "recipe's step_rewards), or set loss.gamma=0"
        )
    _, dense = torch.unique(segment, return_inverse=True)
    num_segments = int(dense.max()) + 1 if len(dense) else 0
    scaled = gamma * rewards.double()
    # The softmax inside each segment; its largest entry is taken off first, so that exp cannot overflow.
    lowest = torch.full((num_segments,), -math.inf, dtype=scaled.dtype, device=scaled.device)
    top = lowest.scatter_reduce(0, dense, scaled, "amax")
    exp = (scaled - top[dense]).exp()
    total = exp.new_zeros(num_segments).index_add(0, dense, exp)
    size = torch.bincount(dense, minlength=num_segments)
    return (exp / total[dense] * size[dense]).float()


def guide_weights(guide: Tensor, alpha: float, beta: float, *, chosen: bool) -> Tensor:
    """(A,) 1 + alpha beta rho^G for chosen actions, 1 - alpha beta rho^G for rejected ones (TGDPO).

    guide: (A,) rho^G, log-ratio of the action under a frozen policy trained by DPO against the reference.
    """
    sign = 1.0 if chosen else -1.0
    return 1 + sign * alpha * beta * guide.detach().float()


def visit_smoothing(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(P,) eps = min(1 - c, 1/2), c = 1 / (1 + N_l / max(1, N_w)), N = visits of each branch (MCTS-DPO)."""
    confidence = 1 / (1 + rejected.double() / chosen.double().clamp(min=1))
    return (1 - confidence).clamp(max=0.5).float()


def token_rewards(better_logp: Tensor, worse_logp: Tensor) -> Tensor:
    """(A,) sigmoid(ln p(y_i | better) - ln p(y_i | worse)) - 1/2 (T-REG).

    better_logp, worse_logp: (A,) log-probs of the same actions under the reference, instructed to revise for the
    better and for the worse.
    """
    return torch.sigmoid(better_logp.float() - worse_logp.float()) - 0.5


def token_regulariser(chosen: Side, rejected: Side, h: Tensor, beta: float) -> Tensor:
    """(P,) w (R(w) + R(l)), R(y) = -sum beta rhat_i ln pi(i), w = sigmoid(-h) without gradient (T-REG).

    h: (P,) difference of the implicit rewards. Without w the method loses its gain.
    """
    total = torch.zeros_like(h)
    for side in (chosen, rejected):
        assert side.token_reward is not None
        # (A,) rhat_i
        rhat = side.token_reward.detach().to(h)
        total = total + _sum_by(-beta * rhat * side.logp.float(), side.pair, len(h))
    return torch.sigmoid(-h.detach()) * total


def value_ranking(chosen: Tensor, rejected: Tensor, *, margin: float = 0.0) -> Tensor:
    """max(0, margin - (v_w - v_l)): a value head learns the order of the pair (SVPO's auxiliary loss).

    chosen, rejected: (P,) values of the states after the two steps.
    """
    return (margin - (chosen.float() - rejected.float())).clamp(min=0)


# --- published settings ------------------------------------------------------------------------------------------


def fields_read(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Fields of a rollout that the loss itself reads with these settings, besides log-probs."""
    needed = {
        "step_reward": options["gamma"],
        "tags.visits": options["smooth_by_visits"],
        "actions.token_reward": options["regulariser"],
    }
    return tuple(name for name, setting in needed.items() if setting)


def published(name: str, source: str, pairs: str, **options: Any) -> Callable[[type[P]], type[P]]:
    """Enter a subclass of `Preference` whose defaults are those of a paper.

    Args:
        pairs, options: the pair builder and its options, where a recipe names none.
    """
    return register("preferences", name, reads=fields_read, source=source, pairs={"name": pairs, **options})


@published("dpo", "Rafailov et al. 2023", "leaves")
@dataclass(frozen=True)
class Dpo(Preference):
    """-ln sigmoid(beta (ln pi/ref (w) - ln pi/ref (l))) on whole responses, beta .1 (Rafailov et al. 2023)."""


@published("step_dpo", "Step-DPO, 2024", "first_wrong")
@dataclass(frozen=True)
class StepDpo(Preference):
    """DPO on the first wrong step against a right one after the same, right steps: weight 1 there, 0 on the prefix.

    beta .4 as in the authors' README; their recipe files have .05 (Step-DPO, 2024).
    """

    beta: PositiveFloat = 0.4


@published("full_step_dpo", "Full-Step-DPO, 2025", "leaves")
@dataclass(frozen=True)
class FullStepDpo(Preference):
    """DPO on whole responses with step weights softmax(gamma r) T (w) and softmax(-gamma r) T (l), r = step rewards.

    beta .05, gamma 1: from the paper's text (Full-Step-DPO, 2025); gamma 0 is DPO.
    """

    beta: PositiveFloat = 0.05
    gamma: float = 1.0


@published("mcts_dpo", "MCTS-DPO / IPL, 2024", "best_path", by="value")
@dataclass(frozen=True)
class MctsDpo(Preference):
    """DPO on the best against the worst sibling at each depth of the best path, beta .1, labels smoothed by visits.

    eps = min(1 - c, 1/2), c = 1 / (1 + N_l / max(1, N_w)); as in the authors' code (MCTS-DPO / IPL, 2024), which also
    offers length_power 1.25.
    """

    smooth_by_visits: bool = True


@published("svpo", "SVPO, 2024; weights as set here", "siblings", by="value", threshold=0.1)
@dataclass(frozen=True)
class Svpo(Preference):
    """DPO on siblings whose values differ by a margin, plus the chosen step's NLL (SVPO, 2024; weights as set here).

    Its value head is a step scorer trained by `mmrl.losses.reward.value_margin`.
    """

    nll: float = 1.0


@published("pdpo", "video-SALMONN-o1, 2025", "contrastive")
@dataclass(frozen=True)
class Pdpo(Preference):
    """DPO, beta .1, on the better and the worse of two steps after one prefix, at contrastively selected steps.

    Process DPO of video-SALMONN-o1 (2025); the published code has the selection, the loss is the text's.
    """


@published("tgdpo", "TGDPO, 2025", "leaves")
@dataclass(frozen=True)
class Tgdpo(Preference):
    """DPO with action weights 1 + alpha beta rho^G (w) and 1 - alpha beta rho^G (l), rho^G of a frozen DPO model.

    beta .1, alpha .5, as in the authors' code (TGDPO, 2025).
    """

    guide: float = 0.5


@published("t_reg", "T-REG, 2024", "leaves")
@dataclass(frozen=True)
class TReg(Preference):
    """DPO + alpha w (R(w) + R(l)), R(y) = -sum beta rhat_i ln pi(i), w = sigmoid(r(l) - r(w)); beta .1, alpha .25.

    rhat_i comes from the model's own opinion of each token under opposite instructions (T-REG, 2024).
    """

    regulariser: float = 0.25


def preset(name: str, **changes: Any) -> Preference:
    """The settings of a published method, some of them changed.

    Raises:
        ComponentError: unknown name or setting (the nearest is named), or a value out of range.
    """
    settings: Preference = build("preferences", "loss", name, changes)
    return settings
