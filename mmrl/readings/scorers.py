"""Readings that run a scorer: its scores as any field, its log-ratios as implicit rewards, its attributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.capabilities import Attributor, RootScorer, model_of
from mmrl.finite import check_finite
from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import register
from mmrl.rollout import Rollout, StepReward, StepScorer
from mmrl.scorers.implicit import Against, ImplicitPrm, step_log_ratios
from mmrl.scorers.scoring import ScorerSpec, good_logits, load_scorer
from mmrl.tree import StepTree
from mmrl.tree_ops import before, last_scored, need_chains, run_head

Form = Literal["score", "logit"]


def _score_fields(options: Mapping[str, Any]) -> tuple[str, ...]:
    into = str(options["into"])
    return (into, "root_value") if options["root"] else (into,)


@register(
    "readings",
    "score",
    writes=_score_fields,
    may_write=("root_value", "step_reward", "ok", "tags.*"),
    scorer="scorer",
    source="a critic (Schulman et al. 2016), RED, PAV, BARFI, ALaRM; any step reward or trained scorer",
)
class ScoreReading:
    """The scores of a step reward in the field `into`: `value`, `step_reward`, `ok` or a tag as `tags.auxiliary`.

    A score belongs to the state after its step. As `value`, a step that the scorer cannot read (blank, too long) takes
    the value of the nearest step above it that has one, or of the prompt.

    Args:
        scorer: a registered name, a saved scorer's folder, or a section with `name` and options.
        root: fill `root_value` as well, with the scorer's number for the prompt alone.
        form: the score, or the logit of a trained scorer, for losses whose prediction is the logit.
        below: fill `into` with verdicts instead: 1 where the number lies below this one, such as 0.5 for `tags.wrong`,
            else 0.
        at_least: likewise, 1 where the number is this one or above, such as 0.5 for `ok` (no number: not right).
    Raises:
        ValueError: another field, or a scorer that lacks what `root` or `form` asks for.
    """

    def __init__(
        self,
        scorer: ScorerSpec,
        into: str = "value",
        root: bool = False,
        form: Form = "score",
        below: float | None = None,
        at_least: float | None = None,
    ) -> None:
        if into not in ("value", "step_reward", "ok") and not into.startswith("tags."):
            raise ValueError(f"into={into!r} is no field of a step; name value, step_reward, ok or tags.<name>")
        if below is not None and at_least is not None:
            raise ValueError("below and at_least both make verdicts; give one of them")
        verdicts = below is not None or at_least is not None
        if verdicts and into in ("value", "step_reward"):
            raise ValueError(
                f"below and at_least make verdicts, which {into} does not hold; name ok or a tag, as tags.wrong"
            )
        if into == "ok" and not verdicts:
            raise ValueError("ok is a verdict; say from which score a step is right, such as at_least: 0.5")
        if form == "logit" and root:
            raise ValueError("root scores are no logits; leave root or form: logit out")
        # Option as an error message names it -> the protocol that it needs.
        needs: dict[str, type] = {}
        if root:
            needs["root: true"] = RootScorer
        if form == "logit":
            needs["form: logit (not form: score)"] = StepScorer
        loaded = load_scorer(scorer, needs=needs, untrained=True)
        self.scorer: StepReward | None = loaded
        self.into, self.root, self.form = into, root, form
        self.below, self.at_least = below, at_least

    @property
    def model(self) -> nn.Module | None:
        """The scorer's model, None for a scorer without one."""
        return model_of(self.scorer)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """The field `into`, and `root_value` with `root`."""
        scorer = self.scorer
        assert scorer is not None
        if self.form == "logit":
            assert isinstance(scorer, StepScorer)
            numbers = good_logits(scorer, rollout)
        else:
            numbers = scorer(rollout).double().cpu()
        columns: dict[str, Tensor] = {}
        root = torch.full((len(rollout.prompts),), torch.nan, dtype=torch.float64)
        if self.root:
            assert isinstance(scorer, RootScorer)
            root = scorer.root_scores(rollout).double().cpu()
            columns["root_value"] = root
        if self.into == "value":
            numbers = _held(rollout.tree, numbers, root)
        if self.below is not None:
            numbers = torch.where(numbers.isnan(), torch.nan, (numbers < self.below).double())
        if self.at_least is not None:
            numbers = torch.where(numbers.isnan(), torch.nan, (numbers >= self.at_least).double())
        # `ok` is a bool: a step without number is not right.
        columns[self.into] = numbers == 1 if self.into == "ok" else numbers
        return columns


def _held(tree: StepTree, value: Tensor, root: Tensor) -> Tensor:
    """(N,) `value`, where it is NaN that of the nearest step above that has one, else of the prompt, `root` (G,)."""
    held = last_scored(tree, value)
    return torch.where(held.isnan(), root[tree.group], held)


