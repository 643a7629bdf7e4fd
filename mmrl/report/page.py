"""The page: curves, sample grids before and after, one rollout tree before and after. No script, no network."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from mmrl.report.tree_picture import draw_tree

# One panel each, in this order; metrics that share a panel share an axis.
PANELS: list[tuple[str, list[str]]] = [
    ("Reward, judge and diversity on the evaluation prompts", ["eval/reward", "eval/judge", "eval/diversity"]),
    ("Reward of the rollouts", ["reward/mean", "reward/std"]),
    ("Divergence from the initial model (KL)", ["policy/kl"]),
    ("Gradient norm", ["policy/grad_norm"]),
    ("Share clipped", ["policy/clip_frac"]),
    ("Seconds per iteration", ["time/rollout_s", "time/reward_s", "time/update_s"]),
]


class ReportError(ValueError):
    """The folder holds no run."""


def write_report(run: Path) -> Path:
    """Write run/report.html from what the run left; returns its path.

    Raises:
        ReportError: no such folder, or no metrics in it.
    """
    run = Path(run)
    if not (run / "metrics.jsonl").is_file() or not (run / "config.yaml").is_file():
        raise ReportError(f"{run} is no run folder (no metrics.jsonl and config.yaml); give the run.output of a run")
    rows = read_metrics(run / "metrics.jsonl")
    env = Environment(loader=PackageLoader("mmrl.report", "templates"), autoescape=select_autoescape())
    grids = sorted(p for p in (run / "samples").glob("[0-9]*") if (p / "samples.json").exists())
    trees = [run / "trees" / n for n in ("first", "last") if (run / "trees" / n / "outputs.json").exists()]
    html = env.get_template("report.html").render(
        title=run.name,
        headline=_headline(rows),
        panels=[svg for panel in PANELS if (svg := _panel(*panel, rows))],
        grids=[_grid(p) for p in dict.fromkeys([*grids[:1], *grids[-1:]])],
        trees=[{"name": p.name, "svg": draw_tree(p)} for p in trees],
        config=(run / "config.yaml").read_text(),
        environment=yaml.safe_dump(json.loads((run / "environment.json").read_text())),
    )
    out = run / "report.html"
    out.write_text(html)
    return out


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a last line cut by a kill is left out."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def series(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Iterations and values at which `name` was logged."""
    points = [(r["iteration"], r[name]) for r in rows if name in r]
    return [p[0] for p in points], [p[1] for p in points]


def _headline(rows: list[dict[str, float]]) -> list[dict[str, str]]:
    """First and last value of every evaluation metric."""
    names = dict.fromkeys(k for r in rows for k in r if k.startswith("eval/"))
    out = []
    for name in names:
        _, y = series(rows, name)
        out.append({"name": name.removeprefix("eval/"), "first": f"{y[0]:.3f}", "last": f"{y[-1]:.3f}"})
    return out


def _panel(title: str, names: list[str], rows: list[dict[str, float]]) -> str | None:
    """An SVG with one line per metric, None when none was logged."""
    from matplotlib.figure import Figure

    found = [(n, *series(rows, n)) for n in names]
    found = [f for f in found if f[1]]
    if not found:
        return None
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    axes = figure.subplots()
    for name, x, y in found:
        axes.plot(x, y, marker="o" if len(x) < 30 else None, markersize=3, linewidth=1.6, label=name)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(found) > 1:
        axes.legend(fontsize=8, frameon=False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _grid(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "samples.json").read_text())
    for cells in rows.values():
        for cell in cells:
            if "picture" in cell["output"]:
                cell["src"] = data_uri(folder / cell["output"]["picture"])
    return {"iteration": int(folder.name), "rows": rows}


def data_uri(file: Path) -> str:
    """The PNG inlined."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
