"""Readings of a video agent's turns: what they looked at, beside what the reference names."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrl.readings import ReadingContext
from mmrl.readings.base import Values
from mmrl.reasoning.readings.texts import item_table
from mmrl.registry import declares
from mmrl.rollout import Rollout
from video.acting.actions import Coords, Syntax
from video.rewards.calls import Call, Kind, Reading


@declares(
    reads=("texts",),
    writes=("tags.similarity", "tags.documents"),
    fits="turns of a video agent",
    source="StepSearch; looks in place of documents",
)
class VideoEvidence:
    """How well the looks of each turn meet the manipulations of the reference, and which looks were taken.

    tags.similarity (N, max_golds): per segment, frame and box of the reference the best overlap of the turn's own
    looks: IoU in seconds of segments (1 or 0 for ids) and of boxes, 1 inside a range of frames; NaN in the columns
    that a prompt does not use. tags.documents (N, max_items): the prompt's different looks in the order in which they
    are first taken; two stretches or boxes with IoU >= 0.9 are one look. A turn that was refused looked at nothing.

    Args:
        kind: of looks: segment, frame, box or all.
        syntax, coords: as the agent's policy has them. max_golds, max_items: columns; a prompt that needs more is set
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
        self._reading = Reading(syntax, coords)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """tags.similarity and tags.documents."""
        tree = rollout.tree
        truths = [self._reading.truth(p) for p in rollout.prompts]
        looks: list[list[Call]] = [[] for _ in rollout.prompts]
        rows: list[int] = []
        columns: list[int] = []
        similarity = torch.full((len(tree), self.max_golds), torch.nan, dtype=torch.float64)
        for step, (turns, group) in enumerate(zip(self._reading.paths(rollout), tree.group.tolist(), strict=True)):
            truth = truths[group]
            if turns is None or truth is None:
                continue
            kinds: tuple[Kind, ...] = ("segment", "frame", "box") if self.kind == "all" else (self.kind,)
            calls = [c for c in turns[-1].calls if c.kind in kinds and turns[-1].problem is None]
            beside = truth.beside(calls)
            offset = 0
            for kind in kinds:
                count = beside.count(kind)
                if offset + count > self.max_golds:
                    prompt = rollout.prompts[group].id
                    raise ValueError(f"prompt {prompt!r} names more than max_golds={self.max_golds}; raise it")
                similarity[step, offset : offset + count] = 0.0
                for call in calls:
                    for item, overlap in beside.overlaps(call).items() if call.kind == kind else ():
                        similarity[step, offset + item] = max(float(similarity[step, offset + item]), overlap)
                offset += count
            for call in calls:
                known = next((i for i, look in enumerate(looks[group]) if call.repeats(look)), len(looks[group]))
                if known == len(looks[group]):
                    looks[group].append(call)
                rows.append(step)
                columns.append(known)
        return {"tags.similarity": similarity, "tags.documents": item_table(len(tree), self.max_items, rows, columns)}
