"""Labelled solutions: as a forest that reward models train on, as a task, and their scores."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch

from mmrl.capabilities import admitted, begin_iteration
from mmrl.jsonl import Quarantined, count_reasons
from mmrl.reasoning.formats import read_format
from mmrl.reasoning.records import Kind, SolutionRecord
from mmrl.registry import of_kind
from mmrl.rollout import Prompt, StepReward, check_prompts
from mmrl.scorers.labelled import Labelled, solution_forest
from mmrl.scorers.scoring import score_solutions

log = logging.getLogger(__name__)

# a scorer keeps what it made of the pictures of so many questions until it has scored them
QUESTIONS_AT_ONCE = 64


def labelled_forest(prompts: Sequence[Prompt], records: Sequence[Sequence[SolutionRecord]]) -> Labelled:
    """The labelled solutions of each prompt."""
    rollout, paths = solution_forest(prompts, [[r.texts for r in own] for own in records])
    flat = [(r, p) for own, ps in zip(records, paths, strict=True) for r, p in zip(own, ps, strict=True)]
    label = [torch.nan if y is None else y for r, _ in flat for y in (r.labels or [None] * len(r.steps))]
    sizes = torch.tensor([len(p) for _, p in flat], dtype=torch.int64)
    return Labelled(
        rollout,
        torch.tensor([v for _, p in flat for v in p], dtype=torch.int64),
        torch.tensor(label, dtype=torch.float32),
        torch.repeat_interleave(torch.arange(len(flat)), sizes),
        [s.kind for r, _ in flat for s in r.steps],
    )


class StepRecords:
    """Task `step_records`: labelled solutions from JSON-lines files, grouped by question and images.

    Args:
        train, eval: files of labelled solutions. format: a row of `formats`, with its options where it has any.
        media_root: folder that images are relative to; by default the file's own.
        ignore_kinds: kinds of steps whose labels are not used for training.
        max_bad: share of bad rows of a file above which loading fails.
    Raises:
        ValueError: no file, no usable row, or too many bad rows.
    """

    def __init__(
        self,
        train: str,
        eval: str,
        format: Annotated[str | dict[str, Any], of_kind("formats")] = "records",
        media_root: str | None = None,
        ignore_kinds: Sequence[Kind] = (),
        max_bad: float = 0.05,
    ) -> None:
        self._records: dict[str, list[SolutionRecord]] = {}
        self.quarantined: list[Quarantined] = []
        taken, tested = (self._read(f, format, media_root, max_bad) for f in (train, eval))
        self.prompts = self._group([without_labels(r, ignore_kinds) for r in taken])
        self.eval_prompts = self._group(tested)

    def _read(
        self, file: str, format: str | dict[str, Any], media_root: str | None, max_bad: float
    ) -> list[SolutionRecord]:
        records, bad = read_format(Path(file), format, media_root=media_root, max_bad=max_bad)
        self.quarantined += bad
        for reason, n in count_reasons(bad).items():
            log.warning("%s: %d rows set aside: %s", file, n, reason)
        return records

    def _group(self, records: Sequence[SolutionRecord]) -> list[Prompt]:
        groups: dict[str, list[SolutionRecord]] = {}
        for r in records:
            groups.setdefault(r.asked, []).append(r)
        prompts = [own[0].prompt for own in groups.values()]
        self._records |= {p.id: own for p, own in zip(prompts, groups.values(), strict=True)}
        return prompts

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """The solutions of these questions."""
        return labelled_forest(prompts, [self._records[p.id] for p in prompts])


def without_labels(record: SolutionRecord, kinds: Sequence[Kind]) -> SolutionRecord:
    """The record with the labels of steps of these kinds taken away."""
    if not kinds or record.labels is None:
        return record
    pairs = zip(record.steps, record.labels, strict=True)
    return replace(record, labels=tuple(None if s.kind in kinds else y for s, y in pairs))


def score_records(scorer: StepReward, records: Sequence[SolutionRecord]) -> list[list[float] | None]:
    """One list per record in its order; None where the scorer cannot take the question (it logs why).

    Records of one question on the same media are scored together, `QUESTIONS_AT_ONCE` of these in a call.
    """
    groups: dict[str, list[int]] = {}
    for i, r in enumerate(records):
        groups.setdefault(r.asked, []).append(i)
    heads = [records[own[0]].prompt for own in groups.values()]
    check_prompts(heads)
    owned = {p.id: own for p, own in zip(heads, groups.values(), strict=True)}
    out: list[list[float] | None] = [None] * len(records)
    for first in range(0, len(heads), QUESTIONS_AT_ONCE):
        begin_iteration(scorer)
        prompts = admitted(scorer, heads[first : first + QUESTIONS_AT_ONCE])
        kept = [owned[p.id] for p in prompts]
        rows = score_solutions(scorer, prompts, [[records[i].texts for i in own] for own in kept])
        for own, scores in zip(kept, rows, strict=True):
            for i, s in zip(own, scores, strict=True):
                out[i] = s
    return out
