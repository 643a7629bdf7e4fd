"""Readings of a video agent's turns: the looks of each turn beside the manipulations of the reference.

A reference with segments 3 and 5, and a path whose turns look at segments 3, 4 and 5, give (`kind: segment`)

    tags.similarity  1 0    tags.documents  1 0 0
                     0 0                    0 1 0
                     0 1                    0 0 1

a row per turn; columns are the segments of the reference, and the different looks in the order of their first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrl.readings import ReadingContext
from mmrl.readings.base import Values
from mmrl.reasoning.readings.texts import item_table
from mmrl.registry import declares
from mmrl.rollout import Rollout
from video.acting.actions import Coords, Syntax
from video.rewards.calls import KINDS, Call, Kind, Reading, Truth


@declares(
    reads=("texts",),
    writes=("tags.similarity", "tags.documents"),
    fits="turns of a video agent",
    source="StepSearch; looks in place of documents",
)
class VideoEvidence:
    """The overlap of each turn's looks with the manipulations of the reference, and the looks that were taken.

    tags.similarity (N, max_golds): per segment, frame and box of the reference the best overlap of the turn's own
    looks: IoU in seconds of segments (1 or 0 for ids) and of boxes, 1 inside a range of frames; NaN in the columns
    that a prompt does not use. tags.documents (N, max_items): the prompt's different looks in the order in which they
    are first taken; two stretches or boxes with IoU >= 0.9 are one look. A turn that was refused looked at nothing.

    Args:
        kind: of looks: segment, frame, box or all.
        syntax, coords: taken from the agent's policy. max_golds, max_items: columns; a prompt that needs more is set
            aside.
    """

    def __init__(
        self,
        kind: Kind | Literal["all"] = "segment",
        syntax: Syntax = "videocom",
        coords: Coords = "pixels",
        max_golds: Annotated[int, Field(ge=1)] = 8,
        max_items: Annotated[int, Field(ge=1)] = 64,
    ) -> None:
        self.kind, self.max_golds, self.max_items = kind, max_golds, max_items
        self.syntax, self.coords = syntax, coords
        self._reading = Reading(syntax, coords)

    def following(self, policy: object) -> VideoEvidence:
        """The same with the options of a video agent; itself for other policies."""
        reading = self._reading.following(policy)
        evidence = VideoEvidence(self.kind, reading.syntax, reading.coords, self.max_golds, self.max_items)
        evidence._reading = reading
        return evidence

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """tags.similarity and tags.documents."""
        tree = rollout.tree
        truths = [self._reading.truth(prompt) for prompt in rollout.prompts]
        paths = self._reading.paths(rollout)
        kinds = KINDS if self.kind == "all" else (self.kind,)
        # (N, max_golds), NaN where a prompt has no item
        similarity = torch.full((len(tree), self.max_golds), torch.nan, dtype=torch.float64)
        # pairs (step, number of a look); looks are numbered per prompt, which is the group of its steps
        looks: list[list[Call]] = [[] for _ in rollout.prompts]
        steps: list[int] = []
        look_numbers: list[int] = []
        for step, group in enumerate(tree.group.tolist()):
            turns, truth = paths[step], truths[group]
            if turns is None or truth is None:
                continue
            # the path ends with the step itself; a refused turn looked at nothing
            calls = [call for call in turns[-1].calls if call.kind in kinds]
            if turns[-1].problem is not None:
                calls = []
            overlaps = _best_overlaps(calls, truth.beside(calls), kinds)
            if len(overlaps) > self.max_golds:
                prompt = rollout.prompts[group].id
                raise ValueError(f"prompt {prompt!r} names more than max_golds={self.max_golds}; raise it")
            similarity[step, : len(overlaps)] = torch.tensor(overlaps, dtype=torch.float64)
            for call in calls:
                steps.append(step)
                look_numbers.append(_look_number(call, looks[group]))
        documents = item_table(len(tree), self.max_items, steps, look_numbers)
        return {"tags.similarity": similarity, "tags.documents": documents}


def _best_overlaps(calls: Sequence[Call], truth: Truth, kinds: Sequence[Kind]) -> list[float]:
    """Per item of the reference, kind after kind, the largest overlap of any call; 0 where no call meets it."""
    best: list[float] = []
    for kind in kinds:
        of_kind = [0.0] * truth.count(kind)
        for call in calls:
            if call.kind == kind:
                for item, overlap in truth.overlaps(call).items():
                    of_kind[item] = max(of_kind[item], overlap)
        best += of_kind
    return best


def _look_number(call: Call, looks: list[Call]) -> int:
    """The position of the look that a call repeats; a new one is appended."""
    for number, look in enumerate(looks):
        if call.repeats(look):
            return number
    looks.append(call)
    return len(looks) - 1
