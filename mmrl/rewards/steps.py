"""Calling step rewards on a rollout, and `StepView`, a step of text with the steps before it.

Failures are handled as in `mmrl.rewards.scoring`: steps on which a reward raised have NaN, never 0.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.finite import NotFiniteError
from mmrl.rewards.scoring import LARGEST, RewardError, out_of_bounds
from mmrl.rollout import Prompt, Rollout, StepReward

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepView:
    """One step of text in its context. `before` holds the texts of its ancestors, first step first.

    Siblings share one `before` list: read it, do not change it.
    """

    prompt: Prompt
    before: list[str]
    text: str
    is_last: bool


@dataclass(frozen=True)
class ScoredSteps:
    """Scores of N steps.

    parts: name -> (N,) float64 of each reward. seconds: wall time per reward. unscored: steps per reward with NaN.
    failed: message of each reward that raised on every prompt; all its steps are unscored.
    """

    parts: Mapping[str, Tensor]
    seconds: Mapping[str, float]
    unscored: Mapping[str, int]
    failed: Mapping[str, str]


def step_views(rollout: Rollout) -> list[StepView]:
    """A view of every step, in node order.

    Raises:
        ValueError: the policy gave no texts.
    """
    tree = rollout.tree
    if len(rollout.texts) != len(tree):
        raise ValueError(
            f"the rollout has {len(rollout.texts)} texts for {len(tree)} steps; rewards that read steps need a "
            "policy that writes"
        )
    views: list[StepView] = []
    # Step -> the texts before each of its children; -1 stands for the prompt.
    below: dict[int, list[str]] = {-1: []}
    rows = zip(tree.parent.tolist(), tree.group.tolist(), tree.is_leaf.tolist(), rollout.texts, strict=True)
    for i, (parent, group, is_leaf, text) in enumerate(rows):
        before = below[parent]
        views.append(StepView(rollout.prompts[group], before, text, is_leaf))
        if not is_leaf:
            below[i] = [*before, text]
    return views


def score_steps(rollout: Rollout, rewards: Mapping[str, tuple[StepReward, float]]) -> tuple[Rollout, ScoredSteps]:
    """Call every step reward (name -> (function, weight)) and write their weighted sum into `tree.step_reward`.

    NaN means "no opinion": it counts as nothing in a step's sum, and a step about which no reward has an opinion
    gets NaN. A reward that raises, SystemExit included, is called again prompt by prompt, and has no opinion on those
    on which it still raises, such as films that a scorer cannot read. One that raises on all is in `failed`.

    Raises:
        RewardError: every reward raised; or one returned another shape than (N,), no numbers, or one beyond `LARGEST`.
        NotFiniteError: the network of a scorer is not finite.
    """
    parts: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    num_steps = len(rollout.tree)
    total = torch.zeros(num_steps, dtype=torch.float64)
    scored = torch.zeros(num_steps, dtype=torch.bool)
    for name, (reward, weight) in rewards.items():
        start = time.perf_counter()
        parts[name], message = _values(name, reward, rollout)
        seconds[name] = time.perf_counter() - start
        if message:
            failed[name] = message
        total += weight * parts[name].nan_to_num(nan=0.0)
        scored |= ~parts[name].isnan()
    if rewards and len(failed) == len(rewards):
        raise RewardError(f"every step reward raised: {failed}; mend them, or take them out of the recipe")
    step_reward = total.where(scored, torch.nan)
    unscored = {name: int(numbers.isnan().sum()) for name, numbers in parts.items()}
    record = ScoredSteps(parts, seconds, unscored, failed)
    return rollout.with_tree(rollout.tree.replace(step_reward=step_reward)), record


def _values(name: str, reward: StepReward, rollout: Rollout) -> tuple[Tensor, str]:
    """(N,) numbers of one reward, NaN on prompts on which it raises, and its last error where it raises on all."""
    try:
        return _checked(name, reward(rollout), len(rollout.tree)), ""
    except (RewardError, NotFiniteError):
        raise
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        log.error("step reward %r raised on %d steps:\n%s", name, len(rollout.tree), traceback.format_exc())
    numbers = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
    if len(rollout.prompts) == 1:
        return numbers, message
    raised = 0
    for i, prompt in enumerate(rollout.prompts):
        steps = (rollout.tree.group == i).nonzero().flatten()
        try:
            numbers[steps] = _checked(name, reward(rollout.select([i])), len(steps))
        except (RewardError, NotFiniteError):
            raise
        except (Exception, SystemExit) as error:
            raised += 1
            message = f"{type(error).__name__}: {error}"
            log.warning("step reward %r leaves prompt %r unscored: %s", name, prompt.id, message)
    return numbers, message if raised == len(rollout.prompts) else ""


def _checked(name: str, raw: object, steps: int) -> Tensor:
    """The result of a reward as (N,) float64 on the CPU; raises RewardError for another shape or no numbers."""
    try:
        if isinstance(raw, (bytes, bytearray, memoryview)):
            raise TypeError("its bytes would be read as numbers")
        values = torch.as_tensor(raw, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise RewardError(f"step reward {name!r} returned {type(raw).__name__}, no numbers ({error})") from error
    if values.shape != (steps,):
        raise RewardError(
            f"step reward {name!r} returned shape {tuple(values.shape)} for {steps} steps; return ({steps},), NaN "
            "where it has no opinion"
        )
    too_large = (values.abs() > LARGEST).nonzero().flatten().tolist()
    if too_large:
        number = values[too_large[0]].item()
        raise RewardError(f"step reward {name!r}: step {too_large[0]} is {out_of_bounds(number)}")
    return values
