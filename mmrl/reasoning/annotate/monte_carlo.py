"""Monte-Carlo labels: the value of a prefix is the share of its completions that reach a right answer.

Math-Shepherd; VisualPRM with `early_stop`. A value is the probability to recover, not the rightness of a step: a
completer that repairs errors finds the first one too late, a weak one too early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrl.reasoning.annotate.store import Completion, Estimator
from mmrl.reasoning.records import Counts, SolutionRecord, record_of
from mmrl.registry import register
from mmrl.rollout import Prompt, Sample, State

Solution = tuple[SolutionRecord, State]  # what is known of it, and what the policy goes on from


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
    return State(record.prompt, (*(t + separator for t in before), last))


def whole_steps(state: State, separator: str = "\n") -> State:
    """The same text in steps that say something; white space and separators alone join the step before.

    Before the first step they join it. Nothing but separators gives no steps.
    """
    ends: list[int] = []  # of each whole step, how many of the written ones it ends after
    for i, piece in enumerate(state.steps, 1):
        if step_text(piece, separator):
            ends.append(i)
        elif ends:
            ends[-1] = i
    starts = [0, *ends][: len(ends)]
    steps = tuple("".join(state.steps[a:b]) for a, b in zip(starts, ends, strict=True))
    ids = tuple(tuple(i for own in state.ids[a:b] for i in own) for a, b in zip(starts, ends, strict=True))
    path = tuple(state.path[b - 1] for b in ends) if state.path else ()
    return State(state.prompt, steps, state.done, ids if state.ids else (), path)


def step_text(written: str, separator: str = "\n") -> str:
    """What a step says, without white space and separators around it."""
    mark = separator.strip()
    return written.strip().removeprefix(mark).removesuffix(mark).strip()


def sample_solutions(
    estimator: Estimator, prompts: Sequence[Prompt], n: int, *, separator: str = "\n"
) -> list[list[Solution]]:
    """n solutions of each prompt, equal ones once. They are the completions of the empty prefix, stored like others.

    A record's `meta` has the prompt's columns, `question_id`, `draws` (how many of the n said the same), `truncated`,
    and `root`, the counts of the empty prefix: [correct, total].
    """
    tallies = estimator.estimate([State(p) for p in prompts], n)
    out: list[list[Solution]] = []
    for prompt, tally in zip(prompts, tallies, strict=True):
        found: dict[tuple[str, ...], list[tuple[int, Completion, State]]] = {}
        for i, completion in enumerate(estimator.store.completions(State(prompt))[:n]):
            state = whole_steps(State(prompt).then(completion.written), separator)
            found.setdefault(state.steps, []).append((i, completion, state))
        out.append([])
        for steps, draws in found.items():
            i, completion, state = draws[0]
            cut = completion.written.truncated
            about: dict[str, Any] = {"question_id": prompt.id, "draws": len(draws), "truncated": cut}
            about["root"] = [tally.correct, tally.total]
            record = replace(
                record_of(prompt, [step_text(s, separator) for s in steps]),
                id=f"{prompt.id}/{i}",
                final_correct=completion.correct,
            )
            out[-1].append((replace(record, meta=dict(record.meta) | about), state))
    return out


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
    live = list(range(len(solutions)))
    for t in range(max((len(s.steps) for s in states), default=0) - 1):
        live = [i for i in live if t < len(states[i].steps) - 1]
        tallies = estimator.estimate([states[i].upto(t + 1) for i in live], k)
        for i, tally in zip(live, tallies, strict=True):
            counts[i].append(tally.counts)
        if early_stop:
            live = [i for i in live if counts[i][t].correct or not counts[i][t].total]
    done = []
    for (record, state), final, seen in zip(solutions, finals, counts, strict=True):
        missing = len(state.steps) - len(seen)
        ended = Counts(int(bool(final)), int(final is not None))
        stopped = early_stop and any(c.total and not c.correct for c in seen)
        seen += [Counts(0, 0)] * (missing if stopped else missing - 1)
        done.append(replace(record, mc=(*seen, *([] if stopped else [ended])), final_correct=final))
    return done


def _outcomes(estimator: Estimator, solutions: Sequence[Solution]) -> list[bool | None]:
    """Whether each answer is right: as the record says, else as the verifier finds."""
    unknown = [state for record, state in solutions if record.final_correct is None]
    verdicts = iter(estimator.verify([Sample(s.prompt, s.text, len(s.steps) - 1) for s in unknown]))
    return [next(verdicts) if r.final_correct is None else r.final_correct for r, _ in solutions]
