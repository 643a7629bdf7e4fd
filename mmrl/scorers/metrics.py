"""Measures of step scores against step labels, and bootstrap intervals over problems.

    roc_auc([.9, .2, .6], [True, False, False])   # 1.0

Letters as in the literature: p (N,) are scores of pooled steps, y (N,) bool is True for right steps.

Right steps are the positive class. Scores are probabilities that a step is right. All results are fractions in [0, 1]
where a published table prints percent. A measure that is undefined on its data (no rows, or one class for a ranking)
is NaN; F1 and MCC are 0 where only their ratio is undefined, as the benchmarks count them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
# Labels of one solution's steps: right iff >= 1/2; None or NaN = unlabelled.
Labels = Sequence[float | None]


# --- pooled steps: p (N,) scores, y (N,) bool, right or not ------------------------------------------------------


def roc_auc(p: ArrayLike, y: ArrayLike) -> float:
    """Probability that a right step outscores a wrong one, ties counting half; NaN with one class.

    Raises:
        ValueError: a score is NaN.
    """
    p = np.asarray(p, float)
    if np.isnan(p).any():
        raise ValueError(f"score {int(np.flatnonzero(np.isnan(p))[0])} of {p.size} is NaN; leave out what has none")
    return rank_auc(np.unique(p, return_inverse=True)[1], np.asarray(y, bool))


def rank_auc(rank: NDArray[np.intp], y: NDArray[np.bool_]) -> float:
    """`roc_auc` of scores given as (N,) ranks >= 0, equal ones for ties: in linear time, for many resamples.

    Of n pairs of a right and a wrong step: (wrong ones below + half of those level, summed over right ones) / n.
    """
    num_ranks = int(rank.max()) + 1 if len(rank) else 0
    right = np.bincount(rank[y], minlength=num_ranks)
    wrong = np.bincount(rank[~y], minlength=num_ranks)
    num_pairs = int(right.sum()) * int(wrong.sum())
    if not num_pairs:
        return math.nan
    # Per rank: wrong steps of a lower rank, and half of those of the same.
    outscored = np.cumsum(wrong) - wrong / 2
    return float((right * outscored).sum() / num_pairs)


def pr_auc(p: ArrayLike, y: ArrayLike) -> float:
    """Average precision of right steps, sum of (R_k - R_{k-1}) P_k over distinct scores; NaN with one class.

    Its chance level is the share of right steps.
    """
    from sklearn.metrics import average_precision_score

    p, y = np.asarray(p), np.asarray(y, bool)
    return float(average_precision_score(y, p)) if 0 < y.sum() < y.size else math.nan


def f1(predicted: ArrayLike, y: ArrayLike) -> float:
    """2 TP / (2 TP + FP + FN) of the True class, 0 if that is 0 / 0, NaN without steps. Negate both for the other."""
    predicted, y = np.asarray(predicted, bool), np.asarray(y, bool)
    if not y.size:
        return math.nan
    true_positives = int((predicted & y).sum())
    # 2 TP + FP + FN
    denominator = int(predicted.sum() + y.sum())
    return 2 * true_positives / denominator if denominator else 0.0


def macro_f1(predicted: ArrayLike, y: ArrayLike) -> float:
    """Mean of the F1 of right and of wrong steps (VisualProcessBench)."""
    predicted, y = np.asarray(predicted, bool), np.asarray(y, bool)
    return (f1(predicted, y) + f1(~predicted, ~y)) / 2


def mcc(predicted: ArrayLike, y: ArrayLike) -> float:
    """Matthews correlation in [-1, 1], 0 if one side is constant (MPBench), NaN without steps."""
    from sklearn.metrics import matthews_corrcoef

    predicted, y = np.asarray(predicted, bool), np.asarray(y, bool)
    if not y.size:
        return math.nan
    # scikit-learn gives the same 0, with a warning.
    if y.all() or not y.any() or predicted.all() or not predicted.any():
        return 0.0
    return float(matthews_corrcoef(y, predicted))


def ece(p: ArrayLike, y: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error: mean over steps of |mean p - mean y| of their bin; `bins` equal widths of [0, 1].

    A bin holds its left edge, the last one its right edge too. y may be soft. NaN without steps.
    """
    p, y = _probabilities(p), np.asarray(y, float)
    index = np.minimum((p * bins).astype(int), bins - 1)
    # (bins,) sums of p - y, whose sizes are count * |mean p - mean y|
    gap = np.bincount(index, p - y, bins)
    return float(np.abs(gap).sum() / p.size) if p.size else math.nan


