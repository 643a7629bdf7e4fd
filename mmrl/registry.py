"""The registry: everything that a recipe can name, with its options, what it reads and what it writes.

A row is one function, class or constant under a name. Rows come from three places:

    @register("estimators", "mine", reads=("outcome",))     a decorator, in a module that has been imported
    [project.entry-points."mmrl.estimators"] mine = "pkg:f"  an entry point of any installed package
    estimators: [{name: "pkg:f"}]                           a dotted path in the recipe; a file beside it counts

The core never imports a modality: vision, diffusion and video enter their rows by entry points.

Fields are named as in a recipe: outcome, step_reward, value, root_value, logp, ok, state_key, edge_key, texts,
tags.NAME, actions.NAME. `forks` says
that two steps of a prompt must be comparable, `chains` that steps may fork at the prompt alone.
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

# Names of fields, or a function that tells them from the row's options.
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
    arguments: how many leading positional arguments the framework passes; they are no options. None: the row is
        called with its options alone, once, when the recipe is read (a class or a factory), or it is a constant.
    keywords: keyword arguments that the framework passes; no options either.
    reads, writes: of every row that says nothing else.
    adapt: dotted path of a function that takes a row's object and gives what is called, where rows may come in several
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
    """Make a kind known. A package of its own calls this in a module that the entry point `mmrl.modules` names."""
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
_GROWN = ("outcome", "step_reward", "value", "root_value", "tags.visits", "tags.q_sum")  # in the trees they store
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
    """What a row says beside its function: fields read and written, where it fits, its source, further facts."""

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
        """Where it makes sense, in words."""
        return self.declared.fits

    @property
    def source(self) -> str:
        """Paper or code that it follows."""
        return self.declared.source

    @property
    def facts(self) -> Mapping[str, Any]:
        """What else the row declares, by kind."""
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
        defaults = {name: o.default for name, o in self.options.items() if o.default is not REQUIRED}
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
                known = ", ".join(self.options) or "none"
                near = key_here(key) or hint(key, self.options)
                raise ComponentError(
                    f"unknown key {where}.{key}={options[key]!r}{near}; {self.kind.singular} {self.name!r} takes "
                    f"{known}"
                )
        asked = {k: o for k, o in self.options.items() if k in options or o.default is REQUIRED}
        if not asked:
            return {}
        fields: dict[str, Any] = {k: (o.type, ...) for k, o in asked.items()}
        model = create_model("Options", __config__=_OPTIONS, **fields)
        try:
            checked = model(**options)
        except ValidationError as error:
            raise ComponentError(explain(error, where, model)) from None
        return {k: getattr(checked, k) for k in options}

    def build(self, options: Mapping[str, Any], section: str = "", **given: Any) -> Any:
        """The row with its options set: an instance, what a factory makes, a function bound to them, or the constant.

        Args:
            given: further keyword arguments from the framework, passed where the target has such a parameter.
        """
        checked = self.check(options, section)
        function = self.kind.arguments is not None and inspect.isfunction(self.target)
        if not callable(self.target) or (function and not checked and not given):
            return self.target
        parameters = inspect.signature(self.target).parameters
        named = {k: v for k, v in given.items() if k in parameters}
        call = gather(self.target, checked) | named
        return partial(self.target, **call) if function else self.target(**call)


# ---- entering -------------------------------------------------------------------------------------------------------

T = TypeVar("T")

_DECLARED = "__mmrl_declares__"
_MODULES = "mmrl.modules"  # entry points: kind = module that enters rows of it
_MISSING: dict[str, MissingPackage] = {}  # kind -> why a module that enters rows of it could not be imported


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
    """Where an object was defined; a module that is imported again replaces its own rows."""
    return f"{target.__module__}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def declares(
    *,
    reads: Fields | None = None,
    writes: Fields | None = None,
    fits: str = "any",
    source: str = "",
    **facts: Any,
) -> Callable[[T], T]:
    """Say what the decorated object reads and writes; it gets its name from an entry point or a dotted path."""

    def note(target: T) -> T:
        setattr(target, _DECLARED, Declaration(reads, writes, fits, source, facts))
        return target

    return note


# ---- finding --------------------------------------------------------------------------------------------------------


def find(kind: str, name: str) -> Row:
    """The row called `name`, or the object at a dotted path `package.module:object`.

    Raises:
        ComponentError: nothing there; the message names the nearest registered name.
    """
    k = _kind(kind)
    if ":" in name:
        return _row(k, name, _at(name))
    table = _ROWS[k.name]
    if name in table or name in _entered(k):
        return table[name]
    for entry in _installed().select(group=f"mmrl.{k.name}", name=name):
        return _load(k, entry)
    if kind in _MISSING:
        raise _MISSING[kind]
    known = names(kind)
    raise ComponentError(
        f"unknown {k.singular} {name!r}{hint(name, known)}; known: {', '.join(known) or 'none'}. One of your own goes "
        "by its dotted path, package.module:object"
    )


def names(kind: str) -> list[str]:
    """Every registered name of a kind, sorted; nothing but the core's own modules is imported."""
    k = _kind(kind)
    return sorted({*_entered(k), *(e.name for e in _installed().select(group=f"mmrl.{k.name}"))})


