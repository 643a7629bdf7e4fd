"""What a reading needs of the policy and of the task, refused when the recipe is read rather than after sampling."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from mmrl.registry import ComponentError, Row, find, names

Need = type | Callable[[Mapping[str, Any]], type | None] | None  # a protocol, or one that hangs on the row's options


def needed(component: Any, protocol: Any, who: str) -> Any:
    """The component, which has to follow a protocol of `mmrl.rollout`.

    Raises:
        ComponentError: it does not.
    """
    if not isinstance(component, protocol):
        raise ComponentError(_refusal(f"reading {who!r}", protocol, type(component).__name__))
    return component


def check_row(where: str, row: Row, options: Mapping[str, Any], policy: Row, task: Row) -> None:
    """Refuse a reading whose policy or task cannot do what it needs, before either is made.

    A class is known from its row, a factory's product from its return annotation; others are checked when made.

    Raises:
        ComponentError: naming the protocol, and the registered components that follow it.
    """
    for role, kind, component in (("policy", "policies", policy), ("task", "tasks", task)):
        protocol = _protocol(row, role, options)
        if protocol is not None:
            _check(f"{where}: reading {row.name!r}", protocol, kind, component)
    for option, protocol in row.facts.get("sections", {}).items():
        section = options.get(option)
        if section is not None:
            _check(f"{where}.{option}: reading {row.name!r}", protocol, "policies", find("policies", section["name"]))


def check_made(where: str, row: Row, options: Mapping[str, Any], policy: object, task: object) -> None:
    """As `check_row`, once both are there: also for what no annotation told."""
    for role, component in (("policy", policy), ("task", task)):
        protocol = _protocol(row, role, options)
        if protocol is not None and not isinstance(component, protocol):
            raise ComponentError(_refusal(f"{where}: reading {row.name!r}", protocol, type(component).__name__))


def _protocol(row: Row, role: str, options: Mapping[str, Any]) -> type | None:
    need: Need = row.facts.get(role)
    if need is None or isinstance(need, type):
        return need
    return need({name: o.default for name, o in row.options.items()} | dict(options))


def keeps_reference(row: Row, options: Mapping[str, Any]) -> bool:
    """Whether the policy must keep its initial weights: the fact `reference`, or what that says of the options."""
    fact = row.facts.get("reference", False)
    defaults = {name: o.default for name, o in row.options.items()}
    return bool(fact(defaults | dict(options)) if callable(fact) else fact)


def _check(who: str, protocol: type, kind: str, component: Row) -> None:
    made = _product(component)
    if made is not None and not issubclass(made, protocol):
        able = [n for n in names(kind) if (c := _product(find(kind, n))) is not None and issubclass(c, protocol)]
        raise ComponentError(
            _refusal(who, protocol, f"{component.kind.singular} {component.name!r}")
            + f"; those that do: {', '.join(able) or 'none'}"
        )


def _refusal(who: str, protocol: type, component: str) -> str:
    meaning = (inspect.getdoc(protocol) or "").rstrip(".").lower()
    return f"{who} needs the protocol {protocol.__name__} of mmrl.rollout ({meaning}); {component} does not have it"


def _product(row: Row) -> type | None:
    """The class of what a row makes, None where that is not told."""
    if inspect.isclass(row.target):
        return row.target
    made = get_type_hints(row.target).get("return")
    return made if inspect.isclass(made) else None
