"""Right, redundant and erroneous manipulations (ViRL's idea): credit for what had not been found before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from mmrl.registry import declares
from mmrl.rollout import Rollout
from video.rewards.calls import KINDS, Call, Kind, Reading, Truth, TurnCalls, all_calls
from video.rewards.manipulations import HITS, Hits, last_of_paths

# bounds of the sum over a path
LEAST, MOST = -0.5, 1.0


def coverage_credit(
    turns: Sequence[TurnCalls],
    truth: Truth,
    hits: Hits = HITS,
    *,
    correct: float = 1.0,
    redundant: float = 0.05,
    erroneous: float = 0.1,
) -> list[float]:
    """Credit of each turn, the sum over its calls; NaN for answers (ViRL; numbers as defined here).

    A call that hits an uncovered item covers the best of these: + correct / number of items. One whose items are all
    covered, or that repeats an earlier call, is redundant: - redundant. One that hits nothing, and a turn that was
    refused, is erroneous: - erroneous (a turn refused as a duplicate is redundant). Calls of a kind without ground
    truth are 0. The sum over a path is kept in [-0.5, 1]: a turn gets what it adds to the clipped sum.
    """
    truth = truth.beside(all_calls(turns))
    covered: dict[Kind, set[int]] = {kind: set() for kind in KINDS}
    earlier: list[Call] = []
    sums = [0.0]
    for turn in turns:
        total = sums[-1]
        if turn.problem is not None:
            total -= redundant if turn.problem == "duplicate_action" else erroneous
        # of a refused turn nothing was shown, so its calls neither cover an item nor count as earlier ones
        shown_calls = turn.calls if turn.problem is None else ()
        for call in shown_calls:
            if not truth.count(call.kind):
                continue
            overlaps = hits.items(call, truth)
            new_items = [item for item in overlaps if item not in covered[call.kind]]
            is_repeat = any(call.repeats(other) for other in earlier)
            if is_repeat or (overlaps and not new_items):
                total -= redundant
            elif new_items:
                covered[call.kind].add(max(new_items, key=overlaps.__getitem__))
                total += correct / truth.total
            else:
                total -= erroneous
            earlier.append(call)
        sums.append(min(max(total, LEAST), MOST))
    credit = [after - before for before, after in pairwise(sums)]
    # an answer looks at nothing, so it has no number here; the outcome judges it
    return [math.nan if turn.answered else gain for turn, gain in zip(turns, credit, strict=True)]


@declares(reads=("texts",))
@dataclass(frozen=True)
class VideoViRL(Reading, Hits):
    """Step reward `coverage_credit` of each turn, given the turns before it on its path. The mode `bonus` adds it.

    Args, beside those of `Reading` and `Hits`:
        correct, redundant, erroneous: >= 0.
    """

    correct: float = 1.0
    redundant: float = 0.05
    erroneous: float = 0.1

    def __post_init__(self) -> None:
        Hits.__post_init__(self)
        for name in ("correct", "redundant", "erroneous"):
            if getattr(self, name) < 0:
                raise ValueError(f"video_virl: {name}={getattr(self, name)} must be at least 0; its sign is fixed")

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64, NaN for answers and for prompts whose reference names no manipulations."""
        return last_of_paths(self, rollout, self._credit)

    def _credit(self, turns: Sequence[TurnCalls], truth: Truth) -> list[float]:
        return coverage_credit(
            turns, truth, self, correct=self.correct, redundant=self.redundant, erroneous=self.erroneous
        )
