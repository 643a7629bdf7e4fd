"""Task: prompts for training and evaluation, with the rewards that fit and the judges that no reward may use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from mmrl.components import build
from mmrl.config import Config, RewardConfig
from mmrl.rollout import OutcomeReward, Prompt, Sample


class Task(Protocol):
    """What the trainers need to know of a task. Evaluation prompts have distinct ids, as training prompts do."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]
    rewards: Sequence[str]  # names used when the recipe lists none

    def judges(self, samples: Sequence[Sample]) -> Mapping[str, float]:
        """Numbers that show whether the reward is being hacked: an independent judge, diversity."""


def build_rewards(config: Config, task: Task) -> dict[str, tuple[OutcomeReward, float]]:
    """name -> (reward, weight), from the recipe or the task's default."""
    chosen = config.rewards or [RewardConfig(name=name) for name in task.rewards]
    out: dict[str, tuple[OutcomeReward, float]] = {}
    for i, r in enumerate(chosen):
        if r.name in out:
            raise ValueError(f"rewards.{i}: {r.name!r} is listed twice; give it once with the summed weight")
        out[r.name] = (build("mmrl.rewards", f"rewards.{i}", r.name, r.options), r.weight)
    return out
