"""Scores for solutions: records, states of a search, or plain texts, by any step reward; and loading a scorer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from torch import Tensor

from mmrl.capabilities import Needs, build_with
from mmrl.finite import check_finite
from mmrl.losses.reward import good_logit
from mmrl.registry import ComponentError, Row, find, names
from mmrl.rollout import Prompt, Rollout, State, StepReward, StepScorer
from mmrl.scorers.labelled import solution_forest

RECORD = "step_format.json"  # beside every saved scorer: which component reads it, and how


def load_scorer(
    scorer: str | Path | Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    needs: Needs | None = None,
    untrained: bool = False,
) -> StepReward:
    """A step reward: a registered name, a saved scorer's folder, or a section with either as `name`, options beside.

    Args:
        needs: protocols that the scorer has to follow.
        untrained: take one with a new head as well, for a run in which it learns.
    Raises:
        ComponentError: no such name or option, an untrained head, or a scorer without a protocol, refused before it is
            loaded where its class is known. ValueError: a folder without a scorer's record.
    """
    name, chosen = _resolved(scorer, options)
    if not untrained:
        check_trained({"name": name, **chosen})
    return build_with(needs or {}, "scorers", "scorer", name, chosen)


def check_trained(scorer: str | Mapping[str, Any], where: str = "scorer") -> None:
    """Refuse a scorer whose head is new, before anything is loaded: its scores are random numbers.

    A row says so by its fact `untrained`: (options, defaults included) -> why, "" = it is trained.

    Raises:
        ComponentError: it is; the message names `where`.
    """
    name, chosen = _resolved(scorer)
    row = find("scorers", name)
    reason = row.facts.get("untrained")
    why = reason({k: o.default for k, o in row.options.items()} | chosen) if reason is not None else ""
    if why:
        raise ComponentError(
            f"{where}: the head of {row.name!r} is untrained ({why}), so its scores are random numbers. Train it "
            "(`trainer: step_reward`) and name the folder of the result, or let it learn along (`online:`)"
        )


def check_scorer(scorer: str | Mapping[str, Any]) -> str | Mapping[str, Any]:
    """The same scorer, after checking that `load_scorer` knows its name and options; nothing is loaded."""
    scorer_row(scorer)
    return scorer


def scorer_row(scorer: str | Mapping[str, Any]) -> Row:
    """The row that `load_scorer` would make, its options checked."""
    name, chosen = _resolved(scorer)
    row = find("scorers", name)
    row.check(chosen, "scorer")
    return row


# An option that is a scorer: name, folder or section; checked when the recipe is read.
ScorerSpec = Annotated[str | Mapping[str, Any], AfterValidator(check_scorer)]


def aggregate_of(scorer: str | Path | Mapping[str, Any], default: str = "min") -> str:
    """The aggregation that a saved scorer was made for."""
    name, options = _split(scorer)
    for folder in (name, options.get("model", name)):
        file = Path(str(folder)) / RECORD
        if file.is_file():
            return str(json.loads(file.read_text())["format"].get("aggregate", default))
    return default


def _split(scorer: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name (or folder) and options."""
    if not isinstance(scorer, Mapping):
        return str(scorer), {}
    options = dict(scorer)
    if "name" not in options:
        raise ComponentError(f"scorer needs a name (or a saved scorer's folder); known: {', '.join(names('scorers'))}")
    return str(options.pop("name")), options


def _resolved(
    scorer: str | Path | Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Registered name and options; those of a saved scorer name its folder as `model`."""
    name, chosen = _split(scorer)
    chosen |= dict(options or {})
    folder = Path(name)
    if not folder.is_dir():
        if len(folder.parts) > 1 and ":" not in name:
            raise FileNotFoundError(f"no scorer in {folder}: the folder does not exist")
        return name, chosen
    try:
        record = json.loads((folder / RECORD).read_text())
        kind = record["scorer"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} is no saved scorer ({error}); it needs {RECORD}, as scorer.save writes it"
        ) from error
    return kind, {"model": str(folder), **chosen}


def score_solutions(
    scorer: StepReward, prompts: Sequence[Prompt], solutions: Sequence[Sequence[Sequence[str]]]
) -> list[list[list[float]]]:
    """Per prompt and solution, one score per step: common prefixes are computed once, all in one call.

    A step without score is NaN: too long, or with a marker inside. A solution without steps has an empty list.
    """
    rollout, paths = solution_forest(prompts, solutions)
    scores = scorer(rollout).tolist() if len(rollout.tree) else []
    return [[[scores[v] for v in path] for path in own] for own in paths]


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
    return good_logits(scorer, rollout).sigmoid()


def good_logits(scorer: StepScorer, rollout: Rollout) -> Tensor:
    """(N,) float64 logit of "good" of each step, without gradient; NaN where it cannot be read.

    Raises:
        NotFiniteError: a step that can be read has no finite logit.
    """
    out = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
    readable = scorer.readable(rollout)
    steps = readable.nonzero().flatten()
    with torch.no_grad():
        for part in scorer.micro_batches(rollout, steps) if len(steps) else []:
            part = part[readable[part]]
            out[part] = good_logit(scorer.logits(rollout, part)).double().cpu()
    check_finite(out, f"the network of scorer {type(scorer).__name__}", "steps", readable)
    return out
