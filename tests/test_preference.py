"""The preference loss: worked numbers of the published methods, reductions to DPO, gradients."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl.losses.preference import (
    Preference,
    Side,
    guide_weights,
    preference_loss,
    preset,
    reward_weights,
    token_rewards,
    value_ranking,
    visit_smoothing,
)
from mmrl.registry import rows

# log-ratios of the worked pair: the chosen segment has steps (0, 2), (2, 4), the rejected one (0, 1), (1, 3)
RHO_W, STEP_W = [0.2, -0.1, 0.3, 0.1], [0, 0, 1, 1]
RHO_L, STEP_L = [-0.2, 0.1, -0.4], [0, 1, 1]
LAST_W, LAST_L = [0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0]


def side(rho, weight=None, action=None, ref=None, pair=None, reward=None):
    """A side of one pair whose log-ratios are `rho`; log-probs are rho + ref, ref -1 by default."""
    logp = torch.tensor(rho, dtype=torch.float32)
    ref = torch.full_like(logp, -1.0) if ref is None else torch.tensor(ref)
    logp = (logp + ref).requires_grad_()
    pair = torch.zeros(len(rho), dtype=torch.long) if pair is None else torch.tensor(pair)
    floats = [None if x is None else torch.as_tensor(x, dtype=torch.float32) for x in (weight, action, reward)]
    return Side(logp, ref, pair, *floats)


def one(chosen, rejected, pref, **more):
    return preference_loss(chosen, rejected, 1, pref, **more)


def random_sides(seed, pairs=3):
    g = torch.Generator().manual_seed(seed)
    sides = []
    for _ in range(2):
        pair = torch.cat([torch.arange(pairs), torch.randint(pairs, (9,), generator=g)])
        logp, ref = -torch.rand((2, len(pair)), generator=g) * 3
        sides.append(Side(logp.requires_grad_(), ref, pair))
    return sides


def plain_dpo(chosen, rejected, pairs, beta):
    """The formula of the paper, sequence by sequence."""
    out = []
    for p in range(pairs):
        w, l = (s.logp[s.pair == p].sum() - s.ref_logp[s.pair == p].sum() for s in (chosen, rejected))  # noqa: E741
        out.append(-F.logsigmoid(beta * (w - l)))
    return torch.stack(out)


# --- worked numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pref, weights, h, loss",
    [
        (Preference(beta=0.5), (None, None), 0.5, 0.474077),  # DPO
        (preset("step_dpo", beta=0.5), (LAST_W, LAST_L), 0.35, 0.533382),
        (Preference(beta=0.1, smoothing=0.25), (LAST_W, LAST_L), 0.07, 0.676260),  # MCTS-DPO, N = (6, 2)
    ],
)
def test_worked_pair(pref, weights, h, loss):
    got = one(side(RHO_W, weights[0]), side(RHO_L, weights[1]), pref)
    assert float(got.margin) == pytest.approx(h, abs=1e-6)
    assert float(got.loss.detach()) == pytest.approx(loss, abs=1e-6)


def test_full_step_dpo():
    a_w = reward_weights(torch.tensor([0.9, 0.4]), torch.tensor([0, 0]), 1.0)
    a_l = reward_weights(torch.tensor([0.6, 0.1]), torch.tensor([0, 0]), -1.0)
    torch.testing.assert_close(a_w, torch.tensor([1.244919, 0.755081]), atol=1e-6, rtol=0)
    torch.testing.assert_close(a_l, torch.tensor([0.755081, 1.244919]), atol=1e-6, rtol=0)
    got = one(side(RHO_W, a_w[STEP_W]), side(RHO_L, a_l[STEP_L]), preset("full_step_dpo", beta=0.5))
    assert float(got.margin) == pytest.approx(0.475508, abs=1e-6)
    assert float(got.loss.detach()) == pytest.approx(0.483394, abs=1e-6)


def test_step_weights_keep_their_sum_per_segment():
    w = reward_weights(torch.tensor([0.3, 0.9, 0.1, 0.5, 0.2]), torch.tensor([4, 4, 7, 7, 7]), 3.0)
    torch.testing.assert_close(w[:2].sum(), torch.tensor(2.0))
    torch.testing.assert_close(w[2:].sum(), torch.tensor(3.0))


def test_visit_smoothing():
    got = visit_smoothing(torch.tensor([6, 2, 0]), torch.tensor([2, 6, 0]))
    torch.testing.assert_close(got, torch.tensor([0.25, 0.5, 0.0]))


def test_tgdpo_weights():
    rho = torch.tensor([1.0, -0.5])
    torch.testing.assert_close(guide_weights(rho, 0.5, 0.1, chosen=True), torch.tensor([1.05, 0.975]))
    torch.testing.assert_close(guide_weights(rho, 0.5, 0.1, chosen=False), torch.tensor([0.95, 1.025]))


def test_t_reg():
    rhat = token_rewards(torch.tensor([-0.5, -1.0]), torch.tensor([-1.5, -0.2]))
    torch.testing.assert_close(rhat, torch.tensor([0.231059, -0.189974]), atol=1e-6, rtol=0)
    # log pi (-.5, -1) and (-.7); references such that the implicit rewards at beta .1 are .4 and .1
    chosen = Side(torch.tensor([-0.5, -1.0]), torch.tensor([-2.5, -3.0]), torch.tensor([0, 0]), token_reward=rhat)
    rejected = Side(torch.tensor([-0.7]), torch.tensor([-1.7]), torch.tensor([0]), token_reward=torch.tensor([-0.1]))
    got = one(chosen, rejected, preset("t_reg"))
    assert float(got.chosen_reward) == pytest.approx(0.4) and float(got.rejected_reward) == pytest.approx(0.1)
    assert float(got.loss) == pytest.approx(0.552819, abs=1e-6)


@pytest.mark.parametrize(
    "name, changes, margin, loss",
    [("spo", {}, 0.007, 0.6896533), ("lpo", {}, 0.35, 0.5333822), ("lpo", {"clip": 1e-4}, 0.1, 0.6443967)],
)
def test_lpo_and_spo(name, changes, margin, loss):
    chosen = side([0.0002], ref=[-0.4002])
    rejected = side([-0.0005], ref=[-0.5495])
    got = one(chosen, rejected, preset(name, **changes))
    assert float(got.margin) == pytest.approx(margin, abs=5e-5)  # differences of log-probs in float32
    assert float(got.loss.detach()) == pytest.approx(loss, abs=2e-5)


def test_clipped_ratios_have_no_gradient():
    chosen, rejected = side([0.5]), side([0.01])
    one(chosen, rejected, preset("lpo", beta=1.0)).loss.backward()
    assert float(chosen.logp.grad) == 0 and float(rejected.logp.grad) > 0


def test_pdpo():
    got = one(side([1.0]), side([-0.5]), preset("pdpo"))
    assert float(got.margin) == pytest.approx(0.15) and float(got.loss.detach()) == pytest.approx(0.62096, abs=1e-5)


def test_svpo_adds_the_chosen_steps_nll():
    chosen, rejected = side([0.3, 0.1]), side([-0.2])
    plain = one(chosen, rejected, preset("svpo", nll=0.0)).loss
    mean_nll = -(0.3 - 1 + 0.1 - 1) / 2
    assert float((one(chosen, rejected, preset("svpo")).loss - plain).detach()) == pytest.approx(mean_nll, abs=1e-6)
    got = value_ranking(torch.tensor([0.6, 0.9]), torch.tensor([0.5, 0.1]), margin=0.3)
    torch.testing.assert_close(got, torch.tensor([0.2, 0.0]))


def test_ipo_and_margins():
    got = one(side([1.0]), side([0.0]), Preference(beta=0.1, form="ipo"))
    assert float(got.loss.detach()) == pytest.approx(16, rel=1e-5)  # (1 - 1 / .2)^2
    shifted = one(side([1.0]), side([0.0]), Preference(beta=0.5, margin=0.1, gap_margin=0.5), gap=torch.tensor([0.4]))
    assert float(shifted.loss.detach()) == pytest.approx(math.log1p(math.exp(-0.2)), abs=1e-6)  # .5 - .1 - .5 * .4
    assert float(shifted.margin) == pytest.approx(0.5)


def test_length_power_and_reference_free():
    chosen, rejected = side([0.5, 0.5, 7.0], weight=[1.0, 1.0, 0.0]), side([0.2])
    got = one(chosen, rejected, Preference(beta=1.0, length_power=1.0))
    assert float(got.margin) == pytest.approx(0.3, abs=1e-6)  # the weightless action has no length
    free = one(
        Side(chosen.logp, None, chosen.pair),
        Side(rejected.logp, None, rejected.pair),
        Preference(1.0, reference_free=True),
    )
    assert float(free.margin) == pytest.approx(5.0 - (-0.8), abs=1e-5)


# --- reductions --------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([0.05, 0.5]))
@settings(max_examples=25, deadline=None)
def test_equal_weights_are_dpo(seed, beta):
    chosen, rejected = random_sides(seed)
    got = preference_loss(chosen, rejected, 3, Preference(beta=beta))
    torch.testing.assert_close(got.loss, plain_dpo(chosen, rejected, 3, beta), atol=1e-6, rtol=1e-6)


def test_smoothed_labels_by_the_plain_formula():
    """Conservative DPO: the pair is taken to be the wrong way round with probability eps."""
    chosen, rejected = random_sides(5)
    got = preference_loss(chosen, rejected, 3, Preference(beta=0.1, smoothing=0.2)).loss
    forth, back = plain_dpo(chosen, rejected, 3, 0.1), plain_dpo(rejected, chosen, 3, 0.1)
    torch.testing.assert_close(got, 0.8 * forth + 0.2 * back, atol=1e-6, rtol=1e-6)


def test_options_that_are_off_change_no_bit():
    chosen, rejected = random_sides(3)
    want = preference_loss(chosen, rejected, 3, Preference()).loss
    ones = reward_weights(torch.rand(12), chosen.pair, 0.0)
    guide = guide_weights(torch.randn(12), 0.0, 0.1, chosen=True)
    other = Side(chosen.logp, chosen.ref_logp, chosen.pair, ones, guide)
    none = torch.zeros(3)
    for got in (
        preference_loss(other, rejected, 3, preset("full_step_dpo", beta=0.1, gamma=0.0)).loss,
        preference_loss(chosen, rejected, 3, preset("tgdpo", guide=0.0)).loss,
        preference_loss(chosen, rejected, 3, preset("t_reg", regulariser=0.0)).loss,
        preference_loss(chosen, rejected, 3, preset("mcts_dpo"), smoothing=none).loss,
    ):
        assert torch.equal(got, want)


def test_zero_weight_steps_have_exactly_no_gradient():
    chosen, rejected = side(RHO_W, LAST_W), side(RHO_L, LAST_L)
    one(chosen, rejected, preset("step_dpo")).loss.backward()
    assert chosen.logp.grad[:2].tolist() == [0, 0] and rejected.logp.grad[0] == 0
    assert bool((chosen.logp.grad[2:] < 0).all()) and bool((rejected.logp.grad[1:] > 0).all())


def test_prefix_of_weight_zero_changes_nothing():
    want = one(side(RHO_W[2:]), side(RHO_L[1:]), preset("step_dpo")).loss
    got = one(side(RHO_W, LAST_W), side(RHO_L, LAST_L), preset("step_dpo")).loss
    torch.testing.assert_close(got, want)


def test_gradient_by_hand():
    """dL/d ln pi(i) is -beta sigmoid(-h) a g for a chosen action, the opposite sign for a rejected one."""
    a, g = [1.0, 1.0, 0.5, 0.5], [0.9, 1.1, 1.0, 2.0]
    chosen, rejected = side(RHO_W, a, g), side(RHO_L, [2.0, 1.0, 1.0])
    got = one(chosen, rejected, Preference(beta=0.3))
    got.loss.backward()
    pull = 0.3 * float(torch.sigmoid(-got.margin))
    torch.testing.assert_close(chosen.logp.grad, -pull * torch.tensor(a) * torch.tensor(g))
    torch.testing.assert_close(rejected.logp.grad, pull * torch.tensor([2.0, 1.0, 1.0]))


def test_identical_pair_gives_log_two():
    got = one(side(RHO_W), side(RHO_W), Preference(beta=0.7))
    assert float(got.loss.detach()) == pytest.approx(math.log(2), abs=1e-7) and float(got.margin) == 0


def test_swapping_flips_the_gradient():
    """At h = 0 exactly; and with half smoothed labels the loss does not tell the two apart."""
    grads = []
    for swap in (False, True):
        x, y = side([0.2, 0.1]), side([0.3])
        pair = (y, x) if swap else (x, y)
        one(*pair, Preference()).loss.backward()
        grads.append((x.logp.grad, y.logp.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, -b)
    half = Preference(beta=0.5, smoothing=0.5)
    x, y = side(RHO_W), side(RHO_L)
    torch.testing.assert_close(one(x, y, half).loss, one(y, x, half).loss)


def test_tokens_and_latents_give_one_loss():
    """A step of many tokens and one transition with the same sum of log-probs are the same to the loss."""
    tokens = one(side(RHO_W), side(RHO_L), Preference()).loss
    latent = one(side([sum(RHO_W)]), side([sum(RHO_L)]), Preference()).loss
    torch.testing.assert_close(tokens, latent)


def test_order_of_actions_and_pairs_does_not_matter():
    chosen, rejected = random_sides(8)
    want = preference_loss(chosen, rejected, 3, Preference()).loss
    order, names = torch.randperm(12), torch.tensor([2, 0, 1])
    move = lambda s: Side(s.logp[order], s.ref_logp[order], names[s.pair[order]])  # noqa: E731
    got = preference_loss(move(chosen), move(rejected), 3, Preference()).loss
    torch.testing.assert_close(got[names], want)


def test_low_precision_log_probs_are_compared_in_float32():
    chosen, rejected = (Side(s.logp.detach().bfloat16(), s.ref_logp.bfloat16(), s.pair) for s in random_sides(1))
    assert preference_loss(chosen, rejected, 3, Preference()).loss.dtype == torch.float32


def test_metrics():
    got = one(side([0.5]), side([0.2]), Preference(beta=2.0)).metrics()
    assert {k: round(float(v), 4) for k, v in got.items()} == {
        "loss": 0.4375, "accuracy": 1.0, "margin": 0.6, "chosen_reward": 1.0, "rejected_reward": 0.4
    }  # fmt: skip


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (partial(preset, "stepdpo"), r"unknown preference loss 'stepdpo' \(did you mean step_dpo\?\)"),
        (partial(preset, "dpo", bete=1.0), r"unknown key loss.bete=1.0 \(did you mean beta\?\)"),
        (partial(preset, "dpo", beta=0.0), "loss.beta=0.0: input should be greater than 0"),
        (partial(preset, "dpo", smoothing=0.6), "loss.smoothing=0.6: input should be less than or equal to 0.5"),
        (partial(preset, "lpo", clip=1.0), "loss.clip=1.0: input should be less than 1"),
        (partial(preset, "dpo", form="ipoo"), r"loss.form='ipoo': input should be .* \(did you mean ipo\?\)"),
        (partial(Preference, form="ipo", smoothing=0.1), "ipo has no label to smooth"),
        (partial(one, Side(torch.zeros(1), None, torch.zeros(1, dtype=torch.long)), side([0.0]), Preference()),
         "the chosen actions have no reference log-probs"),
        (partial(preference_loss, side([0.0]), side([0.0]), 2, Preference()), "pair 1 has no chosen action"),
        (partial(one, side([0.0]), side([0.0]), Preference(gap_margin=1.0)), "needs the gap of each pair"),
        (partial(one, side([0.0]), side([0.0]), preset("t_reg")), "needs a token reward for the chosen"),
        (partial(reward_weights, torch.tensor([math.nan]), torch.tensor([0]), 1.0), "has no reward; score all steps"),
    ],
)  # fmt: skip
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_preset_tells_its_formula_and_source():
    for row in rows("preferences"):
        assert isinstance(row.build({}), Preference)
        assert "20" in row.source and "20" in row.target.__doc__ and len(row.target.__doc__) > 100, row.name
