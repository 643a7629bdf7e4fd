"""The part of a report that shows a search: what each way to choose gains, with its interval, and the curves."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrl.report.artifacts import data_uri
from mmrl.report.panels import as_svg, new_axes
from mmrl.rollout import Prompt

_NAMES = {
    "random": "a random candidate", "majority": "majority vote", "pass": "any candidate right (bound)",
    "answer": "the search's own choice",
}  # fmt: skip


def search_panel(file: Path) -> dict[str, Any] | None:
    """Rows and curves of a search's report.json, None where there is no such file."""
    if not file.is_file():
        return None
    report = json.loads(file.read_text())
    accuracy, over = report["accuracy"], report["over_majority"]
    shown = [n for n in accuracy if n in _NAMES or n.split("/")[0] in ("best_of_n", "weighted")]
    order = sorted(shown, key=lambda n: accuracy[n]["mean"])
    rows = [{"name": _name(n), "accuracy": _interval(accuracy[n]), "over": _interval(over[n], "+")} for n in order]
    return {
        "prompts": report["prompts"],
        "candidates": report["candidates"]["max"],
        "rows": rows,
        "svg": _curves(report["curves"]) if report["curves"] else None,
        "rules": report["rules"],
        "examples": [_shown(e) for e in report.get("examples", [])],
    }


def disagreements(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], limit: int = 6
) -> list[dict[str, Any]]:
    """The first questions on which the search's choice and the vote differ, whoever is right.

    Args:
        rows: of results.jsonl. prompts: those that were searched, for their questions and pictures.
    """
    known = {p.id: p.inputs for p in prompts}
    out: list[dict[str, Any]] = []
    for row in rows:
        answers = [c["answer"] for c in row["candidates"] if c["answer"] is not None]
        if not answers:
            continue
        voted = Counter(answers).most_common(1)[0][0]
        chosen = row["candidates"][row["answer"]]
        if chosen["answer"] != voted and len(out) < limit:
            first = next(c for c in row["candidates"] if c["answer"] == voted)
            inputs = known[row["id"]]
            images = list(inputs.get("images") or [])
            keys = ("steps", "step_scores", "correct")
            out.append({
                "question": inputs.get("question", ""), "image": images[0] if images else None,
                "chosen": {k: chosen[k] for k in keys}, "voted": {k: first[k] for k in keys},
            })  # fmt: skip
    return out


def _shown(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with its picture inside the page and each step beside its score."""
    image = Path(example["image"]) if example["image"] else None
    out: dict[str, Any] = {"question": example["question"]}
    out["src"] = data_uri(image) if image is not None and image.is_file() else None
    for which in ("chosen", "voted"):
        said = [t.strip() for t in example[which]["steps"] if t.strip()]
        scores = example[which]["step_scores"][-len(said) :]
        out[which] = {"right": bool(example[which]["correct"]), "steps": list(zip(said, scores, strict=False))}
    return out


def _name(name: str) -> str:
    way, _, by = name.partition("/")
    told = {"best_of_n": "best of N", "weighted": "weighted vote"}.get(way, way)
    return _NAMES.get(name, f"{told}, {by} of the step scores")


def _interval(x: Mapping[str, float], sign: str = "") -> str:
    return f"{x['mean']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"


def _curves(curves: Mapping[str, Any]) -> str:
    """Accuracy over the number of candidates, with 95 % bands."""
    figure, axes = new_axes("Share of right answers over the number of candidates", "candidates", 3.8, 6.4)
    for name, points in curves["values"].items():
        mean = [p["mean"] for p in points]
        (line,) = axes.plot(curves["k"], mean, marker="o", markersize=3, linewidth=1.6, label=_name(name))
        axes.fill_between(
            curves["k"], [p["low"] for p in points], [p["high"] for p in points], alpha=0.08, color=line.get_color()
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(curves["k"], [str(k) for k in curves["k"]])
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return as_svg(figure)
