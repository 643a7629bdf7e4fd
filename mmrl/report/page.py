"""The page: curves, sample grids before and after, one rollout tree before and after. No script, no network."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape

from mmrl import registry
from mmrl.jsonl import read_metrics
from mmrl.registry import Row
from mmrl.report.artifacts import data_uri
from mmrl.report.panels import Rows, series
from mmrl.report.search_panel import search_panel
from mmrl.report.tree_picture import draw_tree
from mmrl.workdir import write_text

_SAMPLED = (
    "Evaluation without exploration noise, on fixed prompts. A reward that rises while a judge or the diversity falls "
    "is being hacked."
)
_LABELLED = "Evaluation on labelled steps held out. A step is called right from a score of 1/2 on."

LAST = 1000  # place of panels that name none

log = logging.getLogger(__name__)


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
    write_text(out, env.get_template("report.html").render(title=" + ".join(r[0] for r in runs), sections=sections))
    return out


def _section(title: str, run: Path, against: Sequence[Path]) -> dict[str, Any]:
    for folder in (run, *against):
        if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
            raise ReportError(
                f"{folder} is no run folder (no metrics.jsonl and config.yaml); give the run.output of a run"
            )
    rows = read_metrics(run / "metrics.jsonl")
    others = {p.name: read_metrics(p / "metrics.jsonl") for p in against}
    panels = sorted(registry.rows("panels"), key=lambda row: float(row.facts.get("place", LAST)))
    grids = sorted(p for p in (run / "samples").glob("[0-9]*") if (p / "samples.json").exists())
    trees = [run / "trees" / n for n in ("first", "last") if (run / "trees" / n / "outputs.json").exists()]
    return {
        "title": title,
        "note": _LABELLED if any("eval/auc" in r for r in rows) else _SAMPLED,
        "headline": _headline(rows, others, [row.facts["draws"] for row in panels if "draws" in row.facts]),
        "others": list(others),
        "panels": [svg for row in panels if (svg := _drawn(row, rows, others))],
        "grids": [_grid(p) for p in dict.fromkeys([*grids[:1], *grids[-1:]])],
        "search": search_panel(run / "search.json"),
        "trees": [{"name": p.name, "svg": draw_tree(p)} for p in trees],
        "config": (run / "config.yaml").read_text(),
        "environment": _environment(run / "environment.json"),
    }


def _environment(file: Path) -> str:
    """As YAML, or as it is where it is damaged."""
    text = file.read_text(errors="replace")
    try:
        return yaml.safe_dump(json.loads(text))
    except ValueError:
        return text


def _drawn(row: Row, rows: Rows, others: Mapping[str, Rows]) -> str | None:
    """A panel as SVG; one that fails is left out and told, so that no run ends without its report."""
    try:
        svg: str | None = row.build({})(rows, others if row.facts.get("compares") else {})
    except Exception as error:
        log.warning("report: panel %r is left out: %s: %s", row.name, type(error).__name__, error)
        return None
    return svg


def _headline(rows: Rows, others: Mapping[str, Rows], drawn: Sequence[str]) -> list[dict[str, Any]]:
    """First and last value of every evaluation metric, and the last one of the runs compared with.

    Args:
        drawn: patterns of metrics that a panel shows in place of the table.
    """
    logged = dict.fromkeys(k for row in rows for k in row if k.startswith("eval/"))
    names = [name for name in logged if not any(re.fullmatch(pattern, name) for pattern in drawn)]
    out = []
    for name in names:
        _, y = series(rows, name)
        beside = [f"{o[-1]:.3f}" if (o := series(r, name)[1]) else "" for r in others.values()]
        short = name.removeprefix("eval/")
        out.append({"name": short, "first": f"{y[0]:.3f}", "last": f"{y[-1]:.3f}", "others": beside})
    return out


def _grid(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "samples.json").read_text())
    for row in rows:
        row["src"] = data_uri(folder / row["prompt"]) if row["prompt"] else None
        for cell in row["cells"]:
            if "picture" in cell["output"]:
                cell["src"] = data_uri(folder / cell["output"]["picture"])
    return {"iteration": int(folder.name), "rows": rows}
