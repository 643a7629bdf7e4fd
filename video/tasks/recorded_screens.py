"""Task `recorded_screens`: what an expert did on each screen of recorded trajectories, one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from mmrl.rollout import Prompt, Sample
from video.formats.ui_s1 import read_trajectories, step_prompts
from video.rewards.recorded import agreement, written_action


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
        loaded = [read_trajectories(f, media_root=media_root, max_bad=max_bad, limit=limit) for f in (train, eval)]
        self.prompts, self.eval_prompts = ([p for t in found for p in step_prompts(t)] for found, _ in loaded)
        self.quarantined = [bad for _, own in loaded for bad in own]

    def judges(self, samples: Sequence[Sample]) -> dict[str, float]:
        """action_exact and action_type: shares of actions as the expert's, and of the same type at least."""
        found = [self._agreement(s.prompt, s.output) for s in samples]
        exact = sum(how == "exact" for how in found)
        return {
            "action_exact": exact / len(found), "action_type": (exact + sum(h == "type" for h in found)) / len(found),
        }  # fmt: skip

    @staticmethod
    def _agreement(prompt: Prompt, text: str) -> str:
        reference = prompt.reference
        return agreement(written_action(text), reference["expert"], reference["boxes"])
