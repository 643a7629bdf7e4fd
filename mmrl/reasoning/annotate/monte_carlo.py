"""Monte-Carlo labels: the value of a prefix is the share of its completions that reach a right answer.

Math-Shepherd; VisualPRM with `early_stop`. A value is the probability to recover, not the rightness of a step: a
completer that repairs errors finds the first one too late, a weak one too early.

A solution is a record and a state. The record has texts without separators; the state has the steps as the policy
wrote them, from which it can go on:

    record.texts ("2 + 2 = 4", "So 4.")    state.steps ("2 + 2 = 4\\n", "So 4.")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mmrl.reasoning.annotate.store import Completion, Estimator
from mmrl.reasoning.records import Counts, SolutionRecord, record_of
from mmrl.registry import register
from mmrl.rollout import Prompt, Sample, State

Solution = tuple[SolutionRecord, State]


@register("annotations", "monte_carlo", source="Math-Shepherd, VisualPRM, MM-PRM")
@dataclass(frozen=True)
class MonteCarlo:
    """Options. k: completions per prefix (8 Math-Shepherd, 16 VisualPRM). solutions: sampled per question.

    early_stop: after the first value 0 of a solution its later steps are not sampled; their counts have total 0.
    """

    k: int = 8
    solutions: int = 4
    early_stop: bool = False

    def __post_init__(self) -> None:
        if self.k < 1 or self.solutions < 1:
            raise ValueError(f"monte_carlo: k={self.k} and solutions={self.solutions} must be at least 1")


def as_state(record: SolutionRecord, separator: str = "\n") -> State:
    """A solution from elsewhere: `separator` is put after every step but the last, as the policy would write it."""
    if not record.steps:
        return State(record.prompt)
    *before, last = record.texts
    return State(record.prompt, (*(text + separator for text in before), last))


def whole_steps(state: State, separator: str = "\n") -> State:
    """The same text in steps that say something; white space and separators alone join the step before.

    Before the first step they join it. Nothing but separators gives no steps.
    """
    # For each whole step the number of written steps up to its end.
    ends: list[int] = []
    for count, written in enumerate(state.steps, start=1):
        if step_text(written, separator):
            ends.append(count)
        elif ends:
            ends[-1] = count
    starts = [0, *ends[:-1]]
    steps, ids = [], []
    for start, end in zip(starts, ends, strict=False):
        steps.append("".join(state.steps[start:end]))
        ids.append(tuple(chain.from_iterable(state.ids[start:end])))
    path = tuple(state.path[end - 1] for end in ends) if state.path else ()
    return State(state.prompt, tuple(steps), state.done, tuple(ids) if state.ids else (), path)


def step_text(written: str, separator: str = "\n") -> str:
    """The text of a step without white space and separators around it."""
    mark = separator.strip()
    return written.strip().removeprefix(mark).removesuffix(mark).strip()


def sample_solutions(
    estimator: Estimator, prompts: Sequence[Prompt], n: int, *, separator: str = "\n"
) -> list[list[Solution]]:
    """n solutions of each prompt, equal ones once. They are the completions of the empty prefix, stored like others.

    A record's `meta` has the prompt's columns, `question_id`, `draws` (how many of the n said the same), `truncated`,
    and `root`, the counts of the empty prefix: [correct, total].
    """
    tallies = estimator.estimate([State(prompt) for prompt in prompts], n)
    solutions: list[list[Solution]] = []
    for prompt, tally in zip(prompts, tallies, strict=True):
        # By the written steps, since equal solutions count once: the index of each draw, its completion and state.
        distinct: dict[tuple[str, ...], list[tuple[int, Completion, State]]] = {}
        for i, completion in enumerate(estimator.store.completions(State(prompt))[:n]):
            state = whole_steps(State(prompt).then(completion.written), separator)
            distinct.setdefault(state.steps, []).append((i, completion, state))
        of_prompt = []
        for steps, draws in distinct.items():
            i, completion, state = draws[0]
            record = record_of(prompt, [step_text(step, separator) for step in steps])
            about: dict[str, Any] = {
                "question_id": prompt.id,
                "draws": len(draws),
                "truncated": completion.written.truncated,
                "root": [tally.correct, tally.total],
            }
            record = replace(
                record, id=f"{prompt.id}/{i}", final_correct=completion.correct, meta=dict(record.meta) | about
            )
            of_prompt.append((record, state))
        solutions.append(of_prompt)
    return solutions


def estimate_steps(
    estimator: Estimator, solutions: Sequence[Solution], k: int, *, early_stop: bool = False
) -> list[SolutionRecord]:
    """The records with counts for every step and `final_correct`; level by level, one batch of prefixes per level.

    The last step is never sampled: its count is the outcome of the solution itself, 1 of 1 or 0 of 1 (0 of 0 when the
    verifier has no verdict). With `early_stop`, the steps after the first with 0 correct of its completions, the last
    one included, have total 0.
    """
    finals = _outcomes(estimator, solutions)
    states = [state for _, state in solutions]
    counts: list[list[Counts]] = [[] for _ in solutions]
    longest = max((len(state.steps) for state in states), default=0)
    # Solutions that are sampled further; a solution leaves before its last step, or after its first value 0.
    live = list(range(len(solutions)))
    for t in range(longest - 1):
        live = [i for i in live if t < len(states[i].steps) - 1]
        tallies = estimator.estimate([states[i].upto(t + 1) for i in live], k)
        for i, tally in zip(live, tallies, strict=True):
            counts[i].append(tally.counts)
        if early_stop:
            live = [i for i in live if not _is_zero(counts[i][t])]
    labelled = []
    for (record, state), final, sampled in zip(solutions, finals, counts, strict=True):
        num_missing = len(state.steps) - len(sampled)
        if early_stop and any(map(_is_zero, sampled)):
            rest = [Counts(0, 0)] * num_missing
        else:
            outcome = Counts(int(bool(final)), int(final is not None))
            rest = [Counts(0, 0)] * (num_missing - 1) + [outcome]
        labelled.append(replace(record, mc=(*sampled, *rest), final_correct=final))
    return labelled


def _is_zero(counts: Counts) -> bool:
    """True where completions were scored and none of them is right."""
    return counts.total > 0 and counts.correct == 0


def _outcomes(estimator: Estimator, solutions: Sequence[Solution]) -> list[bool | None]:
    """The outcome of each solution: as its record says, else by the verifier, None without a verdict."""
    unknown = [state for record, state in solutions if record.final_correct is None]
    samples = [Sample(state.prompt, state.text, len(state.steps) - 1) for state in unknown]
    verdicts = iter(estimator.verify(samples))
    outcomes = []
    for record, _ in solutions:
        outcomes.append(next(verdicts) if record.final_correct is None else record.final_correct)
    return outcomes
