"""The part of a report on a search: accuracy of each way to choose, with its interval, curves and examples."""

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
    "random": "a random candidate",
    "majority": "majority vote",
    "pass": "any candidate right (bound)",
    "answer": "the search's own choice",
}


def search_panel(file: Path) -> dict[str, Any] | None:
    """Rows and curves of a search's report.json, None where there is no such file."""
    if not file.is_file():
        return None
    report = json.loads(file.read_text())
    accuracy, over_majority = report["accuracy"], report["over_majority"]
    ways = [name for name in accuracy if name in _NAMES or name.split("/")[0] in ("best_of_n", "weighted")]
    rows = []
    for name in sorted(ways, key=lambda name: accuracy[name]["mean"]):
        rows.append(
            {
                "name": _name(name),
                "accuracy": _interval(accuracy[name]),
                "over": _interval(over_majority[name], "+"),
            }
        )
    return {
        "prompts": report["prompts"],
        "candidates": report["candidates"]["max"],
        "rows": rows,
        "svg": _curves(report["curves"]) if report["curves"] else None,
        "rules": report["rules"],
        "examples": [_shown(example) for example in report.get("examples", [])],
    }


def disagreements(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], limit: int = 6
) -> list[dict[str, Any]]:
    """The first questions on which the search's choice and the vote differ, whoever is right.

    Args:
        rows: of results.jsonl. prompts: those that were searched, for their questions and pictures.
    """
    inputs_of = {prompt.id: prompt.inputs for prompt in prompts}
    examples: list[dict[str, Any]] = []
    for row in rows:
        candidates = row["candidates"]
        answers = [candidate["answer"] for candidate in candidates if candidate["answer"] is not None]
        if not answers:
            continue
        majority = Counter(answers).most_common(1)[0][0]
        chosen = candidates[row["answer"]]
        if chosen["answer"] == majority or len(examples) >= limit:
            continue
        voted = next(candidate for candidate in candidates if candidate["answer"] == majority)
        inputs = inputs_of[row["id"]]
        images = list(inputs.get("images") or [])
        keys = ("steps", "step_scores", "correct")
        examples.append(
            {
                "question": inputs.get("question", ""),
                "image": images[0] if images else None,
                "chosen": {key: chosen[key] for key in keys},
                "voted": {key: voted[key] for key in keys},
            }
        )
    return examples


def _shown(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example with its picture inlined and each step beside its score."""
    image = Path(example["image"]) if example["image"] else None
    shown: dict[str, Any] = {"question": example["question"]}
    shown["src"] = data_uri(image) if image is not None and image.is_file() else None
    for which in ("chosen", "voted"):
        solution = example[which]
        texts = [text.strip() for text in solution["steps"] if text.strip()]
        # A scorer gives blank steps no score, or one that is not shown.
        scores = solution["step_scores"][-len(texts) :]
        shown[which] = {"right": bool(solution["correct"]), "steps": list(zip(texts, scores, strict=False))}
    return shown


def _name(name: str) -> str:
    """The words for a way to choose, such as "best of N, min of the step scores" for `best_of_n/min`."""
    way, _, by = name.partition("/")
    words = {"best_of_n": "best of N", "weighted": "weighted vote"}.get(way, way)
    return _NAMES.get(name, f"{words}, {by} of the step scores")


def _interval(numbers: Mapping[str, float], sign: str = "") -> str:
    return f"{numbers['mean']:{sign}.3f} [{numbers['low']:{sign}.3f}, {numbers['high']:{sign}.3f}]"


def _curves(curves: Mapping[str, Any]) -> str:
    """Accuracy over the number of candidates, with 95 % bands."""
    figure, axes = new_axes("Share of right answers over the number of candidates", "candidates", 3.8, 6.4)
    for name, points in curves["values"].items():
        mean, low, high = ([point[key] for point in points] for key in ("mean", "low", "high"))
        (line,) = axes.plot(curves["k"], mean, marker="o", markersize=3, linewidth=1.6, label=_name(name))
        axes.fill_between(curves["k"], low, high, alpha=0.08, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.set_xticks(curves["k"], [str(k) for k in curves["k"]])
    figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return as_svg(figure)