@register(
    "readings",
    "implicit",
    writes=("tags.implicit",),
    source="Free Process Rewards (Implicit PRM), PRIME, OPRL",
    reference=lambda options: options["scorer"] is None,
    scorer="scorer",
)
class ImplicitReading:
    """tags.implicit: beta times the log-ratio of each step's actions, 0 for steps without a density.

    Args:
        scorer: an `implicit_prm`, by section or folder, with its own beta. Without one the policy in training is
            compared with its initial weights.
        beta: without a scorer; 0.05 as PRIME.
        against: the scorer's own reference (PRIME), or the policy that sampled, by the log-probs of the rollout
            (OPRL; give the scorer's policy the temperature of the sampling one).
    Raises:
        ValueError: another kind of scorer, or the policy against itself.
    """

    def __init__(
        self, scorer: ScorerSpec | None = None, beta: float | None = None, against: Against = "reference"
    ) -> None:
        loaded = None if scorer is None else load_scorer(scorer, untrained=True)
        if loaded is not None and not isinstance(loaded, ImplicitPrm):
            raise ValueError(f"scorer {scorer!r} has no log-ratios; name implicit_prm, or use the reading `score`")
        if loaded is not None and beta is not None:
            raise ValueError(f"beta={beta:g}: the scorer has its own; write it into the scorer's section")
        if loaded is None and against == "behaviour":
            raise ValueError("against: behaviour compares a scorer with the policy in training; name a scorer")
        self.scorer: StepReward | None = loaded
        self._implicit, self.beta, self.against = loaded, 0.05 if beta is None else beta, against

    @property
    def model(self) -> nn.Module | None:
        """The scorer's model, None without a scorer."""
        return model_of(self.scorer)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """`tags.implicit` (N,)."""
        if self._implicit is not None:
            rewards = self._implicit.step_rewards(rollout, self.against)
        else:
            steps = torch.arange(len(rollout.tree))
            with torch.no_grad():
                rewards = self.beta * step_log_ratios(context.policy, rollout, steps)
            check_finite(rewards.cpu(), "the policy", "steps")
        return {"tags.implicit": rewards.double().cpu()}


Attribution = Literal["gradient", "difference"]


@register(
    "readings",
    "attribution",
    reads=("chains",),
    writes=("tags.attribution",),
    fits="chains",
    source="Explainable dense reward shapes; gradient times input and score differences in place of SHAP and LIME",
    scorer="scorer",
)
class AttributionReading:
    """tags.attribution (N, I): shares of the outcome by a scorer, a column per entry of `by`; 1 along every solution.

    gradient: gradient times input of the last step's logit with respect to the embeddings of a step's tokens.
    difference: change of the score by the step, from the score of the prompt alone. Shares are absolute values over
    their sum: signed ones have sums near 0, which would blow single steps up. Equal shares where nothing moves it.

    Args:
        scorer: a registered name, a saved scorer's folder, or a section with `name` and options.
    Raises:
        ValueError: a scorer that lacks what `by` asks for. Of the rollout: it branches, and shares of a common step
            would differ from solution to solution.
    """

    def __init__(
        self, scorer: ScorerSpec, by: Annotated[Sequence[Attribution], Field(min_length=1)] = ("gradient",)
    ) -> None:
        protocols: dict[str, type] = {"gradient": Attributor, "difference": RootScorer}
        needs = {f"by: {name}": protocols[name] for name in by}
        self.scorer: StepReward | None = load_scorer(scorer, needs=needs, untrained=True)
        self.by = tuple(by)

    @property
    def model(self) -> nn.Module | None:
        """The scorer's model, None for a scorer without one."""
        return model_of(self.scorer)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """`tags.attribution` (N, I)."""
        need_chains(rollout.tree, "reading 'attribution'", "take a plan that forks at the prompt alone, {0: G}")
        columns = []
        for name in self.by:
            attribution = self._gradient(rollout) if name == "gradient" else self._difference(rollout)
            columns.append(_shares(rollout.tree, attribution))
        return {"tags.attribution": torch.stack(columns, 1)}

    def _gradient(self, rollout: Rollout) -> Tensor:
        assert isinstance(self.scorer, Attributor)
        return self.scorer.attributions(rollout).double().cpu()

    def _difference(self, rollout: Rollout) -> Tensor:
        assert isinstance(self.scorer, RootScorer) and self.scorer is not None
        root = self.scorer.root_scores(rollout).double().cpu()
        score = _held(rollout.tree, self.scorer(rollout).double().cpu(), root)
        return score - before(rollout.tree, score, root)


def _shares(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) |x| over its sum along each chain, 1 / length where that is 0."""
    chain = run_head(tree, torch.ones(len(tree), dtype=torch.bool))
    zero = torch.zeros(len(tree), dtype=torch.float64)
    total = zero.index_add(0, chain, x.abs())[chain]
    length = zero.index_add(0, chain, torch.ones_like(zero))[chain]
    return torch.where(total > 0, x.abs() / total.where(total > 0, 1.0), 1 / length)
