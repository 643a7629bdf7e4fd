"""Rewards that look at the group: the contrast with shuffled frames (T-GRPO) and curiosity (Pixel-Reasoner).

temporal_bonus([1.0, 0.0], [0.5])   # [0.3, 0.0]: 0.5 in the mean is at least 0.8 of 0.5
curiosity([1, 0, 0, 0])             # [0.033.., 0, 0, 0]: a quarter of the responses called a tool
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mmrl.registry import declares
from mmrl.rollout import Prompt, Sample
from video.acting.actions import Syntax
from video.rewards.answers import VideoAnswer, VideoFormat
from video.rewards.turns import count_calls, turns_of

# ---- T-GRPO ---------------------------------------------------------------------------------------------------------


def temporal_bonus(
    accuracy: Sequence[float], shuffled: Sequence[float], *, ratio: float = 0.8, bonus: float = 0.3, above: float = 0.1
) -> list[float]:
    """`bonus` for each response with accuracy > `above`, if the ordered frames' mean accuracy is at least `ratio`
    times that of the shuffled ones; else 0 for all (T-GRPO, Video-R1).

    Args:
        accuracy: of the responses on ordered frames, in [0, 1]. shuffled: of those on frames in random order; none
            (a picture) gives no bonus.
    """
    # without a twin nothing is known of the order
    if not accuracy or not shuffled:
        return [0.0] * len(accuracy)
    order_helps = sum(accuracy) / len(accuracy) >= ratio * sum(shuffled) / len(shuffled)
    return [bonus if order_helps and score > above else 0.0 for score in accuracy]


@declares(reads=("texts",))
@dataclass(frozen=True)
class TemporalContrast:
    """T-GRPO's whole reward without its length bonus: answer + format + 0.3 where order helps, in [0, 2.3].

    In training every prompt with a clip has a twin, the same question on its frames in random order (inputs
    `shuffled: true`, `twin_of: <id>`), which a policy samples half as often (`mmrl.capabilities.ContrastReward`).
    Twins lend their accuracy and nothing else. Without twins (pictures, evaluation) there is no bonus. The answer and
    format are part of this reward: name no other ones for them. T-GRPO's bonus for length is not here: samples have no
    token counts.

    Args:
        syntax: how answers are written, see `VideoAnswer`. ratio, bonus, above: see `temporal_bonus`.
    """

    compares_samples = True

    syntax: Literal["tags", "videocom", "tool_call"] = "tags"
    ratio: float = 0.8
    bonus: float = 0.3
    above: float = 0.1

    def controls(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The twins of those prompts that have a clip."""
        twins = []
        for prompt in prompts:
            if prompt.inputs.get("videos"):
                inputs = {**prompt.inputs, "shuffled": True, "twin_of": prompt.id}
                twins.append(Prompt(f"{prompt.id}/shuffled", inputs, prompt.reference))
        return twins

    def __call__(self, samples: Sequence[Sample], controls: Sequence[Sample] = ()) -> list[float | None]:
        """One number per sample, None where the reference holds no answer. controls: samples of the twins."""
        score_answers = VideoAnswer(self.syntax)
        # id of a prompt -> accuracies of its twin, which lends nothing else
        shuffled: dict[str, list[float]] = {}
        for twin, score in zip(controls, score_answers(controls), strict=True):
            if score is not None:
                shuffled.setdefault(str(twin.prompt.inputs["twin_of"]), []).append(score)
        accuracy = score_answers(samples)
        well_formed = VideoFormat()(samples)
        rewards: list[float | None] = [None] * len(samples)
        for prompt_id, members in _by_prompt(samples).items():
            scores: dict[int, float] = {}
            for i in members:
                score = accuracy[i]
                if score is not None:
                    scores[i] = score
            bonuses = temporal_bonus(
                list(scores.values()),
                shuffled.get(prompt_id, []),
                ratio=self.ratio,
                bonus=self.bonus,
                above=self.above,
            )
            for (i, score), bonus in zip(scores.items(), bonuses, strict=True):
                rewards[i] = score + (well_formed[i] or 0.0) + bonus
        return rewards


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Id of a prompt -> the positions of its samples."""
    groups: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.prompt.id, []).append(i)
    return groups


# ---- curiosity ------------------------------------------------------------------------------------------------------


def curiosity(calls: Sequence[int], *, z: float = 1.5) -> list[float]:
    """0.25 max(0.3 - u, 0) / (z u) - 0.05 (k - 1) for each response with k >= 1 calls, 0 without one (Pixel-Reasoner).

    Args:
        calls: k of each response of one group; u is the share of them with k >= 1.
        z: 1.5 for videos, 2.0 for pictures.
    """
    share = sum(count > 0 for count in calls) / max(1, len(calls))
    # curious while fewer than 0.3 of the group call a tool, and ever less as more do; each further call costs 0.05
    values = []
    for count in calls:
        values.append(0.25 * max(0.3 - share, 0.0) / (z * share) - 0.05 * (count - 1) if count else 0.0)
    return values


@declares(reads=("texts",))
@dataclass(frozen=True)
class Curiosity:
    """`curiosity` of each response among those to the same prompt; given whether or not the answer is right.

    Args:
        syntax: how calls are written; every call that can be read counts. z: see `curiosity`.
    """

    compares_samples = True

    syntax: Syntax = "tool_call"
    z: float = 1.5

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample."""
        rewards: list[float | None] = [None] * len(samples)
        for members in _by_prompt(samples).values():
            # the share of callers is that of the group, so it is counted prompt by prompt
            calls = [count_calls(turns_of(samples[i], self.syntax), self.syntax) for i in members]
            for i, value in zip(members, curiosity(calls, z=self.z), strict=True):
                rewards[i] = value
        return rewards
