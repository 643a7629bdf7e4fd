"""The registry: everything that a recipe can name, with its options, what it reads and what it writes.

A row is one function, class or constant under a name. Rows come from three places:

    @register("estimators", "mine", reads=("outcome",))     a decorator, in a module that has been imported
    [project.entry-points."mmrl.estimators"] mine = "pkg:f"  an entry point of any installed package
    estimators: [{name: "pkg:f"}]                           a dotted path in the recipe; a file beside it counts

The core never imports a modality: vision, diffusion and video enter their rows by entry points.

Fields are named as in a recipe: outcome, step_reward, value, root_value, logp, ok, state_key, edge_key, texts,
tags.NAME, actions.NAME. Two names stand for shapes: `forks` means that two steps of a prompt must be comparable,
`chains` that steps may fork at the prompt alone.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, cached_property, partial
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, create_model

from mmrl.extras import how_to_install
from mmrl.foreign_keys import key_here

log = logging.getLogger(__name__)

# Names of fields, or a function from the row's options to them.
Fields = tuple[str, ...] | Callable[[Mapping[str, Any]], tuple[str, ...]]


class ComponentError(ValueError):
    """A name that nobody registered, a dotted path that leads nowhere, or an option that the component refuses."""


class MissingPackage(ComponentError):
    """A row needs a package that is not installed; the message says how to install it."""


@dataclass(frozen=True)
class Kind:
    """One kind of row.

    name: plural, as in `mmrl list NAME` and in the entry-point group `mmrl.NAME`. singular: for messages.
    modules: of the core, entering rows when imported.
    arguments: number of leading positional arguments that the framework passes; they are no options. None: the row is
        called with its options alone, once, when the recipe is read (a class or a factory), or it is a constant.
    keywords: keyword arguments that the framework passes; no options either.
    reads, writes: of every row that declares nothing else.
    adapt: dotted path of a function from a row's object to the function that is called, where rows may come in several
        forms.
    """

    name: str
    singular: str
    modules: tuple[str, ...] = ()
    arguments: int | None = None
    keywords: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    adapt: str = ""


KINDS: dict[str, Kind] = {}
_ROWS: dict[str, dict[str, Row]] = {}


def add_kind(kind: Kind) -> None:
    """Add a kind. Another package calls this in a module that its entry point in `mmrl.modules` names."""
    KINDS[kind.name] = kind
    _ROWS.setdefault(kind.name, {})


add_kind(
    Kind(
        "trainers",
        "trainer",
        (
            "mmrl.trainers.branch_grpo",
            "mmrl.trainers.sample_loss",
            "mmrl.trainers.imitation",
            "mmrl.trainers.step_preference",
            "mmrl.trainers.step_reward",
        ),
        arguments=1,
    )
)
add_kind(Kind("callbacks", "callback", ("mmrl.trainers.callbacks",), keywords=("api",)))
add_kind(
    Kind(
        "optimizers",
        "optimizer",
        ("mmrl.trainers.optimizers",),
        arguments=1,
        keywords=("lr", "betas", "eps", "weight_decay"),
    )
)
add_kind(Kind("policies", "policy"))
add_kind(Kind("tasks", "task"))
add_kind(Kind("rewards", "reward", arguments=1, writes=("outcome",), adapt="mmrl.rewards.completions:as_reward"))
add_kind(Kind("scorers", "step reward", arguments=1, writes=("step_reward",)))
add_kind(Kind("readings", "reading", ("mmrl.readings", "mmrl.reasoning.readings"), arguments=2))
add_kind(Kind("transforms", "transform", ("mmrl.credit.transforms",), arguments=1))
add_kind(Kind("step_losses", "step loss", ("mmrl.losses.reward",), arguments=2, keywords=("path",)))
add_kind(Kind("loss_rules", "loss rule", arguments=4))
add_kind(Kind("preferences", "preference loss", ("mmrl.losses.preference",)))
add_kind(Kind("sample_losses", "sample loss", arguments=4))
add_kind(Kind("aggregates", "aggregate", ("mmrl.scorers.aggregate",), arguments=1))
add_kind(Kind("formats", "record format", ("mmrl.reasoning.formats",), arguments=2))
add_kind(Kind("exporters", "exporter", ("mmrl.reasoning.formats",), arguments=1))
add_kind(Kind("benchmarks", "benchmark", ("mmrl.reasoning.bench.run",)))
add_kind(Kind("panels", "report panel", ("mmrl.report.panels",), arguments=2))
add_kind(Kind("demos", "demo", ("mmrl.demo",)))
add_kind(Kind("pairs", "pair builder", ("mmrl.preference.builders",), arguments=1))
# Fields of the trees that searches and annotations store.
_GROWN = ("outcome", "step_reward", "value", "root_value", "tags.visits", "tags.q_sum")
add_kind(
    Kind(
        "searches",
        "search",
        (
            "mmrl.search.beam",
            "mmrl.search.best_of_n",
            "mmrl.search.greedy",
            "mmrl.search.mcts",
            "mmrl.search.pats",
            "mmrl.search.step_co",
        ),
        arguments=2,
        keywords=("canonical",),
        writes=_GROWN,
    )
)
add_kind(Kind("sample_searches", "search of samples", arguments=3, keywords=("n", "k", "seed")))
# of two solutions: whether their answers are equal is whether these texts are
add_kind(Kind("answer_forms", "answer form", ("mmrl.search.votes", "mmrl.reasoning.canonical"), arguments=2))
add_kind(
    Kind(
        "annotations",
        "annotation method",
        ("mmrl.reasoning.annotate.direct", "mmrl.reasoning.annotate.monte_carlo", "mmrl.reasoning.annotate.omega"),
        keywords=("context",),
        writes=_GROWN,
    )
)
add_kind(Kind("refinements", "refinement", ("mmrl.reasoning.annotate.refine",), arguments=1, keywords=("context",)))
add_kind(Kind("label_rules", "label rule", ("mmrl.reasoning.annotate.targets",), arguments=1, keywords=("start",)))
add_kind(
    Kind(
        "estimators",
        "estimator",
        ("mmrl.credit.outcome", "mmrl.credit.steps"),
        arguments=1,
        keywords=("all_sum", "past"),
    )
)


@dataclass(frozen=True)
class Declaration:
    """The declarations of a row: fields read and written, what it fits, its source, further facts."""

    reads: Fields | None = None
    writes: Fields | None = None
    fits: str = "any"
    source: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One thing that a recipe can name."""

    kind: Kind
    name: str
    target: Any
    declared: Declaration

    @property
    def fits(self) -> str:
        """The policies, trees or data that it makes sense for, in words."""
        return self.declared.fits

    @property
    def source(self) -> str:
        """The paper or code that it follows."""
        return self.declared.source

    @property
    def facts(self) -> Mapping[str, Any]:
        """Further declarations; their names depend on the kind."""
        return self.declared.facts

    def reads(self, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Fields that it needs, with these options."""
        return self._fields(self.declared.reads, self.kind.reads, options)

    def writes(self, options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """Fields that it fills, with these options."""
        return self._fields(self.declared.writes, self.kind.writes, options)

    def _fields(
        self, declared: Fields | None, default: tuple[str, ...], options: Mapping[str, Any] | None
    ) -> tuple[str, ...]:
        if declared is None:
            return default
        if not callable(declared):
            return declared
        defaults = {name: option.default for name, option in self.options.items() if option.default is not REQUIRED}
        return tuple(declared(defaults | dict(options or {})))

    @cached_property
    def options(self) -> dict[str, Option]:
        """Name -> type and default of every option; a constant has none."""
        return _options(self.target, self.kind) if callable(self.target) else {}

    def check(self, options: Mapping[str, Any], section: str = "") -> dict[str, Any]:
        """The options with their values converted (text to numbers, lists to tuples).

        Args:
            section: where they stand in the recipe, for the message.
        Raises:
            ComponentError: an option that the row does not have (with the nearest), one without value, a value of
                another type, outside its range or none of its choices.
        """
        where = section or self.name
        for key in options:
            if key not in self.options:
                takes = ", ".join(self.options) or "none"
                suggestion = key_here(key) or hint(key, self.options)
                raise ComponentError(
                    f"unknown key {where}.{key}={options[key]!r}{suggestion}; {self.kind.singular} {self.name!r} "
                    f"takes {takes}"
                )
        # A pydantic model of the given options and of those without default; the others keep their defaults.
        fields: dict[str, Any] = {}
        for name, option in self.options.items():
            if name in options or option.default is REQUIRED:
                fields[name] = (option.type, ...)
        if not fields:
            return {}
        model = create_model("Options", __config__=_OPTIONS, **fields)
        try:
            checked = model(**options)
        except ValidationError as error:
            raise ComponentError(explain(error, where, model)) from None
        return {name: getattr(checked, name) for name in options}

    def build(self, options: Mapping[str, Any], section: str = "", **given: Any) -> Any:
        """The component with its options set: an instance, a factory's product, a function bound to them, a constant.

        Args:
            given: further keyword arguments from the framework, passed where the target has such a parameter.
        """
        checked = self.check(options, section)
        is_function = self.kind.arguments is not None and inspect.isfunction(self.target)
        if not callable(self.target) or (is_function and not checked and not given):
            return self.target
        parameters = inspect.signature(self.target).parameters
        accepted = {name: value for name, value in given.items() if name in parameters}
        arguments = gather(self.target, checked) | accepted
        if is_function:
            return partial(self.target, **arguments)
        return self.target(**arguments)


# ---- entering -------------------------------------------------------------------------------------------------------

T = TypeVar("T")

_DECLARED = "__mmrl_declares__"
# The group of entry points `kind = module`: importing the module enters rows of the kind.
_MODULES = "mmrl.modules"
# Kind -> the reason why a module that enters rows of it could not be imported.
_MISSING: dict[str, MissingPackage] = {}


def register(
    kind: str,
    name: str,
    *,
    reads: Fields | None = None,
    writes: Fields | None = None,
    fits: str = "any",
    source: str = "",
    **facts: Any,
) -> Callable[[T], T]:
    """Enter the decorated function or class, or a constant, as `name` among the rows of `kind`.

    Raises:
        ComponentError: no such kind, or the name is taken by another object.
    """
    table = _ROWS[_kind(kind).name]

    def enter(target: T) -> T:
        old = table.get(name)
        if old is not None and _origin(old.target) != _origin(target):
            raise ComponentError(f"{kind}: {name!r} is taken by {_origin(old.target)}")
        declared = Declaration(reads, writes, fits, source, facts)
        if callable(target):
            setattr(target, _DECLARED, declared)
        table[name] = Row(KINDS[kind], name, target, declared)
        return target

    return enter


def _origin(target: Any) -> str:
    """The dotted name under which an object was defined; a module that is imported again replaces its own rows."""
    return f"{target.__module__}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def declares(
    *,
    reads: Fields | None = None,
    writes: Fields | None = None,
    fits: str = "any",
    source: str = "",
    **facts: Any,
) -> Callable[[T], T]:
    """Declare what the decorated object reads and writes; its name comes from an entry point or a dotted path."""

    def declare(target: T) -> T:
        setattr(target, _DECLARED, Declaration(reads, writes, fits, source, facts))
        return target

    return declare


# ---- finding --------------------------------------------------------------------------------------------------------


def find(kind: str, name: str) -> Row:
    """The row called `name`, or the object at a dotted path `package.module:object`.

    Raises:
        ComponentError: nothing there; the message names the nearest registered name.
    """
    found_kind = _kind(kind)
    if ":" in name:
        return _row(found_kind, name, _at(name))
    # Rows that are there already come first: `_entered` imports the core's modules of the kind.
    table = _ROWS[found_kind.name]
    if name in table or name in _entered(found_kind):
        return table[name]
    for entry in _installed().select(group=f"mmrl.{found_kind.name}", name=name):
        return _load(found_kind, entry)
    if kind in _MISSING:
        raise _MISSING[kind]
    registered = names(kind)
    raise ComponentError(
        f"unknown {found_kind.singular} {name!r}{hint(name, registered)}; known: {', '.join(registered) or 'none'}. "
        "One of your own goes by its dotted path, package.module:object"
    )


def names(kind: str) -> list[str]:
    """Every registered name of a kind, sorted; nothing but the core's own modules is imported."""
    found_kind = _kind(kind)
    installed = _installed().select(group=f"mmrl.{found_kind.name}")
    return sorted({*_entered(found_kind), *(entry.name for entry in installed)})


def rows(kind: str) -> list[Row]:
    """Every row of a kind, by name; imports what the entry points name, and leaves out what is not installed."""
    table = []
    for name in names(kind):
        try:
            table.append(find(kind, name))
        except MissingPackage as error:
            log.info("left out: %s", error)
    return table


def writers(field_name: str, kind: str = "readings") -> list[str]:
    """Names of the rows that can fill a field, for messages.

    They fill it by default, or with other options: the fact `may_write`, names of fields or patterns of names.
    """
    able = []
    for row in rows(kind):
        written = (*row.writes(), *row.facts.get("may_write", ()))
        if any(fnmatchcase(field_name, pattern) for pattern in written):
            able.append(row.name)
    return able


def build(kind: str, section: str, name: str, options: Mapping[str, Any], **given: Any) -> Any:
    """Find a row and make it; see `Row.build`. section: where it stands in the recipe, for messages."""
    return find(kind, name).build(options, section, **given)


def build_section(kind: str, section: str, tree: str | Mapping[str, Any], **given: Any) -> Any:
    """`build` for a name, or a mapping that has `name` beside its options, as in a recipe."""
    row, options = _named(kind, section, tree)
    return row.build(options, section, **given)


def check_section(kind: str, section: str, tree: str | Mapping[str, Any]) -> Row:
    """The row that `build_section` would make, its options checked."""
    row, options = _named(kind, section, tree)
    row.check(options, section)
    return row


def _named(kind: str, section: str, tree: str | Mapping[str, Any]) -> tuple[Row, dict[str, Any]]:
    """The row that a section names, and its options."""
    options: dict[str, Any] = {"name": tree} if isinstance(tree, str) else dict(tree)
    if "name" not in options:
        raise ComponentError(f"{section} needs a name; known: {', '.join(names(kind))}")
    return find(kind, options.pop("name")), options


def of_kind(kind: str, *, options: bool = True) -> AfterValidator:
    """For the type of an option that names a row: `Annotated[str, of_kind("kernels")]`, or a mapping with its options.

    An unregistered name, and an unknown option, are then refused with the section that holds them.

    Args:
        options: False checks the name alone, for rows that get all of their options elsewhere.
    """

    def check(value: Any) -> Any:
        if options:
            check_section(kind, _kind(kind).singular, value)
        else:
            find(kind, value)
        return value

    return AfterValidator(check)


def hint(name: str, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known name, empty where none is near."""
    near = get_close_matches(name, list(known), 1)
    return f" (did you mean {near[0]}?)" if near else ""


def explain(error: ValidationError, section: str = "", model: Any = None) -> str:
    """A pydantic error as lines `path=value: message`.

    Args:
        model: the model that was validated; with it, messages about unknown keys name the nearest valid one.
    """
    lines = []
    for fault in error.errors():
        parts = [str(part) for part in fault["loc"]]
        if section:
            parts = [section, *parts]
        path, value, message = ".".join(parts), fault["input"], fault["msg"]
        remedy = ""
        if fault["type"] == "missing":
            lines.append(f"{path} is missing; it has no default")
        elif fault["type"] in _UNKNOWN_KEY:
            valid_keys = _keys_at(model, fault["loc"][:-1])
            nearest = get_close_matches(parts[-1], valid_keys, 1, cutoff=0.5)
            if nearest:
                remedy = f" (did you mean {'.'.join([*parts[:-1], *nearest])}?)"
            remedy = key_here(parts[-1]) or remedy
            lines.append(f"unknown key {path}={value!r}{remedy}; known: {', '.join(valid_keys)}")
        elif fault["type"] == "value_error":
            # Raised by the section itself, whose words need no prefix of pydantic's.
            lines.append(f"{path}={value!r}: {fault['ctx']['error']}")
        else:
            if fault["type"] == "literal_error":
                remedy = hint(str(value), _QUOTED.findall(message))
            if fault["type"] == "string_type" and isinstance(value, bool | int | float):
                remedy = "; a text that YAML reads as a number, true or false goes in quotes"
            lines.append(f"{path}={value!r}: {message[0].lower()}{message[1:]}{remedy}")
    return "\n".join(lines)


def kinds() -> list[Kind]:
    """Every kind, those of installed packages included, by name."""
    for entry in _installed().select(group=_MODULES):
        _import_modules(entry.name)
    return [KINDS[name] for name in sorted(KINDS)]


_QUOTED = re.compile(r"'([^']*)'")
_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def _keys_at(model: Any, path: Sequence[str | int]) -> list[str]:
    """The keys of the closed section at a path below a model; an index, or the name of a union's part, stays there."""
    models = [model]
    for part in path:
        models_below: list[Any] = []
        for candidate in models:
            key_types = _key_types(candidate)
            if part in key_types:
                models_below += _models_in(key_types[part])
        models = models_below or models
    return [key for candidate in models for key in _key_types(candidate)]


def _key_types(model: Any) -> Mapping[Any, Any]:
    """Name -> type of the keys of a pydantic model, a dataclass or a TypedDict."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: info.annotation for name, info in model.model_fields.items()}
    return get_type_hints(model) if isinstance(model, type) else {}


def _models_in(hinted: Any) -> list[Any]:
    """The models that a type allows, such as `Views` of `Views | None` or of `list[Views]`."""
    parts = get_args(hinted)
    if not parts:
        return [hinted]
    return [model for part in parts for model in _models_in(part)]


@cache
def _installed() -> EntryPoints:
    """The entry points of all installed packages in groups `mmrl.*`.

    Cached: reading them opens every installed package, and a recipe needs them a hundred times.
    """
    all_entries = entry_points()
    groups = [group for group in all_entries.groups if group.startswith("mmrl.")]
    return EntryPoints(entry for group in groups for entry in all_entries.select(group=group))


def _kind(name: str) -> Kind:
    """The kind called `name`; raises ComponentError when there is none."""
    if name not in KINDS:
        _import_modules(name)
    if name not in KINDS:
        raise ComponentError(f"no kind {name!r}{hint(name, KINDS)}; known: {', '.join(KINDS)}")
    return KINDS[name]


def _entered(kind: Kind) -> dict[str, Row]:
    """The rows entered by decorators, those of the core's modules included."""
    for module in kind.modules:
        import_module(module)
    _import_modules(kind.name)
    return _ROWS[kind.name]


def _import_modules(kind: str) -> None:
    """Import the modules that installed packages name for a kind."""
    for entry in _installed().select(group=_MODULES, name=kind):
        try:
            import_module(entry.value)
        except ImportError as error:
            remedy = how_to_install(error)
            if not remedy:
                raise
            _MISSING[kind] = MissingPackage(f"{entry.value} cannot be loaded: {error}{remedy}")


def _load(kind: Kind, entry: EntryPoint) -> Row:
    """The row of an entry point; raises ComponentError, or MissingPackage, when it cannot be imported."""
    try:
        return _row(kind, entry.name, entry.load())
    except (ImportError, AttributeError) as error:
        message = f"{kind.singular} {entry.name!r} ({entry.value}) cannot be loaded: {error}"
        remedy = how_to_install(error) if isinstance(error, ImportError) else ""
        if remedy:
            raise MissingPackage(message + remedy) from error
        raise ComponentError(message) from error


def _at(path: str) -> Any:
    """The object at `package.module:object`; a file in the working directory can be named too."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)
    module, _, attribute = path.partition(":")
    try:
        target: Any = import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise ComponentError(f"{path!r}: {error}; give package.module:object, importable from here") from error
    return target


def _row(kind: Kind, name: str, target: Any) -> Row:
    """The row of an object, which is adapted where its kind has an adapter; declarations are the object's own."""
    adapted = _at(kind.adapt)(target) if kind.adapt else target
    return Row(kind, name, adapted, _declaration(target))


def _declaration(target: Any) -> Declaration:
    declared: Declaration = getattr(target, _DECLARED, Declaration())
    return declared


# ---- options --------------------------------------------------------------------------------------------------------

REQUIRED = inspect.Parameter.empty
_OPTIONS = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=())


@dataclass(frozen=True)
class Option:
    """Type (with ranges and choices) and default of one option. default: `REQUIRED` when there is none."""

    type: Any
    default: Any = REQUIRED


# A parameter of such a type stands for several options: its fields, and `preset`, which sets some of them at once.
_GROUPS: dict[type, Mapping[str, Mapping[str, Any]]] = {}


def option_group(cls: type, presets: Mapping[str, Mapping[str, Any]]) -> None:
    """Parameters of type `cls`, a NamedTuple, become its fields and an option `preset`, a name of `presets`."""
    _GROUPS[cls] = presets


def gather(target: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call of `target`: options of a group are put together into the group's object."""
    arguments = dict(options)
    if not arguments:
        return arguments
    hints = _hints(target)
    for name, parameter in inspect.signature(target).parameters.items():
        group = _group_of(hints, name)
        if group is None:
            continue
        changes = {field_name: arguments.pop(field_name) for field_name in group._fields if field_name in arguments}
        preset = arguments.pop("preset", None)
        if changes or preset is not None:
            # The recipe's own values go before those of the preset.
            preset_values = dict(_GROUPS[group].get(str(preset), {}))
            arguments[name] = parameter.default._replace(**preset_values | changes)
    return arguments


def _options(target: Callable[..., Any], kind: Kind) -> dict[str, Option]:
    """The parameters of a function or class that a recipe can set, by name."""
    options: dict[str, Option] = {}
    num_positional = (kind.arguments or 0) if inspect.isfunction(target) else 0
    hints = _hints(target)
    parameters = list(inspect.signature(target).parameters.values())
    for parameter in parameters[num_positional:]:
        if parameter.name in kind.keywords or parameter.kind is parameter.VAR_POSITIONAL:
            continue
        group = _group_of(hints, parameter.name)
        if group is not None:
            options |= _group_options(group, parameter.default)
        elif parameter.kind is parameter.VAR_KEYWORD:
            options |= _open_options(target)
        else:
            # "yes" must become True also for a parameter without annotation whose default is a bool.
            untyped = bool if isinstance(parameter.default, bool) else Any
            options[parameter.name] = Option(hints.get(parameter.name, untyped), parameter.default)
    return options


def _group_options(group: Any, default: Any) -> dict[str, Option]:
    """The fields of a group with their defaults, and `preset`."""
    hints = get_type_hints(group, include_extras=True)
    options = {name: Option(hints[name], getattr(default, name)) for name in group._fields}
    return options | {"preset": Option(_choice(_GROUPS[group]), None)}


def _choice(names_: Sequence[str] | Mapping[str, Any]) -> Any:
    """The type of an option that is one of some names, or None."""
    return Literal[tuple(names_)] | None


def _open_options(target: Any) -> dict[str, Option]:
    """The options of a factory that takes **options: fields of the dataclass that its fact `options_of` names."""
    owner = _declaration(target).facts.get("options_of")
    if owner is None:
        return {}
    hints = get_type_hints(owner, include_extras=True)
    defaults = inspect.signature(owner).parameters
    return {name: Option(hints[name], parameter.default) for name, parameter in defaults.items()}


def _hints(target: Any) -> dict[str, Any]:
    """Types of the parameters of a function or class."""
    # Not by __init__ for dataclasses: its annotations are resolved in the module of the last base alone, and fields
    # may be written in the modules of other bases.
    by_init = inspect.isclass(target) and not is_dataclass(target)
    return get_type_hints(target.__init__ if by_init else target, include_extras=True)


def _group_of(hints: Mapping[str, Any], parameter: str) -> Any:
    hinted = hints.get(parameter)
    return hinted if isinstance(hinted, type) and hinted in _GROUPS else None
