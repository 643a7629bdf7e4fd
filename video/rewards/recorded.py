"""Rewards of actions beside those an expert took on the same screen: UI-S1's step reward, Mobile-R1's second stage.

action = written_action('<answer>{"action": "click", "coordinate": [500, 250]}</answer>')
agreement(action, {"action": "click", "coordinate": [0.5, 0.25]})   # "exact"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmrl.registry import declares
from mmrl.rollout import Prompt, Sample
from video.rewards.answers import video_reference
from video.rewards.turns import last_answer, turns_of
from vision import Box, is_think_answer

Agreement = Literal["exact", "type", "readable", "none"]

ACTION_SCORES: dict[Agreement, float] = {"exact": 1.0, "type": 0.5, "readable": 0.1, "none": 0.0}


def point_hits(
    point: Sequence[float], boxes: Sequence[Box], target: Sequence[float] | None, *, enlarge: float, near: float
) -> bool:
    """The point lies in a box enlarged about its centre, or within `near` of the target; in shares of the screen."""
    if any(_lies_in(point, box, enlarge) for box in boxes):
        return True
    if target is None or near <= 0:
        return False
    return ((point[0] - target[0]) ** 2 + (point[1] - target[1]) ** 2) <= near**2


def _lies_in(point: Sequence[float], box: Box, enlarge: float) -> bool:
    for axis in (0, 1):
        low, high = box[axis], box[axis + 2]
        # with `not`, since a NaN, which JSON may hold, lies nowhere
        if not abs(point[axis] - (low + high) / 2) <= (high - low) / 2 * enlarge:
            return False
    return True


def agreement(
    action: Mapping[str, Any] | None,
    target: Mapping[str, Any],
    boxes: Sequence[Box] = (),
    *,
    enlarge: float = 1.2,
    near: float = 0.04,
) -> Agreement:
    """The level at which an action (None: unreadable) agrees with the recorded one.

    exact: same type, its `coordinate` hits (see `point_hits`), every other argument of the target is equal (texts
    without outer space, case aside). type: the type alone. readable: another type.
    """
    if action is None:
        return "none"
    if action.get("action") != target.get("action"):
        return "readable"
    # arguments that the target does not have may be anything
    for key, right_value in target.items():
        value = action.get(key)
        if key == "coordinate":
            if value is None or not point_hits(value, boxes, right_value, enlarge=enlarge, near=near):
                return "type"
        elif _normalised(value) != _normalised(right_value):
            return "type"
    return "exact"


def _normalised(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def written_action(text: str, scale: float = 1000.0) -> dict[str, Any] | None:
    """The action in `<answer>{"action": ..., "coordinate": [x, y]}</answer>`, points divided by `scale`; None where no
    such object can be read."""
    try:
        action = json.loads(last_answer([text], "tags") or "")
    except (ValueError, RecursionError):
        return None
    if not isinstance(action, dict) or not isinstance(action.get("action"), str):
        return None
    point = action.get("coordinate")
    if point is None:
        return action
    # by `type`, since a boolean is an int to `isinstance`
    if not isinstance(point, list) or len(point) != 2 or not all(type(value) in (int, float) for value in point):
        return None
    action["coordinate"] = [value / scale for value in point]
    return action


@declares(reads=("texts",))
@dataclass(frozen=True)
class ScreenAction:
    """The reward of one action on a recorded screen, written as `<think>..</think><answer>{JSON}</answer>`.

    Args:
        style: ui_s1: 0.1 format + 0.9 action, action 1 (exact), 0.5 (right type), 0.1 (readable), 0; points count in
            boxes enlarged by 1.2 and within 0.04 of the expert's. mobile_r1: [action exact] + [format], in {0, 1, 2};
            points count in the box alone, where there is one.
        scale: written coordinates per side of the screen; 1000 for thousandths, 1 for shares.
    """

    style: Literal["ui_s1", "mobile_r1"] = "ui_s1"
    scale: float = 1000.0

    def __call__(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample, None where the reference holds no expert's action."""
        return [self._score(s.prompt, turns_of(s)[-1]) for s in samples]

    def _score(self, prompt: Prompt, text: str) -> float | None:
        reference = video_reference(prompt)
        if "expert" not in reference:
            return None
        boxes = reference.get("boxes") or ()
        # Mobile-R1 has no tolerance; a touch without a box could then only be right by the exact same numbers
        tolerance = {"enlarge": 1.0, "near": 0.0} if self.style == "mobile_r1" and boxes else {}
        level = agreement(written_action(text, self.scale), reference["expert"], boxes, **tolerance)
        well_formed = float(is_think_answer(text))
        if self.style == "mobile_r1":
            return float(level == "exact") + well_formed
        return 0.1 * well_formed + 0.9 * ACTION_SCORES[level]
