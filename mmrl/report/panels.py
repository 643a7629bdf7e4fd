"""Panels of a run's page: pictures made from its metrics. A package adds its own as rows of the kind `panels`."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from mmrl.registry import register

Rows = list[dict[str, float]]
# (metrics of the run, run name -> metrics of a run compared with it) -> SVG, or None where there is nothing to draw.
Panel = Callable[[Rows, Mapping[str, Rows]], str | None]


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Iterations and values at which the metric `name` was logged."""
    logged = [row for row in rows if name in row]
    return [row["iteration"] for row in logged], [row[name] for row in logged]


def curves(title: str, *metrics: str) -> Panel:
    """A panel with one line per metric over the iterations; lines of other runs are dashed.

    It is left out where none of the metrics was logged or all are 0; a curve that equals another is drawn once.
    """

    def draw(rows: Rows, others: Mapping[str, Rows]) -> str | None:
        """The panel, see `Panel`."""
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for name in metrics:
            iterations, values = series(rows, name)
            already_drawn = any(values == other for _, other in lines.values())
            if any(values) and not already_drawn:
                lines[name] = (iterations, values)
        if not lines:
            return None
        figure, axes = new_axes(title, "iteration", 3.4 if others else 2.7)
        for name, (iterations, values) in lines.items():
            # Single points are marked while there are few.
            marker = "o" if len(iterations) < 30 else None
            (line,) = axes.plot(iterations, values, marker=marker, markersize=3, linewidth=1.6, label=name)
            for run, other_rows in others.items():
                style = {"linewidth": 1.3, "color": line.get_color(), "label": f"{name}, {run}"}
                axes.plot(*series(other_rows, name), "--", **style)
        if len(lines) > 1 or others:
            figure.legend(fontsize=7 if others else 8, frameon=False, loc="outside lower center", ncols=2)
        return as_svg(figure)

    return draw


def new_axes(title: str, across: str, height: float = 2.7, width: float = 5.2) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes in the style of the page. height, width: inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(across, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def as_svg(figure: Any) -> str:
    """A figure as an SVG element for the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


# place: order on the page. compares: curves of other runs are drawn as well.
register("panels", "evaluation", place=0, compares=True)(
    curves(
        "On the evaluation prompts",
        "eval/reward",
        "eval/judge",
        "eval/diversity",
        "eval/accuracy",
        "eval/steps",
        "eval/format",
    )
)
register("panels", "labelled_steps", place=30)(
    curves(
        "On labelled steps held out",
        "eval/auc",
        "eval/macro_f1",
        "eval/first_error_f1",
        "eval/ece",
        "eval/perception/auc",
        "eval/reasoning/auc",
    )
)
register("panels", "step_loss", place=40)(curves("Loss on labelled steps", "loss/mean"))
register("panels", "preference", place=50)(
    curves("Loss on pairs of steps, and share of pairs ordered rightly", "preference/loss", "preference/accuracy")
)
register("panels", "reward", place=60)(curves("Reward of the rollouts", "reward/mean", "reward/std"))
register("panels", "entropy", place=70)(curves("Entropy of the actions", "policy/entropy"))
register("panels", "kl", place=80)(curves("Divergence from the initial model (KL)", "policy/kl"))
register("panels", "grad_norm", place=90)(curves("Gradient norm", "policy/grad_norm"))
register("panels", "clipped", place=100)(curves("Share clipped", "policy/clip_frac"))
register("panels", "time", place=110)(
    curves("Seconds per iteration", "time/rollout_s", "time/reward_s", "time/update_s")
)
