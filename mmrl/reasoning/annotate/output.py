"""The output of an annotation: its report and its progress bar."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def summary(
    settings: Mapping[str, Any],
    items: int,
    records: Iterable[str],
    bad: Sequence[Mapping[str, str]],
    costs: Mapping[str, Any],
) -> dict[str, Any]:
    """The report of an annotation: items, records, balance of labels, first errors, cost, rows set aside and why.

    records: JSON lines.
    """
    rows = [json.loads(line) for line in records]
    labels = [label for row in rows for label in row["labels"]]
    given = [label for label in labels if label is not None]
    finals = [row["final_correct"] for row in rows if row["final_correct"] is not None]
    return {
        "settings": dict(settings),
        "items": items,
        "records": len(rows),
        "steps": len(labels),
        "labels": {
            "positive": sum(label >= 0.5 for label in given),
            "negative": sum(label < 0.5 for label in given),
            "unlabelled": len(labels) - len(given),
            "mean": sum(given) / len(given) if given else None,
        },
        "first_error": dict(Counter(str(row["first_error"]) for row in rows).most_common()),
        "final_correct_frac": sum(finals) / len(finals) if finals else None,
        "cost": dict(costs),
        "quarantined": list(bad),
    }


@contextmanager
def progress_bar(total: int, visible: bool) -> Iterator[Callable[[int, Mapping[str, int]], None]]:
    """A bar over `total` items; advance(items, cost)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("annotate"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not visible) as bar:
        task = bar.add_task("", total=total)

        def advance(items: int, cost: Mapping[str, int]) -> None:
            status = f"{cost['completions']} completions, {cost['tokens']} tokens, {cost['reused']} reused"
            bar.update(task, advance=items, description=status)

        yield advance
