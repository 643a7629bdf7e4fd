"""Progress towards a recipe of actions, by longest common subsequences (ProgRM)."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

from mmrl.rollout import Rollout
from video.rewards.calls import KINDS, Call, Kind, Reading, Truth, TurnCalls
from video.rewards.manipulations import Hits, last_of_paths

A = TypeVar("A")
B = TypeVar("B")
H = TypeVar("H", bound=Hashable)


def _suffix_lengths(a: Sequence[A], b: Sequence[B], same: Callable[[A, B], bool]) -> list[list[int]]:
    """s[i][j] = length of the longest common subsequence of a[i:] and b[j:]."""
    s = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            s[i][j] = max(s[i + 1][j + 1] + 1 if same(a[i], b[j]) else 0, s[i + 1][j], s[i][j + 1])
    return s


def common_subsequence(a: Sequence[H], b: Sequence[H]) -> list[H]:
    """The longest common subsequence; of several, the one found from the end, skipping in `a` first on a tie."""
    a, b = a[::-1], b[::-1]  # walking back from the end is walking forward here
    s = _suffix_lengths(a, b, operator.eq)
    i, j, out = 0, 0, []
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            out.append(a[i])
            i, j = i + 1, j + 1
        elif s[i + 1][j] >= s[i][j + 1]:
            i += 1
        else:
            j += 1
    return out[::-1]


def recipe(trajectories: Sequence[Sequence[H]]) -> list[H]:
    """What successful trajectories of one kind have in common: `common_subsequence` folded, shortest first.

    Actions are compared as they are: normalise them (type and target) beforehand.

    Raises:
        ValueError: no trajectories.
    """
    if not trajectories:
        raise ValueError("a recipe needs at least one successful trajectory")
    first, *others = sorted(trajectories, key=len)
    return reduce(common_subsequence, others, list(first))


def leftmost_alignment(
    actions: Sequence[A], recipe: Sequence[B], same: Callable[[A, B], bool] = operator.eq
) -> list[bool]:
    """Which actions belong to the longest match with `recipe` whose indices are the earliest possible.

    The match found by walking back from the end has the latest ones, and labels a repeated action too late.
    """
    s = _suffix_lengths(actions, recipe, same)
    j, matched = 0, []
    for i, action in enumerate(actions):
        places = (k for k in range(j, len(recipe)) if same(action, recipe[k]) and s[i + 1][k + 1] + 1 == s[i][j])
        place = next(places, None)
        matched.append(place is not None)
        j = j if place is None else place + 1
    return matched


def progress_labels(
    actions: Sequence[A],
    recipes: Sequence[Sequence[B]],
    *,
    success: bool = False,
    same: Callable[[A, B], bool] = operator.eq,
) -> list[float]:
    """p_t = recipe items matched up to action t / recipe length, in [0, 1] (ProgRM; details as defined here).

    Of several recipes the one with the longest match counts, of these the shortest. `success` sets the last label to
    1. The alignment looks at the whole trajectory, so these are targets for a progress model; for a reward take
    `path_progress`, which looks back only.

    Raises:
        ValueError: no recipe, or an empty one.
    """
    if not recipes or not all(recipes):
        raise ValueError("progress needs at least one recipe, none of them empty")
    matches = [(leftmost_alignment(actions, r, same), len(r)) for r in recipes]
    matched, size = min(matches, key=lambda m: (-sum(m[0]), m[1]))
    labels = [sum(matched[: t + 1]) / size for t in range(len(actions))]
    return [*labels[:-1], 1.0] if success and labels else labels


def path_progress(done: Sequence[A], recipe: Sequence[B], same: Callable[[A, B], bool] = operator.eq) -> float:
    """p = longest match of what has been done with the recipe / recipe length, in [0, 1]; never falls along a path.

    It depends on the past only, so the branches of a tree share the progress of their common steps. Where a
    trajectory's prefixes match best inside its own best match, it equals `progress_labels`; it is never below them.
    """
    return _suffix_lengths(done, recipe, same)[0][0] / len(recipe)


@dataclass(frozen=True)
class LcsProgress(Reading, Hits):
    """Step reward from the progress p_k towards the reference's manipulations, see `path_progress`.

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
        calls = [[c for c in t.calls if t.problem is None] for t in turns]
        truth = truth.beside([c for own in calls for c in own])
        items = [(kind, i) for kind in KINDS for i in range(truth.count(kind))]

        def same(call: Call, item: tuple[Kind, int]) -> bool:
            return call.kind == item[0] and item[1] in self.items(call, truth)

        done: list[Call] = []
        values = [0.0]
        for own in calls:
            done += own
            values.append(path_progress(done, items, same))
        if self.increments:
            return [b - a for a, b in pairwise(values)]
        return [math.nan if t.answered else v for t, v in zip(turns, values[1:], strict=True)]
