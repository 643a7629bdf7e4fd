"""Panels of a diffusion run's page."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mmrl.registry import declares
from mmrl.report.panels import Rows, as_svg, new_axes

# A metric at one noise level s, such as eval/pair_acc/s0.30.
AT_NOISE_LEVEL = r"eval/(.+)/s(\d+\.\d+)"


@declares(place=10, draws=AT_NOISE_LEVEL)
def noise_levels(rows: Rows, others: Mapping[str, Rows]) -> str | None:
    """The last evaluation's metrics over the noise level."""
    last: dict[str, dict[float, float]] = {}
    for row in rows:
        for name, value in row.items():
            if match := re.fullmatch(AT_NOISE_LEVEL, name):
                last.setdefault(match[1], {})[float(match[2])] = value
    if not last:
        return None
    figure, axes = new_axes("By noise level, at the end", "noise level s")
    for label, points in last.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), marker="o", markersize=3, linewidth=1.6, label=label)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return as_svg(figure)
