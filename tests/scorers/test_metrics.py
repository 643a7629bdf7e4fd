import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.scorers.metrics import (
    bootstrap,
    brier,
    ece,
    evaluate_steps,
    f1,
    first_error,
    first_error_of_labels,
    first_error_score,
    last_minimum_share,
    macro_f1,
    mcc,
    pr_auc,
    rank_auc,
    roc_auc,
)

SCORES, LABELS = np.array([0.9, 0.6, 0.55, 0.4, 0.2]), np.array([1, 1, 0, 1, 0])
steps = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=12)


@pytest.mark.parametrize("tau, right, wrong, macro", [(0.5, 0.666667, 0.5, 0.583333), (0.6, 0.8, 0.8, 0.8)])
def test_visual_process_bench_f1(tau, right, wrong, macro):
    called, y = np.array([p >= tau for p in SCORES]), LABELS == 1
    assert f1(called, y) == pytest.approx(right, abs=1e-6)
    assert f1(~called, ~y) == pytest.approx(wrong, abs=1e-6)
    assert macro_f1(called, y) == pytest.approx(macro, abs=1e-6)


def test_auc_of_the_worked_solution():
    assert roc_auc(SCORES, LABELS) == pytest.approx(5 / 6)
    # right steps at ranks 1, 2, 4 of 5: precisions 1, 1, 3/4 at recall steps of 1/3
    assert pr_auc(SCORES, LABELS) == pytest.approx((1 + 1 + 0.75) / 3)


def test_ties_count_half():
    assert roc_auc([0.5, 0.5], [1, 0]) == 0.5
    assert roc_auc([0.5, 0.5, 0.2], [1, 0, 0]) == 0.75
    assert pr_auc([0.5, 0.5], [1, 0]) == 0.5


@settings(deadline=None, max_examples=30)
@given(steps)
def test_auc_is_the_share_of_ordered_pairs(rows):
    right, wrong = [p for p, y in rows if y], [p for p, y in rows if not y]
    got = roc_auc([p for p, _ in rows], [y for _, y in rows])
    if not right or not wrong:
        assert math.isnan(got)
        return
    wins = sum((a > b) + (a == b) / 2 for a in right for b in wrong)
    assert got == pytest.approx(wins / (len(right) * len(wrong)))


def test_auc_on_resampled_ranks():
    """Ranks of all scores stay ranks of a resample, though some do not occur in it."""
    rank, y = np.unique(SCORES, return_inverse=True)[1], LABELS == 1
    drawn = np.array([0, 0, 2, 3, 3])  # right .9 twice and .4 twice against wrong .55: half of the pairs
    assert rank_auc(rank[drawn], y[drawn]) == roc_auc(SCORES[drawn], y[drawn]) == 0.5
    with pytest.raises(ValueError, match="score 1 of 2 is NaN"):
        roc_auc([0.5, math.nan], [1, 0])


def test_undefined_measures():
    assert math.isnan(roc_auc([0.5, 0.6], [1, 1]))
    assert math.isnan(pr_auc([0.5, 0.6], [0, 0]))
    assert f1([False, False], [False, False]) == 0
    assert mcc([True, True], [True, False]) == 0
    for measure in (roc_auc, pr_auc, f1, macro_f1, mcc, ece, brier):
        assert math.isnan(measure([], [])), measure.__name__


def test_mcc_by_hand():
    called, y = SCORES >= 0.5, LABELS == 1  # TP 2, FP 1, FN 1, TN 1
    assert mcc(called, y) == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert mcc(y, y) == pytest.approx(1)
    assert mcc(~y, y) == pytest.approx(-1)


@settings(deadline=None, max_examples=30)
@given(steps)
def test_mcc_agrees_with_its_formula(rows):
    called, y = np.array([p > 2 for p, _ in rows]), np.array([y for _, y in rows])
    tp, fp, fn, tn = (int((a & b).sum()) for a, b in ((called, y), (called, ~y), (~called, y), (~called, ~y)))
    bottom = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert mcc(called, y) == pytest.approx((tp * tn - fp * fn) / bottom if bottom else 0)


