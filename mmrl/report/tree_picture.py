"""A rollout tree as SVG: time runs right, every fork and leaf with its picture, edges coloured by advantage."""

from __future__ import annotations

import html
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.report.artifacts import data_uri, prompt_title, shown_steps
from mmrl.rollout import Rollout
from mmrl.tree import StepTree

CELL, GAP, COLUMN, MARGIN, ROOT = 40, 10, 150, 24, 96
WORDS = 104  # width of a written step
LETTERS = 17  # of a written step; the whole text is its tooltip


def draw_tree(folder: Path) -> str:
    """SVG of the tree that `save_tree` wrote."""
    rollout = Rollout.load(folder)
    tree, adv = rollout.tree, rollout.tree.tags["adv"]
    outputs: dict[str, dict[str, str]] = json.loads((folder / "outputs.json").read_text())
    shown = shown_steps(rollout)
    above = _shown_ancestor(tree, shown)
    x, y = _layout(tree, shown, above)
    width = int(max(x.values())) + WORDS + 130
    height = max(int(max(y.values())) + CELL, ROOT) + MARGIN
    first = [y[int(s)] for s in shown if above[int(s)] < 0]
    root = (MARGIN + ROOT, sum(first) / len(first))
    wide = WORDS if rollout.texts else CELL
    parts = [_edge(root if above[s] < 0 else (x[above[s]] + wide, y[above[s]]), (x[s], y[s]), float(adv[s]),
                   bool(rollout.actions.trainable[tree.tok_start[s]]))
             for s in map(int, shown)]  # fmt: skip
    parts.append(_root(root, folder))
    for s in map(int, shown):
        parts.append(_node(x[s], y[s], outputs[str(s)], folder, _caption(tree, s), float(tree.step_reward[s])))
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


def _layout(tree: StepTree, shown: Tensor, above: dict[int, int]) -> tuple[dict[int, float], dict[int, float]]:
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
        x[s] = MARGIN + ROOT + 60 + column[int(tree.depth[s])] * COLUMN
        below = children.get(s, [])
        for c in below:
            place(c)
        if below:
            y[s] = sum(y[c] for c in below) / len(below)
        else:
            y[s] = MARGIN + CELL / 2 + row * (CELL + GAP)
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


def _node(x: float, y: float, output: dict[str, Any], folder: Path, caption: str, step_reward: float) -> str:
    if "picture" in output:
        body = (
            f'<image x="{x:.0f}" y="{y - CELL / 2:.0f}" width="{CELL}" height="{CELL}" '
            f'href="{data_uri(folder / output["picture"])}"/>'
        )
    else:
        body = _words(x, y, output["text"], step_reward)
        x += WORDS - CELL
    if caption:
        body += f'<text x="{x + CELL + 8:.0f}" y="{y + 4:.0f}" class="reward">{caption}</text>'
    return body


def _words(x: float, y: float, text: str, step_reward: float) -> str:
    """A written step in a box; its left edge is green for a step reward above 0, red otherwise, grey without one."""
    colour = "var(--mute)" if math.isnan(step_reward) else "var(--good)" if step_reward > 0 else "var(--bad)"
    short = html.escape(text if len(text) <= LETTERS else text[: LETTERS - 1] + "\u2026")
    return (
        f"<g><title>{html.escape(text)} (step reward {step_reward:g})</title>"
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="{WORDS}" height="22" class="words"/>'
        f'<rect x="{x:.0f}" y="{y - 11:.0f}" width="4" height="22" fill="{colour}"/>'
        f'<text x="{x + 9:.0f}" y="{y + 4:.0f}">{short}</text></g>'
    )
