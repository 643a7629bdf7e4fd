import math

import pytest

from mmrl.annotate.borders import (
    confidence_borders,
    confidence_threshold,
    entropy,
    entropy_borders,
    spans,
    step_uncertainty,
)


def test_adaptive_step_example():
    conf = [0.99, 0.95, 0.30, 0.98, 0.97, 0.12, 0.90, 0.88, 0.99, 0.91]
    tau = confidence_threshold(conf, 0.2)
    assert tau == 0.30
    assert confidence_borders(conf, tau) == [2, 5]
    assert spans([2, 5], 10) == [(0, 2), (2, 5), (5, 10)]


def test_threshold_takes_at_least_one_and_counts_exactly():
    assert confidence_threshold([0.9, 0.2, 0.5]) == 0.2
    assert confidence_threshold([i / 100 for i in range(100)], 0.29) == 0.28  # 29th smallest
    with pytest.raises(ValueError, match="at least one"):
        confidence_threshold([])


def test_the_first_token_is_no_border():
    assert confidence_borders([0.1, 0.9], 0.5) == []
    assert entropy_borders([2.0, 0.1]) == []


def test_entropy_example():
    h = [entropy(row) for row in ((0.9, 0.1), (0.5, 0.5), (0.8, 0.2))]
    assert h == pytest.approx([0.325083, 0.693147, 0.500402], abs=1e-6)
    assert entropy_borders(h, 0.6) == [1]
    assert entropy_borders([0.0, 0.6], 0.6) == []  # above, not at
    assert entropy((1.0, 0.0)) == 0


def test_spans_refuse_borders_out_of_order():
    assert spans([], 3) == [(0, 3)]
    for bad in ([0], [3], [2, 1]):
        with pytest.raises(ValueError, match="ascend"):
            spans(bad, 3)


def test_uncertainty_example():
    logps = (-0.1, -2.0, -0.5)
    assert step_uncertainty(logps) == pytest.approx(1.086201, abs=1e-6)
    assert step_uncertainty(logps, kind="log_sum") == pytest.approx(3.334575, abs=1e-6)
    assert step_uncertainty(logps, normalise=True) == pytest.approx(1.086201 / math.log(3), abs=1e-6)


def test_uncertainty_edges():
    assert step_uncertainty([-3.0], normalise=True) == 0
    assert step_uncertainty([-1.0] * 7, normalise=True) == pytest.approx(1.0)
    for bad in ([], [-1.0, -math.inf], [math.nan]):
        with pytest.raises(ValueError, match="finite"):
            step_uncertainty(bad)
