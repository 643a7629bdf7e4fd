"""compose(): transforms, then a weighted sum of estimators, then what every advantage must satisfy."""

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
    """One estimator of a weighted sum: weight and its own options beside the name."""

    weight: float = 1.0

    @property
    def spec(self) -> dict[str, Any]:
        """As `mmrl.credit.compose` takes it."""
        return {"name": self.name, "weight": self.weight, **self.options}


class CreditConfig(Section):
    """Transforms, then a weighted sum of estimators, then the clip. `mmrl list estimators` prints what there is."""

    # null = none; with a trained scorer as step reward, clip (at 1/2) and delta, so that writing more steps never pays
    # (Clip/Delta, Designing Effective RL Reward).
    transforms: list[str | dict[str, Any]] | None = None
    estimators: list[EstimatorConfig] = Field(default_factory=lambda: [EstimatorConfig(name="grpo")], min_length=1)
    counting: Literal["node", "leaf"] = "node"
    # A value scores the state and must be differenced.
    step_reward_kind: Literal["reward", "value"] = "reward"
    whiten: bool = False  # centre and scale the sum over the whole batch
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
    tree: StepTree, name: str, transforms: Sequence[str | Spec] = (), *,
    counting: Counting = "node", **options: Any,
) -> StepAdvantage:  # fmt: skip
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
    steps = validate(
        estimators, transforms, kind=kind, whiten=whiten, allow_double_norm=allow_double_norm, counting=counting,
        repeats_prefix=repeats_prefix,
    )  # fmt: skip
    before = tree
    for t in steps:
        tree = apply_transform(tree, t)
    check_tree(tree, estimators, steps)
    parts = [(float(e.get("weight", 1.0)), _run(tree, e, all_sum, past)) for e in estimators]
    adv = torch.stack([w * c.adv for w, c in parts]).sum(0)
    if whiten:
        adv = whiten_over_batch(torch.where(tree.valid, adv, 0.0), tree.valid.double(), all_sum)
    info = {"estimators": [dict(e) for e in estimators], "transforms": steps}
    for _, c in reversed(parts):
        info |= c.info
    return _finish(tree, before, adv, parts[0][1].returns, counting, info)


def validate(
    estimators: Sequence[str | Spec], transforms: Sequence[str | Spec] = (), **how: Any
) -> list[dict[str, Any]]:
    """Check names, options and combination without a tree; returns the transforms as mappings.

    how: see `rules.check_recipe`. Raises ValueError as `compose` does.
    """
    estimators, steps = as_specs(estimators, "estimators"), as_specs(transforms, "transforms")
    if not estimators:
        raise ComponentError(f"estimators is empty: name at least one of {', '.join(names('estimators'))}")
    for t in steps:
        row, options = transform_of(t)
        row.check(options)
    for e in estimators:
        row, options = estimator_of(e)
        row.check(options)
    check_recipe(steps, estimators, **how)
    return steps


def apply_transform(tree: StepTree, spec: Spec) -> StepTree:
    """One transform by name, its needs and options checked."""
    row, options = transform_of(spec)
    for need in row.reads(options):
        check_need(tree, need, f"transform {row.name!r}")
    changed: StepTree = row.build(options)(tree)
    return changed


def _run(tree: StepTree, spec: Spec, all_sum: AllSum | None, past: Past) -> Credit:
    row, options = estimator_of(spec)
    credit: Credit = row.build(options, all_sum=all_sum, past=past)(tree)
    return credit


def _finish(
    tree: StepTree, before: StepTree, adv: Tensor, returns: Tensor | None, counting: Counting, info: dict[str, Any]
) -> StepAdvantage:
    valid = tree.valid
    adv = torch.where(valid, adv, 0.0)
    if not bool(adv.isfinite().all()):
        i = int((~adv.isfinite()).nonzero()[0])
        raise ValueError(f"{[e['name'] for e in info['estimators']]} gave step {i} the advantage {adv[i].item()}")
    size = adv[valid].abs()
    groups = norm(before.outcome, before.group, Norm(scale="none"))
    info |= {
        "outcome": tree.outcome,
        "groups": tree.num_groups,
        "zero_spread_groups": int((groups.constant | (groups.size < 2)).sum()),  # a lone outcome has no spread either
        "valid_frac": float(valid.double().mean()) if len(tree) else 0.0,
        "adv_abs_mean": float(size.mean()) if size.numel() else 0.0,
        "adv_abs_max": float(size.max()) if size.numel() else 0.0,
    }
    weight = tree.m.double() if counting == "leaf" else valid.double()
    return StepAdvantage(adv, adv if returns is None else torch.where(valid, returns, 0.0), valid, weight, info)
