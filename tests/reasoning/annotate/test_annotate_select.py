import pytest

from mmrl.reasoning.annotate.refine import information
from mmrl.reasoning.annotate.select import is_confident

SURE, UNSURE = ((0.98, 0.96), (0.97, 0.95)), ((0.98, 0.70), (0.97, 0.80))


def test_actprm_examples():
    assert is_confident(SURE)
    assert not is_confident(UNSURE)  # std of the second step is .070711
    assert is_confident(((0.98, 0.9), (0.97, 1.0)), d_std=0.070712)  # std .070711 passes just above it
    assert not is_confident(((0.98, 0.9), (0.97, 1.0)), d_std=0.070710)


def test_steps_after_the_first_wrong_one_do_not_count():
    assert is_confident(((0.99, 0.02, 0.9), (0.99, 0.03, 0.1)))
    assert not is_confident(((0.99, 0.45, 0.99), (0.99, 0.45, 0.99)))  # the wrong step itself does


@pytest.mark.parametrize("off", [{"d_p": 1.01}, {"d_std": -1.0}])
def test_filter_can_be_switched_off(off):
    assert not is_confident(SURE, **off)


@pytest.mark.parametrize("heads", [((0.9,),), ((0.9, 0.8), (0.9,)), ((), ())])
def test_actprm_refuses(heads):
    with pytest.raises(ValueError, match="heads"):
        is_confident(heads)


@pytest.mark.parametrize("values, want", [((1, 0.5, 0), 0.2041667), ((1, 1, 1), 0.05), ((0, 0, 0), 0.05),
                                          ((0.0625, 0, 0, 0), 0.0148438)])  # fmt: skip
def test_balanced_information(values, want):
    assert information(values) == pytest.approx(want, abs=1e-6)
