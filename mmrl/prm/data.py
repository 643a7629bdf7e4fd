"""Labelled solutions as one forest: common prefixes become shared steps, so each is computed once."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mmrl.jsonl import Quarantined, count_reasons
from mmrl.prm.formats import read_format
from mmrl.prm.records import Kind, SolutionRecord
from mmrl.registry import of_kind
from mmrl.rollout import Actions, Prompt, Rollout
from mmrl.tree import INTERNAL, UNFINISHED, StepTree

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """Labels on the steps of a forest; several solutions may label one step, each in its own way.

    rollout: N steps. node (M,) int: the step a label belongs to. label (M,) float32 in [0, 1], NaN = unlabelled.
    solution (M,) int: 0..S-1, ascending; the rows of a solution are its steps in order. kinds: (M,) what they are.
    """

    rollout: Rollout
    node: Tensor
    label: Tensor
    solution: Tensor
    kinds: Sequence[Kind]

    @property
    def paths(self) -> list[Tensor]:
        """The rows of each solution."""
        return list(torch.arange(len(self.node)).split(torch.bincount(self.solution).tolist()))


@runtime_checkable
class LabelledTask(Protocol):
    """A task of labelled steps: what the step-reward trainer needs to know of its data."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """Everything known about the solutions of these prompts, prompts in this order."""


@runtime_checkable
class StepMeasurer(Protocol):
    """A task of labelled steps with measures of its own, beside those of every step-reward model."""

    def measures(self, data: Labelled, score: Tensor) -> Mapping[str, float]:
        """Numbers by name. score: (M,) float64 of the rows of `data`, NaN where a step cannot be read."""


def solution_forest(prompts: Sequence[Prompt], solutions: Sequence[Sequence[Sequence[str]]]) -> tuple[Rollout, Paths]:
    """Written solutions as a rollout without actions: steps with equal texts after equal steps are one step.

    Args:
        prompts: G prompts. solutions: per prompt, any number of solutions (at least one in all), each a list of step
            texts; a solution without steps has an empty path.
    Returns:
        The rollout, and per prompt and solution the steps along it.
    """
    parent: list[int] = []
    group: list[int] = []
    texts: list[str] = []
    known: dict[tuple[int, int, str], int] = {}
    paths: Paths = []
    for g, own in enumerate(solutions):
        paths.append([])
        for steps in own:
            path: list[int] = []
            for text in steps:
                above = path[-1] if path else -1
                node = known.setdefault((g, above, text), len(parent))
                if node == len(parent):
                    parent.append(above)
                    group.append(g)
                    texts.append(text)
                path.append(node)
            paths[-1].append(path)
    used = sorted(set(group))  # a prompt whose solutions are all empty has no place in the forest
    place = {g: i for i, g in enumerate(used)}
    n = len(parent)
    inner = torch.zeros(n, dtype=torch.bool)
    inner[[p for p in parent if p >= 0]] = True
    none = torch.zeros(n, dtype=torch.int64)
    ints = partial(torch.tensor, dtype=torch.int64)  # of an empty list as well
    tree = StepTree(
        ints(parent), ints([place[g] for g in group]), torch.where(inner, INTERNAL, UNFINISHED),
        torch.full((n,), torch.nan), tok_start=none, tok_end=none,
    )  # fmt: skip
    actions = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    return Rollout([prompts[g] for g in used], tree, actions, texts=texts), paths


Paths = list[list[list[int]]]


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
