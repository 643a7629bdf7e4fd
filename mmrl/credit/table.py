"""The tables of estimators and transforms. A new one is a function and the decorator that names it.

A row says what the function needs; `compose.check` turns a missing need into an error. Shared needs:
outcome, step_reward, value, root_value, state_key, edge_key, ok, logp, forks (a prompt with two chains is enough for
sets), and tags.NAME.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from mmrl.tree import StepTree


class Credit(NamedTuple):
    """What an estimator returns: adv (N,), optionally returns (N,), and facts worth logging."""

    adv: Tensor
    returns: Tensor | None = None
    info: dict[str, Any] = {}  # noqa: RUF012 - never mutated


@dataclass(frozen=True)
class Estimator:
    """One row: the function, what it needs, which modalities it fits, where it comes from."""

    name: str
    function: Callable[..., Credit]
    needs: tuple[str, ...]
    fits: str
    source: str

    @property
    def uses_steps(self) -> bool:
        """Reads step rewards; the others read outcomes only, so step-reward transforms would be lost on them."""
        return "step_reward" in self.needs or "value" in self.needs


@dataclass(frozen=True)
class Transform:
    """One row. writes: "step_reward", "outcome" or "tags". differences: turns a running score into increments."""

    name: str
    function: Callable[..., StepTree]
    writes: Literal["step_reward", "outcome", "tags"]
    needs: tuple[str, ...]
    differences: bool
    chains_only: bool
    source: str


ESTIMATORS: dict[str, Estimator] = {}
TRANSFORMS: dict[str, Transform] = {}


def estimator(
    name: str, *, needs: tuple[str, ...] = ("outcome",), fits: str = "any", source: str
) -> Callable[[Callable[..., Credit]], Callable[..., Credit]]:
    """Enter the decorated function into ESTIMATORS under `name`."""

    def enter(function: Callable[..., Credit]) -> Callable[..., Credit]:
        ESTIMATORS[name] = Estimator(name, function, needs, fits, source)
        return function

    return enter


def transform(
    name: str,
    *,
    writes: Literal["step_reward", "outcome", "tags"] = "step_reward",
    needs: tuple[str, ...] = ("step_reward",),
    differences: bool = False,
    chains_only: bool = False,
    source: str,
) -> Callable[[Callable[..., StepTree]], Callable[..., StepTree]]:
    """Enter the decorated function into TRANSFORMS under `name`."""

    def enter(function: Callable[..., StepTree]) -> Callable[..., StepTree]:
        TRANSFORMS[name] = Transform(name, function, writes, needs, differences, chains_only, source)
        return function

    return enter
