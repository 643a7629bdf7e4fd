import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.search.curves import best_of_k, majority_at_k, mean_interval, pass_at_k, sizes, weighted_at_k
from mmrl.search.votes import weighted

POOLS = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([0.1, 0.5, 0.9])), min_size=1, max_size=6
)


def drawn(pool, ks, pick):
    """Mean over all ordered draws of k candidates of what `pick` says about a draw."""
    return [np.mean([pick(list(draw)) for draw in itertools.permutations(range(len(pool)), k)]) for k in ks]


def test_worked_curves():
    got = best_of_k([[0.9, 0.5, 0.7, 0.1]], [[0, 1, 1, 0]], [1, 2, 4])
    np.testing.assert_allclose(got, [[0.5, 0.5, 0.0]], atol=1e-12)
    assert pass_at_k([[1, 1, 0, 0]], [2])[0, 0] == pytest.approx(0.833333, abs=1e-6)
    got, how = majority_at_k([["a", "b", "a", "b"]], [[1, 0, 1, 0]], [3])
    assert how == "exact" and got[0, 0] == pytest.approx(0.5)


def test_ties_of_best_of_k_go_to_the_earlier_one():
    np.testing.assert_allclose(best_of_k([[0.5] * 4], [[1, 0, 0, 0]], [1, 2, 4]), [[0.25, 0.5, 1.0]])


@settings(max_examples=60, deadline=None)
@given(POOLS)
def test_exact_curves_are_means_over_draws(pool):
    answers, scores = [a for a, _ in pool], [s for _, s in pool]
    right = [a == "a" for a in answers]
    ks = list(range(1, len(pool) + 1))
    top = [max(range(len(pool)), key=lambda i: (scores[i], -i))]
    assert top[0] in range(len(pool))
    by_best = drawn(pool, ks, lambda d: right[max(d, key=lambda i: (scores[i], -i))])
    np.testing.assert_allclose(best_of_k([scores], [right], ks)[0], by_best, atol=1e-9)
    np.testing.assert_allclose(
        pass_at_k([right], ks)[0], drawn(pool, ks, lambda d: any(right[i] for i in d)), atol=1e-9
    )
    votes = drawn(pool, ks, lambda d: weighted([answers[i] for i in d], [1.0] * len(d)) == "a")
    np.testing.assert_allclose(majority_at_k([answers], [right], ks)[0][0], votes, atol=1e-9)


def test_sampled_votes_are_near_the_exact_ones():
    answers = ["a", "b", "a", "c", "b", None, "c", "b"]
    right = [a == "b" for a in answers]
    ks = sizes(8)
    exact, _ = majority_at_k([answers], [right], ks)
    sampled = weighted_at_k([answers], [[0.3] * 8], [right], ks, draws=20_000)
    np.testing.assert_allclose(sampled, exact, atol=0.02)
    scores = [0.9, 0.2, 0.8, 0.1, 0.3, 0.5, 0.2, 0.1]
    want = drawn(answers, [3], lambda d: weighted([answers[i] for i in d], [scores[i] for i in d]) == "b")
    assert weighted_at_k([answers], [scores], [right], [3], draws=20_000)[0, 0] == pytest.approx(want[0], abs=0.02)


def test_large_pools_are_sampled_and_say_so():
    answers = [["a", "b", "b"] * 100]
    got, how = majority_at_k(answers, [[a == "b" for a in answers[0]]], [1, 64])
    assert how == "sampled"
    assert got[0, 0] == pytest.approx(2 / 3, abs=0.05) and got[0, 1] > 0.95


def test_nobody_votes():
    assert majority_at_k([[None, None]], [[0, 0]], [1, 2])[0].tolist() == [[0, 0]]
    assert weighted_at_k([[None, None]], [[1.0, 1.0]], [[0, 0]], [2]).tolist() == [[0]]
    assert 0.3 < weighted_at_k([["a", None]], [[1.0, 1.0]], [[1, 0]], [1])[0, 0] < 0.7


def test_permuting_problems_permutes_rows_and_leaves_intervals():
    rng = np.random.default_rng(0)
    scores, right = rng.random((20, 8)), rng.random((20, 8)) < 0.4
    answers = [["yes" if c else str(i % 3) for i, c in enumerate(r)] for r in right]
    order, ks = rng.permutation(20), sizes(8)
    one = weighted_at_k(answers, scores.tolist(), right.tolist(), ks)
    other = weighted_at_k([answers[i] for i in order], scores[order].tolist(), right[order].tolist(), ks)
    np.testing.assert_array_equal(one[order], other)
    for a, b in zip(mean_interval(one), mean_interval(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_interval_covers_the_mean_and_narrows():
    wide = mean_interval(np.array([[1.0, 0.3]] * 5 + [[0.0, 0.3]] * 5))
    narrow = mean_interval(np.array([[1.0, 0.3]] * 500 + [[0.0, 0.3]] * 500))
    assert wide[0].tolist() == pytest.approx([0.5, 0.3])
    assert wide[1][0] < narrow[1][0] < 0.5 < narrow[2][0] < wide[2][0]
    assert narrow[2][0] - narrow[1][0] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(1000), rel=0.1)
    assert wide[1][1] == pytest.approx(0.3) == wide[2][1]
    with pytest.raises(ValueError, match="no problems"):
        mean_interval(np.zeros((0, 1)))


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_of_k([[0.1, math.nan]], [[0, 1]], [1]),
        lambda: best_of_k([[0.1]], [[0, 1]], [1]),
        lambda: pass_at_k([[1]], [2]),
        lambda: majority_at_k([["a"]], [[1]], [0]),
    ],
)
def test_what_has_no_curve_is_refused(call):
    with pytest.raises(ValueError, match="problem 0"):
        call()


def test_sizes():
    assert sizes(1) == [1] and sizes(8) == [1, 2, 4, 8] and sizes(12) == [1, 2, 4, 8, 12]


def test_best_of_k_of_500_problems_takes_well_under_a_second():
    rng = np.random.default_rng(0)
    scores, right = rng.random((500, 64)), rng.random((500, 64)) < 0.3
    start = time.process_time()
    best_of_k(scores, right, sizes(64))
    assert time.process_time() - start < 0.5
