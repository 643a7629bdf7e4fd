"""PRMBench: nine classes of modified solutions, every step judged on its own.

Counts and ratios follow the official evaluation, its value -1 for undefined ratios included: a class without any error
step (multi_solutions) has negative F1 -1, and a scorer that calls everything right has negative F1 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrl.reasoning.bench.base import Benchmark, Item, Result, Scored, mean
from mmrl.reasoning.formats.benches import numbered, prmbench
from mmrl.reasoning.records import plain_steps
from mmrl.reasoning.rows import rows, text
from mmrl.registry import register

CATEGORIES = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
CLASSES = tuple(name for classes in CATEGORIES.values() for name in classes)
# The class of original solutions, to which the modified ones are compared.
PARTNER = "correct"
# Classes without error steps, so that negative F1 is undefined.
_ALL_RIGHT = ("multi_solutions", PARTNER)


# An item and which of its steps are called valid; None without scores.
Pair = tuple[Item, Sequence[bool] | None]


class Counts(NamedTuple):
    """Steps by prediction and truth; valid is the positive class."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0

    def __add__(self, other: Counts) -> Counts:  # type: ignore[override]
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def swapped(self) -> Counts:
        """Counts with invalid as the positive class."""
        return Counts(self.tn, self.fn, self.tp, self.fp)


def read_row(row: Mapping[str, Any], name: str, stem: str) -> list[Item]:
    """The modified solution and, of a redundency row, also the original one as `correct_idx`."""
    (record,) = prmbench(row, name)
    kind, index = record.meta["classification"], record.meta["idx"]
    items = [Item((record,), kind, index)]
    if kind == "redundency":
        steps = plain_steps(numbered(rows(row, "original_process")))
        meta = {"idx": index, "classification": PARTNER, "error_steps": []}
        partner = replace(
            record,
            id=f"{PARTNER}_{index}",
            question=text(row, "original_question"),
            steps=steps,
            labels=(1.0,) * len(steps),
            first_error=-1,
            meta=meta,
        )
        items.append(Item((partner,), PARTNER, index))
    return items


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """A step is called valid iff its score is above the threshold; solutions without scores lower the validity."""
    valid: list[list[bool] | None] = []
    for entry in scored:
        scores = entry.scores[0]
        valid.append(None if scores is None else [score > threshold for score in scores])
    return measure_valid([entry.item for entry in scored], valid)


def measure_valid(items: Sequence[Item], valid: Sequence[Sequence[bool] | None]) -> Result:
    """All measures from the steps called valid. Totals are pooled over steps and leave the `correct` items out."""
    pairs = list(zip(items, valid, strict=True))
    by_class: dict[str, list[Pair]] = {}
    modified: list[Pair] = []
    # By the index of an original solution: the share of its steps that are called valid.
    partner_valid: dict[str, float] = {}
    num_beyond = 0
    for item, steps_valid in pairs:
        by_class.setdefault(item.group, []).append((item, steps_valid))
        num_beyond += max(_errors(item), default=0) > len(item.records[0].steps)
        if item.group != PARTNER:
            modified.append((item, steps_valid))
        elif steps_valid is not None:
            partner_valid[item.truth] = mean(steps_valid)
    groups = {}
    for name in (PARTNER, *CLASSES):
        if name in by_class:
            groups[name] = _group(by_class[name], partner_valid, name)
    metrics = _group(modified, partner_valid, "")
    for category, members in CATEGORIES.items():
        metrics[category] = mean([groups[name]["prmscore"] if name in groups else math.nan for name in members])
    note = f"{num_beyond} items name error steps beyond the last step; those are ignored, as officially"
    return Result(metrics, groups, (note,) if num_beyond else ())


def _group(pairs: Sequence[Pair], partner_valid: Mapping[str, float], kind: str) -> dict[str, float]:
    """The measures of one class, or of all for the kind ""."""
    total = Counts()
    num_scored = 0
    first_errors: list[bool] = []
    distances: list[float] = []
    for item, valid in pairs:
        if valid is None:
            continue
        num_scored += 1
        total += count(valid, _errors(item))
        first_error = min(_errors(item), default=0) - 1
        if 0 <= first_error < len(valid):
            first_errors.append(not valid[first_error])
        # A partner of which no step is called valid counts as missing, as officially.
        if item.group != PARTNER and partner_valid.get(item.truth):
            distances.append(abs(mean(valid) - partner_valid[item.truth]))
    positive, negative = f1(total), f1(total.swapped)
    return {
        "prmscore": positive if kind in _ALL_RIGHT else 0.5 * positive + 0.5 * negative,
        "f1": positive,
        "negative_f1": negative,
        "step_acc": ratio(total.tp + total.tn, sum(total)),
        "correct_step_acc": ratio(total.tp, total.tp + total.fn),
        "wrong_step_acc": ratio(total.tn, total.tn + total.fp),
        "first_error_acc": mean(first_errors) if first_errors else -1,
        "similarity": 1 - mean(distances) if distances else -1,
        "validity": num_scored / len(pairs) if pairs else math.nan,
        "items": len(pairs),
    }


def quick(scored: Sequence[Scored], threshold: float) -> Callable[[NDArray[np.intp]], float]:
    """Total PRMScore of items by index."""
    # (items, 4): TP, FP, TN, FN of each.
    table = np.zeros((len(scored), 4), int)
    for row, entry in zip(table, scored, strict=True):
        scores = entry.scores[0]
        if entry.item.group != PARTNER and scores is not None:
            row[:] = count([score > threshold for score in scores], _errors(entry.item))

    def value(index: NDArray[np.intp]) -> float:
        total = Counts(*table[index].sum(0).tolist())
        return 0.5 * f1(total) + 0.5 * f1(total.swapped)

    return value


def count(valid: Sequence[bool], error_steps: Sequence[int]) -> Counts:
    """Counts of one solution; `error_steps` are 1-based."""
    right, wrong = [], []
    for number, called_valid in enumerate(valid, start=1):
        if number in error_steps:
            wrong.append(called_valid)
        else:
            right.append(called_valid)
    return Counts(tp=sum(right), fp=sum(wrong), tn=len(wrong) - sum(wrong), fn=len(right) - sum(right))


def f1(counts: Counts) -> float:
    """F1 of the positive class with the official -1: for an undefined ratio, and where precision + recall is 0."""
    precision = ratio(counts.tp, counts.tp + counts.fp)
    recall = ratio(counts.tp, counts.tp + counts.fn)
    if precision + recall > 0:
        return abs(2 * precision * recall) / (precision + recall)
    # One of them undefined (-1) and the other 0.
    return 0.0 if precision + recall == -1 else -1.0


def ratio(part: int, whole: int) -> float:
    """part / whole, -1 if undefined."""
    return part / whole if whole else -1.0


def _errors(item: Item) -> list[int]:
    return list(item.records[0].meta["error_steps"])


BENCH = register("benchmarks", "prmbench")(Benchmark(read_row, measure, "prmscore", lenient=True, quick=quick))
