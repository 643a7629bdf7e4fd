"""The bar of a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_SHOWN = ("reward/mean", "eval/reward", "eval/judge")


@contextmanager
def progress_bar(total: int, completed: int, *, shown: bool) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A bar of iterations inside the block; what it gives is called with the metrics of each of them."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("train"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total, completed=completed)

        def advance(metrics: Mapping[str, float]) -> None:
            known = {k: metrics[k] for k in _SHOWN if k in metrics}
            bar.update(task, advance=1, description="  ".join(f"{k} {v:.3f}" for k, v in known.items()))

        yield advance
