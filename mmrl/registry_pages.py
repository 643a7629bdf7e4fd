"""The registry as text: the tables of `mmrl list`, and the reference pages, generated from docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol, get_args, get_origin

from mmrl.registry import REQUIRED, ComponentError, Option, Row, find, hint, kinds, names, rows

_CREDIT = """# Step credit

<!-- made by `mmrl list --page credit > docs/reference/credit.md`; edit the docstrings, not this file -->

`mmrl.credit` turns a tree of steps with rewards into one advantage per step, for chains and trees of any modality:

```python
from mmrl import StepTree
from mmrl.credit import compose, estimate

nan = float("nan")
tree = StepTree(parent=[-1, 0, 0], group=[0, 0, 0], status=[0, 1, 1], outcome=[nan, 1.0, 0.0])
estimate(tree, "grpo").adv  # one estimator
compose(tree, [{"name": "grpo"}, {"name": "tree_rpo", "weight": 0.5}])  # a weighted sum
```

In a recipe: transforms first, then a weighted sum of estimators, then the clip.

```yaml
credit:
  transforms: [{name: clip, eta: 0.3}, delta]
  estimators: [{name: process_grpo}, {name: grpo, weight: 0.5, preset: trl}]
  clip: 5.0
```

Which of them run on texts, pictures, conversations and latents: [credit_modalities.md](credit_modalities.md). Fields
that nothing else fills are written by [readings](readings.md).

Combinations without meaning are refused with both offenders and the fix. Estimators that normalise take `scale`
(std, none, loo, bernoulli, batch, global_std), `eps`, `ddof`, `singleton`, `std_floor`, or a `preset`:

"""

_READINGS = """# Readings

<!-- made by `mmrl list --page readings > docs/reference/readings.md`; edit the docstrings, not this file -->

A reading fills fields of a rollout between its rewards and what learns from it: values, tags, numbers per action. A
recipe names them in the order in which they run. One that reads what nothing writes is refused before a model is
loaded, and the message names the readings that would write it; so is a reading whose policy or task cannot do what it
needs (a protocol of `mmrl.capabilities`).

```yaml
# PAV: progress under a prover. Without `policy` the policy itself completes: VinePPO's values, for gae and vsrm
readings: [{name: monte_carlo, n: 4, policy: {name: vision, model: runs/prover/model}}]
credit: {estimators: [{name: pav, alpha: 3.0}]}
```

```yaml
# IGPO: what each turn adds to the probability of the right answer
readings: [{name: answer_probability}]
credit: {transforms: [progress], estimators: [{name: igpo}]}
```

```yaml
# rewards against the initial model
readings: [{name: baseline, n: 5}]
credit: {transforms: [contrastive], estimators: [{name: grpo}]}
```

```yaml
trainer: step_preference    # pDPO; T-REG with loss: {name: t_reg} and the reading instructed
readings: [{name: divergence, sight: blank}]
loss: {name: pdpo}
```

A second look at a rollout runs every token of a tree once, packed as in the update; completions go on from the caches
of that pass, denoising from the stored latents. Random numbers depend on seed, iteration, prompt and state alone. What
a reading costs is logged: `time/readings_s`, `rollout/completions_per_leaf`. A prompt on which one raises is set aside
(`reading/NAME/failed_prompts`), up to `run.max_unscored`. One of your own is a function
`(rollout, context, *, options) -> fields` by its dotted path; `mmrl.registry.declares` says what it reads and writes.

"""

_CAPABILITIES = """# Capabilities

<!-- made by `mmrl list --page capabilities > docs/reference/capabilities.md`; edit the docstrings, not this file -->

```python
from mmrl.capabilities import Extender, having

having("policies", Extender)  # names of those that search and annotation can use
```

What a component can do beyond the least of its kind is a protocol with a name. A class has it by defining the members
below: it inherits nothing and registers nothing. A recipe that needs one is refused before a model is loaded where the
class is known (from its row, or the return annotation of its factory), else when it is made, and the message names the
components that have it. `mmrl.registry.declares(lacks=(Protocol,))` says that a component refuses one although its
class has the methods.

The least: `Policy`, `OutcomeReward` and `StepReward` of `mmrl.rollout`, `Task` of `mmrl.task`; for a
step-reward model `StepScorer` of `mmrl.rollout` and `LabelledTask` of `mmrl.scorers.labelled`. Shapes: G prompts, N
steps, A actions, S steps or places asked for.

"""

_CALLBACKS = """# Callbacks

<!-- made by `mmrl list --page callbacks > docs/reference/callbacks.md`; edit the docstrings, not this file -->

```yaml
callbacks: [{name: early_stop, metric: eval/accuracy, patience: 3}, {name: best_model, metric: eval/reward}]
```

What happens in a run beside its iterations, evaluations and checkpoints. A recipe names more under `callbacks`; one
that is named takes the place of the same one that every run has. One of your own is a class by its dotted path, with
its options, or an object: `trainer_of(recipe, callbacks=[...])` ([python.md](../guides/python.md)).

