"""Progress towards a recipe of actions, by longest common subsequences (ProgRM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mmrl.registry import declares
from mmrl.rollout import Rollout
from video.rewards.answers import common_length
from video.rewards.calls import KINDS, Call, Kind, Reading, Truth, TurnCalls, all_calls
from video.rewards.manipulations import Hits, last_of_paths


@declares(reads=("texts",))
@dataclass(frozen=True)
class LcsProgress(Reading, Hits):
    """Step reward from the progress p_k towards the reference's manipulations.

    p_k in [0, 1] is the longest match of the calls so far with the recipe / the recipe's length. It looks back only,
    so the branches of a tree share the progress of their common steps.

    The recipe is the reference's segments, then its frames, then its boxes, each kind in its order; a call matches an
    item that it hits. Calls of refused turns do not count.

    Args, beside those of `Reading` and `Hits`:
        increments: give p_k - p_(k-1), with p_0 = 0, which may be summed (mode `delta`). False gives p_k itself: a
            score of the state, for `step_reward_kind: value`.
    """

    increments: bool = True

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN for answers (as increments: 0) and for prompts whose reference names no manipulations."""
        return last_of_paths(self, rollout, self._progress)

    def _progress(self, turns: Sequence[TurnCalls], truth: Truth) -> list[float]:
        carried_out = [turn for turn in turns if turn.problem is None]
        truth = truth.beside(all_calls(carried_out))
        # (kind, number of the item): all segments, then all frames, then all boxes
        recipe: list[tuple[Kind, int]] = []
        for kind in KINDS:
            recipe += [(kind, item) for item in range(truth.count(kind))]

        def matches(call: Call, entry: tuple[Kind, int]) -> bool:
            kind, item = entry
            return call.kind == kind and item in self.items(call, truth)

        calls_so_far: list[Call] = []
        progress = [0.0]
        for turn in turns:
            if turn.problem is None:
                calls_so_far += turn.calls
            progress.append(common_length(calls_so_far, recipe, matches) / len(recipe))
        if self.increments:
            return [after - before for before, after in pairwise(progress)]
        # an answer looks at nothing, so it tells nothing of the state
        return [math.nan if turn.answered else p for turn, p in zip(turns, progress[1:], strict=True)]
