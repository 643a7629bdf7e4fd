"""The report page of a run: curves, then samples and one rollout tree from the beginning and from the end."""

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

# Place on the page of panels that name none.
LAST = 1000

log = logging.getLogger(__name__)


class ReportError(ValueError):
    """The folder holds no run."""


def write_report(run: Path, against: Sequence[Path] = ()) -> Path:
    """Write run/report.html from the files of the run; returns its path.

    against: other runs whose evaluation curves are drawn beside this one's.

    Raises:
        ReportError: no such folder, or no metrics in it.
    """
    return write_overview([(Path(run).name, Path(run), against)], Path(run) / "report.html")


def write_overview(runs: Sequence[tuple[str, Path, Sequence[Path]]], out: Path) -> Path:
    """One page of several runs, each (title, run, runs to compare with); returns `out`."""
    env = Environment(loader=PackageLoader("mmrl.report", "templates"), autoescape=select_autoescape())
    sections = [_section(title, run, against) for title, run, against in runs]
    page_title = " + ".join(title for title, _, _ in runs)
    write_text(out, env.get_template("report.html").render(title=page_title, sections=sections))
    return out


def _section(title: str, run: Path, against: Sequence[Path]) -> dict[str, Any]:
    """The variables of the template for one run."""
    for folder in (run, *against):
        if not (folder / "metrics.jsonl").is_file() or not (folder / "config.yaml").is_file():
            raise ReportError(
                f"{folder} is no run folder (no metrics.jsonl and config.yaml); give the run.output of a run"
            )
    rows = read_metrics(run / "metrics.jsonl")
    others = {folder.name: read_metrics(folder / "metrics.jsonl") for folder in against}
    panels = sorted(registry.rows("panels"), key=lambda row: float(row.facts.get("place", LAST)))
    drawings = [_drawn(row, rows, others) for row in panels]
    drawn_metrics = [row.facts["draws"] for row in panels if "draws" in row.facts]
    # The samples of the first and of the last evaluation, which may be the same.
    evaluations = sorted(p for p in (run / "samples").glob("[0-9]*") if (p / "samples.json").exists())
    first_and_last = dict.fromkeys([*evaluations[:1], *evaluations[-1:]])
    trees = [run / "trees" / name for name in ("first", "last")]
    return {
        "title": title,
        "note": _LABELLED if any("eval/auc" in row for row in rows) else _SAMPLED,
        "headline": _headline(rows, others, drawn_metrics),
        "others": list(others),
        "panels": [svg for svg in drawings if svg],
        "grids": [_grid(folder) for folder in first_and_last],
        "search": search_panel(run / "search.json"),
        "trees": [{"name": p.name, "svg": draw_tree(p)} for p in trees if (p / "outputs.json").exists()],
        "config": (run / "config.yaml").read_text(),
        "environment": _environment(run / "environment.json"),
    }


def _environment(file: Path) -> str:
    """The environment file as YAML; its text unchanged where it is damaged."""
    text = file.read_text(errors="replace")
    try:
        return yaml.safe_dump(json.loads(text))
    except ValueError:
        return text


def _drawn(row: Row, rows: Rows, others: Mapping[str, Rows]) -> str | None:
    """A panel as SVG; one that fails is logged and left out, so that no run ends without its report."""
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
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    table = []
    for name in names:
        if any(re.fullmatch(pattern, name) for pattern in drawn):
            continue
        _, values = series(rows, name)
        last_of_others = []
        for other_rows in others.values():
            _, other_values = series(other_rows, name)
            last_of_others.append(f"{other_values[-1]:.3f}" if other_values else "")
        table.append(
            {
                "name": name.removeprefix("eval/"),
                "first": f"{values[0]:.3f}",
                "last": f"{values[-1]:.3f}",
                "others": last_of_others,
            }
        )
    return table


def _grid(folder: Path) -> dict[str, Any]:
    """The samples of one evaluation as `save_samples` wrote them, pictures inlined."""
    rows = json.loads((folder / "samples.json").read_text())
    for row in rows:
        row["src"] = data_uri(folder / row["prompt"]) if row["prompt"] else None
        for cell in row["cells"]:
            if "picture" in cell["output"]:
                cell["src"] = data_uri(folder / cell["output"]["picture"])
    return {"iteration": int(folder.name), "rows": rows}
