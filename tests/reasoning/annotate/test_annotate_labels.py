import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrl.reasoning.annotate.denoise import pseudo_labels, scan_labels, scan_use
from mmrl.reasoning.annotate.labels import (
    after_error,
    label_mc,
    labels_up_to,
    local_first_error,
    mc_first_error,
)
from mmrl.reasoning.annotate.targets import (
    advantage,
    estimate,
    hard_ge,
    hard_gt,
    log_boost,
    mc_values,
    rel_effective,
    relative_progress,
    signs,
    soft,
)
from mmrl.reasoning.records import Counts, SolutionRecord, Step


def test_estimate_of_six_of_eight():
    e = estimate(Counts(6, 8))
    got = (e.value, e.stderr, e.beta_mean, e.low, e.high)
    assert got == pytest.approx((0.75, 0.153093, 0.7, 0.409270, 0.928522), abs=1e-6)
    assert hard_gt([e.value]) == (1.0,)
    assert soft([e.value]) == (0.75,)


def test_estimate_of_five_of_sixteen():
    e = estimate(Counts(5, 16))
    assert e.value == 0.3125
    assert e.stderr == pytest.approx(math.sqrt(0.3125 * 0.6875 / 16), abs=1e-12)
    assert e.stderr == pytest.approx(0.1159, abs=1e-4)
    assert (hard_gt([e.value]), hard_ge([e.value], 0.5)) == ((1.0,), (0.0,))


@given(st.integers(1, 200).flatmap(lambda k: st.tuples(st.integers(0, k), st.just(k))))
def test_intervals_hold_the_value(counts):
    e = estimate(Counts(*counts))
    assert 0 <= e.low <= e.value + 1e-12 and e.value - 1e-12 <= e.high <= 1
    assert e.low - 1e-12 <= e.beta_mean <= e.high + 1e-12


@pytest.mark.parametrize("counts", [Counts(0, 0), Counts(3, 2), Counts(-1, 2)])
def test_estimate_refuses(counts):
    with pytest.raises(ValueError, match="total"):
        estimate(counts)


def test_unsampled_steps_are_no_zeros():
    values = mc_values([Counts(2, 4), Counts(0, 4), Counts(0, 0)])
    assert values == (0.5, 0.0, None)
    for rule in (hard_gt, soft, log_boost):
        assert rule(values)[2] is None
    assert advantage((0.5, None, 0.25), 0.5) == (0.0, None, None)


@pytest.mark.parametrize("m, want", [(0.1, 0.2890650), (0.25, 0.5224433), (0.5, 0.7472219), (0.75, 0.8924769),
                                     (0.0, 0.0), (1.0, 1.0)])  # fmt: skip
def test_log_boost(m, want):
    assert log_boost([m])[0] == pytest.approx(want, abs=1e-6)


def test_thresholds_on_the_border():
    assert hard_gt([0.5], 0.5) == (0.0,)
    assert hard_ge([0.5], 0.5) == (1.0,)


@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_values_outside_the_range_are_refused(bad):
    with pytest.raises(ValueError, match="step 1"):
        hard_gt([0.5, bad])


def test_advantage_and_its_classes():
    adv = advantage([0.5, 0.75, 0.75, 0.25], start=0.25)
    assert adv == (0.25, 0.25, 0.0, -0.5)
    assert signs(adv) == (1, 1, 0, -1)


def test_relative_labels():
    assert relative_progress([0.5, 0.5, 0.25, 0.0], 0.5) == (1, 1, 0, 0)
    assert relative_progress([0.6], 0.75) == (1,)  # 0.6 / 0.75 in floats is below 0.8
    assert relative_progress([0.0, 0.25], 0.5) == (0, 1)
    assert rel_effective([0.5, 0.25, 0.25], 0.25, gamma=1.0) == (1, 0, 1)  # .75, 0, .25
    assert rel_effective([0.1], 0.3, gamma=0.5) == (0,)  # 0 up to rounding
    assert rel_effective([0.5], 0.25, gamma=1.0, threshold=0.75) == (0,)


def test_first_error_and_what_follows():
    values = (1.0, 0.5, 0.0, 0.25)
    assert mc_first_error(values) == 2
    hard = hard_gt(values)
    assert after_error(hard, 2) == (1, 1, 0, None)
    assert after_error(hard, 2, "zero") == (1, 1, 0, 0)
    assert after_error(hard, 2, "keep") == (1, 1, 0, 1)
    assert after_error((1, 0, None), 1, "zero") == (1, 0, 0)
    assert after_error((1, 1), -1) == (1, 1)
    with pytest.raises(ValueError, match="none of mask"):
        after_error(hard, 2, "cut")
    with pytest.raises(ValueError, match="outside"):
        after_error(hard, 4)


