"""A rollout tree as SVG: time runs to the right, forks and leaves have their pictures, edges the advantage's colour.

Coordinates are SVG's: x to the right, y down, in pixels; a point is (x, y).
"""

from __future__ import annotations

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.report.artifacts import data_uri, prompt_title, shown_steps
from mmrl.rollout import Rollout
from mmrl.tree import StepTree

# Pixels: the margin of the page, the side of the prompt's picture, the space between rows, the side of a picture.
MARGIN, ROOT, GAP = 24, 96, 10
CELL = 40

Point = tuple[float, float]


@dataclass(frozen=True)
class _Look:
    """Sizes in pixels: width of a step, height of a row, distance between columns.

    letters: of a text that are shown; the whole text is its tooltip.
    """

    width: int
    row: int
    column: int
    letters: int = 0


PICTURES, TEXTS, TURNS = _Look(CELL, CELL, 150), _Look(104, CELL, 150, 17), _Look(216, 84, 262, 37)


def draw_tree(folder: Path) -> str:
    """SVG of the tree that `save_tree` wrote."""
    rollout = Rollout.load(folder)
    tree, adv = rollout.tree, rollout.tree.tags["adv"]
    outputs: dict[str, dict[str, str]] = json.loads((folder / "outputs.json").read_text())
    shown = shown_steps(rollout)
    above = _shown_ancestor(tree, shown)
    look = _look(rollout, outputs)
    place = _layout(tree, shown, above, look)
    width = int(max(x for x, _ in place.values())) + look.width + 130
    height = max(int(max(y for _, y in place.values())) + look.row, ROOT) + MARGIN
    # The prompt stands in the middle of its first steps.
    first_rows = [place[step][1] for step in place if above[step] < 0]
    root: Point = (MARGIN + ROOT, sum(first_rows) / len(first_rows))
    parts = []
    for step in shown.tolist():
        start = root
        if above[step] >= 0:
            x, y = place[above[step]]
            start = (x + look.width, y)
        trained = bool(rollout.actions.trainable[tree.tok_start[step]])
        parts.append(_edge(start, place[step], float(adv[step]), trained))
    parts.append(_root(root, folder))
    for step in shown.tolist():
        x, y = place[step]
        parts.append(_node(x, y, outputs[str(step)], folder, look, float(tree.step_reward[step])))
        caption = _caption(tree, step)
        if caption:
            parts.append(f'<text x="{x + look.width + 8:.0f}" y="{y + 4:.0f}" class="reward">{caption}</text>')
    prompt = html.escape(prompt_title(rollout.prompts[0]))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" class="tree" role="img">'
        f'<title>Rollout tree of prompt {prompt}</title><text x="{MARGIN}" y="14">{prompt}</text>'
        f"{''.join(parts)}</svg>"
    )


def _look(rollout: Rollout, outputs: dict[str, dict[str, str]]) -> _Look:
    """The sizes for turns (texts with a picture each), texts or pictures."""
    if any({"text", "picture"} <= set(output) for output in outputs.values()):
        return TURNS
    return TEXTS if rollout.texts else PICTURES


def _root(point: Point, folder: Path) -> str:
    """The prompt: its picture, or a dot."""
    x, y = point
    if not (folder / "prompt.png").exists():
        return f'<circle cx="{x}" cy="{y:.0f}" r="6" class="root"/>'
    top = max(y - ROOT / 2, MARGIN)
    return (
        f'<image x="{MARGIN}" y="{top:.0f}" width="{ROOT}" height="{ROOT}" href="{data_uri(folder / "prompt.png")}"/>'
    )


def _shown_ancestor(tree: StepTree, shown: Tensor) -> dict[int, int]:
    """The nearest shown ancestor of each shown step, -1 = the prompt."""
    visible = torch.zeros(len(tree), dtype=torch.bool)
    visible[shown] = True
    ancestor_of = {}
    for step in shown.tolist():
        ancestor = int(tree.parent[step])
        while ancestor >= 0 and not visible[ancestor]:
            ancestor = int(tree.parent[ancestor])
        ancestor_of[step] = ancestor
    return ancestor_of