def brier(p: ArrayLike, y: ArrayLike) -> float:
    """Mean (p - y)^2; y may be soft. NaN without steps."""
    p, y = _probabilities(p), np.asarray(y, float)
    return float(((p - y) ** 2).mean()) if p.size else math.nan


# --- first errors and solutions ----------------------------------------------------------------------------------


class FirstErrorScore(NamedTuple):
    """Exact-match accuracy on solutions with an error and on those without, and their harmonic mean."""

    error_acc: float
    correct_acc: float
    f1: float


def first_error(scores: Sequence[float], *, tau: float = 0.5) -> int:
    """Index of the first step with p < tau, -1 without one; a score equal to tau is no error.

    Raises:
        ValueError: a step without a score (NaN) before any error was found.
    """
    for step, score in enumerate(scores):
        if math.isnan(score):
            raise ValueError(f"step {step} of {len(scores)} has no score (NaN), so the first error is unknown")
        if score < tau:
            return step
    return -1


def first_error_of_labels(labels: Labels) -> int | None:
    """First wrong step (label below 1/2), -1 if all are right, None if an unlabelled step leaves it open."""
    for step, label in enumerate(labels):
        if label is None or math.isnan(label):
            return None
        if label < 0.5:
            return step
    return -1


def first_error_score(predicted: Sequence[int | None], labels: Sequence[int]) -> FirstErrorScore:
    """ProcessBench: F1 = 2 a b / (a + b) of the two accuracies, 0 if both are 0; NaN if one kind has no solution.

    Args:
        predicted: index of the first error, -1 = none, None = no prediction (matches nothing).
        labels: index of the first error, -1 = none.
    """
    with_error: list[bool] = []
    without_error: list[bool] = []
    for prediction, label in zip(predicted, labels, strict=True):
        hits = without_error if label == -1 else with_error
        hits.append(prediction == label)
    a, b = _mean(with_error), _mean(without_error)
    harmonic_mean = 0.0 if a == b == 0 else 2 * a * b / (a + b)
    return FirstErrorScore(a, b, harmonic_mean)


def last_minimum_share(scores: Sequence[Sequence[float]]) -> float:
    """Share of solutions whose lowest score, the first one of equals, is the last step's.

    Above 0.4 a scorer probably judges outcomes rather than steps. Solutions of fewer than two steps are not counted:
    theirs is always the last. NaN without any other.
    """
    return _mean([int(np.argmin(steps)) == len(steps) - 1 for steps in scores if len(steps) > 1])


# --- intervals over problems -------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """Value on all data, bounds of the percentile bootstrap, and number of resamples with an undefined statistic."""

    value: float
    low: float
    high: float
    undefined: int


