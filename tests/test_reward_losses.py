import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.losses.reward import (
    atanh_mse,
    atanh_target,
    bce,
    bce_two_sided,
    bradley_terry,
    buffered_nll,
    ce_full,
    free_prm,
    good_logit,
    last_labels,
    mse,
    nca,
    q_rank,
    return_decomposition,
    smooth,
    step_loss,
    value_margin,
)
from mmrl.registry import names

NAN = math.nan
ALL = names("step_losses")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def columns(*q):
    """(S, 3) logits that every loss accepts; good minus bad is q."""
    return torch.tensor([[x, 0.0, -0.5] for x in q])


def paths(n):
    return torch.zeros(n, dtype=torch.long)


def check_worked(value, want):
    assert value.tolist() == pytest.approx(want, abs=1e-6)


# --- pointwise


@pytest.mark.parametrize("y, want", [(1.0, 0.2014133), (0.0, 1.7014133), (0.75, 0.5764133)])
def test_two_token_cross_entropy(y, want):
    logits = torch.tensor([[2.0, 0.5]])
    check_worked(good_logit(logits).sigmoid(), [0.8175745])
    check_worked(bce(logits, tensor(y)), [want])
    check_worked(bce(torch.tensor([[1.5]]), tensor(y)), [want])  # a scalar head with the same log-odds


def test_two_sided_is_the_sum_over_both_classes():
    check_worked(bce_two_sided(torch.tensor([[2.0, 0.5]]), tensor(1.0)), [0.4028266])


def test_token_pair_of_a_model_form():
    """Specification C1: z (1.2, -.3) -> p .817574, CE .201413."""
    logits = torch.tensor([[1.2, -0.3]])
    check_worked(good_logit(logits).sigmoid(), [0.817574])
    check_worked(bce(logits, tensor(1.0)), [0.201413])


def test_a_judges_log_probabilities_are_two_logits():
    check_worked(good_logit(torch.tensor([[-0.2, -1.9]])).sigmoid(), [0.8455347])


@pytest.mark.parametrize("name, want", [("bce", 1.300502), ("mse", 0.459170)])
def test_unlabelled_step_takes_no_part_in_the_mean(name, want):
    logits, labels = torch.tensor([[0.5], [-1.0], [2.0]]), tensor(1, NAN, 0)
    loss = step_loss(name)(logits, labels)
    assert loss[1] == 0
    assert loss.sum().item() / 2 == pytest.approx(want, abs=1e-6)


def test_label_smoothing_and_last_step_labels():
    out = smooth(tensor(1, 0, NAN, 0.5), 0.1)
    assert out[[0, 1, 3]].tolist() == pytest.approx([0.95, 0.05, 0.5])
    assert out[2].isnan()
    with pytest.raises(ValueError, match="must be in"):
        smooth(tensor(1), 1.0)
    kept = last_labels(tensor(1, 0, 0, 1, 1), torch.tensor([9, 9, 2, 9, 2]))
    assert kept.isnan().tolist() == [True, True, True, False, False]
    assert kept[3:].tolist() == [1, 1]
    assert last_labels(tensor(), paths(0)).shape == (0,)


def test_signed_targets_and_their_distance():
    check_worked(atanh_target(tensor(0.5, 1.0, -1.0)), [0.549306, 1.831781, -1.831781])
    logits, labels = torch.tensor([[1.0], [8.0]]), tensor(0.75, 1.0)  # v = .5 and 1
    check_worked(step_loss("atanh_mse")(logits, labels), [(0.5 - 0.549306) ** 2, (4 - math.atanh(0.95)) ** 2])
    huber = step_loss("atanh_huber")(logits, labels)
    check_worked(huber, [(0.5 - 0.549306) ** 2 / 2, 4 - 1.831781 - 0.5])
    at_target = torch.tensor([[2 * math.atanh(0.5)]])
    assert good_logit(at_target).sigmoid().item() == pytest.approx(0.75)  # the optimum scores the label
    with pytest.raises(ValueError, match="atanh of"):
        atanh_mse(logits, labels, margin=0.0)


def test_three_class_loss_with_buffer():
    logits = torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.7, 0.1]]).log()
    loss = buffered_nll(logits, tensor(1, 1), tensor(1, 0))
    check_worked(loss, [0.105361, 1.609438])
    assert loss.mean().item() == pytest.approx(0.857399, abs=1e-6)
    check_worked(buffered_nll(logits, tensor(0, 0), tensor(0, 1)), [-math.log(0.1), -math.log(0.8)])
    check_worked(
        free_prm(logits, tensor(1, 0)), [-(math.log(0.6) + math.log(0.9)) / 2, -(math.log(0.7) + math.log(0.8)) / 2]
    )
    check_worked(good_logit(logits).sigmoid(), [0.6 / 0.7, 0.2 / 0.9])


