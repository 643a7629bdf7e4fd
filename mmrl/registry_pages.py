"""The registry as text: the table of `mmrl list`, and the reference pages, which are made from the docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from mmrl.registry import REQUIRED, ComponentError, Option, Row, find, hint, kinds, names, rows

_CREDIT = """# Step credit

<!-- made by `mmrl list --page credit > docs/credit.md`; edit the docstrings, not this file -->

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

Combinations without meaning are refused with both offenders and the fix. Estimators that normalise take `scale`
(std, none, loo, bernoulli, batch, global_std), `eps`, `ddof`, `singleton`, `std_floor`, or a `preset`:

"""

PAGES = ("credit",)


def table(kind: str, reads: str | None = None, writes: str | None = None) -> list[tuple[str, str, str, str, str]]:
    """(name, reads, writes, fits, source) of every row of a kind that reads and writes the given fields, if any."""
    out = []
    for row in rows(kind):
        read, written = row.reads(), row.writes()
        if (reads is None or reads in read) and (writes is None or writes in written):
            out.append((row.name, ", ".join(read), ", ".join(written), row.fits, row.source))
    return out


def overview() -> list[tuple[str, str]]:
    """(kind, its names) of every kind."""
    return [(kind.name, ", ".join(names(kind.name))) for kind in kinds()]


def entry(row: Row) -> str:
    """A row in Markdown: name, docstring, options, declarations."""
    text = inspect.cleandoc(row.target.__doc__ or "").replace("*", "\\*").replace("|", "\\|")
    out = f"### {row.name}\n\n{text}\n\n"
    options = [f"`{name}` = {_shown(option)}" for name, option in row.options.items() if not _is_shared(name, row)]
    if options:
        out += f"Options: {', '.join(options)}. "
    about = [f"reads {', '.join(row.reads()) or 'nothing'}"]
    if row.writes():
        about.append(f"writes {', '.join(row.writes())}")
    about.append(f"fits {row.fits}")
    if row.source:
        about.append(f"source: {row.source}")
    told = "; ".join(about)
    return out + told[0].upper() + told[1:] + ".\n"


def page(name: str) -> str:
    """A reference page under docs/.

    Raises:
        ComponentError: no such page.
    """
    if name not in PAGES:
        raise ComponentError(f"no page {name!r}{hint(name, PAGES)}; known: {', '.join(PAGES)}")
    return _credit_page()


def _credit_page() -> str:
    from mmrl.credit import transforms
    from mmrl.credit.norm import NORM_PRESETS, Norm

    fields = Norm._fields[1:]
    out = [_CREDIT, "| preset | " + " | ".join(fields) + " |\n|---|" + "---|" * len(fields)]
    for name, preset in NORM_PRESETS.items():
        cells = [str(preset.get(f, getattr(Norm(), f))) for f in fields]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out.append("\n## Estimators\n")
    out += [entry(row) for row in rows("estimators")]
    out.append(f"## Transforms\n\n{inspect.cleandoc(transforms.__doc__ or '')}\n")
    out += [entry(row) for row in rows("transforms")]
    return "\n".join(out).rstrip() + "\n"


def describe(kind: str, name: str) -> str:
    """One row in full."""
    return entry(find(kind, name))


def _is_shared(name: str, row: Row) -> bool:
    """Whether an option stands at the head of the page already: normalisation, unless its default differs here."""
    from mmrl.credit.norm import Norm

    shared = {*Norm._fields, "preset"} if "preset" in row.options else set()
    if name not in shared:
        return False
    usual = getattr(Norm(), name, None)
    return name != "scale" and row.options[name].default == usual


def _shown(option: Option) -> str:
    default = "(required)" if option.default is REQUIRED else repr(option.default)
    choices = _choices(option.type)
    return f"{default} ({', '.join(map(str, choices))})" if choices else default


def _choices(hinted: Any) -> Sequence[Any]:
    if get_origin(hinted) is Literal:
        return get_args(hinted)
    return ()
