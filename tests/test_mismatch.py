"""Difference of two engines' log-probs and its correction, worked by hand."""

import math

import pytest
import torch

from mmrl.losses.mismatch import mismatch, truncated_importance

ROLLOUT = torch.tensor([-1.0, -2.0, -3.0, -0.5])


def test_mismatch_by_hand():
    d = torch.tensor([0.0, math.log(2.0), -math.log(2.0), 0.0])
    got = mismatch(ROLLOUT + d, ROLLOUT)
    # |d| = 0, .693147, .693147, 0; exp(d) - 1 - d = 0, 1 - .693147, -.5 + .693147, 0: sum .5
    assert got["mean"] == pytest.approx(0.3465736, abs=1e-6)
    assert got["max"] == pytest.approx(0.6931472, abs=1e-6)
    assert got["k3"] == pytest.approx(0.125, abs=1e-6)


def test_k3_keeps_its_digits_where_engines_nearly_agree():
    """exp(d) - 1 - d is d^2 / 2 for small d; in float32 the terms would cancel to nothing."""
    got = mismatch(ROLLOUT.double() + 1e-6, ROLLOUT.double())
    assert got["k3"] == pytest.approx(5e-13, rel=1e-3)


def test_truncated_importance_by_hand():
    train = (ROLLOUT + torch.tensor([0.0, math.log(1.5), 5.0, -math.log(4.0)])).requires_grad_()
    weights = truncated_importance(train, ROLLOUT)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.5, 2.0, 0.25]), atol=1e-6, rtol=0)
    assert weights.dtype == torch.float32 and not weights.requires_grad
    torch.testing.assert_close(truncated_importance(train, ROLLOUT, cap=1.0), torch.tensor([1.0, 1.0, 1.0, 0.25]))


def test_a_weight_is_a_probability_ratio_whose_mean_is_one():
    """Under the rollout distribution the untruncated weights average 1, sum_a p(a) q(a) / p(a)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])
    weights = truncated_importance(q.log(), p.log(), cap=10.0)
    assert float((p * weights).sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("train", "rollout", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"\(2,\) and rollout_logp \(3,\)"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2), r"train_logp is not finite at actions \[1\]"),
        (torch.zeros(2), torch.tensor([-math.inf, 0.0]), r"rollout_logp is not finite at actions \[0\]"),
    ],
)
def test_bad_input_is_named(train, rollout, message):
    with pytest.raises(ValueError, match=message):
        mismatch(train, rollout)
    with pytest.raises(ValueError, match=message):
        truncated_importance(train, rollout)


def test_nothing_to_compare_and_no_cap_are_errors():
    with pytest.raises(ValueError, match="at least one"):
        mismatch(torch.zeros(0), torch.zeros(0))
    with pytest.raises(ValueError, match="cap=0"):
        truncated_importance(ROLLOUT, ROLLOUT, cap=0.0)
