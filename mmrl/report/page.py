"""The page: curves, sample grids before and after, one rollout tree before and after. No script, no network."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from mmrl.report.artifacts import data_uri
from mmrl.report.search_panel import search_panel
from mmrl.report.tree_picture import draw_tree

# One panel each, in this order; metrics that share a panel share an axis.
PANELS: list[tuple[str, list[str]]] = [
    (
        "On the evaluation prompts",
        [
            "eval/reward",
            "eval/judge",
            "eval/diversity",
            "eval/accuracy",
            "eval/manipulation_f1",
            "eval/steps",
            "eval/format",
        ],
    ),
    (
        "On labelled steps held out",
        ["eval/auc", "eval/macro_f1", "eval/first_error_f1", "eval/ece", "eval/perception/auc", "eval/reasoning/auc"],
    ),
    ("Loss on labelled steps", ["loss/mean"]),
    ("Loss on pairs of steps, and share of pairs ordered rightly", ["preference/loss", "preference/accuracy"]),
    ("Reward of the rollouts", ["reward/mean", "reward/std"]),
    ("Entropy of the actions", ["policy/entropy"]),
    ("Divergence from the initial model (KL)", ["policy/kl"]),
    ("Gradient norm", ["policy/grad_norm"]),
    ("Share clipped", ["policy/clip_frac"]),
    ("Seconds per iteration", ["time/rollout_s", "time/reward_s", "time/update_s"]),
]


_SAMPLED = (
    "Evaluation without exploration noise, on fixed prompts. A reward that rises while a judge or the diversity falls "
    "is being hacked."
)
_LABELLED = "Evaluation on labelled steps held out. A step is called right from a score of 1/2 on."

_AT_LEVEL = re.compile(r"eval/(.+)/s(\d+\.\d+)")  # a metric at one noise level s, such as eval/pair_acc/s0.30

Rows = list[dict[str, float]]


class ReportError(ValueError):
    """The folder holds no run."""


def write_report(run: Path, against: Sequence[Path] = ()) -> Path:
    """Write run/report.html from what the run left; returns its path.

    against: other runs whose evaluation curves are drawn beside this one's.

    Raises:
        ReportError: no such folder, or no metrics in it.
    """
    return write_overview([(Path(run).name, Path(run), against)], Path(run) / "report.html")


def write_overview(runs: Sequence[tuple[str, Path, Sequence[Path]]], out: Path) -> Path:
    """One page of several runs, each (title, run, runs to compare with); returns `out`."""
    env = Environment(loader=PackageLoader("mmrl.report", "templates"), autoescape=select_autoescape())
    sections = [_section(*run) for run in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(env.get_template("report.html").render(title=" + ".join(r[0] for r in runs), sections=sections))
    return out


def _section(title: str, run: Path, against: Sequence[Path]) -> dict[str, Any]:
    for folder in (run, *against):
        if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
            raise ReportError(
                f"{folder} is no run folder (no metrics.jsonl and config.yaml); give the run.output of a run"
            )
    rows = read_metrics(run / "metrics.jsonl")
    others = {p.name: read_metrics(p / "metrics.jsonl") for p in against}
    panels = [_panel(*panel, rows, {} if i else others) for i, panel in enumerate(PANELS)]
    grids = sorted(p for p in (run / "samples").glob("[0-9]*") if (p / "samples.json").exists())
    trees = [run / "trees" / n for n in ("first", "last") if (run / "trees" / n / "outputs.json").exists()]
    return {
        "title": title,
        "note": _LABELLED if any("eval/auc" in r for r in rows) else _SAMPLED,
        "headline": _headline(rows, others),
        "others": list(others),
        "panels": [svg for svg in (panels[0], _by_level(rows), *panels[1:]) if svg],
        "grids": [_grid(p) for p in dict.fromkeys([*grids[:1], *grids[-1:]])],
        "search": search_panel(run / "search.json"),
        "trees": [{"name": p.name, "svg": draw_tree(p)} for p in trees],
        "config": (run / "config.yaml").read_text(),
        "environment": yaml.safe_dump(json.loads((run / "environment.json").read_text())),
    }


def read_metrics(file: Path) -> Rows:
    """The lines of metrics.jsonl; a last line cut by a kill is left out."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Iterations and values at which `name` was logged."""
    points = [(r["iteration"], r[name]) for r in rows if name in r]
    return [p[0] for p in points], [p[1] for p in points]


def _headline(rows: Rows, others: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """First and last value of every evaluation metric, and the last one of the runs compared with."""
    names = dict.fromkeys(k for r in rows for k in r if k.startswith("eval/") and not _AT_LEVEL.fullmatch(k))
    out = []
    for name in names:
        _, y = series(rows, name)
        beside = [f"{o[-1]:.3f}" if (o := series(r, name)[1]) else "" for r in others.values()]
        short = name.removeprefix("eval/")
        out.append({"name": short, "first": f"{y[0]:.3f}", "last": f"{y[-1]:.3f}", "others": beside})
    return out


def _panel(title: str, names: list[str], rows: Rows, others: Mapping[str, Rows]) -> str | None:
    """An SVG with one line per metric, None when none was logged or all are 0; the other runs' lines are dashed."""
    found: list[tuple[str, list[float], list[float]]] = []
    for name in names:
        x, y = series(rows, name)
        if any(y) and all(y != f[2] for f in found):  # no empty panel for what is off, no curve drawn twice
            found.append((name, x, y))
    if not found:
        return None
    figure, axes = _axes(title, "iteration", 3.4 if others else 2.7)
    for name, x, y in found:
        (line,) = axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=3, linewidth=1.6, label=name)
        for other, its in others.items():
            axes.plot(*series(its, name), "--", linewidth=1.3, color=line.get_color(), label=f"{name}, {other}")
    if len(found) > 1 or others:
        figure.legend(fontsize=7 if others else 8, frameon=False, loc="outside lower center", ncols=2)
    return _svg(figure)


def _by_level(rows: Rows) -> str | None:
    """An SVG of the last evaluation's metrics over the noise level, None when none was logged by level."""
    last: dict[str, dict[float, float]] = {}
    for name, value in ((k, v) for r in rows for k, v in r.items()):
        if found := _AT_LEVEL.fullmatch(name):
            last.setdefault(found[1], {})[float(found[2])] = value
    if not last:
        return None
    figure, axes = _axes("By noise level, at the end", "noise level s", 2.7)
    for label, points in last.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3, linewidth=1.6, label=label)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return _svg(figure)


def _axes(title: str, across: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _grid(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "samples.json").read_text())
    for row in rows:
        row["src"] = data_uri(folder / row["prompt"]) if row["prompt"] else None
        for cell in row["cells"]:
            if "picture" in cell["output"]:
                cell["src"] = data_uri(folder / cell["output"]["picture"])
    return {"iteration": int(folder.name), "rows": rows}
