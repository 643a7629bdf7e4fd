import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.registry import names
from mmrl.scorers.aggregate import aggregate

PLAIN = names("aggregates")
SYMMETRIC = sorted(set(PLAIN) - {"last", "first_below", "min_then_last"})
IN_RANGE = ["min", "max", "last", "mean", "geometric", "harmonic", "softmin"]  # between the lowest and highest score
score = st.floats(0, 1)


@pytest.mark.parametrize(
    "name, want",
    [
        ("min", 0.4),
        ("last", 0.4),
        ("product", 0.2736),
        ("mean", 0.7625),
        ("max", 0.95),
        ("sum_logprob", -1.2960881),
        ("geometric", 0.7232343),
        ("sum_logit", 6.1224928),
        ("mean_odds", 8.1666667),
        ("harmonic", 0.6763906),
        ("first_below", 0.75),
    ],
)
def test_worked_numbers_of_four_steps(name, want):
    assert aggregate(name)([0.9, 0.8, 0.95, 0.4]) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "name, want",
    [
        ("min", 0.6),
        ("last", 0.8),
        ("mean", 0.766667),
        ("product", 0.432),
        ("geometric", 0.755953),
        ("sum_logit", 3.988984),
        ("sum_logprob", -0.839330),
        ("softmin", 0.635442),
    ],
)
def test_worked_numbers_of_three_steps(name, want):
    assert aggregate(name)([0.9, 0.6, 0.8]) == pytest.approx(want, abs=1e-6)


def test_min_then_last_breaks_ties_by_the_last_step():
    key = aggregate("min_then_last")
    assert max([[0.4, 0.9, 0.5], [0.9, 0.4, 0.8], [0.3, 1.0, 1.0]], key=key) == [0.9, 0.4, 0.8]


def test_first_below_counts_the_good_prefix():
    assert aggregate("first_below", tau=0.9)([0.95, 0.9, 0.4, 0.99]) == 0.5
    assert aggregate("first_below")([0.5, 0.5]) == 1
    assert aggregate("first_below")([0.1, 0.9]) == 0


def test_softmin_lies_between_minimum_and_mean():
    s = [0.9, 0.6, 0.8]
    assert aggregate("softmin", tau=1e-3)(s) == pytest.approx(0.6)
    assert aggregate("softmin", tau=1e6)(s) == pytest.approx(0.766667, abs=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_a_solution_without_steps_never_wins(name):
    empty = aggregate(name)([])
    assert empty == ((-math.inf, -math.inf) if name == "min_then_last" else -math.inf)
    assert empty < aggregate(name)([0.0] * 50)


@pytest.mark.parametrize("name", PLAIN)
def test_a_missing_score_is_named(name):
    with pytest.raises(ValueError, match="step 1 of 3 has no score"):
        aggregate(name)([0.9, math.nan, 0.8])


@pytest.mark.parametrize("name", ["product", "sum_logprob", "sum_logit", "geometric", "mean_odds", "harmonic"])
def test_scores_that_are_no_probabilities_are_refused(name):
    with pytest.raises(ValueError, match="step 1 scored -0.5"):
        aggregate(name)([0.9, -0.5])


def test_judges_scores_may_be_negative_where_no_logarithm_is_taken():
    assert aggregate("min")([0.9, -0.5]) == -0.5
    assert aggregate("mean")([0.9, -0.5]) == pytest.approx(0.2)


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="did you mean product"):
        aggregate("produkt")
    with pytest.raises(ValueError, match="unknown key aggregate.temperature=1; aggregate 'softmin' takes tau"):
        aggregate("softmin", temperature=1)
    with pytest.raises(ValueError, match="aggregate.tau=0: input should be greater than 0"):
        aggregate("softmin", tau=0)


@pytest.mark.parametrize("name", SYMMETRIC)
@settings(deadline=None, max_examples=30)
@given(scores=st.lists(score, min_size=1, max_size=8), data=st.data())
def test_order_does_not_matter(name, scores, data):
    shuffled = data.draw(st.permutations(scores))
    assert aggregate(name)(shuffled) == pytest.approx(aggregate(name)(scores), rel=1e-12)


@pytest.mark.parametrize("name", PLAIN)
@settings(deadline=None, max_examples=30)
@given(scores=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=8))
def test_certain_scores_stay_finite(name, scores):
    value = aggregate(name)(scores)
    assert all(map(math.isfinite, value if isinstance(value, tuple) else (value,)))


@pytest.mark.parametrize("name", IN_RANGE)
@settings(deadline=None, max_examples=30)
@given(scores=st.lists(st.floats(1e-3, 1 - 1e-3), min_size=1, max_size=8))
def test_averages_stay_between_the_extremes(name, scores):
    assert min(scores) - 1e-9 <= aggregate(name)(scores) <= max(scores) + 1e-9


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=5), min_size=2, max_size=5))
def test_product_and_sum_of_logs_choose_alike(pool):
    by_product, by_logs = (max(pool, key=aggregate(n)) for n in ("product", "sum_logprob"))
    assert math.prod(by_product) == pytest.approx(math.prod(by_logs))