def test_calibration():
    assert ece([0.1, 0.4, 0.9], [0, 1, 1]) == pytest.approx(0.266667, abs=1e-6)
    assert brier([0.1, 0.4, 0.9], [0, 1, 1]) == pytest.approx((0.01 + 0.36 + 0.01) / 3)
    assert ece([0.92, 1.0], [0, 1]) == pytest.approx(abs(1.92 - 1) / 2)  # the right edge joins the last bin
    assert ece([0.3, 0.35], [0, 1]) == pytest.approx(abs(0.65 - 1) / 2)  # 0.3 opens its own bin
    assert ece([0.75, 0.75], [0.75, 0.75]) == 0  # soft labels
    with pytest.raises(ValueError, match="score -0.5 at 1"):
        brier([0.1, -0.5], [0, 1])
    with pytest.raises(ValueError, match="score nan at 0"):
        ece([math.nan], [0])


def test_first_error_from_scores():
    assert first_error([0.9, 0.7, 0.4, 0.6]) == 2
    assert first_error([0.9, 0.7]) == -1
    assert first_error([0.9, 0.5]) == -1  # equal to tau is no error
    assert first_error([]) == -1
    assert first_error([0.3, math.nan]) == 0
    with pytest.raises(ValueError, match="step 1 of 2"):
        first_error([0.9, math.nan])


def test_first_error_from_labels():
    assert first_error_of_labels([1, 1, 0, None]) == 2
    assert first_error_of_labels([1, 1]) == -1
    assert first_error_of_labels([1, None, 0]) is None
    assert first_error_of_labels([1, math.nan]) is None
    assert first_error_of_labels([0.5, 0.25]) == 1


@pytest.mark.parametrize(
    "predicted, labels, want",
    [
        ((-1, 2, 1, 0, None), (-1, 2, 0, -1, 3), (1 / 3, 0.5, 0.4)),
        ((-1, 1, 2, -1), (-1, 1, 3, 0), (1 / 3, 1.0, 0.5)),
        ((0, 0), (1, -1), (0.0, 0.0, 0.0)),
    ],
)
def test_process_bench(predicted, labels, want):
    assert first_error_score(predicted, labels) == pytest.approx(want, abs=1e-6)


def test_process_bench_with_one_kind_only():
    got = first_error_score([1, 2], [1, 1])
    assert got.error_acc == 0.5
    assert math.isnan(got.correct_acc)
    assert math.isnan(got.f1)


def test_share_of_minima_at_the_last_step():
    assert last_minimum_share([[0.9, 0.1], [0.1, 0.9], [0.4, 0.4], [0.3]]) == pytest.approx(1 / 3)
    assert math.isnan(last_minimum_share([[0.3]]))


# --- intervals


def test_bootstrap_draws_problems_not_items():
    x = np.array([0.0] * 50 + [1.0] * 50)
    problem = ["a"] * 50 + ["b"] * 50
    got = bootstrap(lambda i: x[i].mean(), problem)
    assert got.value == 0.5
    assert (got.low, got.high) == (0, 1)  # two problems know next to nothing, however many steps they have
    alone = bootstrap(lambda i: x[i].mean(), range(100))
    assert 0.38 < alone.low < 0.45
    assert 0.55 < alone.high < 0.62


def test_bootstrap_covers_the_mean_of_a_normal_sample():
    x = np.random.default_rng(0).normal(size=400)
    got = bootstrap(lambda i: x[i].mean(), range(400))
    assert got.high - got.low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)


