import math

import pytest
import torch
from tiny import flatten, random_forest

from mmrl.credit import estimate
from mmrl.losses.policy import (
    action_weights,
    cispo,
    clipped_surrogate,
    kl_estimate,
    pooled_log_ratio,
    sapo,
)
from mmrl.tree import StepTree


def test_clipped_surrogate_worked_numbers():
    rho, adv = torch.tensor([1.5, 0.5, 1.5, 4.0]), torch.tensor([1.0, -1.0, -1.0, -1.0])
    plain = clipped_surrogate(rho.log(), adv, 0.2, 0.2)
    torch.testing.assert_close(plain, torch.tensor([-1.2, 0.8, 1.5, 4.0]))
    dual = clipped_surrogate(rho.log(), adv, 0.2, 0.28, dual_clip=3.0)
    torch.testing.assert_close(dual, torch.tensor([-1.28, 0.8, 1.5, 3.0]))
    with pytest.raises(ValueError, match="must be above 1"):
        clipped_surrogate(rho.log(), adv, 0.2, 0.2, dual_clip=1.0)


def test_diffusion_clip_range_worked_numbers():
    rho = torch.tensor([1.0003, 0.9997, 1.0003, 0.9997], dtype=torch.float64)
    adv = torch.tensor([1.2, 1.2, -1.2, -1.2], dtype=torch.float64)
    log_ratio = rho.log().requires_grad_()
    loss = clipped_surrogate(log_ratio, adv, 1e-4, 1e-4)
    want = torch.tensor([-1.20012, -1.19964, 1.20036, 1.19988], dtype=torch.float64)
    torch.testing.assert_close(loss, want, atol=1e-9, rtol=0)
    loss.sum().backward()
    assert [bool(g) for g in log_ratio.grad != 0] == [False, True, True, False]


def test_step_ratio_worked_number_and_gradient():
    log_ratio = torch.tensor([0.1, -0.3, 0.5], requires_grad=True)
    pooled = pooled_log_ratio(log_ratio, torch.tensor([7, 7, 9]))
    assert pooled.detach().exp()[0].item() == pytest.approx(0.904837, abs=1e-6)
    assert pooled[2].item() == 0.5
    pooled[0].backward()
    assert log_ratio.grad.tolist() == [1, 0, 0]  # each entry's gradient goes through its own log-prob


def test_sapo_worked_number_and_sign():
    rho = torch.tensor([1.2])
    assert sapo(rho.log(), torch.tensor([1.0]), 1.0).item() == pytest.approx(-2.199336, abs=1e-6)
    log_ratio = torch.zeros(2, requires_grad=True)
    sapo(log_ratio, torch.tensor([1.0, -1.0])).sum().backward()
    assert log_ratio.grad.tolist() == pytest.approx([-1, 1])  # on-policy: the plain policy gradient


def test_cispo_keeps_a_gradient_where_the_clip_has_none():
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    old, adv = torch.tensor([-3.0, -1.0]), torch.tensor([2.0, 2.0])
    clipped_surrogate(logp - old, adv, 0.2, 0.2).sum().backward()
    assert logp.grad.tolist() == [0, -2]
    logp.grad = None
    cispo(logp - old, adv, logp, 0.2, 0.2).sum().backward()
    assert logp.grad.tolist() == pytest.approx([-2.4, -2])


def test_kl_worked_numbers():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])
    for form, want in (("k1", 0.5), ("k2", 0.125), ("k3", 0.106531)):
        assert kl_estimate(logp, ref, form).item() == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="none of k1, k2, k3"):
        kl_estimate(logp, ref, "k4")


def rows_tree():
    """Three chains of one step each with 3, 1 and 2 actions; the last row is fully masked."""
    return StepTree([-1] * 3, [0] * 3, [1] * 3, [1.0, 0, 1], tok_start=[0, 3, 4], tok_end=[3, 4, 6])


@pytest.mark.parametrize(
    "aggregation, want",
    [
        ("token-mean", 2.5),
        ("seq-mean-token-mean", 3),
        ("seq-mean-token-sum", 5),
        ("constant", 0.625),
        ("step-mean", 3),
    ],
)
def test_aggregation_worked_numbers(aggregation, want):
    tree = rows_tree()
    x = torch.tensor([1.0, 2, 3, 4, 9, 9], dtype=torch.float64)
    mask = torch.tensor([True] * 4 + [False] * 2)
    w, denominator = action_weights(tree, tree.step_of_action(), mask, aggregation, torch.ones(3).double(), max_len=8)
    assert float((w * x).sum() / denominator) == pytest.approx(want)


def test_aggregation_errors():
    tree = rows_tree()
    args = (tree, tree.step_of_action(), torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="set loss.max_len"):
        action_weights(*args, "constant", torch.ones(3).double())
    with pytest.raises(ValueError, match="is none of"):
        action_weights(*args, "mean", torch.ones(3).double())


AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "step-mean"]


def spanned(seed: int) -> StepTree:
    """A random forest whose steps own one to three actions."""
    tree = random_forest(seed)
    span = torch.randint(1, 4, (len(tree),), generator=torch.Generator().manual_seed(seed))
    return tree.replace(tok_start=span.cumsum(0) - span, tok_end=span.cumsum(0))


def aggregate(tree: StepTree, per_step: torch.Tensor, aggregation: str) -> torch.Tensor:
    owner = tree.step_of_action()
    mask = torch.ones(len(owner), dtype=torch.bool)
    w, denominator = action_weights(tree, owner, mask, aggregation, tree.leaves_below.double())
    return (w * per_step[owner]).sum() / denominator


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(5))
def test_leaf_counting_aggregates_as_flattened_rows_do(aggregation, seed):
    tree = spanned(seed)
    chains, source = flatten(tree)
    x = torch.rand(len(tree), dtype=torch.float64)
    torch.testing.assert_close(aggregate(tree, x, aggregation), aggregate(chains, x[source], aggregation))


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "fold_grpo", "capo", "pav", "salt"]
)
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "step-mean"])
@pytest.mark.parametrize("seed", range(5))
def test_leaf_counting_has_the_gradient_of_flattened_rows(name, aggregation, seed):
    """One parameter per step is the log-ratio of its actions. (seq-mean-token-mean weighs the copies of a shared step
    by 1/length, so its mean advantage is no longer enough.)"""
    tree = spanned(seed)
    chains, source = flatten(tree)

    def gradient(t: StepTree, origin: torch.Tensor) -> torch.Tensor:
        theta = torch.zeros(len(tree), dtype=torch.float64, requires_grad=True)
        loss = clipped_surrogate(theta[origin], estimate(t, name).adv, 0.2, 0.2)
        aggregate(t, loss, aggregation).backward()
        return theta.grad

    torch.testing.assert_close(gradient(tree, torch.arange(len(tree))), gradient(chains, source), atol=1e-8, rtol=1e-7)


def test_unfinished_rows_have_no_weight():
    tree = StepTree([-1, -1], [0, 0], [1, 2], [1.0, math.nan])
    credit = estimate(tree, "grpo")
    w, denominator = action_weights(
        tree, tree.step_of_action(), torch.ones(2, dtype=torch.bool), "token-mean", credit.weight
    )
    assert w.tolist() == [1, 0] and denominator == 1
