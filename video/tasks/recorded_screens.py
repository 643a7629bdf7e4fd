"""Task `recorded_screens`: the actions of an expert on the screens of recorded trajectories, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl.rollout import Prompt, Sample
from video.formats.ui_s1 import Trajectory, read_trajectories, step_prompts
from video.rewards.recorded import Agreement, agreement, written_action


class RecordedScreens:
    """Every step of every trajectory is a prompt: the goal, what was done before, and the screen. Its own policy is
    `vision`; what follows from another action than the expert's is never seen (offline; UI-S1's semi-online replay is
    not here).

    Args:
        train, eval: files of UI-S1's format. media_root: folder that screenshots are relative to, and may not leave.
        max_bad: share of bad rows of a file, in [0, 1], above which loading fails. limit: trajectories to take.
    Raises:
        ValueError: no file, no usable row, or too many bad rows (the first ones are named).
    """

    rewards = ("screen_action",)

    def __init__(
        self, train: str, eval: str, media_root: str = ".", max_bad: float = 0.05, limit: int | None = None
    ) -> None:
        trajectories, bad = read_trajectories(train, media_root=media_root, max_bad=max_bad, limit=limit)
        eval_trajectories, bad_eval = read_trajectories(eval, media_root=media_root, max_bad=max_bad, limit=limit)
        self.prompts = _prompts(trajectories)
        self.eval_prompts = _prompts(eval_trajectories)
        self.quarantined = bad + bad_eval

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """action_exact and action_type: shares of actions as the expert's, and of the same type at least."""
        levels = [_agreement(sample) for sample in samples]
        num_exact = levels.count("exact")
        num_same_type = num_exact + levels.count("type")
        return {"action_exact": num_exact / len(levels), "action_type": num_same_type / len(levels)}


def _prompts(trajectories: Sequence[Trajectory]) -> list[Prompt]:
    prompts: list[Prompt] = []
    for trajectory in trajectories:
        prompts += step_prompts(trajectory)
    return prompts


def _agreement(sample: Sample) -> Agreement:
    reference = sample.prompt.reference
    return agreement(written_action(sample.output), reference["expert"], reference["boxes"])
