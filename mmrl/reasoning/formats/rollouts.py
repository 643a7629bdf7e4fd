"""Stored rollouts read as solutions: every path to a leaf is a record, with the values and counts of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmrl.jsonl import Quarantined, RowError, check_share
from mmrl.reasoning.records import Counts, SolutionRecord, record_of
from mmrl.reasoning.records_io import check_markers, check_record
from mmrl.registry import register
from mmrl.rollout import Rollout
from mmrl.tree_ops import backup


def read_rollouts(
    path: str | Path, *, markers: Sequence[str] = (), max_bad: float = 0.05, unlabelled: bool = False
) -> tuple[list[SolutionRecord], list[Quarantined]]:
    """The solutions of a folder of rollouts (`mmrl rollouts`, `search`, `annotate`), and those set aside.

    Raises:
        ValueError: no rollout there, or too many solutions that are no records.
    """
    files = sorted(Path(path).rglob("rollout.json"))
    if not files:
        raise ValueError(f"no rollout in {path}; write some: mmrl rollouts RECIPE --out {path}")
    records: list[SolutionRecord] = []
    bad: list[Quarantined] = []
    for file in files:
        for leaf, record in solutions_of(Rollout.load(file.parent), file.parent.name):
            try:
                check_markers(check_record(record, unlabelled=unlabelled), markers)
                records.append(record)
            except RowError as error:
                bad.append(Quarantined(str(file), leaf + 1, str(error)))
    check_share(Path(path), bad, len(records), max_bad)
    return records, bad


@register("formats", "rollouts", read=read_rollouts)
def solutions_of(rollout: Rollout, name: str) -> list[tuple[int, SolutionRecord]]:
    """(leaf, record) of every distinct path to a leaf, in node order; steps that say nothing are left out.

    labels: the value of the state after each step, where it has one, else the mean outcome below it. mc: visits and
    q_sum where they are counts. final_correct: the outcome is at least 1/2. `meta.draws`: leaves with the same texts.

    Args:
        name: of the rollout, the beginning of the records' ids.
    Raises:
        ValueError: a rollout without texts, or a prompt without a question.
    """
    tree, texts = rollout.tree, rollout.texts
    if len(texts) != len(tree):
        raise ValueError(f"the rollout {name!r} has no texts; only steps that are written are solutions")
    parent, group = tree.parent.tolist(), tree.group.tolist()
    # By prompt and texts, since equal solutions become one record: (nodes of the steps, leaf) of each.
    draws: dict[tuple[Any, ...], list[tuple[list[int], int]]] = {}
    for leaf in tree.is_leaf.nonzero().flatten().tolist():
        path = [leaf]
        while parent[path[-1]] >= 0:
            path.append(parent[path[-1]])
        nodes = [node for node in reversed(path) if texts[node].strip()]
        key = (group[leaf], *(texts[node].strip() for node in nodes))
        draws.setdefault(key, []).append((nodes, leaf))
    # (N,) the tree's value, else the mean outcome below a step, NaN where it has neither.
    mean_below = torch.where(tree.valid, backup(tree), torch.nan)
    value = torch.where(tree.value.isnan(), mean_below, tree.value)
    counts = _counts(rollout)
    records = []
    for (prompt, *steps), of_path in draws.items():
        nodes, leaf = of_path[0]
        record = record_of(rollout.prompts[prompt], steps)
        outcome = float(tree.outcome[leaf])
        record = replace(
            record,
            id=f"{name}/{record.id}/{leaf}",
            final_correct=None if math.isnan(outcome) else outcome >= 0.5,
            labels=tuple(None if math.isnan(label) else label for label in value[nodes].tolist()),
            label_kind="soft",
            scope="prefix",
            mc=None if counts is None else tuple(counts[node] for node in nodes),
            source="rollouts",
            meta=dict(record.meta) | {"question_id": record.id, "draws": len(of_path)},
        )
        records.append((leaf, record))
    return records


def _counts(rollout: Rollout) -> list[Counts] | None:
    """q_sum of visits per step, None where they are no counts of right ends."""
    tags = rollout.tree.tags
    if "visits" not in tags or "q_sum" not in tags:
        return None
    total, right = tags["visits"].double(), tags["q_sum"].double()
    is_count = (right == right.round()) & (right >= 0) & (right <= total)
    if not bool(is_count.all()):
        return None
    return [Counts(int(correct), int(drawn)) for correct, drawn in zip(right.tolist(), total.tolist(), strict=True)]
