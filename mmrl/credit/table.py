"""The tables of estimators and transforms. A new one is a function and the decorator that names it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from mmrl.tree import StepTree


class Credit(NamedTuple):
    """What an estimator returns: adv (N,), optionally returns (N,), and facts worth logging."""

    adv: Tensor
    returns: Tensor | None = None
    info: dict[str, float] = {}  # noqa: RUF012 - never mutated


@dataclass(frozen=True)
class Estimator:
    """One row of the table: the function, what it needs, which modalities it fits and where it comes from."""

    name: str
    function: Callable[..., Credit]
    needs: tuple[str, ...]
    fits: str
    source: str
    check: Callable[[StepTree], None] | None = None


@dataclass(frozen=True)
class Transform:
    """A pure function tree -> tree applied before the estimator."""

    name: str
    function: Callable[..., StepTree]
    options: dict[str, Any] = field(default_factory=dict)


ESTIMATORS: dict[str, Estimator] = {}
TRANSFORMS: dict[str, Transform] = {}


def estimator(
    name: str,
    *,
    needs: tuple[str, ...] = ("outcome",),
    fits: str = "any",
    source: str,
    check: Callable[[StepTree], None] | None = None,
) -> Callable[[Callable[..., Credit]], Callable[..., Credit]]:
    """Enter the decorated function into the table under `name`; `check` raises on trees it has no meaning for."""

    def enter(function: Callable[..., Credit]) -> Callable[..., Credit]:
        ESTIMATORS[name] = Estimator(name, function, needs, fits, source, check)
        return function

    return enter
