"""How an estimator or a transform enters the registry: a function and the decorator that names it.

`reads` names the fields a tree must have; `mmrl.credit.rules` checks them. See `mmrl.registry` for their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mmrl.registry import Fields, Row, find, register
from mmrl.tree import StepTree

Spec = Mapping[str, Any]  # {"name": ..., option: ...}


class Credit(NamedTuple):
    """What an estimator returns: adv (N,), optionally returns (N,), and facts worth logging."""

    adv: Tensor
    returns: Tensor | None = None
    info: dict[str, Any] = {}  # noqa: RUF012 - never mutated


def estimator(
    name: str,
    *,
    reads: Fields = ("outcome",),
    fits: str = "any",
    source: str,
    may_read: tuple[str, ...] = (),
    sums_steps: bool = False,
    scale: str | None = None,
) -> Callable[[Callable[..., Credit]], Callable[..., Credit]]:
    """Enter the decorated function as an estimator.

    Args:
        may_read: fields it uses where the tree has them.
        sums_steps: it adds step rewards up along a path, so a score of the state must be differenced before.
        scale: the normalisation it uses where that is no option.
    """
    return register(
        "estimators", name, reads=reads, fits=fits, source=source,
        may_read=may_read, sums_steps=sums_steps, scale=scale,
    )  # fmt: skip


def transform(
    name: str,
    *,
    reads: Fields = ("step_reward",),
    writes: tuple[str, ...] = ("step_reward",),
    differences: bool = False,
    fits: str = "any",
    source: str,
) -> Callable[[Callable[..., StepTree]], Callable[..., StepTree]]:
    """Enter the decorated function as a transform. differences: it turns a running score into increments."""
    return register("transforms", name, reads=reads, writes=writes, fits=fits, source=source, differences=differences)


def estimator_of(spec: Spec) -> tuple[Row, dict[str, Any]]:
    """The row that `{"name": ..., "weight": ..., option: ...}` names, and its options."""
    return _row_of("estimators", spec)


def transform_of(spec: Spec) -> tuple[Row, dict[str, Any]]:
    """The row that `{"name": ..., option: ...}` names, and its options."""
    return _row_of("transforms", spec)


def _row_of(kind: str, spec: Spec) -> tuple[Row, dict[str, Any]]:
    options = {k: v for k, v in spec.items() if k not in ("name", "weight")}
    return find(kind, str(spec["name"])), options
