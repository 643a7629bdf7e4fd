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

# A scorer keeps the encoded pictures of this many questions until it has scored them.
QUESTIONS_AT_ONCE = 64


def labelled_forest(prompts: Sequence[Prompt], records: Sequence[Sequence[SolutionRecord]]) -> Labelled:
    """The labelled solutions of each prompt as one forest.

    Args:
        prompts: P prompts. records: (P, solutions) of each.
    """
    rollout, paths = solution_forest(prompts, [[record.texts for record in group] for group in records])
    # One entry per step of a solution; a node that several solutions share has one entry in each of them.
    nodes: list[int] = []
    labels: list[float] = []
    solution: list[int] = []
    kinds: list[Kind] = []
    num_solutions = 0
    for group, group_paths in zip(records, paths, strict=True):
        for record, path in zip(group, group_paths, strict=True):
            step_labels = record.labels or [None] * len(record.steps)
            nodes += path
            labels += [torch.nan if label is None else label for label in step_labels]
            solution += [num_solutions] * len(path)
            kinds += [step.kind for step in record.steps]
            num_solutions += 1
    return Labelled(
        rollout,
        torch.tensor(nodes, dtype=torch.int64),
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor(solution, dtype=torch.int64),
        kinds,
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
        train_records = self._read(train, format, media_root, max_bad)
        eval_records = self._read(eval, format, media_root, max_bad)
        self.prompts = self._group([without_labels(record, ignore_kinds) for record in train_records])
        self.eval_prompts = self._group(eval_records)

    def _read(
        self, file: str, format: str | dict[str, Any], media_root: str | None, max_bad: float
    ) -> list[SolutionRecord]:
        records, bad = read_format(Path(file), format, media_root=media_root, max_bad=max_bad)
        self.quarantined += bad
        for reason, count in count_reasons(bad).items():
            log.warning("%s: %d rows set aside: %s", file, count, reason)
        return records

    def _group(self, records: Sequence[SolutionRecord]) -> list[Prompt]:
        """One prompt per question, and its solutions by the prompt's id."""
        groups: dict[str, list[SolutionRecord]] = {}
        for record in records:
            groups.setdefault(record.asked, []).append(record)
        prompts = []
        for group in groups.values():
            prompt = group[0].prompt
            prompts.append(prompt)
            self._records[prompt.id] = group
        return prompts

    def labelled(self, prompts: Sequence[Prompt]) -> Labelled:
        """The solutions of these questions."""
        return labelled_forest(prompts, [self._records[prompt.id] for prompt in prompts])


def without_labels(record: SolutionRecord, kinds: Sequence[Kind]) -> SolutionRecord:
    """The record with the labels of steps of these kinds taken away."""
    if not kinds or record.labels is None:
        return record
    labels = []
    for step, label in zip(record.steps, record.labels, strict=True):
        labels.append(None if step.kind in kinds else label)
    return replace(record, labels=tuple(labels))


def score_records(scorer: StepReward, records: Sequence[SolutionRecord]) -> list[list[float] | None]:
    """One list per record in its order; None where the scorer cannot take the question (it logs why).

    Records of one question on the same media are scored together, `QUESTIONS_AT_ONCE` of these in a call.
    """
    # By question: the indices of its records.
    groups: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.asked, []).append(i)
    questions = [records[indices[0]].prompt for indices in groups.values()]
    check_prompts(questions)
    indices_of = {prompt.id: indices for prompt, indices in zip(questions, groups.values(), strict=True)}
    scores: list[list[float] | None] = [None] * len(records)
    for start in range(0, len(questions), QUESTIONS_AT_ONCE):
        begin_iteration(scorer)
        prompts = admitted(scorer, questions[start : start + QUESTIONS_AT_ONCE])
        texts = [[records[i].texts for i in indices_of[prompt.id]] for prompt in prompts]
        for prompt, rows in zip(prompts, score_solutions(scorer, prompts, texts), strict=True):
            for i, row in zip(indices_of[prompt.id], rows, strict=True):
                scores[i] = row
    return scores
