"""The decorators by which estimators and transforms enter the registry.

    @estimator("mean_outcome", source="example")
    def mean_outcome(tree: StepTree) -> Credit:
        return Credit(lift(tree, tree.outcome))

`reads` names the fields a tree must have; `mmrl.credit.rules` checks them. See `mmrl.registry` for their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mmrl.registry import ComponentError, Fields, Row, find, register
from mmrl.tree import StepTree

# An entry of a recipe: {"name": ..., option: ...}.
Spec = Mapping[str, Any]


class Credit(NamedTuple):
    """The result of an estimator: advantages (N,), optionally returns (N,) for a critic, and facts for the log."""

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
    scale: str | Callable[[Mapping[str, Any]], str] | None = None,
    remembers: str | None = None,
    relative: bool = False,
) -> Callable[[Callable[..., Credit]], Callable[..., Credit]]:
    """Enter the decorated function as an estimator.

    Args:
        may_read: fields that the function uses where the tree has them.
        sums_steps: it adds step rewards up along a path, so a score of the state must be differenced before.
        scale: the normalisation of a function without that option; it may depend on the other options.
        relative: it compares the outcomes of one prompt alone, so a single rollout of it teaches nothing.
        remembers: the option whose value is the number of earlier outcomes of each prompt that the function gets, as
            its argument `past`.
    """
    return register(
        "estimators",
        name,
        reads=reads,
        fits=fits,
        source=source,
        may_read=may_read,
        sums_steps=sums_steps,
        scale=scale,
        remembers=remembers,
        relative=relative,
    )


def transform(
    name: str,
    *,
    reads: Fields = ("step_reward",),
    writes: tuple[str, ...] = ("step_reward",),
    differences: bool = False,
    sums_steps: bool = False,
    fits: str = "any",
    source: str,
) -> Callable[[Callable[..., StepTree]], Callable[..., StepTree]]:
    """Enter the decorated function as a transform.

    Args:
        differences: it turns a running score into increments.
        sums_steps: it adds step rewards up along a path, so a score of the state must be differenced before.
    """
    return register(
        "transforms",
        name,
        reads=reads,
        writes=writes,
        fits=fits,
        source=source,
        differences=differences,
        sums_steps=sums_steps,
    )


def estimator_of(spec: Spec) -> tuple[Row, dict[str, Any]]:
    """The row that `{"name": ..., "weight": ..., option: ...}` names, and its options.

    Raises ComponentError for an estimator with an option called `weight`, which would never be set.
    """
    row = find("estimators", str(spec["name"]))
    if "weight" in row.options:
        raise ComponentError(
            f"estimator {row.name!r} has an option 'weight', which a recipe reads as its weight in the sum; rename it"
        )
    return row, {option: value for option, value in spec.items() if option not in ("name", "weight")}


def transform_of(spec: Spec) -> tuple[Row, dict[str, Any]]:
    """The row that `{"name": ..., option: ...}` names, and its options."""
    row = find("transforms", str(spec["name"]))
    return row, {option: value for option, value in spec.items() if option != "name"}


def as_specs(entries: Sequence[str | Spec], kind: str) -> list[dict[str, Any]]:
    """Names and mappings as mappings with a name; `kind` is for the message.

    Raises ComponentError for something that is no list, and for an entry without name.
    """
    if isinstance(entries, str | Mapping):
        raise ComponentError(f"{kind}={entries!r} must be a list, such as [{entries!r}]")
    specs = [{"name": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
    for spec in specs:
        if "name" not in spec:
            raise ComponentError(f"{kind}: {spec} needs a name beside its options")
    return specs
