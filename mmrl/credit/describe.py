"""The tables as text: for `mmrl credit --list`, and for docs/credit.md, which is made from the same docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import mmrl.credit.estimate  # noqa: F401 - fills the tables
from mmrl.credit.norm import NORM_PRESETS, Norm
from mmrl.credit.table import ESTIMATORS, TRANSFORMS

INTRO = """# Step credit

<!-- made by `mmrl credit --markdown > docs/credit.md`; edit the docstrings, not this file -->

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
(std, none, loo, bernoulli, batch), `eps`, `ddof`, `singleton`, `std_floor`, or a `preset`:

"""


def rows() -> list[tuple[str, str, str, str]]:
    """(name, needs, fits, source) of every estimator, then of every transform, by name."""
    estimators = [(e.name, ", ".join(e.needs), e.fits, e.source) for e in ESTIMATORS.values()]
    transforms = [
        (f"{t.name} (transform)", ", ".join(t.needs), "chains" if t.chains_only else "any", t.source)
        for t in TRANSFORMS.values()
    ]
    return sorted(estimators) + sorted(transforms)


def markdown() -> str:
    """docs/credit.md."""
    out = [INTRO, "| preset | " + " | ".join(Norm._fields[1:]) + " |\n|---|" + "---|" * len(Norm._fields[1:])]
    default = Norm()
    for name, fields in NORM_PRESETS.items():
        cells = [str(fields.get(f, getattr(default, f))) for f in Norm._fields[1:]]
        out.append(f"| {name} | " + " | ".join(cells) + " |")
    out.append("\n## Estimators\n")
    for e in sorted(ESTIMATORS.values(), key=lambda e: e.name):
        out.append(
            _entry(e.name, e.function, [f"needs {', '.join(e.needs)}", f"fits {e.fits}", f"source: {e.source}"])
        )
    out.append("## Transforms\n")
    for t in sorted(TRANSFORMS.values(), key=lambda t: t.name):
        about = [f"needs {', '.join(t.needs)}", f"writes {t.writes}", f"source: {t.source}"]
        out.append(_entry(t.name, t.function, [*about, "chains only"] if t.chains_only else about))
    return "\n".join(out).rstrip() + "\n"


def _entry(name: str, function: Callable[..., Any], about: list[str]) -> str:
    options = [
        f"`{p.name}` = {_shown(p.default)}"
        for p in inspect.signature(function).parameters.values()
        if p.name not in ("tree", "all_sum")
    ]
    text = inspect.cleandoc(function.__doc__ or "").replace("*", "\\*").replace("|", "\\|")
    head = f"### {name}\n\n{text}\n\n"
    return head + (f"Options: {', '.join(options)}. " if options else "") + "; ".join(about).capitalize() + ".\n"


def _shown(default: Any) -> str:
    if default is inspect.Parameter.empty:
        return "(required)"
    if isinstance(default, Norm):
        base = Norm()
        changed = {f: v for f, v in default._asdict().items() if v != getattr(base, f) or f == "scale"}
        return "{" + ", ".join(f"{k}: {v}" for k, v in changed.items()) + "}"
    return repr(default)
