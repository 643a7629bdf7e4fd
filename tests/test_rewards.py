from array import array
from decimal import Decimal
from fractions import Fraction
from types import GeneratorType

import foreign_rewards
import numpy as np
import pandas as pd
import pytest
import torch
from tiny import nan_for_first, raising, wrong_length

from mmrl.registry import build
from mmrl.rewards import Isolated, RewardError, score
from mmrl.rollout import Prompt, Sample


def samples(count=10):
    return [Sample(Prompt(f"p{i}", {"label": i}), torch.full((1, 2, 2), i / 10), i) for i in range(count)]


@pytest.fixture(scope="module")
def answering():
    """An isolated reward that gives one answer, in one process for all of them."""
    reward = Isolated(foreign_rewards.stated)

    def make(answer):
        if isinstance(answer, (GeneratorType, memoryview, type({}.values()))):
            pytest.skip("cannot be sent to another process")
        return lambda batch: reward([Sample(s.prompt, answer, s.step) for s in batch])

    yield make
    reward.close()


def test_weighted_sum_and_unscored_samples():
    def one(batch):
        return [1.0 for _ in batch]

    scored = score(samples(), {"one": (one, 2.0), "nan": (nan_for_first, 1.0)})
    assert scored.total[0].isnan() and scored.total[1].item() == pytest.approx(2.1)
    assert scored.unscored == {"one": 0, "nan": 1} and set(scored.seconds) == {"one", "nan"}


@pytest.mark.parametrize(
    "reward, message",
    [
        (raising, r"100% of 10 samples have no reward .*'r': 10.*last error: KeyError: 'answer'"),
        (wrong_length, "reward 'r' returned 1 values for 10 samples"),
        (lambda s: [None] * len(s), "100% of 10 samples have no reward"),
        (lambda s: [float("nan")] * len(s), "100% of 10 samples have no reward"),
        (lambda s: ["good"] * len(s), "sample 0 got 'good', which is no number"),
        (lambda s: [float("inf")] * len(s), r"sample 0 \(prompt 'p0'\) is infinite"),
    ],
)
def test_bad_rewards_are_clear_errors(reward, message):
    with pytest.raises(RewardError, match=message):
        score(samples(), {"r": (reward, 1.0)})


def test_a_raising_reward_below_the_limit_leaves_samples_unscored():
    scored = score(samples(), {"r": (raising, 1.0)}, max_unscored=1.0)
    assert bool(scored.total.isnan().all()) and scored.unscored["r"] == 10


def raises_for(*bad):
    calls = []

    def reward(batch):
        calls.append(len(batch))
        if any((s.prompt.id, s.step) in bad for s in batch):
            raise KeyError("answer")
        return [1.0] * len(batch)

    return reward, calls


def test_a_sample_that_breaks_a_reward_costs_itself_alone():
    batch = [Sample(Prompt(f"p{i % 3}", {}), "x", i) for i in range(9)]
    reward, calls = raises_for(("p1", 4))
    scored = score(batch, {"r": (reward, 1.0)})
    assert scored.total.isnan().nonzero().flatten().tolist() == [4] and scored.unscored["r"] == 1
    assert sorted(calls) == [1, 1, 1, 3, 3, 3, 9]


@pytest.mark.parametrize(
    "name",
    ["cos_structure", "deep_eyes", "exact_answer", "format", "key_step_match", "lav_cot", "math_answer",
     "multiple_choice", "repeated_steps", "shapes_answer", "step_rar", "step_rvr", "video_answer", "video_com"],
)  # fmt: skip
def test_an_output_that_is_no_text_costs_itself_alone_in_every_built_in_reward(name):
    reference = {"answer": "A", "key_steps": ["x"], "solution": "x"}
    outputs = [5 if i == 3 else "<think>x</think> answer: A" for i in range(8)]
    batch = [Sample(Prompt(f"p{i}", {"question": "q"}, reference), output, i) for i, output in enumerate(outputs)]
    scored = score(batch, {name: (build("rewards", "rewards.0", name, {}), 1.0)})
    assert scored.total.isnan().nonzero().flatten().tolist() == [3]


