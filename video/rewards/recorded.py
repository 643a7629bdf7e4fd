"""Rewards for agents that are trained on recorded trajectories or in a simulator: UI-S1, Mobile-R1, SeeNav.

Actions are mappings with `action` (the type), `coordinate` (x, y in unit floats) and further arguments. All functions
are pure; the returns and advantages over a tree are `mmrl.credit`'s estimators `ui_s1` and `srgpo`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
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


def navigation_step(before: float, after: float, *, appeared: bool = False, valid: bool = True) -> float:
    """1 when the distance to the goal shrank by more than 0.01 or the target became visible, else 0 (SeeNav-Agent).

    An invalid action costs 0.1: the result is -0.1, 0, or 1.

    Args:
        before, after: distance to the goal, in the simulator's unit.
        appeared: the target is visible now and was not before.
    """
    if not valid:
        return -0.1
    return float(before - after > 0.01 or appeared)


# ---- semi-online trajectories (UI-S1) -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SemiOnline:
    """history: per step that was acted on, whose action the history goes on with; `stop` ends the trajectory.

    The policy's own response and reward stay in the batch for every step of `history`, an expert's step included.
    """

    history: tuple[Literal["policy", "expert", "stop"], ...]

    @property
    def complete(self) -> bool:
        """Every step of the recorded trajectory was acted on and could be gone on from."""
        return "stop" not in self.history


def patched(errors: int, threshold: int) -> bool:
    """Whether a mismatch is patched by the recorded action, after `errors` earlier ones (UI-S1's patch module).

    threshold: most patches of a trajectory; 0 stops at the first mismatch, -1 never (their script: 2).
    """
    if threshold < -1:
        raise ValueError(f"patch threshold {threshold}: -1 (unlimited), 0 (stop at once) or a number of patches")
    return threshold == -1 or errors < threshold


def semi_online(matches: Sequence[bool], threshold: int = 2) -> SemiOnline:
    """Which history a recorded trajectory continues with, given whether the policy's action matched at each step.

    A match goes on with the policy's action, a patched mismatch with the expert's; the first mismatch that is not
    patched is the last step.
    """
    history: list[Literal["policy", "expert", "stop"]] = []
    errors = 0
    for match in matches:
        if match:
            history.append("policy")
        elif patched(errors, threshold):
            history.append("expert")
            errors += 1
        else:
            return SemiOnline((*history, "stop"))
    return SemiOnline(tuple(history))


def cut_returns(rewards: Sequence[float], matches: Sequence[bool], gamma: float = 0.5) -> list[float]:
    """G_t = r_t + gamma G_(t+1) where step t matched, else r_t and the running sum starts anew (UI-S1).

    For recorded lists, before there is a tree; on a tree the estimator `ui_s1` takes these returns itself.
    """
    out: list[float] = []
    running = 0.0
    for reward, match in zip(reversed(rewards), reversed(matches), strict=True):
        out.append(reward + gamma * running if match else reward)
        running = out[-1] if match else 0.0
    return out[::-1]


def group_is_kept(first_returns: Sequence[float], least: float = 0.3) -> bool:
    """Whether the returns G_0 of a task's rollouts differ enough: their std (ddof 1) is above `least` (UI-S1)."""
    return len(first_returns) > 1 and stdev(first_returns) > least


def semi_online_metrics(trajectories: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Success and progress with the model's own history: each trajectory, one truth value per step of the expert,
    counts up to its first miss (UI-S1). success: share without a miss. progress: mean share of steps done.

    Raises:
        ValueError: no trajectories, or an empty one.
    """
    if not trajectories or not all(trajectories):
        raise ValueError("semi-online metrics need at least one trajectory, and a step in each")
    shares = [(list(t).index(False) if False in t else len(t)) / len(t) for t in trajectories]
    return {
        "semi_online_success": sum(s == 1 for s in shares) / len(shares),
        "semi_online_progress": sum(shares) / len(shares),
    }
