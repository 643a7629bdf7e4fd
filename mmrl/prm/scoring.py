"""Scores for solutions: records, states of a search, or plain texts, by any step reward; and loading a scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.losses.reward import good_logit
from mmrl.prm.data import solution_forest
from mmrl.prm.records import SolutionRecord
from mmrl.registry import build
from mmrl.rollout import Prompt, Rollout, State, StepReward, StepScorer

RECORD = "step_format.json"  # beside every saved scorer: which component reads it, and how


def load_scorer(name: str | Path, options: Mapping[str, Any] | None = None) -> StepReward:
    """A step reward of the group `mmrl.scorers` by name, or a saved scorer by its folder.

    Raises:
        ComponentError: no such name or option. ValueError: a folder without the record of a scorer.
    """
    folder = Path(name)
    if len(folder.parts) > 1 and ":" not in str(name) and not folder.is_dir():
        raise FileNotFoundError(f"no scorer in {folder}: the folder does not exist")
    if not folder.is_dir():
        return build("scorers", "scorer", str(name), options or {})
    try:
        record = json.loads((folder / RECORD).read_text())
        kind = record["scorer"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} is no saved scorer ({error}); it needs {RECORD}, as scorer.save writes it"
        ) from error
    return build("scorers", "scorer", kind, {"model": str(folder), **(options or {})})


def aggregate_of(name: str | Path, default: str = "min") -> str:
    """The aggregation that a saved scorer was made for."""
    file = Path(name) / RECORD
    return str(json.loads(file.read_text())["format"].get("aggregate", default)) if file.is_file() else default


def score_solutions(
    scorer: StepReward, prompts: Sequence[Prompt], solutions: Sequence[Sequence[Sequence[str]]]
) -> list[list[list[float]]]:
    """Per prompt and solution, one score per step: common prefixes are computed once, all in one call.

    A step without score is NaN: too long, or with a marker inside. A solution without steps has an empty list.
    """
    rollout, paths = solution_forest(prompts, solutions)
    scores = scorer(rollout).tolist() if len(rollout.tree) else []
    return [[[scores[v] for v in path] for path in own] for own in paths]


def score_records(scorer: StepReward, records: Sequence[SolutionRecord]) -> list[list[float] | None]:
    """One list per record in its order; None where the scorer cannot take the question (it logs why).

    Records of one question and its images are scored together.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, r in enumerate(records):
        groups.setdefault((r.question, r.images, r.options), []).append(i)
    heads = [records[own[0]].prompt for own in groups.values()]
    good = {p.id for p in admitted(scorer, heads)}
    kept = [own for p, own in zip(heads, groups.values(), strict=True) if p.id in good]
    prompts = [p for p in heads if p.id in good]
    out: list[list[float] | None] = [None] * len(records)
    for own, scores in zip(
        kept, score_solutions(scorer, prompts, [[records[i].texts for i in own] for own in kept]), strict=True
    ):
        for i, s in zip(own, scores, strict=True):
            out[i] = s
    return out


def score_states(scorer: StepReward, states: Sequence[State]) -> list[list[float]]:
    """Step scores along each state of a search; blank steps have none."""
    groups: dict[str, list[int]] = {}
    for i, state in enumerate(states):
        groups.setdefault(state.prompt.id, []).append(i)
    prompts = [states[own[0]].prompt for own in groups.values()]
    texts = [[[t for t in states[i].steps if t.strip()] for i in own] for own in groups.values()]
    out: list[list[float]] = [[] for _ in states]
    for own, scores in zip(groups.values(), score_solutions(scorer, prompts, texts), strict=True):
        for i, s in zip(own, scores, strict=True):
            out[i] = s
    return out


def probabilities(scorer: StepScorer, rollout: Rollout) -> Tensor:
    """(N,) float64 probability that each step is good by the scorer's logits, without gradient; NaN where it cannot be
    read."""
    out = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
    readable = scorer.readable(rollout)
    steps = readable.nonzero().flatten()
    with torch.no_grad():
        for part in scorer.micro_batches(rollout, steps) if len(steps) else []:
            part = part[readable[part]]
            out[part] = good_logit(scorer.logits(rollout, part)).sigmoid().double().cpu()
    return out


def admitted(scorer: StepReward | StepScorer, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts a scorer can take; one that reads no media takes all."""
    admit = getattr(scorer, "admit", None)
    return list(prompts) if admit is None else admit(prompts)
