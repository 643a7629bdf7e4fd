"""The common parts of the benchmarks: items to score, their files, calls of a scorer, a threshold tuned elsewhere.

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
# Scores of one solution's steps, None where the scorer gave none.
Steps = Sequence[float] | None

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


# (row, "file:row", name of the file without suffix) -> items.
Read = Callable[[Mapping[str, Any], str, str], list[Item]]
# (scored items, threshold, aggregate) -> measures.
Measure = Callable[[Sequence[Scored], float, str], Result]
# (scored items, threshold) -> a function from (M,) item indices to the headline.
Quick = Callable[[Sequence[Scored], float], Callable[[NDArray[np.intp]], float]]


@dataclass(frozen=True)
class Benchmark:
    """A test set's file layout and its measures.

    headline: the metric that a threshold is tuned for and an interval is drawn for.
    thresholded: `measure` looks at the threshold. stepwise: one solution with labelled steps per item.
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
    pictures: dict[Path, None] = {}

    def make(row: Mapping[str, Any], name: str) -> list[Item]:
        items = read_row(row, name, file.stem)
        for item in items:
            for record in item.records:
                check_record(record, unlabelled=True)
        with_paths = []
        for item in items:
            records = [with_media(record, file.parent, media_root, pictures) for record in item.records]
            with_paths.append(replace(item, records=tuple(records)))
        return with_paths

    return read_rows(file, make, max_bad=max_bad, key=lambda item: item.records[0].id)


def score_items(items: Sequence[Item], score: Score, *, lenient: bool = False) -> list[Scored]:
    """Items with the scores of all their solutions, asked for in one call.

    A solution scored with an empty list or any NaN has none: an error, or None when `lenient`.
    """
    if not items:
        raise ValueError("no items to evaluate")
    records = [record for item in items for record in item.records]
    rows = list(score(records))
    if len(rows) != len(records):
        raise ValueError(f"the scorer returned {len(rows)} lists for {len(records)} solutions; one each, in order")
    scores = [_checked(record, row, lenient) for record, row in zip(records, rows, strict=True)]
    scored, start = [], 0
    for item in items:
        stop = start + len(item.records)
        scored.append(Scored(item, tuple(scores[start:stop])))
        start = stop
    return scored


def _checked(record: SolutionRecord, scores: Sequence[float], lenient: bool) -> Steps:
    """The scores of a solution as floats, checked; None without scores where that is allowed."""
    values = [float(score) for score in scores]
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
    # By the id of a record. The record is kept beside its scores: were it freed, a new one could get its id.
    memo: dict[int, tuple[SolutionRecord, Sequence[float]]] = {}

    def call(records: Sequence[SolutionRecord]) -> list[Sequence[float]]:
        new = [record for record in records if id(record) not in memo]
        for record, scores in zip(new, score(new) if new else [], strict=True):
            memo[id(record)] = record, scores
        return [memo[id(record)][1] for record in records]

    return call


def tune(bench: Benchmark, items: Sequence[Item], score: Score, *, aggregate: str = "min", most: int = 200) -> float:
    """The threshold with the best headline on `items`, which must not be the test set; the lowest on ties.

    Candidates: distinct scores rounded to 4 digits, thinned evenly to at most `most`.
    """
    scored = score_items(items, score, lenient=bench.lenient)
    all_scores = [scores for item in scored for scores in item.scores if scores is not None]
    candidates = thresholds(all_scores, most)
    values = [bench.measure(scored, threshold, aggregate).metrics[bench.headline] for threshold in candidates]
    best = max((value for value in values if not math.isnan(value)), default=math.nan)
    if math.isnan(best):
        raise ValueError(f"{bench.headline} is undefined on the tuning items; give a threshold instead")
    return candidates[values.index(best)]


def thresholds(scores: Sequence[Sequence[float]], most: int) -> list[float]:
    """Distinct scores rounded to 4 digits, ascending, every k-th so that at most `most` are left."""
    distinct = sorted({round(score, 4) for of_solution in scores for score in of_solution})
    return distinct[:: math.ceil(len(distinct) / most)] if distinct else []


def total(scores: Steps, name: str) -> float:
    """The score of a whole solution by an aggregate that is one number."""
    value = find_aggregate(name)([] if scores is None else scores)
    if isinstance(value, tuple):
        raise ValueError(f"aggregate {name!r} is a pair to rank by; benchmarks need one number, such as min or mean")
    return value


def of_groups(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Scored items by group, in order of first appearance."""
    groups: dict[str, list[Scored]] = {}
    for entry in scored:
        groups.setdefault(entry.item.group, []).append(entry)
    return groups


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, NaN without values."""
    return math.fsum(values) / len(values) if values else math.nan


def response_steps(text: Any, what: str) -> tuple[Step, ...]:
    """A whole response as steps, split at blank lines; RowError when it is empty."""
    paragraphs = text.split("\n\n") if isinstance(text, str) else []
    parts = [paragraph for paragraph in paragraphs if paragraph.strip()]
    if not parts:
        raise RowError(f"empty candidate: {what} has no text")
    return tuple(map(Step, parts))