def test_buffer_alone_is_no_optimum():
    logits = torch.tensor([[0.0, 0.0, 9.0]], requires_grad=True)
    free_prm(logits, tensor(1.0)).sum().backward()
    assert logits.grad[0, 2] > 0.4  # descent lowers the buffer
    assert logits.grad[0, 0] < -0.4


def test_full_vocabulary_cross_entropy():
    logits = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    check_worked(ce_full(logits, tensor(1, 0)), [-math.log(0.5), -math.log(0.3)])
    with pytest.raises(ValueError, match="C = 2"):
        ce_full(logits[:, :2], tensor(1, 0))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-8, 8), st.floats(0, 1)), min_size=1, max_size=6))
def test_soft_label_gradient_is_p_minus_y(rows):
    z = torch.tensor([[a] for a, _ in rows], requires_grad=True)
    y = tensor(*(b for _, b in rows))
    step_loss("bce")(z, y).sum().backward()
    torch.testing.assert_close(z.grad[:, 0], z.detach()[:, 0].sigmoid() - y, atol=1e-6, rtol=0)


def test_soft_label_gradient_on_two_tokens():
    z = torch.tensor([[1.2, -0.3]], requires_grad=True)
    step_loss("bce")(z, tensor(0.25)).sum().backward()
    p = torch.sigmoid(torch.tensor(1.5)).item()
    assert z.grad[0].tolist() == pytest.approx([p - 0.25, 0.25 - p])


# --- whole solutions


@pytest.mark.parametrize("zeta, want", [(2.0, 0.9660485), (0.0, 0.3781851)])
def test_q_rank_without_anchor(zeta, want):
    logits, labels = torch.tensor([[0.5], [1.0], [-1.0]]), tensor(1, 1, 0)
    check_worked(q_rank(logits, labels, paths(3), zeta=zeta, anchor=False), [want] * 3)


def test_q_rank_with_anchor():
    loss = step_loss("q_rank")
    check_worked(loss(torch.tensor([[0.5], [0.2], [-1.0]]), tensor(1, 1, 0), path=paths(3)), [2.882888] * 3)
    check_worked(loss(torch.tensor([[0.5], [0.2]]), tensor(1, 1), path=paths(2)), [0.813682] * 2)


def test_q_rank_keeps_solutions_apart_and_weighs_them():
    q, y = torch.tensor([[0.5], [0.3], [0.2], [0.2], [-1.0], [9.0]]), tensor(1, 1, 1, 1, 0, NAN)
    path = torch.tensor([8, 2, 8, 2, 8, 8])
    loss = step_loss("q_rank")
    got = loss(q, y, path=path)
    alone = loss(q[[1, 3]], y[[1, 3]], path=paths(2))
    check_worked(got, [2.882888, alone[0].item(), 2.882888, alone[1].item(), 2.882888, 0])
    weight = tensor(5 / 6, 5 / 4, 5 / 6, 5 / 4, 5 / 6, 0)  # equal shares of the two solutions
    mean = loss(q, y, weight, path).sum() / weight.sum()
    assert mean.item() == pytest.approx((2.882888 + alone[0].item()) / 2, abs=1e-6)


def test_q_rank_without_a_right_step():
    q, y = torch.tensor([[0.0], [1.0]]), tensor(0, 0)
    check_worked(q_rank(q, y, paths(2), anchor=False), [0, 0])
    want = math.log(1 + math.exp(4) + math.exp(5))  # the anchor alone
    check_worked(q_rank(q, y, paths(2)), [want] * 2)


def test_q_rank_pulls_right_up_and_wrong_down():
    q = torch.zeros(4, 1, requires_grad=True)
    step_loss("q_rank")(q, tensor(1, 1, 0, NAN), path=paths(4)).sum().backward()
    assert q.grad[1, 0] < 0 < q.grad[2, 0]
    assert q.grad[3, 0] == 0


# --- children of a state


def logit(*p):
    return torch.logit(tensor(*p))[:, None]


