"""Labels that cost no completions: a scorer's or a judge's opinion of every step, or the outcome for all of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mmrl.capabilities import Extender, admitted
from mmrl.growth import rollout_for
from mmrl.reasoning.annotate.consensus import vote
from mmrl.reasoning.annotate.denoise import pseudo_labels
from mmrl.reasoning.annotate.judge import judge_prompt, parse_critique, parse_first_error
from mmrl.reasoning.annotate.labels import Labels, labels_up_to, local_first_error
from mmrl.reasoning.annotate.monte_carlo import Solution, as_state, sample_solutions
from mmrl.reasoning.annotate.output import progress_bar, summary
from mmrl.reasoning.annotate.spare import read_spare
from mmrl.reasoning.annotate.store import STORE, CompletionStore, Estimator
from mmrl.reasoning.annotate.trees import solution_trees
from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.reasoning.records_io import check_record, record_to_json
from mmrl.reasoning.solutions import score_records
from mmrl.registry import register
from mmrl.rollout import OutcomeReward, Prompt, Sample, State, StepReward, reference_solution
from mmrl.rollout_folder import RolloutFolder
from mmrl.scorers.scoring import ScorerSpec
from mmrl.workdir import WorkDir, publish_lines, write_json

log = logging.getLogger(__name__)

LabelAsk = Literal["first_error", "critique", "reference"]
Labeller = Callable[[Sequence[SolutionRecord]], list[Labels | None]]  # None = this solution cannot be labelled


def by_scorer(scorer: StepReward, *, threshold: float | None = None) -> Labeller:
    """The scores of a step reward in [0, 1] as soft labels; with a threshold, hard ones (1 iff score >= threshold).

    A verifiable step reward gives exact labels, a trained model those of a teacher. NaN = unlabelled.
    """

    def label(records: Sequence[SolutionRecord]) -> list[Labels | None]:
        return [None if row is None else tuple(map(one, row)) for row in score_records(scorer, records)]

    def one(score: float) -> float | None:
        if score != score:
            return None
        if threshold is None and not 0 <= score <= 1:
            raise ValueError(f"score {score:.6g} is no label in [0, 1]; give a threshold to make hard labels of it")
        return score if threshold is None else float(score >= threshold)

    return label


def by_outcome(records: Sequence[SolutionRecord]) -> list[Labels | None]:
    """FreePRM: every step gets the outcome; a solution without verdict is left out."""
    return [None if r.final_correct is None else pseudo_labels(float(r.final_correct), len(r.steps)) for r in records]


def by_judge(
    extender: Extender,
    store: CompletionStore,
    *,
    votes: int = 1,
    ask: LabelAsk = "first_error",
    seed: int = 0,
    batch: int = 64,
) -> Labeller:
    """A policy reads each solution `votes` times and its verdicts are put to the vote, step by step (SPARK).

    ask: "first_error" (ProcessBench's index; what follows it is unlabelled), "critique" (an analysis per step), or
        "reference" (every step beside the reference solution of its question, which the record must have: SPARE).
    store: keeps the readings, so that none is paid twice; it counts those that cannot be parsed as unscored. They do
        not vote; a solution without any other, or one that the judge cannot take, is not labelled.
    """

    def label(records: Sequence[SolutionRecord]) -> list[Labels | None]:
        asked = {r.id: p for r in records if (p := _question(r, ask)) is not None}
        taken = {p.id for p in admitted(extender, list(asked.values()))}
        steps = {asked[r.id].id: r.steps for r in records if r.id in asked}

        def parsed(samples: Sequence[Sample]) -> list[float | None]:
            said = [parse_labels(s.output, steps[s.prompt.id], ask) for s in samples]
            return [None if y is None else 1.0 for y in said]

        states = {i: State(p) for i, p in asked.items() if p.id in taken}
        Estimator(extender, parsed, store, seed=seed, batch=batch, max_unscored=1.0).estimate(
            list(states.values()), votes
        )
        return [_voted(store, states[r.id], r.steps, votes, ask) if r.id in states else None for r in records]

    return label


class LabelContext(Protocol):
    """What a labeller of a recipe may ask the job for."""

    policy: Any
    seed: int
    batch: int

    @property
    def readings(self) -> CompletionStore:
        """Where a judge's answers are kept."""

    def scorer(self, name: str | Mapping[str, Any]) -> StepReward:
        """A step reward or saved scorer, on the job's device."""


@register(
    "annotations",
    "scorer",
    writes=("outcome", "step_reward"),
    source="a verifiable step reward, or a teacher",
    scorer="scorer",
)
def scorer_labels(scorer: ScorerSpec, threshold: float | None = None, *, context: LabelContext) -> Labeller:
    """`by_scorer` of a step reward's name or section, or a saved scorer's folder."""
    return by_scorer(context.scorer(scorer), threshold=threshold)


@register("annotations", "judge", writes=("outcome", "step_reward"), source="SPARK; SPARE")
def judge_labels(votes: int = 1, ask: LabelAsk = "first_error", *, context: LabelContext) -> Labeller:
    """`by_judge` by the recipe's policy."""
    return by_judge(context.policy, context.readings, votes=votes, ask=ask, seed=context.seed, batch=context.batch)


@register("annotations", "outcome", writes=("outcome", "step_reward"), source="FreePRM")
def outcome_labels() -> Labeller:
    """`by_outcome`."""
    return by_outcome


def _voted(store: CompletionStore, state: State, steps: Sequence[Step], votes: int, ask: LabelAsk) -> Labels | None:
    parsed = [parse_labels("".join(c.written.steps), steps, ask) for c in store.completions(state)[:votes]]
    known = [p for p in parsed if p is not None]
    return vote(known) if known else None


def parse_labels(text: str, steps: Sequence[Step], ask: LabelAsk) -> Labels | None:
    """Labels of the steps (1 right, 0 wrong, None without opinion) in a judge's reply; None when it cannot be read."""
    if ask == "critique":
        critique = parse_critique(text, len(steps), [step.kind for step in steps])
        return critique.labels if any(y is not None for y in critique.labels) else None
    if ask == "reference":
        return read_spare(text, len(steps))
    first = parse_first_error(text, len(steps))
    return None if first is None else labels_up_to(first, len(steps))


def _question(record: SolutionRecord, ask: LabelAsk) -> Prompt | None:
    """What the judge is asked, None for a solution that cannot be put to it."""
    try:
        text = judge_prompt(record.question, record.texts, ask, reference_solution(record.prompt) or "")
    except ValueError as error:
        log.warning("record %r is not judged: %s", record.id, error)
        return None
    inputs = {**record.prompt.inputs, "question": text}
    inputs.pop("options", None)
    return Prompt(f"{record.id}/judge", inputs)


def annotate_directly(
    extender: Extender,
    verifier: OutcomeReward,
    items: Sequence[Prompt] | Sequence[SolutionRecord],
    labeller: Labeller,
    folder: str | Path,
    *,
    solutions: int = 4,
    about: Mapping[str, Any] | None = None,
    fingerprint: str = "",
    seed: int = 0,
    separator: str = "\n",
    batch: int = 64,
    rollouts: RolloutFolder | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Label solutions by `labeller`; questions are solved `solutions` times each first. Files as `run.annotate`'s.

    Sampled solutions are kept in `store.sqlite`, so none is paid twice. rollouts: where they go as trees, with their
    verdicts as outcomes and the labels as step rewards.
    """
    folder = Path(folder)
    prompts = [i for i in items if isinstance(i, Prompt)]
    given = [(i, as_state(i, separator)) for i in items if isinstance(i, SolutionRecord)]
    bad: list[dict[str, str]] = []
    with (
        WorkDir(folder).owned(),
        CompletionStore(folder / STORE, fingerprint=fingerprint) as store,
        progress_bar(len(items), progress) as advance,
    ):
        estimator = Estimator(extender, verifier, store, seed=seed, batch=batch)
        with publish_lines(folder / "records.jsonl") as add:
            for a in range(0, len(items), batch):
                part = given[a : a + batch]
                if prompts:
                    found = sample_solutions(estimator, prompts[a : a + batch], solutions, separator=separator)
                    written = [solution for own in found for solution in own]
                    part = [(r, s) for r, s in written if r.steps]
                    bad += [
                        {"id": r.id, "reason": "no step: the policy wrote nothing"} for r, _ in written if not r.steps
                    ]
                labelled: list[Solution] = []
                for (record, state), labels in zip(part, labeller([r for r, _ in part]), strict=True):
                    labelled.append((replace(record, labels=labels), state))
                    if labels is None or all(y is None for y in labels):
                        bad.append({"id": record.id, "reason": "no label could be made of what the labeller said"})
                        continue
                    add(json.dumps(_row(record, labels), allow_nan=False))
                if rollouts is not None and (trees := solution_trees(store, labelled)):
                    rollouts.save(rollout_for(extender, trees, {"grown_by": "solutions", "seed": seed}), a // batch)
                advance(len(part) if given else min(batch, len(prompts) - a), estimator.cost)
        if rollouts is not None:
            rollouts.trim(math.ceil(len(items) / batch))
        store.export(folder / "store.jsonl")
        with (folder / "records.jsonl").open() as records:
            costs = {"run": estimator.cost, "paid": store.spent}
            report = summary(dict(about or {}), len(items), records, bad, costs)
        write_json(folder / "report.json", report)
    return report


def _row(record: SolutionRecord, labels: Labels) -> dict[str, Any]:
    """The record with its labels, as it is written."""
    soft = any(y not in (0.0, 1.0, None) for y in labels)
    labelled = replace(
        record, labels=labels, label_kind="soft" if soft else "hard", scope="local",
        first_error=None if soft else local_first_error(labels),
    )  # fmt: skip
    return record_to_json(check_record(labelled))