def rows(kind: str) -> list[Row]:
    """Every row of a kind, by name; imports what the entry points name, and leaves out what is not installed."""
    found = []
    for name in names(kind):
        try:
            found.append(find(kind, name))
        except MissingPackage as error:
            log.info("left out: %s", error)
    return found


def writers(field_name: str, kind: str = "readings") -> list[str]:
    """Names of the rows that can fill a field, by default or with other options (the fact `may_write`, fields or
    patterns of them); for messages."""
    found = []
    for row in rows(kind):
        written = (*row.writes(), *row.facts.get("may_write", ()))
        if any(fnmatchcase(field_name, pattern) for pattern in written):
            found.append(row.name)
    return found


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

    A name that nobody registered, and an unknown option, are then refused with the section that holds them.

    Args:
        options: off, the name alone is checked, for rows that get all of their options elsewhere.
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
    """A pydantic error as lines `path=value: what is wrong`.

    Args:
        model: what was validated; with it, a key that is unknown at any depth is told with the nearest known one.
    """
    lines = []
    for e in error.errors():
        parts = [str(p) for p in ((section,) if section else ()) + e["loc"]]
        path = ".".join(parts)
        if e["type"] == "missing":
            lines.append(f"{path} is missing; it has no default")
        elif e["type"] in _UNKNOWN_KEY:
            known = _keys_at(model, e["loc"][:-1])
            nearest = get_close_matches(parts[-1], known, 1, cutoff=0.5)
            told = f" (did you mean {'.'.join([*parts[:-1], *nearest])}?)" if nearest else ""
            told = key_here(parts[-1]) or told
            lines.append(f"unknown key {path}={e['input']!r}{told}; known: {', '.join(known)}")
        elif e["type"] == "value_error":  # raised by the section itself: its words as they are
            lines.append(f"{path}={e['input']!r}: {e['ctx']['error']}")
        else:
            near = hint(str(e["input"]), _QUOTED.findall(e["msg"])) if e["type"] == "literal_error" else ""
            if e["type"] == "string_type" and isinstance(e["input"], bool | int | float):
                near = "; a text that YAML reads as a number, true or false goes in quotes"
            lines.append(f"{path}={e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}{near}")
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
        types = [known[part] for m in models if part in (known := _key_types(m))]
        models = [m for hinted in types for m in _models_in(hinted)] or models
    return [key for m in models for key in _key_types(m)]


