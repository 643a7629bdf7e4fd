"""`compose`: from a tree with rewards to advantages, in three stages.

Transforms change the rewards, a weighted sum of estimators turns them into advantages, and the result is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from mmrl.config import Component, Section
from mmrl.credit.norm import AllSum, Norm, norm
from mmrl.credit.norm import whiten as whiten_over_batch
from mmrl.credit.outcome import Past
from mmrl.credit.rules import Kind, check_need, check_recipe, check_tree
from mmrl.credit.table import Credit, Spec, as_specs, estimator_of, transform_of
from mmrl.registry import ComponentError, names
from mmrl.tree import StepTree

Counting = Literal["node", "leaf"]


class EstimatorConfig(Component):
    """One estimator of a weighted sum: its name, its weight, and beside them its options."""

    weight: float = 1.0

    @property
    def spec(self) -> dict[str, Any]:
        """The mapping that `mmrl.credit.compose` takes."""
        return {"name": self.name, "weight": self.weight, **self.options}


class CreditConfig(Section):
    """Transforms, then a weighted sum of estimators, then the clip. `mmrl list estimators` prints what there is."""

    # null = none; with a trained scorer as step reward, clip (at 1/2) and delta, so that writing more steps never pays
    # (Clip/Delta, Designing Effective RL Reward).
    transforms: list[str | dict[str, Any]] | None = None
    estimators: list[EstimatorConfig] = Field(default_factory=lambda: [EstimatorConfig(name="grpo")], min_length=1)
    counting: Literal["node", "leaf"] = "node"
    # The meaning of the step rewards: a value is a score of the state and must be differenced before it is summed.
    step_reward_kind: Literal["reward", "value"] = "reward"
    # Centre and scale the summed advantages over the whole batch.
    whiten: bool = False
    allow_double_norm: bool = False
    # Advantages are clamped to +-clip. Every public diffusion trainer has 5, those of language models have none.
    clip: PositiveFloat | None = None


@dataclass(frozen=True)
class StepAdvantage:
    """adv, returns, weight: (N,) float64; valid: (N,) bool. adv is 0 where not valid.

    weight is how often a step counts in the loss: 1 (`counting="node"`: each step trained once) or the number of
    finished leaves below it (`"leaf"`: the same gradient as training every root-to-leaf path on its own).
    info["outcome"] holds the outcomes after the transforms.
    """

    adv: Tensor
    returns: Tensor
    valid: Tensor
    weight: Tensor
    info: dict[str, Any] = field(default_factory=dict)


def estimate(
    tree: StepTree,
    name: str,
    transforms: Sequence[str | Spec] = (),
    *,
    counting: Counting = "node",
    **options: Any,
) -> StepAdvantage:
    """Advantages of all steps by one estimator; `compose` with one entry. Options are the estimator's own."""
    return compose(tree, [{"name": name, **options}], transforms, counting=counting)


def compose(
    tree: StepTree,
    estimators: Sequence[str | Spec],
    transforms: Sequence[str | Spec] = (),
    *,
    counting: Counting = "node",
    kind: Kind = "reward",
    whiten: bool = False,
    allow_double_norm: bool = False,
    repeats_prefix: bool = False,
    all_sum: AllSum | None = None,
    past: Past = (),
) -> StepAdvantage:
    """A = sum over estimators of weight * A_k, on the transformed tree.

    Args:
        tree: outcomes, step rewards, values ... written into it.
        estimators: at least one, names or {"name": ..., "weight": 1.0, option: ...}. Normalising ones also take
            scale, eps, ddof, singleton and preset (a row of NORM_PRESETS).
        transforms: names, or {"name": ..., option: ...}, applied in order.
        kind, repeats_prefix: see `rules.check_recipe`.
        whiten: centre and scale the sum over the whole batch.
        all_sum: sums a tensor over processes, for the estimators whose statistics span the batch.
        past: earlier outcomes of each prompt, oldest first, for the estimators that remember them.

    Raises:
        ValueError: no estimator, unknown name or option (with the nearest), a combination without meaning, or a tree
            that lacks what an estimator needs.
    """
    estimators = as_specs(estimators, "estimators")
    applied = validate(
        estimators,
        transforms,
        kind=kind,
        whiten=whiten,
        allow_double_norm=allow_double_norm,
        counting=counting,
        repeats_prefix=repeats_prefix,
    )
    before = tree
    for spec in applied:
        tree = apply_transform(tree, spec)
    check_tree(tree, estimators, applied)

    credits = [_run(tree, spec, all_sum, past) for spec in estimators]
    weights = [float(spec.get("weight", 1.0)) for spec in estimators]
    adv = torch.stack([weight * credit.adv for weight, credit in zip(weights, credits, strict=True)]).sum(0)
    if whiten:
        adv = whiten_over_batch(torch.where(tree.valid, adv, 0.0), tree.valid.double(), all_sum)

    info = {"estimators": [dict(spec) for spec in estimators], "transforms": applied}
    # Backwards, so that of two estimators with the same fact the first one's is logged.
    for credit in reversed(credits):
        info |= credit.info
    # A critic learns from the returns of the first estimator.
    return _finish(tree, before, adv, credits[0].returns, counting, info)


