"""UI-S1: recorded trajectories of an expert on a phone, one per line.

    {"goal": str, "steps": [{"action_content": {"action": str, "coordinate": [x, y], ..}, "screenshot": path,
     "bbox" | "check_options.candidate_bbox": boxes, "thought": str, "annotation": str}]}

Points and boxes are pixels of the screenshot in the file and shares of it here. What is right to do at a step is in
`check_options` where it is there, else in `action_content`; the target's boxes are read wherever they stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

from mmrl.jsonl import Quarantined, RowError, read_rows
from mmrl.reasoning.pictures import check_image
from mmrl.reasoning.rows import optional_text, rest, rows, text
from mmrl.rollout import Prompt
from video.formats._values import Row, box, media_file, pair, real, typed
from video.records import Box

Point = tuple[float, float]
# keys of an action that are not among the arguments a policy writes
_NO_ARGUMENT = ("action", "coordinate", "coordinate2", "bbox", "candidate_bbox", "thought", "annotation")


@dataclass(frozen=True)
class ExpertStep:
    """One step of an expert: the screen, the action, and the boxes that count as hit.

    screen: path. size: (height, width) of it in pixels. action: its name; args: its other arguments (text, button,
    direction, time, status). point: where it touched; boxes: each a target that counts; shares of the screen, points
    may lie on its edge.
    """

    screen: str
    size: tuple[int, int]
    action: str
    args: Mapping[str, Any] = field(default_factory=dict)
    point: Point | None = None
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """A goal and the steps that an expert took to reach it."""

    id: str
    goal: str
    steps: tuple[ExpertStep, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_trajectories(
    path: str | Path, *, media_root: str | Path | None = None, max_bad: float = 0.05, limit: int | None = None
) -> tuple[list[Trajectory], list[Quarantined]]:
    """Trajectories of a file and the rows set aside. Arguments as `video.formats.read_format`.

    Raises:
        ValueError: no file, no usable row, or too many bad rows.
    """
    root = Path(path).parent if media_root is None else Path(media_root)

    def read_row(row: Row, name: str) -> list[Trajectory]:
        return [trajectory(row, name, root)]

    return read_rows(path, read_row, max_bad=max_bad, key=attrgetter("id"), limit=limit)


def trajectory(row: Row, name: str, root: Path) -> Trajectory:
    """The trajectory of a row; its id is `episode_id`, else `id`, else `name`."""
    steps = rows(row, "steps", dict)
    if not steps:
        raise RowError("no step: 'steps' is empty")
    expert_steps = tuple(_step(step, f"steps[{i}]", root) for i, step in enumerate(steps))
    trajectory_id = optional_text(row, "episode_id", "id") or name
    meta = rest(row, "goal", "steps", "id", "episode_id")
    return Trajectory(trajectory_id, text(row, "goal"), expert_steps, meta)


def step_prompts(recorded: Trajectory) -> list[Prompt]:
    """A prompt per step: the goal, what the expert did before, and the screen it saw then.

    reference: `expert`, the action as a policy is asked to write it, its point in shares of the screen; `boxes` that
    count as hit.
    """
    prompts = []
    history = ""
    for i, step in enumerate(recorded.steps):
        action = {"action": step.action, **step.args}
        expert = dict(action)
        if step.point is not None:
            expert["coordinate"] = list(step.point)
        question = recorded.goal
        if history:
            question += f"\nDone so far:{history}"
        inputs = {"question": question, "images": [step.screen]}
        reference = {"expert": expert, "boxes": [list(box) for box in step.boxes]}
        prompts.append(Prompt(f"{recorded.id}/{i}", inputs, reference))
        # without the point, which belongs to a screen that the policy does not see any more
        history += f"\n{i + 1}. {json.dumps(action, ensure_ascii=False)}"
    return prompts


def _step(row: Row, what: str, root: Path) -> ExpertStep:
    # `check_options` says what is right at a step; without it the recorded action is
    recorded = typed(row, "action_content", dict, None)
    accepted = typed(row, "check_options", dict, recorded)
    if recorded is None or accepted is None:
        raise RowError(f"no action: {what} has no 'action_content'")
    try:
        screen = media_file(text(row, "screenshot"), root, "screenshot")
        width, height = check_image(screen)
        size = (height, width)
        boxes = tuple(_share(corners, what, size) for corners in _boxes(accepted, recorded, row))
        point = _point(accepted.get("coordinate", recorded.get("coordinate")), f"{what}.coordinate", size)
        action = text(accepted, "action")
    except RowError as error:
        raise RowError(f"{error} (in {what})") from None
    return ExpertStep(screen, size, action, rest(accepted, *_NO_ARGUMENT), point, boxes)


def _boxes(*places: Row) -> list[Any]:
    """The first boxes in `candidate_bbox` or `bbox`: a list of boxes, or one box."""
    for place in places:
        for key in ("candidate_bbox", "bbox"):
            value = place.get(key)
            if isinstance(value, list) and value:
                is_list_of_boxes = isinstance(value[0], list)
                return value if is_list_of_boxes else [value]
    return []


def _share(value: Any, what: str, size: tuple[int, int]) -> Box:
    height, width = size
    x1, y1, x2, y2 = box(value, f"{what} box")
    # layout trees know elements that go on beyond the screen; what can be touched is on it
    left, top = max(x1 / width, 0.0), max(y1 / height, 0.0)
    right, bottom = min(x2 / width, 1.0), min(y2 / height, 1.0)
    if left >= right or top >= bottom:
        raise RowError(f"bad box: {what} has {value}, which is empty on a screen of {width} x {height}")
    return left, top, right, bottom


def _point(value: Any, what: str, size: tuple[int, int]) -> Point | None:
    if value is None:
        return None
    height, width = size
    x, y = pair(value, what, real)
    if not (0 <= x <= width and 0 <= y <= height):
        raise RowError(f"bad {what}: {[x, y]} lies outside of the screen of {width} x {height}")
    return x / width, y / height
