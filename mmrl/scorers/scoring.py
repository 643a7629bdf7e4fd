"""Loading a step scorer, and scoring with it: written solutions, states of a search, or the steps of a rollout."""

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

# The file beside every saved scorer: the component that reads it, and its options.
RECORD = "step_format.json"


def load_scorer(
    scorer: str | Path | Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    needs: Needs | None = None,
    untrained: bool = False,
) -> StepReward:
    """A step reward by its registered name, by the folder where one was saved, or by a section of a recipe.

    Args:
        scorer: a name, a folder, or a mapping with either as `name` and options beside it.
        needs: protocols that the scorer has to follow.
        untrained: accept one with a new head, for a run in which it learns.
    Raises:
        ComponentError: no such name or option, an untrained head, or a scorer that lacks a protocol; refused before
            the model is loaded where its class is known.
        ValueError: a folder without a scorer's record.
    """
    name, chosen = _resolved(scorer, options)
    if not untrained:
        check_trained({"name": name, **chosen})
    return build_with(needs or {}, "scorers", "scorer", name, chosen)


def check_trained(scorer: str | Mapping[str, Any], where: str = "scorer") -> None:
    """Refuse a scorer whose head is new, before anything is loaded: its scores are random numbers.

    A row declares it by its fact `untrained`: a function from options, defaults included, to the reason, "" = trained.

    Raises:
        ComponentError: the head is untrained; the message names `where`.
    """
    name, chosen = _resolved(scorer)
    row = find("scorers", name)
    reason = row.facts.get("untrained")
    defaults = {option_name: option.default for option_name, option in row.options.items()}
    why = reason(defaults | chosen) if reason is not None else ""
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
    """The name (or folder) of a scorer, and its options."""
    if not isinstance(scorer, Mapping):
        return str(scorer), {}
    options = dict(scorer)
    if "name" not in options:
        raise ComponentError(f"scorer needs a name (or a saved scorer's folder); known: {', '.join(names('scorers'))}")
    return str(options.pop("name")), options


def _resolved(
    scorer: str | Path | Mapping[str, Any], options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """The registered name of a scorer and its options; those of a saved scorer name its folder as `model`."""
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
    result: list[list[list[float]]] = []
    for paths_of_prompt in paths:
        result.append([[scores[step] for step in path] for path in paths_of_prompt])
    return result


def score_states(scorer: StepReward, states: Sequence[State]) -> list[list[float]]:
    """Step scores along each state of a search; blank steps have none."""
    # States of one prompt stand together, so that their common prefixes are computed once.
    states_of_prompt: dict[str, list[int]] = {}
    for i, state in enumerate(states):
        states_of_prompt.setdefault(state.prompt.id, []).append(i)
    prompts, texts = [], []
    for indices in states_of_prompt.values():
        prompts.append(states[indices[0]].prompt)
        texts.append([[text for text in states[i].steps if text.strip()] for i in indices])
    scores_of_state: list[list[float]] = [[] for _ in states]
    for indices, scores in zip(states_of_prompt.values(), score_solutions(scorer, prompts, texts), strict=True):
        for i, state_scores in zip(indices, scores, strict=True):
            scores_of_state[i] = state_scores
    return scores_of_state


def probabilities(scorer: StepScorer, rollout: Rollout) -> Tensor:
    """(N,) float64 probability that each step is good, without gradient; NaN where a step cannot be read."""
    return good_logits(scorer, rollout).sigmoid()


def good_logits(scorer: StepScorer, rollout: Rollout) -> Tensor:
    """(N,) float64 logit of "good" of each step, without gradient; NaN where a step cannot be read.

    Raises:
        NotFiniteError: a step that can be read has no finite logit.
    """
    logits = torch.full((len(rollout.tree),), torch.nan, dtype=torch.float64)
    readable = scorer.readable(rollout)
    steps = readable.nonzero().flatten()
    parts = scorer.micro_batches(rollout, steps) if len(steps) else []
    with torch.no_grad():
        for part in parts:
            # A micro-batch of whole prompts may hold further steps.
            part = part[readable[part]]
            logits[part] = good_logit(scorer.logits(rollout, part)).double().cpu()
    check_finite(logits, f"the network of scorer {type(scorer).__name__}", "steps", readable)
    return logits