def test_value_margin():
    """p (.6, .5, .3), y (.9, .4, .45), margin .1: squares .09, .01, .0225; two pairs, the first over the others."""
    loss = step_loss("value_margin")
    q, y = logit(0.6, 0.5, 0.3), tensor(0.9, 0.4, 0.45)
    check_worked(loss(q, y, path=paths(3)), [0.1225 / 3] * 3)  # gaps of .1 and .3 suffice, .05 is no pair
    far = [0.1225 / 3 + 2 * (0.3 + 0.1) / 2] * 3  # margin .4: short by .3 and .1
    check_worked(value_margin(q, y, paths(3), margin=0.4, weight=2.0), far)
    check_worked(value_margin(q, y, paths(3), margin=0.4, weight=0.0), [0.1225 / 3] * 3)


def test_value_margin_is_zero_at_the_values_and_apart_by_fork():
    y = tensor(0.9, 0.2, 0.5, 0.5)
    fork = torch.tensor([4, 4, 1, 7])
    check_worked(value_margin(logit(0.9, 0.2, 0.5, 0.5), y, fork), [0] * 4)
    q = logit(0.4, 0.5, 0.5, 0.1)  # the first two in the wrong order; only children have no pair
    check_worked(value_margin(q, y, fork), [(0.25 + 0.09) / 2 + 0.2] * 2 + [0, 0.16])


def test_value_margin_puts_siblings_in_order():
    """Values .55 and .45 of states that look alike: the margin term moves them apart faster than regression."""
    grads = []
    for weight in (0.0, 1.0):
        q = logit(0.5, 0.5).requires_grad_()
        value_margin(q, tensor(0.55, 0.45), paths(2), weight=weight)[0].backward()
        grads.append(q.grad.flatten())
    assert grads[1][0] < grads[0][0] < 0 < grads[0][1] < grads[1][1]


def test_only_ranking_needs_solutions():
    whole = ["bradley_terry", "nca", "preference", "q_rank", "return_decomposition", "value_margin"]
    assert [n for n in ALL if step_loss(n).needs_path] == whole
    with pytest.raises(ValueError, match="give `path`"):
        step_loss("q_rank")(torch.zeros(1, 1), tensor(1))


# --- what every loss promises


@pytest.mark.parametrize("name", ALL)
def test_unlabelled_steps_get_no_gradient(name):
    logits = columns(0.3, math.inf, -0.8, NAN).requires_grad_()  # what stands at unlabelled steps cannot matter
    loss = step_loss(name)(logits, tensor(1, NAN, 0, NAN), tensor(1, 5, 2, 5), paths(4))
    assert loss[[1, 3]].tolist() == [0, 0]
    loss.sum().backward()
    assert logits.grad[[1, 3]].abs().sum() == 0
    assert logits.grad[[0, 2]].isfinite().all()
    assert logits.grad[[0, 2]].abs().sum() > 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_labelled_is_zero_with_a_graph(name, n):
    logits = columns(*[0.5] * n).reshape(n, 3).requires_grad_()
    total = step_loss(name)(logits, torch.full((n,), NAN), torch.ones(n), paths(n)).sum()
    total.backward()
    assert total.item() == 0
    assert logits.grad.abs().sum() == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(name, dtype):
    logits = columns(1e4, -1e4, 1e4, -1e4).to(dtype).requires_grad_()
    loss = step_loss(name)(logits, tensor(1, 1, 0, 0.5), path=paths(4))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("name", [n for n in ALL if not step_loss(n).needs_path])
@settings(deadline=None, max_examples=30)
@given(st.permutations(range(5)))
def test_order_of_steps_does_not_matter(name, order):
    logits, labels = columns(0.3, -1.0, 2.0, 0.0, 1.1), tensor(1, 0, NAN, 0.4, 0.0)
    order = torch.tensor(order)
    loss = step_loss(name)
    torch.testing.assert_close(loss(logits, labels)[order], loss(logits[order], labels[order]), rtol=0, atol=0)


@settings(deadline=None, max_examples=30)
@given(st.permutations(range(3)))
def test_order_of_solutions_does_not_matter(order):
    q = [columns(0.3, -1.0), columns(2.0, 0.0, 1.1), columns(0.7)]
    y = [tensor(1, 0), tensor(0, 1, 0.9), tensor(1)]
    path = [torch.full((len(a),), i) for i, a in enumerate(y)]
    loss = step_loss("q_rank")
    apart = torch.cat([loss(q[i], y[i], path=path[i]) for i in order])
    together = loss(
        *(torch.cat([part[i] for i in order]) for part in (q, y)), path=torch.cat([path[i] for i in order])
    )
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("name", ALL)
def test_parts_add_up_to_the_whole(name):
    logits, labels, path = columns(0.3, -1.0, 2.0, 0.0), tensor(1, 0, 0.8, 0.4), torch.tensor([0, 0, 1, 1])
    loss, weight = step_loss(name), tensor(1, 2, 0.5, 1)
    whole = loss(logits, labels, weight, path).sum()
    parts = sum(loss(logits[s], labels[s], weight[s], path[s]).sum() for s in (slice(0, 2), slice(2, 4)))
    torch.testing.assert_close(whole, parts)


