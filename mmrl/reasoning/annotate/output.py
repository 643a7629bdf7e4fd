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
    """What an annotation made: items, records, balance of labels, first errors, cost, what was set aside and why.

    records: JSON lines.
    """
    rows = [json.loads(line) for line in records]
    labels = [y for row in rows for y in row["labels"]]
    known = [y for y in labels if y is not None]
    finals = [row["final_correct"] for row in rows if row["final_correct"] is not None]
    return {
        "settings": dict(settings),
        "items": items,
        "records": len(rows),
        "steps": len(labels),
        "labels": {
            "positive": sum(y >= 0.5 for y in known),
            "negative": sum(y < 0.5 for y in known),
            "unlabelled": len(labels) - len(known),
            "mean": sum(known) / len(known) if known else None,
        },
        "first_error": dict(Counter(str(row["first_error"]) for row in rows).most_common()),
        "final_correct_frac": sum(finals) / len(finals) if finals else None,
        "cost": dict(costs),
        "quarantined": list(bad),
    }


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[Callable[[int, Mapping[str, int]], None]]:
    """A bar over `total` items; advance(items, cost)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("annotate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total)

        def advance(items: int, cost: Mapping[str, int]) -> None:
            told = f"{cost['completions']} completions, {cost['tokens']} tokens, {cost['reused']} reused"
            bar.update(task, advance=items, description=told)

        yield advance