def _layout(tree: StepTree, shown: Tensor, above: dict[int, int], look: _Look) -> dict[int, Point]:
    """Step -> its point: columns by depth, a row per leaf in depth-first order, inner steps amid their children."""
    children: dict[int, list[int]] = {}
    for step in shown.tolist():
        children.setdefault(above[step], []).append(step)
    column_of_depth = {depth: i for i, depth in enumerate(tree.depth[shown].unique().tolist())}
    places: dict[int, Point] = {}
    num_rows = 0

    def place(step: int) -> float:
        """Place a step and all below it; returns its y."""
        nonlocal num_rows
        x = MARGIN + ROOT + 60 + column_of_depth[int(tree.depth[step])] * look.column
        below = [place(child) for child in children.get(step, [])]
        if below:
            y = sum(below) / len(below)
        else:
            y = MARGIN + look.row / 2 + num_rows * (look.row + GAP)
            num_rows += 1
        places[step] = (x, y)
        return y

    for step in children.get(-1, []):
        place(step)
    return places


def _colour(number: float) -> str:
    """Green for a positive number, red for a negative one, grey for 0 and NaN."""
    if number > 0:
        return "var(--good)"
    if number < 0:
        return "var(--bad)"
    return "var(--mute)"


def _edge(start: Point, end: Point, adv: float, trained: bool) -> str:
    """A curve in the colour of its advantage; dashed and without number where a step has no density (ODE)."""
    (x, y), (end_x, end_y) = start, end
    middle = (x + end_x) / 2
    colour = _colour(adv)
    style = f'stroke="{colour}" stroke-width="{1 + min(abs(adv), 2):.1f}"' if trained else 'class="ode"'
    # A cubic Bezier curve that leaves and arrives horizontally.
    curve = f"M{x:.0f} {y:.0f}C{middle:.0f} {y:.0f} {middle:.0f} {end_y:.0f} {end_x:.0f} {end_y:.0f}"
    path = f'<path d="{curve}" {style}/>'
    if not trained:
        return path
    return path + f'<text x="{end_x - 6:.0f}" y="{end_y - 6:.0f}" class="adv" fill="{colour}">{adv:+.2f}</text>'


def _caption(tree: StepTree, step: int) -> str:
    """The outcome of a leaf, empty for inner steps."""
    if not bool(tree.is_leaf[step]):
        return ""
    return f"{float(tree.outcome[step]):.3f}" if bool(tree.is_finished[step]) else "unscored"


def _node(x: float, y: float, output: dict[str, Any], folder: Path, look: _Look, step_reward: float) -> str:
    """A picture, a text, or a text with a picture below it."""
    picture = folder / output["picture"] if "picture" in output else None
    if "text" not in output:
        return "" if picture is None else _picture(x, y - CELL / 2, CELL, CELL, picture)
    if picture is None:
        return _words(x, y, output["text"], look, step_reward)
    top = y - look.row / 2 + 11
    return _words(x, top, output["text"], look, step_reward) + _picture(
        x, top + 14, look.width, look.row - 25, picture
    )


def _picture(x: float, y: float, width: float, height: float, file: Path) -> str:
    return (
        f'<image x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'preserveAspectRatio="xMinYMid" href="{data_uri(file)}"/>'
    )


def _words(x: float, y: float, text: str, look: _Look, step_reward: float) -> str:
    """A written step in a box; its left edge is green for a step reward above 0, red otherwise, grey without one."""
    colour = "var(--bad)" if step_reward == 0 else _colour(step_reward)
    short = text if len(text) <= look.letters else text[: look.letters - 1] + "\u2026"
    short = html.escape(short)
    return (
        f"<g><title>{html.escape(text)} (step reward {step_reward:g})</title>"
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="{look.width}" height="22" class="words"/>'
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="4" height="22" fill="{colour}"/>'
        f'<text x="{x + 9:.0f}" y="{y + 4:.0f}">{short}</text></g>'
    )
