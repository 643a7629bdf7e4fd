"""estimate(): transforms, then one estimator, then what every advantage must satisfy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

import mmrl.credit.outcome  # noqa: F401 - enters its estimators into the table
from mmrl.credit.norm import norm
from mmrl.credit.table import ESTIMATORS, TRANSFORMS, Credit
from mmrl.tree import StepTree

Counting = Literal["node", "leaf"]


@dataclass(frozen=True)
class StepAdvantage:
    """adv, returns, weight: (N,) float64; valid: (N,) bool. adv is 0 where not valid.

    weight is how often a step counts in the loss: 1 (`counting="node"`: each step trained once) or the number of
    finished leaves below it (`"leaf"`: the same gradient as training every root-to-leaf path on its own).
    """

    adv: Tensor
    returns: Tensor
    valid: Tensor
    weight: Tensor
    info: dict[str, Any] = field(default_factory=dict)


def estimate(
    tree: StepTree,
    name: str,
    transforms: Sequence[str | Mapping[str, Any]] = (),
    *,
    counting: Counting = "node",
    **options: Any,
) -> StepAdvantage:
    """Advantages of all steps by the estimator `name`, after `transforms` in their order.

    Args:
        tree: outcomes (and step rewards) written into it.
        name: a row of ESTIMATORS.
        transforms: names, or mappings {"name": ..., option: ...}.
        options: keyword options of the estimator.

    Raises:
        ValueError: unknown estimator, transform or option (with the nearest name), or a tree the estimator has no
            meaning for.
    """
    applied = []
    for item in transforms:
        spec = {"name": item} if isinstance(item, str) else dict(item)
        applied.append(spec.copy())
        function = _lookup(TRANSFORMS, str(spec.pop("name")), "transform").function
        tree = function(tree, **_checked_options(function, spec))
    row = _lookup(ESTIMATORS, name, "estimator")
    if row.check is not None:
        row.check(tree)
    credit = row.function(tree, **_checked_options(row.function, options))
    return _finish(tree, credit, counting, {"estimator": name, "transforms": applied})


def _finish(tree: StepTree, credit: Credit, counting: Counting, info: dict[str, Any]) -> StepAdvantage:
    valid = tree.valid
    adv = torch.where(valid, credit.adv, 0.0)
    if not bool(adv.isfinite().all()):
        i = int((~adv.isfinite()).nonzero()[0])
        raise ValueError(f"estimator {info['estimator']!r} gave step {i} the advantage {adv[i].item()}")
    size = adv[valid].abs()
    groups = norm(tree.outcome, tree.group, scale="none")
    info |= {
        "groups": tree.num_groups,
        "zero_spread_groups": int(groups.constant.sum()),
        "valid_frac": float(valid.double().mean()) if len(tree) else 0.0,
        "adv_abs_mean": float(size.mean()) if size.numel() else 0.0,
        "adv_abs_max": float(size.max()) if size.numel() else 0.0,
        **credit.info,
    }
    returns = adv if credit.returns is None else torch.where(valid, credit.returns, 0.0)
    weight = tree.m.double() if counting == "leaf" else valid.double()
    return StepAdvantage(adv, returns, valid, weight, info)


def _lookup(table: dict[str, Any], name: str, kind: str) -> Any:
    if name in table:
        return table[name]
    near = get_close_matches(name, table, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"unknown {kind} {name!r}{hint}; known: {', '.join(table) or 'none'}")


def _checked_options(function: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    known = [p for p in inspect.signature(function).parameters if p != "tree"]
    for key in options:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"{function.__name__} has no option {key!r}{hint}; it takes {', '.join(known) or 'none'}")
    return dict(options)
