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
CLASSES = tuple(c for classes in CATEGORIES.values() for c in classes)
PARTNER = "correct"
_ALL_RIGHT = ("multi_solutions", PARTNER)  # without error steps, so that negative F1 is undefined


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
    kind, own = record.meta["classification"], record.meta["idx"]
    items = [Item((record,), kind, own)]
    if kind == "redundency":
        steps = plain_steps(numbered(rows(row, "original_process")))
        meta = {"idx": own, "classification": PARTNER, "error_steps": []}
        partner = replace(
            record, id=f"{PARTNER}_{own}", question=text(row, "original_question"), steps=steps,
            labels=(1.0,) * len(steps), first_error=-1, meta=meta,
        )  # fmt: skip
        items.append(Item((partner,), PARTNER, own))
    return items


def measure(scored: Sequence[Scored], threshold: float, aggregate: str) -> Result:
    """A step is called valid iff its score is above the threshold; solutions without scores lower the validity."""
    valid = [None if s.scores[0] is None else [p > threshold for p in s.scores[0]] for s in scored]
    return measure_valid([s.item for s in scored], valid)


def measure_valid(items: Sequence[Item], valid: Sequence[Sequence[bool] | None]) -> Result:
    """All measures from the steps called valid. Totals are pooled over steps and leave the `correct` items out."""
    pairs = list(zip(items, valid, strict=True))
    partner = {i.truth: mean(v) for i, v in pairs if i.group == PARTNER and v is not None}
    classes = [c for c in (PARTNER, *CLASSES) if any(i.group == c for i in items)]
    groups = {c: _group([p for p in pairs if p[0].group == c], partner, c) for c in classes}
    metrics = _group([p for p in pairs if p[0].group != PARTNER], partner, "")
    for category, members in CATEGORIES.items():
        metrics[category] = mean([groups[c]["prmscore"] if c in groups else math.nan for c in members])
    beyond = sum(max(_errors(i), default=0) > len(i.records[0].steps) for i in items)
    note = f"{beyond} items name error steps beyond the last step; those are ignored, as officially"
    return Result(metrics, groups, (note,) if beyond else ())


def _group(
    pairs: Sequence[tuple[Item, Sequence[bool] | None]], partner: Mapping[str, float], kind: str
) -> dict[str, float]:
    known = [(i, v) for i, v in pairs if v is not None]
    c = sum((count(v, _errors(i)) for i, v in known), Counts())
    first = [not v[e] for i, v in known if 0 <= (e := min(_errors(i), default=0) - 1) < len(v)]
    apart = [abs(mean(v) - partner[i.truth]) for i, v in known if i.group != PARTNER and partner.get(i.truth)]
    f1_, negative = f1(c), f1(c.swapped)
    return {
        "prmscore": f1_ if kind in _ALL_RIGHT else 0.5 * f1_ + 0.5 * negative,
        "f1": f1_,
        "negative_f1": negative,
        "step_acc": ratio(c.tp + c.tn, sum(c)),
        "correct_step_acc": ratio(c.tp, c.tp + c.fn),
        "wrong_step_acc": ratio(c.tn, c.tn + c.fp),
        "first_error_acc": mean(first) if first else -1,
        "similarity": 1 - mean(apart) if apart else -1,
        "validity": len(known) / len(pairs) if pairs else math.nan,
        "items": len(pairs),
    }


def quick(scored: Sequence[Scored], threshold: float) -> Callable[[NDArray[np.intp]], float]:
    """Total PRMScore of items by index."""
    table = np.zeros((len(scored), 4), int)
    for row, s in zip(table, scored, strict=True):
        if s.item.group != PARTNER and s.scores[0] is not None:
            row[:] = count([p > threshold for p in s.scores[0]], _errors(s.item))

    def value(index: NDArray[np.intp]) -> float:
        c = Counts(*table[index].sum(0).tolist())
        return 0.5 * f1(c) + 0.5 * f1(c.swapped)

    return value


def count(valid: Sequence[bool], error_steps: Sequence[int]) -> Counts:
    """Counts of one solution; `error_steps` are 1-based."""
    right = [v for i, v in enumerate(valid, 1) if i not in error_steps]
    wrong = [v for i, v in enumerate(valid, 1) if i in error_steps]
    return Counts(sum(right), sum(wrong), len(wrong) - sum(wrong), len(right) - sum(right))


def f1(c: Counts) -> float:
    """F1 of the positive class with the official -1: for an undefined ratio, and where precision + recall is 0."""
    p, r = ratio(c.tp, c.tp + c.fp), ratio(c.tp, c.tp + c.fn)
    return abs(2 * p * r) / (p + r) if p + r > 0 else 0.0 if p + r == -1 else -1.0


def ratio(part: int, whole: int) -> float:
    """part / whole, -1 if undefined."""
    return part / whole if whole else -1.0


def _errors(item: Item) -> list[int]:
    return list(item.records[0].meta["error_steps"])


BENCH = register("benchmarks", "prmbench")(Benchmark(read_row, measure, "prmscore", lenient=True, quick=quick))
