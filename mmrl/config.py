"""Reading recipes: YAML files whose sections are typed models, in which unknown keys are refused.

config = load_config("configs/vlm_grpo.yaml", ["optim.lr=1e-5"])
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mmrl.registry import ComponentError, explain, find

if TYPE_CHECKING:
    from mmrl.recipe import TrainingConfig


class ConfigError(ValueError):
    """The recipe cannot be used; the message names the key, its value and a remedy."""


class Section(BaseModel):
    """A closed section: every key is known."""

    model_config = ConfigDict(extra="forbid")


class Component(BaseModel):
    """An open section: `name` picks the component, every other key is one of its options, checked when it is made."""

    model_config = ConfigDict(extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """A bare name is a section without options."""
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """All keys but the name."""
        return dict(self.model_extra or {})


C = TypeVar("C", bound=Section)


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a training recipe and apply `key.path=value` overrides (values are YAML); `trainer:` picks its kind.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown trainer, an unknown or ill-typed key.
    """
    config: TrainingConfig = parse_config(_read(file, overrides), str(file))
    return config


def trainer_config(tree: Mapping[str, Any], where: str = "config") -> type[Section]:
    """The kind of recipe that `trainer:` names, branch_grpo by default.

    Raises:
        ConfigError: no such trainer.
    """
    try:
        row = find("trainers", str(tree.get("trainer", "branch_grpo")))
    except ComponentError as error:
        raise ConfigError(f"{where}: {error}") from None
    config: type[Section] = row.facts["config"]
    return config


def load_section(file: str | Path, model: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a recipe of another kind, such as `AnnotateConfig`; see `load_config`."""
    return parse_config(_read(file, overrides), str(file), model)


def parse_config(tree: Mapping[str, Any], where: str = "config", model: type[C] | None = None) -> C:
    """Validate a mapping of sections; see `load_config`. model: by default that of the trainer it names."""
    kind: Any = model or trainer_config(tree, where)
    try:
        return kind.model_validate(with_declared_defaults(tree, kind))
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, model=kind)}") from None


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, with the numbers and truth values of YAML 1.2.

    `1e-6` is a number, not a text; `Yes` and `No` are texts, and options that are true or false take them as such;
    `1:30` is no number to the base of 60.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses `{0:8}`, a key `0:8` without value, which was meant as `{0: 8}`."""
        pairs = node.value if node.flow_style else []
        for key, value in pairs:
            is_plain_text = isinstance(key, yaml.ScalarNode) and not key.style
            if is_plain_text and ":" in key.value and _is_left_out(value):
                blank = key.value.replace(":", ": ", 1)
                raise yaml.MarkedYAMLError(
                    problem=f"write a blank after the colon: {blank!r}, not {key.value!r}",
                    problem_mark=key.start_mark,
                )
        return super().construct_mapping(node, deep)


def _is_left_out(value: yaml.Node) -> bool:
    """True for the value of `{key}`, False for those of `{key: }` and `{key: null}`."""
    return isinstance(value, yaml.ScalarNode) and value.value == "" and not value.style


def _resolve_as_1_2() -> None:
    """Replace the patterns by which PyYAML, after YAML 1.1, takes plain text for a bool, an int or a float."""
    # Type -> its pattern, and the characters with which such a value can begin.
    patterns = {
        "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
        "int": (r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
        "float": (
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            "-+.0123456789",
        ),
    }
    tags = {f"tag:yaml.org,2002:{name}" for name in patterns}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in tags]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for name, (pattern, first) in patterns.items():
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(f"(?:{pattern})$"), list(first))


_resolve_as_1_2()


def read_yaml(text: str) -> Any:
    """The value of YAML text: of a recipe, an override, or a section on the command line.

    Raises:
        yaml.YAMLError: no valid YAML, with line and column.
    """
    return yaml.load(text, _Loader)


def with_declared_defaults(tree: Mapping[str, Any], model: type[Section]) -> Mapping[str, Any]:
    """The recipe with the defaults that its policy or scorer and its trainer declare, such as `loss.clip_low: 0.2`.

    A clip range that suits tokens is 200 times too wide for a denoising step, so such defaults belong to the policy;
    those of the trainer come second. Values that the recipe sets stay.

    Raises:
        ConfigError: no such policy, scorer or trainer.
    """
    filled = dict(tree)
    for key, (value, _) in declared_defaults(tree, model).items():
        section, name = key.split(".")
        # A policy may declare defaults of sections that another trainer's recipe does not have.
        field = model.model_fields.get(section)
        owner = None if field is None else field.annotation
        if not (isinstance(owner, type) and issubclass(owner, Section) and name in owner.model_fields):
            continue
        given = filled.get(section) or {}
        if isinstance(given, Mapping):
            filled[section] = {name: value} | dict(given)
    return filled


def declared_defaults(tree: Mapping[str, Any], model: type[Section]) -> dict[str, tuple[Any, str]]:
    """The defaults that a recipe's policy, trained scorer and trainer declare: section.key -> (value, its owner).

    The trainer's come last.

    Raises:
        ConfigError: no such policy, scorer or trainer.
    """
    defaults: dict[str, tuple[Any, str]] = {}
    kinds = {"policy": "policies"}
    if "trainer" in model.model_fields:
        kinds |= {"scorer": "scorers", "trainer": "trainers"}
    for key, kind in kinds.items():
        value = tree.get(key, model.model_fields[key].default if key == "trainer" else None)
        name = value.get("name") if isinstance(value, Mapping) else value
        if not isinstance(name, str) or key not in model.model_fields:
            continue
        try:
            row = find(kind, name)
        except ComponentError as error:
            raise ConfigError(f"{key}.name: {error}") from None
        owner = f"{row.kind.singular} {row.name}"
        for setting, default in row.facts.get("recipe", {}).items():
            defaults[setting] = (default, owner)
    return defaults


def _read(file: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    """A recipe as a mapping; modules in its folder can be imported from here on."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"no recipe at {path}; recipes lie under configs/")
    # At the end: a module beside the recipe never takes the place of an installed one.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        tree = read_yaml(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping of sections, such as task, policy, run")
    for item in overrides:
        _override(tree, item)
    return tree


def _override(tree: dict[str, Any], item: str) -> None:
    """Set one `key.path=value` in a recipe; a part of the path that is a number is a position in a list."""
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(f"override {item!r} must be key.path=value, such as optim.lr=1e-4")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: the value is no valid YAML ({error})") from error
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = parsed
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(
            f"override {item!r}: {key} leads nowhere; a part of it is a value or a missing entry"
        ) from error
