"""Labels without completions: a scorer's or a judge's opinion of every step, or the outcome for all of them.

A `Labeller` takes solutions and returns the labels of each one's steps, None for a solution that cannot be labelled:

    [record of 3 steps, record of 2 steps]  ->  [(1.0, 0.0, None), None]

`annotate_directly` samples the solutions where only questions are given, and writes the same files as `run.annotate`.
"""

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
Labeller = Callable[[Sequence[SolutionRecord]], list[Labels | None]]


def by_scorer(scorer: StepReward, *, threshold: float | None = None) -> Labeller:
    """The scores of a step reward in [0, 1] as soft labels; with a threshold, hard ones (1 iff score >= threshold).

    A verifiable step reward gives exact labels, a trained model those of a teacher. NaN = unlabelled.
    """

    def label(records: Sequence[SolutionRecord]) -> list[Labels | None]:
        labels: list[Labels | None] = []
        for scores in score_records(scorer, records):
            labels.append(None if scores is None else tuple(map(label_of, scores)))
        return labels

    def label_of(score: float) -> float | None:
        if math.isnan(score):
            return None
        if threshold is None and not 0 <= score <= 1:
            raise ValueError(f"score {score:.6g} is no label in [0, 1]; give a threshold to make hard labels of it")
        return score if threshold is None else float(score >= threshold)

    return label


def by_outcome(records: Sequence[SolutionRecord]) -> list[Labels | None]:
    """FreePRM: every step gets the outcome; a solution without verdict is left out."""
    labels: list[Labels | None] = []
    for record in records:
        outcome = record.final_correct
        labels.append(None if outcome is None else pseudo_labels(float(outcome), len(record.steps)))
    return labels


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
        questions: dict[str, Prompt] = {}  # by the id of a record
        steps: dict[str, Sequence[Step]] = {}  # by the id of a question to the judge
        for record in records:
            question = _question(record, ask)
            if question is not None:
                questions[record.id] = question
                steps[question.id] = record.steps
        admitted_ids = {prompt.id for prompt in admitted(extender, list(questions.values()))}
        states = {name: State(prompt) for name, prompt in questions.items() if prompt.id in admitted_ids}

        # In place of a verifier: a reply that can be parsed has the verdict 1, any other is unscored.
        def parsed(samples: Sequence[Sample]) -> list[float | None]:
            verdicts: list[float | None] = []
            for sample in samples:
                labels = parse_labels(sample.output, steps[sample.prompt.id], ask)
                verdicts.append(None if labels is None else 1.0)
            return verdicts

        estimator = Estimator(extender, parsed, store, seed=seed, batch=batch, max_unscored=1.0)
        estimator.estimate(list(states.values()), votes)
        labels: list[Labels | None] = []
        for record in records:
            state = states.get(record.id)
            labels.append(None if state is None else _voted(store, state, record.steps, votes, ask))
        return labels

    return label


class LabelContext(Protocol):
    """The parts of an annotation job that a labeller uses."""

    policy: Any
    seed: int
    batch: int

    @property
    def readings(self) -> CompletionStore:
        """The store of a judge's replies."""

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
    """The majority of the first `votes` replies that can be parsed; None without any."""
    parsed = []
    for reply in store.completions(state)[:votes]:
        labels = parse_labels("".join(reply.written.steps), steps, ask)
        if labels is not None:
            parsed.append(labels)
    return vote(parsed) if parsed else None


def parse_labels(text: str, steps: Sequence[Step], ask: LabelAsk) -> Labels | None:
    """Labels of the steps (1 right, 0 wrong, None without opinion) in a judge's reply; None when it cannot be read."""
    if ask == "critique":
        critique = parse_critique(text, len(steps), [step.kind for step in steps])
        without_opinion = all(label is None for label in critique.labels)
        return None if without_opinion else critique.labels
    if ask == "reference":
        return read_spare(text, len(steps))
    first = parse_first_error(text, len(steps))
    return None if first is None else labels_up_to(first, len(steps))


def _question(record: SolutionRecord, ask: LabelAsk) -> Prompt | None:
    """The prompt to the judge about a solution, None for a solution that it cannot be asked about."""
    try:
        text = judge_prompt(record.question, record.texts, ask, reference_solution(record.prompt) or "")
    except ValueError as error:
        log.warning("record %r is not judged: %s", record.id, error)
        return None
    inputs = {**record.prompt.inputs, "question": text}
    # The options of a choice belong to the question; the judge chooses among other words.
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
    bad: list[dict[str, str]] = []
    with (
        WorkDir(folder).owned(),
        CompletionStore(folder / STORE, fingerprint=fingerprint) as store,
        progress_bar(len(items), progress) as advance,
    ):
        estimator = Estimator(extender, verifier, store, seed=seed, batch=batch)
        with publish_lines(folder / "records.jsonl") as add_line:
            for start in range(0, len(items), batch):
                part = items[start : start + batch]
                written = _written(estimator, part, solutions, separator, bad)
                labelled = _label(written, labeller, add_line, bad)
                trees = [] if rollouts is None else solution_trees(store, labelled)
                if rollouts is not None and trees:
                    rollout = rollout_for(extender, trees, {"grown_by": "solutions", "seed": seed})
                    rollouts.save(rollout, start // batch)
                advance(len(part), estimator.cost)
        if rollouts is not None:
            rollouts.trim(math.ceil(len(items) / batch))
        store.export(folder / "store.jsonl")
        with (folder / "records.jsonl").open() as records:
            costs = {"run": estimator.cost, "paid": store.spent}
            report = summary(dict(about or {}), len(items), records, bad, costs)
        write_json(folder / "report.json", report)
    return report


def _written(
    estimator: Estimator,
    items: Sequence[Prompt | SolutionRecord],
    num_solutions: int,
    separator: str,
    bad: list[dict[str, str]],
) -> list[Solution]:
    """The solutions among the items, or those sampled for the questions; empty ones go to `bad`."""
    given = [(item, as_state(item, separator)) for item in items if isinstance(item, SolutionRecord)]
    prompts = [item for item in items if isinstance(item, Prompt)]
    if not prompts:
        return given
    written = []
    for of_question in sample_solutions(estimator, prompts, num_solutions, separator=separator):
        for record, state in of_question:
            if record.steps:
                written.append((record, state))
            else:
                bad.append({"id": record.id, "reason": "no step: the policy wrote nothing"})
    return written


def _label(
    solutions: Sequence[Solution], labeller: Labeller, add_line: Callable[[str], None], bad: list[dict[str, str]]
) -> list[Solution]:
    """The solutions with their labels, each added to the records; those without a label go to `bad` instead."""
    labelled: list[Solution] = []
    all_labels = labeller([record for record, _ in solutions])
    for (record, state), labels in zip(solutions, all_labels, strict=True):
        labelled.append((replace(record, labels=labels), state))
        if labels is None or all(label is None for label in labels):
            bad.append({"id": record.id, "reason": "no label could be made of what the labeller said"})
            continue
        add_line(json.dumps(_row(record, labels), allow_nan=False))
    return labelled


def _row(record: SolutionRecord, labels: Labels) -> dict[str, Any]:
    """The record with its labels, as it is written."""
    is_hard = all(label in (0.0, 1.0, None) for label in labels)
    labelled = replace(
        record,
        labels=labels,
        label_kind="hard" if is_hard else "soft",
        scope="local",
        first_error=local_first_error(labels) if is_hard else None,
    )
    return record_to_json(check_record(labelled))