"""

PAGES = ("callbacks", "capabilities", "credit", "readings")


def table(kind: str, reads: str | None = None, writes: str | None = None) -> list[tuple[str, str, str, str, str]]:
    """(name, reads, writes, fits, source) of every row of a kind that reads and writes the given fields, if any."""
    lines = []
    for row in rows(kind):
        read, written = row.reads(), row.writes()
        if (reads is None or reads in read) and (writes is None or writes in written):
            lines.append((row.name, ", ".join(read), ", ".join(written), row.fits, row.source))
    return lines


def overview() -> list[tuple[str, str]]:
    """(kind, its names) of every kind."""
    return [(kind.name, ", ".join(names(kind.name))) for kind in kinds()]


def entry(row: Row) -> str:
    """A row in Markdown: name, docstring, options, declarations."""
    text = inspect.cleandoc(row.target.__doc__ or "").replace("*", "\\*").replace("|", "\\|")
    markdown = f"### {row.name}\n\n{text}\n\n"
    options = [f"`{name}` = {_shown(option)}" for name, option in row.options.items() if not _is_shared(name, row)]
    if options:
        markdown += f"Options: {', '.join(options)}. "
    about = [f"reads {', '.join(row.reads()) or 'nothing'}"]
    if row.writes():
        about.append(f"writes {', '.join(row.writes())}")
    about.append(f"fits {row.fits}")
    if row.source:
        about.append(f"source: {row.source}")
    declarations = "; ".join(about)
    return markdown + declarations[0].upper() + declarations[1:] + ".\n"


def page(name: str) -> str:
    """A reference page under docs/.

    Raises:
        ComponentError: no such page.
    """
    if name not in PAGES:
        raise ComponentError(f"no page {name!r}{hint(name, PAGES)}; known: {', '.join(PAGES)}")
    pages = {
        "callbacks": _callbacks_page,
        "capabilities": _capabilities_page,
        "credit": _credit_page,
        "readings": _readings_page,
    }
    return pages[name]()


def _capabilities_page() -> str:
    from mmrl import capabilities
    from mmrl.scorers.labelled import StepMeasurer

    classes: list[type] = [StepMeasurer]
    for value in vars(capabilities).values():
        if inspect.isclass(value) and value.__module__ == capabilities.__name__ and Protocol in value.__mro__:
            classes.insert(-1, value)
    return "\n".join([_CAPABILITIES.rstrip() + "\n", *map(_capability, classes)]).rstrip() + "\n"


def _capability(protocol: type) -> str:
    """A protocol in Markdown: what it is, its members, and the registered components that have it."""
    from mmrl.capabilities import having, methods

    lines = [f"### {protocol.__name__}", "", inspect.cleandoc(protocol.__doc__ or ""), ""]
    for name, hinted in inspect.get_annotations(protocol).items():
        lines.append(f"- `{name}: {hinted}`")
    named = methods(protocol)
    for name in sorted(named):
        method = getattr(protocol, name)
        text = " ".join(inspect.cleandoc(method.__doc__ or "").split())
        lines.append(f"- `{name}({', '.join(_parameters(method))})`: {text}".removesuffix(": "))
    # A protocol of attributes alone, or of __call__, would fit nearly every class.
    kinds_with_owners = ("policies", "tasks", "rewards", "scorers", "readings") if named - {"__call__"} else ()
    owners = []
    for kind in kinds_with_owners:
        able = ", ".join(f"`{name}`" for name in having(kind, protocol))
        if able:
            owners.append(f"{'step rewards' if kind == 'scorers' else kind} {able}")
    if owners:
        lines += ["", f"Had by {'; '.join(owners)}."]
    return "\n".join(lines) + "\n"


def _parameters(method: Any) -> list[str]:
    """Names of a method's parameters without `self`, a star before keyword-only ones."""
    parameters: list[str] = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        parameters.append(parameter.name)
    return parameters


def _callbacks_page() -> str:
    from mmrl.trainers.callback import Callback

    parts = [_CALLBACKS.rstrip() + "\n", _capability(Callback), "## Those there are\n"]
    return "\n".join([*parts, *(entry(row) for row in rows("callbacks"))]).rstrip() + "\n"


def _readings_page() -> str:
    return "\n".join([_READINGS.rstrip() + "\n", *(entry(row) for row in rows("readings"))]).rstrip() + "\n"


def _credit_page() -> str:
    from mmrl.credit import transforms
    from mmrl.credit.norm import NORM_PRESETS, Norm

    # All fields of a normalisation but its scale, which no preset sets.
    fields = Norm._fields[1:]
    defaults = Norm()._asdict()
    parts = [_CREDIT, "| preset | " + " | ".join(fields) + " |\n|---|" + "---|" * len(fields)]
    for name, preset in NORM_PRESETS.items():
        cells = [str(preset.get(field, defaults[field])) for field in fields]
        parts.append(f"| {name} | " + " | ".join(cells) + " |")
    parts.append("\n## Estimators\n")
    parts += [entry(row) for row in rows("estimators")]
    parts.append(f"## Transforms\n\n{inspect.cleandoc(transforms.__doc__ or '')}\n")
    parts += [entry(row) for row in rows("transforms")]
    return "\n".join(parts).rstrip() + "\n"


def describe(kind: str, name: str) -> str:
    """One row in full."""
    return entry(find(kind, name))


def _is_shared(name: str, row: Row) -> bool:
    """True for an option that the head of the page explains: normalisation, unless its default differs here."""
    from mmrl.credit.norm import Norm

    shared = {*Norm._fields, "preset"} if "preset" in row.options else set()
    if name not in shared:
        return False
    shared_default = Norm()._asdict().get(name)
    return name != "scale" and row.options[name].default == shared_default


def _shown(option: Option) -> str:
    default = "(required)" if option.default is REQUIRED else repr(option.default)
    choices = _choices(option.type)
    return f"{default} ({', '.join(map(str, choices))})" if choices else default


def _choices(hinted: Any) -> Sequence[Any]:
    if get_origin(hinted) is Literal:
        return get_args(hinted)
    return ()