def test_wrong_requests_are_named():
    with pytest.raises(ValueError, match="did you mean bce"):
        step_loss("bec")
    with pytest.raises(
        ValueError, match=r"unknown key loss.zetta=1 \(did you mean zeta\?\); step loss 'q_rank' takes"
    ):
        step_loss("q_rank", zetta=1)
    with pytest.raises(ValueError, match=r"loss.margin=0.0: input should be greater than 0"):
        step_loss("atanh_mse", margin=0.0)
    with pytest.raises(ValueError, match="label -100 of step 2 is outside"):
        step_loss("bce")(torch.zeros(3, 1), tensor(1, NAN, -100))


# --- pairs


@pytest.mark.parametrize(
    "delta, options, want",
    [
        (1.0, {}, 0.313262),
        (1.0, {"margin": 0.5}, 0.474077),
        (1.0, {"gamma": 2.0}, 0.090632),
        (-1.0, {"gamma": 2.0}, 1.313262),  # a pair in the wrong order keeps its whole loss
        (1.2 - 0.3, {}, 0.3411539),
        (1.0 - 0.2, {}, 0.371101),
        (0.4 - 0.1, {}, 0.554355),  # the implicit model's DPO
    ],
)
def test_bradley_terry(delta, options, want):
    loss = bradley_terry(torch.tensor([[0.2], [0.2 + delta]]), tensor(0.0, 1.0), torch.tensor([3, 3]), **options)
    check_worked(loss, [want, want])  # both steps carry the loss of their path


def test_bradley_terry_over_all_pairs_of_two_sets():
    q, labels = torch.tensor([[0.8], [-0.3], [0.5], [0.1]]), tensor(1.0, 0.0, 1.0, 0.0)
    check_worked(bradley_terry(q, labels, torch.zeros(4).long()), [0.393659] * 4)


def test_pairs_are_ordered_by_label_within_their_path():
    """Labels 0, 1/2, 1 make three pairs, with a gap of 0.6 one; a path without a pair costs nothing."""
    q, labels = torch.tensor([[0.0], [1.0], [3.0], [9.0]]), tensor(0.0, 0.5, 1.0, 0.3)
    path = torch.tensor([1, 1, 1, 0])
    three = sum(math.log(1 + math.exp(-d)) for d in (1, 2, 3)) / 3
    check_worked(bradley_terry(q, labels, path), [three] * 3 + [0.0])
    check_worked(bradley_terry(q, labels, path, gap=0.6), [math.log(1 + math.exp(-3))] * 3 + [0.0])


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_bradley_terry_gradient_is_finite_at_extremes(gamma):
    q = torch.tensor([[-200.0], [0.0], [30.0], [200.0]]).requires_grad_()
    labels, path = tensor(1, 1, 1, 1, 0, 0, 0, 0), torch.arange(4).repeat(2)
    bradley_terry(torch.cat([q, torch.zeros(4, 1)]), labels, path, gamma=gamma)[:4].sum().backward()
    assert q.grad.isfinite().all()
    assert q.grad[0].item() == pytest.approx(-1)


def test_nca_reads_more_than_differences():
    path, labels = torch.tensor([0, 0]), tensor(1.0, 0.0)
    check_worked(nca(torch.tensor([[0.4], [0.1]]), labels, path), [1.341721] * 2)
    assert nca(torch.tensor([[1.4], [1.1]]), labels, path)[0] != nca(torch.tensor([[0.4], [0.1]]), labels, path)[0]


def test_contributions_add_up_to_the_outcome():
    """SPA: (0.2 + 0.3 - 1)^2 and (0.4 - 0)^2; the optimum is any split whose sum is the outcome."""
    q, labels = torch.tensor([[0.2], [0.4], [0.3]]), tensor(1.0, 0.0, 1.0)
    check_worked(return_decomposition(q, labels, torch.tensor([0, 1, 0])), [0.25, 0.16, 0.25])
    exact = torch.tensor([[-1.5], [0.0], [2.5]])
    check_worked(return_decomposition(exact, labels, torch.tensor([0, 1, 0])), [0, 0, 0])


def test_mse_worked_by_hand():
    check_worked(mse(torch.tensor([[0.0], [math.log(3)]]), tensor(1.0, 0.5)), [0.25, 0.0625])