def bootstrap(
    statistic: Callable[[NDArray[np.intp]], float],
    problem: Sequence[Hashable],
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of any statistic by drawing whole problems with replacement.

    Steps, and solutions, of one problem are dependent; drawing them alone would make intervals too narrow.
    Resamples where the statistic is NaN are counted and left out.

    Args:
        statistic: item indices (with repeats) -> value, e.g. `lambda i: roc_auc(p[i], y[i])`.
        problem: per item (step or solution), the problem it belongs to.
    """
    if not len(problem):
        raise ValueError("bootstrap: no items; an interval needs at least one problem")
    members: dict[Hashable, list[int]] = {}
    for i, key in enumerate(problem):
        members.setdefault(key, []).append(i)
    items_of = [np.array(items, np.intp) for items in members.values()]
    rng = np.random.default_rng(seed)
    # (resamples, problems) each row draws as many problems as there are, with replacement
    draws = rng.integers(len(items_of), size=(resamples, len(items_of)))
    values = np.array([statistic(np.concatenate([items_of[drawn] for drawn in draw])) for draw in draws])
    defined = values[~np.isnan(values)]
    low, high = math.nan, math.nan
    if defined.size:
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    value = statistic(np.arange(len(problem)))
    return Interval(float(value), float(low), float(high), int(values.size - defined.size))


# --- everything at once ------------------------------------------------------------------------------------------


def evaluate_steps(
    scores: Sequence[Sequence[float]],
    labels: Sequence[Labels],
    kinds: Sequence[Sequence[str]] | None = None,
    *,
    first_errors: Sequence[int | None] | None = None,
    tau: float = 0.5,
) -> dict[str, float]:
    """Every measure of a set of scored solutions, over all steps and, as `kind/measure`, over the steps of each kind.

    Steps: num_steps, right_frac, auc, pr_auc, f1_right, f1_wrong, macro_f1, mcc, ece, brier, over labelled steps;
    a step is predicted to be right iff p >= tau. Solutions: first_error_f1, error_acc, correct_acc, num_first_errors
    (number of solutions with a known first error), last_minimum_frac.

    Args:
        scores: per solution one probability per step. labels: likewise, right iff >= 1/2, None = unlabelled;
            calibration compares with soft labels as they are.
        kinds: likewise, any name (`Step.kind`, or the position).
        first_errors: per solution, -1 = none, None = unknown; default: read off the labels. Give it where labels end
            before the first error can be seen.

    Raises:
        ValueError: lengths differ, or a score or label is outside [0, 1]; solution and step are named.
    """
    _check_aligned(scores, labels, kinds)
    # (N,) scores and labels of all steps of all solutions, those without label taken out
    p = np.array(list(chain.from_iterable(scores)), float)
    y = np.array([math.nan if label is None else label for label in chain.from_iterable(labels)], float)
    labelled = ~np.isnan(y)
    p, y = p[labelled], y[labelled]

    if first_errors is None:
        first_errors = [first_error_of_labels(row) for row in labels]
    predicted, actual = [], []
    for row, error in zip(scores, first_errors, strict=True):
        if error is not None:
            predicted.append(first_error(row, tau=tau))
            actual.append(error)
    first = first_error_score(predicted, actual)

    measures = _step_measures(p, y, tau) | {
        "first_error_f1": first.f1,
        "error_acc": first.error_acc,
        "correct_acc": first.correct_acc,
        "num_first_errors": float(len(actual)),
        "last_minimum_frac": last_minimum_share(scores),
    }
    if kinds is not None:
        kind = np.array(list(chain.from_iterable(kinds)), str)[labelled]
        for name in np.unique(kind):
            part = _step_measures(p[kind == name], y[kind == name], tau)
            measures |= {f"{name}/{measure}": value for measure, value in part.items()}
    return measures


def _step_measures(p: Floats, y: Floats, tau: float) -> dict[str, float]:
    """Measures of the labelled steps: scores p (N,), labels y (N,) in [0, 1]."""
    right, predicted_right = y >= 0.5, p >= tau
    return {
        "num_steps": float(p.size),
        "right_frac": _mean(right),
        "auc": roc_auc(p, right),
        "pr_auc": pr_auc(p, right),
        "f1_right": f1(predicted_right, right),
        "f1_wrong": f1(~predicted_right, ~right),
        "macro_f1": macro_f1(predicted_right, right),
        "mcc": mcc(predicted_right, right),
        "ece": ece(p, y),
        "brier": brier(p, y),
    }


def _check_aligned(
    scores: Sequence[Sequence[float]], labels: Sequence[Labels], kinds: Sequence[Sequence[str]] | None
) -> None:
    """Raises ValueError unless there is one label and one kind per score, and all numbers lie in [0, 1]."""
    for name, other in (("labels", labels), ("kinds", kinds)):
        if other is None:
            continue
        if len(other) != len(scores):
            raise ValueError(f"{len(scores)} solutions have scores and {len(other)} have {name}; they must align")
        for i, (score_row, row) in enumerate(zip(scores, other, strict=True)):
            if len(score_row) != len(row):
                raise ValueError(f"solution {i}: {len(score_row)} scores and {len(row)} {name}; give one per step")
    for i, score_row in enumerate(scores):
        for step, score in enumerate(score_row):
            if not 0 <= score <= 1:
                raise ValueError(f"solution {i} step {step}: score {score:g} is no probability; map scores to [0, 1]")
    for i, label_row in enumerate(labels):
        for step, label in enumerate(label_row):
            if label is not None and (label < 0 or label > 1):
                raise ValueError(
                    f"solution {i} step {step}: label {label:g} is outside [0, 1]; wrong is 0, neutral None"
                )


def _probabilities(p: ArrayLike) -> Floats:
    p = np.asarray(p, float)
    bad = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if bad.size:
        raise ValueError(f"score {p[bad[0]]:g} at {bad[0]} is no probability; calibration needs scores in [0, 1]")
    return p


def _mean(values: Sequence[bool] | NDArray[np.bool_]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
