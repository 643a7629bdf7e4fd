"""Rewards for agents that are trained on recorded trajectories or in a simulator: UI-S1, Mobile-R1, SeeNav.

Actions are mappings with `action` (the type), `coordinate` (x, y in unit floats) and further arguments. All functions
are pure; the returns and advantages over a tree are `mmrl.credit`'s estimators `ui_s1` and `srgpo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vision.rewards import Box

Agreement = Literal["exact", "type", "readable", "none"]

ACTION_SCORES: dict[Agreement, float] = {"exact": 1.0, "type": 0.5, "readable": 0.1, "none": 0.0}


# ---- one step -------------------------------------------------------------------------------------------------------


def point_hits(
    point: Sequence[float],
    *,
    box: Box | None = None,
    target: Sequence[float] | None = None,
    enlarge: float = 1.2,
    near: float = 0.04,
) -> bool:
    """The point lies in the box enlarged about its centre, or within `near` of the target point (UI-S1); unit floats.

    `enlarge=1, near=0` is the plain click in the box of Mobile-R1.
    """
    if box is not None:
        sides = [(abs(point[k] - (box[k] + box[k + 2]) / 2), (box[k + 2] - box[k]) / 2 * enlarge) for k in (0, 1)]
        if all(away <= half for away, half in sides):
            return True
    return target is not None and near > 0 and ((point[0] - target[0]) ** 2 + (point[1] - target[1]) ** 2) <= near**2


def agreement(
    action: Mapping[str, Any] | None,
    target: Mapping[str, Any],
    *,
    box: Box | None = None,
    enlarge: float = 1.2,
    near: float = 0.04,
) -> Agreement:
    """How far an action (None: unreadable) agrees with the recorded one.

    exact: same type, its `coordinate` hits (see `point_hits`), every other argument of the target is equal (texts
    without outer space, case aside). type: the type alone. readable: another type.
    """
    if action is None:
        return "none"
    if action.get("action") != target.get("action"):
        return "readable"
    for key, want in target.items():
        given = action.get(key)
        if key == "coordinate":
            if given is None or not point_hits(given, box=box, target=want, enlarge=enlarge, near=near):
                return "type"
        elif _plain(given) != _plain(want):
            return "type"
    return "exact"


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value.strip().lower()
    return list(value) if isinstance(value, tuple) else value


def ui_s1_step(how: Agreement, *, well_formed: bool) -> float:
    """0.1 format + 0.9 action, action 1 (exact), 0.5 (right type), 0.1 (readable), 0 (UI-S1), in [0, 1]."""
    return 0.1 * float(well_formed) + 0.9 * ACTION_SCORES[how]


def mobile_r1(how: Agreement, *, well_formed: bool) -> float:
    """[action right] + [format right], in {0, 1, 2} (Mobile-R1, stage 2).

    Take `how` from `agreement(.., enlarge=1, near=0)`. Stages 1 and 3 are an SFT and an outcome recipe of their own.
    """
    return float(how == "exact") + float(well_formed)
