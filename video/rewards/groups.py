"""Rewards that look at the group: the contrast with shuffled frames (T-GRPO) and curiosity (Pixel-Reasoner)."""

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
    if not accuracy or not shuffled:
        return [0.0] * len(accuracy)
    passed = sum(accuracy) / len(accuracy) >= ratio * sum(shuffled) / len(shuffled)
    return [bonus if passed and a > above else 0.0 for a in accuracy]


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
        return [
            Prompt(f"{p.id}/shuffled", {**p.inputs, "shuffled": True, "twin_of": p.id}, p.reference)
            for p in prompts
            if p.inputs.get("videos")
        ]

    def __call__(self, samples: Sequence[Sample], controls: Sequence[Sample] = ()) -> list[float | None]:
        """One number per sample, None where the reference holds no answer. controls: samples of the twins."""
        answer = VideoAnswer(self.syntax)
        shuffled: dict[str, list[float]] = {}
        for twin, a in zip(controls, answer(controls), strict=True):
            if a is not None:
                shuffled.setdefault(str(twin.prompt.inputs["twin_of"]), []).append(a)
        accuracy = answer(samples)
        out = [None if a is None else a + (f or 0.0) for a, f in zip(accuracy, VideoFormat()(samples), strict=True)]
        for own, members in _by_prompt(samples).items():
            scored = [(i, a) for i in members if (a := accuracy[i]) is not None]
            given = temporal_bonus(
                [a for _, a in scored], shuffled.get(own, []), ratio=self.ratio, bonus=self.bonus, above=self.above
            )
            for (i, _), extra in zip(scored, given, strict=True):
                out[i] = (out[i] or 0.0) + extra
        return out


def _by_prompt(samples: Sequence[Sample]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, s in enumerate(samples):
        groups.setdefault(s.prompt.id, []).append(i)
    return groups


# ---- curiosity ------------------------------------------------------------------------------------------------------


def curiosity(calls: Sequence[int], *, z: float = 1.5) -> list[float]:
    """0.25 max(0.3 - u, 0) / (z u) - 0.05 (k - 1) for each response with k >= 1 calls, 0 without one (Pixel-Reasoner).

    Args:
        calls: k of each response of one group; u is the share of them with k >= 1.
        z: 1.5 for videos, 2.0 for pictures.
    """
    u = sum(k > 0 for k in calls) / max(1, len(calls))
    return [0.25 * max(0.3 - u, 0.0) / (z * u) - 0.05 * (k - 1) if k else 0.0 for k in calls]


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
        out: list[float | None] = [None] * len(samples)
        for members in _by_prompt(samples).values():
            calls = [count_calls(turns_of(samples[i], self.syntax), self.syntax) for i in members]
            for i, value in zip(members, curiosity(calls, z=self.z), strict=True):
                out[i] = value
        return out
