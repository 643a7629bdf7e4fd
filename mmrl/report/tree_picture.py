"""A rollout tree as SVG: time runs right, every fork and leaf with its picture, edges coloured by advantage."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.report.artifacts import data_uri, prompt_title, shown_steps
from mmrl.rollout import Rollout
from mmrl.tree import StepTree

MARGIN, ROOT, GAP = 24, 96, 10
CELL = 40  # side of a picture, height of a row


@dataclass(frozen=True)
class _Look:
    """How wide a step is drawn, how high a row is, how far apart columns are, letters shown of a text (the whole text
    is its tooltip)."""

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
    turns = any({"text", "picture"} <= set(o) for o in outputs.values())
    look = TURNS if turns else TEXTS if rollout.texts else PICTURES
    x, y = _layout(tree, shown, above, look)
    width = int(max(x.values())) + look.width + 130
    height = max(int(max(y.values())) + look.row, ROOT) + MARGIN
    first = [y[int(s)] for s in shown if above[int(s)] < 0]
    root = (MARGIN + ROOT, sum(first) / len(first))
    parts = [_edge(root if above[s] < 0 else (x[above[s]] + look.width, y[above[s]]), (x[s], y[s]), float(adv[s]),
                   bool(rollout.actions.trainable[tree.tok_start[s]]))
             for s in map(int, shown)]  # fmt: skip
    parts.append(_root(root, folder))
    for s in map(int, shown):
        parts.append(_node(x[s], y[s], outputs[str(s)], folder, look, float(tree.step_reward[s])))
        if caption := _caption(tree, s):
            parts.append(f'<text x="{x[s] + look.width + 8:.0f}" y="{y[s] + 4:.0f}" class="reward">{caption}</text>')
    prompt = html.escape(prompt_title(rollout.prompts[0]))
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" class="tree" role="img">'
        f'<title>Rollout tree of prompt {prompt}</title><text x="{MARGIN}" y="14">{prompt}</text>'
        f"{''.join(parts)}</svg>"
    )


def _root(at: tuple[float, float], folder: Path) -> str:
    """The prompt: its picture, or a dot."""
    if not (folder / "prompt.png").exists():
        return f'<circle cx="{at[0]}" cy="{at[1]:.0f}" r="6" class="root"/>'
    top = max(at[1] - ROOT / 2, MARGIN)
    return (
        f'<image x="{MARGIN}" y="{top:.0f}" width="{ROOT}" height="{ROOT}" href="{data_uri(folder / "prompt.png")}"/>'
    )


def _shown_ancestor(tree: StepTree, shown: Tensor) -> dict[int, int]:
    """The nearest shown ancestor of each shown step, -1 = the prompt."""
    visible = torch.zeros(len(tree), dtype=torch.bool)
    visible[shown] = True
    out = {}
    for s in map(int, shown):
        p = int(tree.parent[s])
        while p >= 0 and not visible[p]:
            p = int(tree.parent[p])
        out[s] = p
    return out


def _layout(
    tree: StepTree, shown: Tensor, above: dict[int, int], look: _Look
) -> tuple[dict[int, float], dict[int, float]]:
    """Columns by depth, leaves one row each in depth-first order, inner steps in the middle of their children."""
    children: dict[int, list[int]] = {}
    for s in map(int, shown):
        children.setdefault(above[s], []).append(s)
    column = {int(d): i for i, d in enumerate(tree.depth[shown].unique())}
    x: dict[int, float] = {}
    y: dict[int, float] = {}
    row = 0

    def place(s: int) -> None:
        nonlocal row
        x[s] = MARGIN + ROOT + 60 + column[int(tree.depth[s])] * look.column
        below = children.get(s, [])
        for c in below:
            place(c)
        if below:
            y[s] = sum(y[c] for c in below) / len(below)
        else:
            y[s] = MARGIN + look.row / 2 + row * (look.row + GAP)
            row += 1

    for s in children.get(-1, []):
        place(s)
    return x, y


def _edge(a: tuple[float, float], b: tuple[float, float], adv: float, trained: bool) -> str:
    """A curve; green for a positive advantage, red for a negative one, grey and dashed where nothing was decided."""
    colour = "var(--good)" if adv > 0 else "var(--bad)" if adv < 0 else "var(--mute)"
    style = f'stroke="{colour}" stroke-width="{1 + min(abs(adv), 2):.1f}"' if trained else 'class="ode"'
    mid = (a[0] + b[0]) / 2
    path = (
        f'<path d="M{a[0]:.0f} {a[1]:.0f}C{mid:.0f} {a[1]:.0f} {mid:.0f} {b[1]:.0f} {b[0]:.0f} {b[1]:.0f}" {style}/>'
    )
    if not trained:
        return path
    return path + f'<text x="{b[0] - 6:.0f}" y="{b[1] - 6:.0f}" class="adv" fill="{colour}">{adv:+.2f}</text>'


def _caption(tree: StepTree, s: int) -> str:
    if not bool(tree.is_leaf[s]):
        return ""
    return f"{float(tree.outcome[s]):.3f}" if bool(tree.is_finished[s]) else "unscored"


def _node(x: float, y: float, output: dict[str, Any], folder: Path, look: _Look, step_reward: float) -> str:
    """A picture, a text, or a text with the picture of what it led to below it."""
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
    colour = "var(--mute)" if math.isnan(step_reward) else "var(--good)" if step_reward > 0 else "var(--bad)"
    short = html.escape(text if len(text) <= look.letters else text[: look.letters - 1] + "\u2026")
    return (
        f"<g><title>{html.escape(text)} (step reward {step_reward:g})</title>"
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="{look.width}" height="22" class="words"/>'
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="4" height="22" fill="{colour}"/>'
        f'<text x="{x + 9:.0f}" y="{y + 4:.0f}">{short}</text></g>'
    )