@pytest.mark.parametrize("values, want", [((1, 0.5), -1), ((0.0,), 0), ((1, None, 0), None), ((1, 0, None), 1),
                                          ((1, None), None)])  # fmt: skip
def test_mc_first_error(values, want):
    assert mc_first_error(values) == want


def test_mc_first_error_threshold_is_inclusive():
    assert mc_first_error((0.75, 0.25, 0.0), threshold=0.25) == 1


@pytest.mark.parametrize("f", [mc_first_error, local_first_error])
def test_no_steps_is_an_error(f):
    with pytest.raises(ValueError, match="no steps"):
        f([])


@pytest.mark.parametrize("labels, first", [
    ((1, 0, 1, None), 1), ((1, 1), -1), ((1, None, 1), None), ((None, 0, 1), None),
])  # fmt: skip
def test_local_labels(labels, first):
    assert local_first_error(labels) == first


def test_soft_labels_have_no_first_error():
    with pytest.raises(ValueError, match="soft label"):
        local_first_error((1, 0.5))


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(-1, n - 1), st.just(n))))
def test_labels_up_to_round_trip(case):
    assert local_first_error(labels_up_to(*case)) == case[0]


def record(mc):
    return SolutionRecord("a", "q", tuple(Step(f"s{t}") for t in range(4)), mc=mc)


def test_label_mc_of_a_record():
    counts = (Counts(8, 8), Counts(4, 8), Counts(0, 8), Counts(2, 8))
    r = label_mc(record(counts))
    assert (r.labels, r.first_error, r.label_kind, r.scope, r.mc) == ((1, 1, 0, None), 2, "hard", "prefix", counts)
    r = label_mc(record(counts), soft, after="zero")
    assert (r.labels, r.label_kind) == ((1, 0.5, 0, 0), "soft")
    r = label_mc(record((Counts(8, 8), Counts(0, 0), Counts(0, 8), Counts(0, 8))))
    assert (r.labels, r.first_error) == ((1, None, 0, 0), None)
    with pytest.raises(ValueError, match="counts for 4 steps"):
        label_mc(record(counts[:2]))


def test_scan_example():
    got = scan_labels((1, 0.75, 0.5, 0.25, 0, 0), 4, 0.8, window=2)
    assert got[:5] == pytest.approx((1, 1, 0.625, 0.3125, 0), abs=1e-12)
    assert got[5] is None


def test_scan_edges():
    assert scan_labels((1, 0.5), -1, 0.5) == (1, 1)
    assert scan_labels((0, 0.5), 0, 0.5) == (0, None)
    assert scan_labels((0.9, None, 0), 2, 0.6) == (1.0, None, 0)  # capped; unsampled
    assert scan_labels((0.25, 0.25, 0), 2, 0.5, window=0) == (1, 1, 0)
    with pytest.raises(ValueError, match="consistency"):
        scan_labels((1, 0), 1, 0.0)


@pytest.mark.parametrize("right, consistency, want", [(True, 0.6, "positive"), (False, 0.6, "estimate"),
                                                     (False, 0.5, "drop"), (True, 0.1, "drop")])  # fmt: skip
def test_scan_use(right, consistency, want):
    assert scan_use(right, consistency) == want


def test_freeprm_labels():
    assert pseudo_labels(1, 3) == (1, 1, 1)
    assert pseudo_labels(0, 2) == (0, 0)
    with pytest.raises(ValueError, match="num_steps"):
        pseudo_labels(1, 0)


# ---- a toy world: chains with a planted error and a completer that knows the way -------------------------------------


def completions(rng, error, steps, repairs, k=8):
    """Counts per step: always right from a right prefix, right with probability `repairs` from a wrong one."""
    right = [error < 0 or t < error for t in range(steps)]
    return [Counts(k if ok else sum(rng.random() < repairs for _ in range(k)), k) for ok in right]


@pytest.mark.parametrize("error", [-1, 0, 2, 5])
def test_perfect_completer_finds_the_error(error):
    values = mc_values(completions(random.Random(0), error, 6, repairs=0.0))
    assert mc_first_error(values) == error
    assert scan_labels(values, error, 1.0) == labels_up_to(error, 6)


def test_repairing_completer_is_late():
    rng = random.Random(1)
    found = [(mc_first_error(mc_values(completions(rng, 3, 10, repairs=0.15))), 3) for _ in range(400)]
    late = [(10 if m < 0 else m) - e for m, e in found]
    assert min(late) >= 0
    assert sum(late) / len(late) > 1.0
