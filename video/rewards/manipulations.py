"""Rewards on manipulations: Video-CoM's as published, F1 against the reference, and one number per step.

A call *hits* an item of the reference (`Hits`). From the hits follow

    videocom_score   right calls / calls, one number per response (precision alone)
    f1_score         the mean of the kinds' F1, one number per response
    step_values      one number per turn, for credit step by step

and the rewards `Manipulations` (per step) and `VideoComReward` (per response) that recipes name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mmrl.registry import declares
from mmrl.rollout import Prompt, Rollout, Sample
from video.rewards.answers import graded
from video.rewards.calls import KINDS, READING, Call, Kind, Reading, Truth, TurnCalls, all_calls
from video.rewards.turns import last_answer, turns_of

Mode = Literal["videocom", "f1"]


@dataclass(frozen=True)
class Hits:
    """When a call hits an item of the reference: IoU >= `iou_threshold` for boxes, >= `time_threshold` for seconds.

    A segment hits by its id and a frame by lying in a range.
    """

    iou_threshold: float = 0.35
    time_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("iou_threshold", "time_threshold"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"manipulations: {name}={getattr(self, name)} must lie in (0, 1]")

    def items(self, call: Call, truth: Truth) -> dict[int, float]:
        """Item -> overlap, of the items that the call hits."""
        threshold = {"segment": self.time_threshold, "frame": 1.0, "box": self.iou_threshold}[call.kind]
        return {item: overlap for item, overlap in truth.overlaps(call).items() if overlap >= threshold}


HITS = Hits()


# ---- all calls of a response ----------------------------------------------------------------------------------------


def videocom_counts(calls: Sequence[Call], truth: Truth, hits: Hits = HITS) -> dict[Kind, tuple[int, int]]:
    """Kind -> (right, predicted) as published by Video-CoM, (0, 0) for kinds without ground truth.

    Segments and frames count once however often they are named, boxes every time; a box on a frame that has none in
    the reference counts neither way.
    """
    truth = truth.beside(calls)
    frames_with_boxes = {frame for frame, _ in truth.boxes}
    counts: dict[Kind, tuple[int, int]] = {}
    for kind in KINDS:
        counted = [call for call in calls if call.kind == kind and truth.count(kind)]
        if kind == "box":
            counted = [call for call in counted if call.frame in frames_with_boxes]
        else:
            counted = list(dict.fromkeys(counted))
        right = [call for call in counted if hits.items(call, truth)]
        counts[kind] = (len(right), len(counted))
    return counts


def videocom_score(calls: Sequence[Call], truth: Truth, hits: Hits = HITS) -> float:
    """Right calls / counted calls over all kinds, in [0, 1], 0 without any (Video-CoM, RA-GRPO's step reward).

    Precision only: one right call gives 1, what is missing costs nothing.
    """
    counts = videocom_counts(calls, truth, hits).values()
    right = sum(kind_right for kind_right, _ in counts)
    predicted = sum(kind_predicted for _, kind_predicted in counts)
    return right / predicted if predicted else 0.0


@dataclass(frozen=True)
class Match:
    """precision: share of the different calls of a kind that hit. recall: share of its items that were hit."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Harmonic mean, 0 when nothing was hit."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def match_kinds(calls: Sequence[Call], truth: Truth, hits: Hits = HITS) -> dict[Kind, Match]:
    """Kind -> precision and recall, for the kinds that have ground truth; repeated calls count once (as defined here).

    No call of a kind is precision 0. A box on a frame without one in the reference is wrong.
    """
    truth = truth.beside(calls)
    # without repeats, in order: naming a right item twice is no second hit
    different_calls = list(dict.fromkeys(calls))
    matches: dict[Kind, Match] = {}
    for kind in KINDS:
        if not truth.count(kind):
            continue
        hit_items: set[int] = set()
        num_calls = num_right = 0
        for call in different_calls:
            if call.kind == kind:
                items = hits.items(call, truth)
                hit_items |= items.keys()
                num_calls += 1
                num_right += bool(items)
        matches[kind] = Match(num_right / max(1, num_calls), len(hit_items) / truth.count(kind))
    return matches


def f1_score(
    calls: Sequence[Call], truth: Truth, hits: Hits = HITS, weights: Mapping[str, float] | None = None
) -> float:
    """Mean F1 over the kinds that have ground truth, by `weights` (kind -> >= 0, 1 where it names none), in [0, 1].

    0 when the kinds with ground truth have no weight.
    """
    matches = match_kinds(calls, truth, hits)
    weight = {kind: (weights or {}).get(kind, 1.0) for kind in matches}
    total = sum(weight.values())
    if not total:
        return 0.0
    return sum(weight[kind] * match.f1 for kind, match in matches.items()) / total


def count_repeats(calls: Sequence[Call]) -> int:
    """The number of calls that ask for a look that an earlier one asked for."""
    return sum(_is_repeat(call, calls[:i]) for i, call in enumerate(calls))


def _is_repeat(call: Call, earlier: Sequence[Call]) -> bool:
    return any(call.repeats(other) for other in earlier)


# ---- one number per turn --------------------------------------------------------------------------------------------


def step_values(
    turns: Sequence[TurnCalls],
    truth: Truth,
    hits: Hits = HITS,
    *,
    mode: Mode = "f1",
    overlap: bool = False,
    repeat_penalty: float = 0.0,
    error_penalty: float = 0.0,
) -> list[float]:
    """r_k of each turn: the mean over its calls, NaN for a turn without an opinion (as defined here).

    A call that hits is worth 1 (with `overlap` its best IoU), one that does not 0; a repeat -repeat_penalty; a refused
    turn as a whole -error_penalty, or -repeat_penalty where the environment refused it as a duplicate. No opinion: an
    answer, a call of a kind without ground truth, and with `videocom` a box on a frame that has none.
    """
    truth = truth.beside(all_calls(turns))
    frames_with_boxes = {frame for frame, _ in truth.boxes}
    earlier: list[Call] = []
    values = []
    for turn in turns:
        call_values = []
        for call in turn.calls:
            is_uncounted_box = mode == "videocom" and call.kind == "box" and call.frame not in frames_with_boxes
            if truth.count(call.kind) and not is_uncounted_box:
                worth = _worth(hits.items(call, truth), overlap)
                call_values.append(-repeat_penalty if _is_repeat(call, earlier) else worth)
            # calls of refused turns and of other kinds too: asking for them again is a repeat
            earlier.append(call)
        if turn.problem is not None:
            call_values = [-repeat_penalty if turn.problem == "duplicate_action" else -error_penalty]
        # + 0.0 makes 0.0 of -0.0, which a penalty of 0 gives
        values.append(sum(call_values) / len(call_values) + 0.0 if call_values else math.nan)
    return values


def _worth(overlaps: Mapping[int, float], is_graded: bool) -> float:
    """The value of a call by the items that it hits: its best overlap if graded, else 1 for any."""
    if is_graded:
        return max(overlaps.values(), default=0.0)
    return float(bool(overlaps))


# ---- rewards --------------------------------------------------------------------------------------------------------


@declares(reads=("texts",))
@dataclass(frozen=True)
class Manipulations(Reading, Hits):
    """Step reward r_k of each turn's manipulations, see `step_values`, given the turns before it on its path.

    Args, beside those of `Reading` and `Hits`:
        mode: f1, or videocom, which has no opinion on boxes whose frame has none in the reference.
        overlap: count the IoU of a hit instead of 1.
        repeat_penalty, error_penalty: >= 0.
    """

    mode: Mode = "f1"
    overlap: bool = False
    repeat_penalty: float = 0.0
    error_penalty: float = 0.0

    def __post_init__(self) -> None:
        Hits.__post_init__(self)
        _refuse_negative(repeat_penalty=self.repeat_penalty, error_penalty=self.error_penalty)

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN for answers and for prompts whose reference names no manipulations."""
        return last_of_paths(self, rollout, self._values)

    def _values(self, turns: Sequence[TurnCalls], truth: Truth) -> list[float]:
        return step_values(
            turns,
            truth,
            self,
            mode=self.mode,
            overlap=self.overlap,
            repeat_penalty=self.repeat_penalty,
            error_penalty=self.error_penalty,
        )


def last_of_paths(
    reading: Reading, rollout: Rollout, values: Callable[[Sequence[TurnCalls], Truth], Sequence[float]]
) -> Tensor:
    """(N,) float64: the last number that `values` gives for the path to each step; NaN without ground truth."""
    truths = [reading.truth(prompt) for prompt in rollout.prompts]
    rewards = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
    paths = reading.paths(rollout)
    for step, group in enumerate(rollout.tree.group.tolist()):
        path, truth = paths[step], truths[group]
        if path is not None and truth is not None:
            rewards[step] = values(path, truth)[-1]
    return rewards


@declares(reads=("texts",))
@dataclass(frozen=True)
class VideoComReward(Reading, Hits):
    """Answer + manipulations, R in [0, 2]: RA-GRPO's reward as published (`videocom`) or with F1 in its place.

    R = answer score + step score - repeat_penalty * repeated calls. The calls of the whole response count, whether
    the environment carried them out or not. A reference without manipulations leaves the answer alone.

    Args, beside those of `Reading` and `Hits`:
        mode: see `videocom_score` and `f1_score`.
        gate: answer = the step score counts only when the answer's score is at least 0.5.
        weights: of the kinds segment, frame, box in F1.
        repeat_penalty: >= 0 per repeated call.
    """

    mode: Mode = "videocom"
    gate: Literal["none", "answer"] = "none"
    weights: dict[str, float] = field(default_factory=dict)
    repeat_penalty: float = 0.0

    def __post_init__(self) -> None:
        Hits.__post_init__(self)
        _refuse_negative(repeat_penalty=self.repeat_penalty, **self.weights)
        unknown = set(self.weights) - set(KINDS)
        if unknown:
            raise ValueError(f"video_com: weights name {sorted(unknown)}; the kinds are {', '.join(KINDS)}")

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference holds no answer."""
        return [self._score(s.prompt, turns_of(s, self.syntax)) for s in samples]

    def _score(self, prompt: Prompt, turns: Sequence[str]) -> float | None:
        answer = graded(prompt, last_answer(turns, self.syntax))
        truth = self.truth(prompt)
        if answer is None or truth is None or (self.gate == "answer" and answer < 0.5):
            return answer
        # as published: what is written counts, whether or not it was carried out
        calls = all_calls(self.replay(prompt, turns))
        if self.mode == "videocom":
            score = videocom_score(calls, truth, self)
        else:
            score = f1_score(calls, truth, self, self.weights)
        return answer + score - self.repeat_penalty * count_repeats(calls)


def manipulation_f1(samples: Sequence[Sample], reading: Reading = READING, hits: Hits = HITS) -> dict[str, float]:
    """Means over the samples with ground truth, for a task's metrics: `manipulation_f1`, and per kind precision and
    recall; a kind that no reference has is left out."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        truth = reading.truth(sample.prompt)
        # a task may mix questions with and without labels
        if truth is None:
            continue
        turns = reading.replay(sample.prompt, turns_of(sample, reading.syntax))
        matches = match_kinds(all_calls(turns), truth, hits)
        mean_f1 = sum(match.f1 for match in matches.values()) / len(matches)
        values.setdefault("manipulation_f1", []).append(mean_f1)
        for kind, match in matches.items():
            values.setdefault(f"{kind}_precision", []).append(match.precision)
            values.setdefault(f"{kind}_recall", []).append(match.recall)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _refuse_negative(**options: float) -> None:
    for name, value in options.items():
        if value < 0:
            raise ValueError(f"manipulations: {name}={value} must be at least 0")
