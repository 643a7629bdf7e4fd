import pytest
import torch
from tiny import nan_for_first, raising, wrong_length

from mmrl.rewards import RewardError, score
from mmrl.rollout import Prompt, Sample


def samples(count=10):
    return [Sample(Prompt(f"p{i}", {"label": i}), torch.full((1, 2, 2), i / 10), i) for i in range(count)]


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
