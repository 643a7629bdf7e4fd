import pytest

from mmrl.annotate.select import balanced_information, is_confident, to_annotate
from mmrl.annotate.unprm import probe_error, probe_order, rollouts_needed

SURE, UNSURE = ((0.98, 0.96), (0.97, 0.95)), ((0.98, 0.70), (0.97, 0.80))


def test_actprm_examples():
    assert is_confident(SURE)
    assert not is_confident(UNSURE)  # std of the second step is .070711
    assert is_confident(((0.98, 0.9), (0.97, 1.0)), d_std=0.070712)  # std .070711 passes just above it
    assert not is_confident(((0.98, 0.9), (0.97, 1.0)), d_std=0.070710)
    assert to_annotate([SURE, UNSURE, SURE]) == [1]


def test_steps_after_the_first_wrong_one_do_not_count():
    assert is_confident(((0.99, 0.02, 0.9), (0.99, 0.03, 0.1)))
    assert not is_confident(((0.99, 0.45, 0.99), (0.99, 0.45, 0.99)))  # the wrong step itself does


@pytest.mark.parametrize("off", [{"d_p": 1.01}, {"d_std": -1.0}])
def test_filter_can_be_switched_off(off):
    assert to_annotate([SURE, UNSURE], **off) == [0, 1]


def test_a_batch_may_become_empty():
    assert to_annotate([SURE, SURE]) == []


@pytest.mark.parametrize("heads", [((0.9,),), ((0.9, 0.8), (0.9,)), ((), ())])
def test_actprm_refuses(heads):
    with pytest.raises(ValueError, match="heads"):
        is_confident(heads)


@pytest.mark.parametrize("values, want", [((1, 0.5, 0), 0.2041667), ((1, 1, 1), 0.05), ((0, 0, 0), 0.05),
                                          ((0.0625, 0, 0, 0), 0.0148438)])  # fmt: skip
def test_balanced_information(values, want):
    assert balanced_information(values) == pytest.approx(want, abs=1e-6)
    assert balanced_information((*values, None)) == pytest.approx(want, abs=1e-6)  # unsampled steps are left out


def test_balanced_information_needs_values():
    with pytest.raises(ValueError, match="sampled"):
        balanced_information([None])


def test_number_of_rollouts():
    assert rollouts_needed([i % 2 == 0 for i in range(72)]) == 24  # the 10th right one is the 19th
    assert rollouts_needed([True] * 72) == 16
    assert rollouts_needed([True] * 10 + [False] * 62) is None
    assert rollouts_needed([False] * 61 + [True] * 11) == 72


def test_probe_order():
    u = (0.5, 1.5, 1.0, 2.5)
    assert probe_order(u) == [3, 1, 2, 0]
    assert probe_order(u, "increase") == [3, 1, 2]
    assert probe_order((1.0, 1.0)) == [0, 1]


def test_first_hit_need_not_be_the_earliest():
    rates = [1.0, 0.2, 0.1, 0.0]
    order = [3, 0, 1, 2]
    asked = []

    def rate(t):
        asked.append(t)
        return rates[t]

    assert probe_error(order, 4, rate, 0.5) == (3, {3: 0.0})
    error, seen = probe_error(order, 4, rate, 0.5, confirm_left=True)
    assert error == 1
    assert seen == {3: 0.0, 2: 0.1, 1: 0.2, 0: 1.0}
    assert asked == [3, 3, 2, 1, 0]


def test_no_hit_is_the_last_step():
    assert probe_error([1, 0, 2], 3, lambda t: 0.9, 0.5)[0] == 2
    with pytest.raises(ValueError, match="no steps"):
        probe_error([], 0, lambda t: 0.0, 0.5)


@pytest.mark.parametrize("error", range(5))
def test_perfect_completer_and_confirmation_find_the_error(error):
    for order in ([4, 0, 2, 1, 3], [0, 1, 2, 3, 4], [3, 1, 4]):
        assert probe_error(order, 5, lambda t: float(t < error), 0.5, confirm_left=True)[0] == error