def test_a_reward_that_compares_samples_is_never_asked_about_one_alone():
    batch = [Sample(Prompt(f"p{i % 3}", {}), "x", i) for i in range(9)]
    reward, calls = raises_for(("p1", 4))

    class Comparing:
        compares_samples = True

        def __call__(self, samples):
            return reward(samples)

    scored = score(batch, {"r": (Comparing(), 1.0)}, max_unscored=0.5)
    assert scored.total.isnan().nonzero().flatten().tolist() == [1, 4, 7] and min(calls) == 3


@pytest.mark.parametrize(
    "answer, message",
    [
        ({"a": 1.0, "b": 2.0}, "it returned a dict"),
        ("01", "it returned a str, 01"),
        (b"ab", "it returned a bytes"),
        ((x for x in (1.0, 2.0)), "it returned a generator"),
        (3.0, "it returned a float"),
        (["0.5", 1.0], "sample 0 got '0.5', which is no number"),
        ({1.0, 2.0}, "it returned a set"),
        ({"a": 1.0, "b": 2.0}.values(), "it returned a dict_values"),
        (bytearray(b"ab"), "it returned a bytearray"),
        (memoryview(b"ab"), "it returned a memoryview"),
        (range(2), "it returned a range"),
        (np.float64(3.0), r"it returned a float64 of shape \(\)"),
        (np.zeros((2, 1)), r"it returned a ndarray of shape \(2, 1\)"),
        (torch.zeros(2, 1), r"it returned a Tensor of shape \(2, 1\)"),
        (torch.tensor(1.0), r"it returned a Tensor of shape \(\)"),
        (np.array(["0", "1"]), "sample 0 got '0', which is no number"),
        ([b"1", b"0"], "sample 0 got .*which is no number"),
        ([1.0, 10**400], "sample 1 got '1000.*which is no number"),
        ([1.0, 10**5000], "sample 1 got 'a int', which is no number"),
        ([1.0, 1j], "sample 1 got '1j', which is no number"),
        ([1.0, {}], "sample 1 got '{}', which is no number"),
        ([[1.0, 2.0], 1.0], "sample 0 got"),
        ([[1.0], [2.0]], "sample 0 got"),
        ([np.ones(1), np.ones(1)], "sample 0 got"),
        ([1e308, 1.0], r"sample 0 \(prompt 'p0'\) is 1e\+308, beyond 1e\+15"),
        ([1.0, -1e16], r"sample 1 \(prompt 'p1'\) is -1e\+16"),
        (np.zeros(3), "returned 3 values for 2 samples"),
        ([], "returned 0 values for 2 samples"),
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["in_process", "isolated"])
def test_what_is_no_list_of_numbers_is_refused(answer, message, apart, answering):
    reward = answering(answer) if apart else lambda batch: answer
    with pytest.raises(RewardError, match=f"reward '(r|stated)':? {message}"):
        score(samples(2), {"r": (reward, 1.0)})


@pytest.mark.parametrize(
    "answer",
    [
        [1.0, 0],
        (True, 1),
        torch.tensor([1.0, 0.0]),
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.bfloat16),
        np.array([1, 0]),
        np.ones(2, np.float16),
        np.array([1.0, None]),
        array("d", [1, 0]),
        pd.Series([1.0, 0.0], index=["b", "a"]),
        [torch.tensor(1.0), None],
        [np.float32(1), np.bool_(True)],
        [Fraction(1), Decimal(1)],
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["in_process", "isolated"])
def test_lists_tuples_arrays_and_tensors_are_read(answer, apart, answering):
    reward = answering(answer) if apart else lambda batch: answer
    assert score(samples(2), {"r": (reward, 1.0)}, max_unscored=0.5).parts["r"][0] == 1.0