def validate(
    estimators: Sequence[str | Spec], transforms: Sequence[str | Spec] = (), **how: Any
) -> list[dict[str, Any]]:
    """Check names, options and combination without a tree; returns the transforms as mappings.

    how: see `rules.check_recipe`. Raises ValueError as `compose` does.
    """
    estimators = as_specs(estimators, "estimators")
    applied = as_specs(transforms, "transforms")
    if not estimators:
        raise ComponentError(f"estimators is empty: name at least one of {', '.join(names('estimators'))}")
    for spec in applied:
        row, options = transform_of(spec)
        row.check(options)
    for spec in estimators:
        row, options = estimator_of(spec)
        row.check(options)
    check_recipe(applied, estimators, **how)
    return applied


def apply_transform(tree: StepTree, spec: Spec) -> StepTree:
    """One transform by name, its needs and options checked."""
    row, options = transform_of(spec)
    for need in row.reads(options):
        check_need(tree, need, f"transform {row.name!r}")
    changed: StepTree = row.build(options)(tree)
    return changed


def _run(tree: StepTree, spec: Spec, all_sum: AllSum | None, past: Past) -> Credit:
    """The credit of one estimator; `all_sum` and `past` reach only functions that take them."""
    row, options = estimator_of(spec)
    credit: Credit = row.build(options, all_sum=all_sum, past=past)(tree)
    return credit


def _finish(
    tree: StepTree, before: StepTree, adv: Tensor, returns: Tensor | None, counting: Counting, info: dict[str, Any]
) -> StepAdvantage:
    """The advantages, zero on invalid steps and checked to be finite, with facts for the log.

    Args:
        tree: after the transforms. before: the tree of the rollout, whose outcomes decide what has no spread.
    """
    valid = tree.valid
    adv = torch.where(valid, adv, 0.0)
    if not bool(adv.isfinite().all()):
        i = int((~adv.isfinite()).nonzero()[0])
        names_of_sum = [spec["name"] for spec in info["estimators"]]
        raise ValueError(f"{names_of_sum} gave step {i} the advantage {adv[i].item()}")
    size = adv[valid].abs()
    groups = norm(before.outcome, before.group, Norm(scale="none"))
    # A lone outcome has no spread either.
    without_spread = groups.constant | (groups.size < 2)
    info |= {
        "outcome": tree.outcome,
        "groups": tree.num_groups,
        "zero_spread_groups": int(without_spread.sum()),
        "valid_frac": float(valid.double().mean()) if len(tree) else 0.0,
        "adv_abs_mean": float(size.mean()) if size.numel() else 0.0,
        "adv_abs_max": float(size.max()) if size.numel() else 0.0,
    }
    weight = tree.leaves_below.double() if counting == "leaf" else valid.double()
    returns = adv if returns is None else torch.where(valid, returns, 0.0)
    return StepAdvantage(adv, returns, valid, weight, info)