def test_bootstrap_is_repeatable_and_counts_what_is_undefined():
    def statistic(i):
        return roc_auc(SCORES[i], LABELS[i])

    got = bootstrap(statistic, range(5), seed=3, resamples=200)
    assert got == bootstrap(statistic, range(5), seed=3, resamples=200)
    assert got.undefined > 0  # resamples of one class
    assert got.low <= got.value <= got.high
    never = bootstrap(lambda i: math.nan, range(3), resamples=10)
    assert never.undefined == 10
    assert math.isnan(never.low)
    with pytest.raises(ValueError, match="no items"):
        bootstrap(statistic, [])


# --- everything at once


def test_evaluate_steps():
    scores = [[0.9, 0.6, 0.55, 0.4], [0.2, 0.7]]
    labels = [[1, 1, 0, 1], [0, None]]
    kinds = [["perception", "perception", "reasoning", "reasoning"], ["reasoning", "answer"]]
    got = evaluate_steps(scores, labels, kinds)
    assert got["num_steps"] == 5
    assert got["right_frac"] == 0.6
    assert got["auc"] == pytest.approx(5 / 6)
    assert (got["f1_right"], got["f1_wrong"]) == pytest.approx((2 / 3, 0.5))
    assert got["macro_f1"] == pytest.approx(0.583333, abs=1e-6)
    assert got["brier"] == pytest.approx((0.01 + 0.16 + 0.3025 + 0.36 + 0.04) / 5)
    assert got["perception/num_steps"] == 2
    assert got["reasoning/auc"] == 0.5  # 0.4 lies between 0.55 and 0.2
    assert math.isnan(got["perception/auc"])
    assert not any(k.startswith("answer/") for k in got)  # nothing labelled there
    # predictions 3 and 0; first errors 2 and 0
    assert got["num_first_errors"] == 2
    assert got["error_acc"] == 0.5
    assert math.isnan(got["correct_acc"])
    assert got["last_minimum_frac"] == 0.5
    assert all(type(v) is float for v in got.values())


def test_evaluate_steps_takes_first_errors_as_given():
    scores, labels = [[0.9, 0.3], [0.9, 0.8], [0.1]], [[1, None], [1, 1], [None]]
    assert evaluate_steps(scores, labels)["num_first_errors"] == 1
    got = evaluate_steps(scores, labels, first_errors=[1, -1, None])
    assert got["first_error_f1"] == 1
    assert got["num_first_errors"] == 2


def test_evaluate_steps_of_soft_labels():
    got = evaluate_steps([[0.75, 0.25]], [[0.75, 0.25]])
    assert (got["auc"], got["ece"], got["brier"]) == (1, 0, 0)


def test_evaluate_steps_without_labels_has_no_numbers_but_no_zeros():
    got = evaluate_steps([[0.75, 0.25]], [[None, None]])
    assert got["num_steps"] == 0
    measured = set(got) - {"num_steps", "num_first_errors", "last_minimum_frac"}
    assert all(math.isnan(got[k]) for k in measured)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(4)))
def test_evaluate_steps_ignores_the_order_of_solutions(order):
    scores, labels = [[0.9, 0.2], [0.6], [0.4, 0.8, 0.3], [0.1]], [[1, 0], [0], [1, 1, None], [0]]
    want = evaluate_steps(scores, labels)
    assert evaluate_steps([scores[i] for i in order], [labels[i] for i in order]) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize(
    "scores, labels, kinds, message",
    [
        ([[0.5]], [[1], [1]], None, "1 solutions have scores and 2 have labels"),
        ([[0.5], [0.5]], [[1], [1, 0]], None, "solution 1: 1 scores and 2 labels"),
        ([[0.5]], [[1]], [[]], "solution 0: 1 scores and 0 kinds"),
        ([[0.5, math.nan]], [[1, None]], None, "solution 0 step 1: score nan"),
        ([[1.5]], [[1]], None, "solution 0 step 0: score 1.5"),
        ([[0.5, 0.5]], [[1, -1]], None, "solution 0 step 1: label -1"),
    ],
)
def test_evaluate_steps_names_what_does_not_fit(scores, labels, kinds, message):
    with pytest.raises(ValueError, match=message):
        evaluate_steps(scores, labels, kinds)
