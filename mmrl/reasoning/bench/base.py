"""What the benchmarks share: items to score, reading files of them, calling a scorer, tuning a threshold elsewhere.

A benchmark is a `Benchmark`: how a row becomes items, and a pure `measure` from items and step scores to numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrl.jsonl import Quarantined, RowError, read_rows
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.records_io import check_record, with_media
from mmrl.scorers.aggregate import aggregate as find_aggregate

Score = Callable[[Sequence[SolutionRecord]], Sequence[Sequence[float]]]
Steps = Sequence[float] | None  # scores of one solution, None where the scorer gave none

_FILES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Item:
    """One test case: the solutions to score, the group it is reported in, and what is right about it."""

    records: tuple[SolutionRecord, ...]
    group: str = ""
    truth: Any = None


@dataclass(frozen=True)
class Scored:
    """An item and the scores of its solutions, aligned with their steps."""

    item: Item
    scores: tuple[Steps, ...]


@dataclass(frozen=True)
class Result:
    """Measures over all items, the same per group (class, source, split, ..), and remarks for the reader."""

    metrics: Mapping[str, float]
    groups: Mapping[str, Mapping[str, float]]
    notes: tuple[str, ...] = ()


Read = Callable[[Mapping[str, Any], str, str], list[Item]]  # row, "file:row", name of the file without suffix
Measure = Callable[[Sequence[Scored], float, str], Result]  # scored items, threshold, aggregate
Quick = Callable[[Sequence[Scored], float], Callable[[NDArray[np.intp]], float]]


@dataclass(frozen=True)
class Benchmark:
    """A test set's file layout and its measures.

    headline: the metric that a threshold is tuned for and an interval is drawn for.
    thresholded: whether `measure` looks at the threshold. stepwise: one solution with labelled steps per item.
    lenient: a solution without scores counts against the scorer instead of being an error.
    quick: the headline of a resample, by item indices, with the work per item done once; for large sets.
    """

    read_row: Read
    measure: Measure
    headline: str
    thresholded: bool = True
    stepwise: bool = True
    lenient: bool = False
    quick: Quick | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def read(
        self, path: str | Path, *, media_root: str | Path | None = None, max_bad: float = 0.05
    ) -> tuple[list[Item], list[Quarantined]]:
        """Items of a file, or of all `.jsonl`, `.json` and `.parquet` files of a folder, and the rows set aside.

        Raises:
            ValueError: no file, no usable row, or more than the share `max_bad` of bad rows in a file.
        """
        items: list[Item] = []
        bad: list[Quarantined] = []
        for file in data_files(Path(path)):
            more, worse = _read_file(file, self.read_row, media_root, max_bad)
            items += more
            bad += worse
        return items, bad

    def evaluate(
        self, items: Sequence[Item], score: Score, *, threshold: float = 0.5, aggregate: str = "min"
    ) -> Result:
        """Measures of a scorer. A step is right iff its score is at least `threshold` (PRMBench: above it).

        Raises:
            ValueError: no items, or a solution whose scores are not one finite number per step.
        """
        return self.measure(score_items(items, score, lenient=self.lenient), threshold, aggregate)


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder by name."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _FILES)
        if not files:
            raise ValueError(f"no data in {path}; expected files ending in {', '.join(_FILES)}")
        return files
    return [path]


def _read_file(
    file: Path, read_row: Read, media_root: str | Path | None, max_bad: float
) -> tuple[list[Item], list[Quarantined]]:
    seen: dict[Path, None] = {}

    def make(row: Mapping[str, Any], name: str) -> list[Item]:
        items = read_row(row, name, file.stem)
        for item in items:
            for r in item.records:
                check_record(r, unlabelled=True)
        return [
            replace(i, records=tuple(with_media(r, file.parent, media_root, seen) for r in i.records)) for i in items
        ]

    return read_rows(file, make, max_bad=max_bad, key=lambda i: i.records[0].id)


def score_items(items: Sequence[Item], score: Score, *, lenient: bool = False) -> list[Scored]:
    """Items with the scores of all their solutions, asked for in one call.

    A solution scored with an empty list or any NaN has none: an error, or None when `lenient`.
    """
    if not items:
        raise ValueError("no items to evaluate")
    records = [r for i in items for r in i.records]
    given = list(score(records))
    if len(given) != len(records):
        raise ValueError(f"the scorer returned {len(given)} lists for {len(records)} solutions; one each, in order")
    checked = iter([_checked(r, s, lenient) for r, s in zip(records, given, strict=True)])
    return [Scored(i, tuple(next(checked) for _ in i.records)) for i in items]


def _checked(record: SolutionRecord, scores: Sequence[float], lenient: bool) -> Steps:
    values = [float(s) for s in scores]
    if lenient and (not values or any(map(math.isnan, values))):
        return None
    if len(values) != len(record.steps) or not all(map(math.isfinite, values)):
        raise ValueError(
            f"solution {record.id!r}: scores {values[:8]} for {len(record.steps)} steps; the scorer must give one "
            "finite number per step"
        )
    return values


def remembered(score: Score) -> Score:
    """The scorer, asked once per record object."""
    # the record is kept beside its scores: once it were freed, a new one could have its id
    memo: dict[int, tuple[SolutionRecord, Sequence[float]]] = {}

    def call(records: Sequence[SolutionRecord]) -> list[Sequence[float]]:
        new = [r for r in records if id(r) not in memo]
        for record, scores in zip(new, score(new) if new else [], strict=True):
            memo[id(record)] = record, scores
        return [memo[id(r)][1] for r in records]

    return call


def tune(bench: Benchmark, items: Sequence[Item], score: Score, *, aggregate: str = "min", most: int = 200) -> float:
    """The threshold with the best headline on `items`, which must not be the test set; the lowest on ties.

    Candidates: distinct scores rounded to 4 digits, thinned evenly to at most `most`.
    """
    scored = score_items(items, score, lenient=bench.lenient)
    candidates = thresholds([s for x in scored for s in x.scores if s is not None], most)
    values = [bench.measure(scored, t, aggregate).metrics[bench.headline] for t in candidates]
    best = max((v for v in values if not math.isnan(v)), default=math.nan)
    if math.isnan(best):
        raise ValueError(f"{bench.headline} is undefined on the tuning items; give a threshold instead")
    return candidates[values.index(best)]


def thresholds(scores: Sequence[Sequence[float]], most: int) -> list[float]:
    """Distinct scores rounded to 4 digits, ascending, every k-th so that at most `most` are left."""
    distinct = sorted({round(p, 4) for s in scores for p in s})
    return distinct[:: math.ceil(len(distinct) / most)] if distinct else []


def total(scores: Steps, name: str) -> float:
    """The score of a whole solution by an aggregate that is one number."""
    value = find_aggregate(name)([] if scores is None else scores)
    if isinstance(value, tuple):
        raise ValueError(f"aggregate {name!r} is a pair to rank by; benchmarks need one number, such as min or mean")
    return value


def of_groups(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Scored items by group, in order of first appearance."""
    found: dict[str, list[Scored]] = {}
    for s in scored:
        found.setdefault(s.item.group, []).append(s)
    return found


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def response_steps(text: Any, what: str) -> tuple[Step, ...]:
    """A whole response as steps, split at blank lines; RowError when it is empty."""
    parts = [p for p in text.split("\n\n") if p.strip()] if isinstance(text, str) else []
    if not parts:
        raise RowError(f"empty candidate: {what} has no text")
    return tuple(map(Step, parts))