def _key_types(model: Any) -> Mapping[Any, Any]:
    """Name -> type of the keys of a pydantic model, a dataclass or a TypedDict."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: info.annotation for name, info in model.model_fields.items()}
    return get_type_hints(model) if isinstance(model, type) else {}


def _models_in(hinted: Any) -> list[Any]:
    """The models that a type allows, such as `Views` of `Views | None` or of `list[Views]`."""
    parts = get_args(hinted)
    return [m for part in parts for m in _models_in(part)] if parts else [hinted]


@cache
def _installed() -> EntryPoints:
    """What packages enter here. Read once: a recipe asks a hundred times, and each time every package is opened."""
    found = entry_points()
    groups = [group for group in found.groups if group.startswith("mmrl.")]
    return EntryPoints(entry for group in groups for entry in found.select(group=group))


def _kind(name: str) -> Kind:
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
            if not (remedy := how_to_install(error)):
                raise
            _MISSING[kind] = MissingPackage(f"{entry.value} cannot be loaded: {error}{remedy}")


def _load(kind: Kind, entry: EntryPoint) -> Row:
    try:
        return _row(kind, entry.name, entry.load())
    except (ImportError, AttributeError) as error:
        told = f"{kind.singular} {entry.name!r} ({entry.value}) cannot be loaded: {error}"
        remedy = how_to_install(error) if isinstance(error, ImportError) else ""
        raise (MissingPackage if remedy else ComponentError)(told + remedy) from error


def _at(path: str) -> Any:
    """The object at `package.module:object`; a file in the working directory can be named too."""
    if (here := os.getcwd()) not in sys.path:
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
    called = _at(kind.adapt)(target) if kind.adapt else target
    return Row(kind, name, called, _declaration(target))


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
    """Keyword arguments of a call: options of a group are put back together."""
    call = dict(options)
    if not call:
        return call
    hints = _hints(target)
    for name, parameter in inspect.signature(target).parameters.items():
        group = _group_of(hints, name)
        if group is None:
            continue
        changes = {k: call.pop(k) for k in group._fields if k in call}
        preset = call.pop("preset", None)
        if changes or preset is not None:
            call[name] = parameter.default._replace(**dict(_GROUPS[group].get(str(preset), {})) | changes)
    return call


def _options(target: Callable[..., Any], kind: Kind) -> dict[str, Option]:
    out: dict[str, Option] = {}
    skip = (kind.arguments or 0) if inspect.isfunction(target) else 0
    hints = _hints(target)
    parameters = list(inspect.signature(target).parameters.values())
    for p in parameters[skip:]:
        if p.name in kind.keywords or p.kind is p.VAR_POSITIONAL:
            continue
        group = _group_of(hints, p.name)
        if group is not None:
            out |= _group_options(group, p.default)
        elif p.kind is p.VAR_KEYWORD:
            out |= _open_options(target)
        else:
            # "yes" for an option of one's own without a type, but with a default that is true or false
            untyped = bool if isinstance(p.default, bool) else Any
            out[p.name] = Option(hints.get(p.name, untyped), p.default)
    return out


def _group_options(group: Any, default: Any) -> dict[str, Option]:
    hints = get_type_hints(group, include_extras=True)
    out = {f: Option(hints[f], getattr(default, f)) for f in group._fields}
    return out | {"preset": Option(_choice(_GROUPS[group]), None)}


def _choice(names_: Sequence[str] | Mapping[str, Any]) -> Any:
    return Literal[tuple(names_)] | None


def _open_options(target: Any) -> dict[str, Option]:
    """A factory that takes **options declares whose fields they are: the fact `options_of`, a dataclass."""
    owner = _declaration(target).facts.get("options_of")
    if owner is None:
        return {}
    hints = get_type_hints(owner, include_extras=True)
    defaults = inspect.signature(owner).parameters
    return {name: Option(hints[name], p.default) for name, p in defaults.items()}


def _hints(target: Any) -> dict[str, Any]:
    # the fields of a dataclass are written in the modules of its bases too, its __init__ knows the last one alone
    by_init = inspect.isclass(target) and not is_dataclass(target)
    return get_type_hints(target.__init__ if by_init else target, include_extras=True)


def _group_of(hints: Mapping[str, Any], parameter: str) -> Any:
    hinted = hints.get(parameter)
    return hinted if isinstance(hinted, type) and hinted in _GROUPS else None
