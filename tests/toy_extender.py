"""A scripted policy for annotation and search: arithmetic chains, planted wrong steps, completers good and bad.

The question "5 +3 *2" has the solution "5 + 3 = 8\n8 * 2 = 16\nanswer: 16": one step per operation, then the answer.
A wrong number stays wrong, because every operation is one-to-one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmrl.reasoning.records import SolutionRecord, Step
from mmrl.rollout import Continuation, Prompt, Sample, State

_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class Killed(RuntimeError):
    """What the extender raises at the call it was told to die at."""


def chain(name: str, operations: int, seed: int = 0) -> Prompt:
    """A question with `operations` operations; its solution has one step more."""
    rng = random.Random(f"{seed}/{name}")
    ops = [rng.choice("+-*") + str(rng.randint(2, 9)) for _ in range(operations)]
    prompt = Prompt(name, {"question": " ".join([str(rng.randint(1, 9)), *ops]), "images": []})
    solution = "".join(write(prompt, 0, numbers(prompt)[0]))
    return Prompt(name, prompt.inputs, {"answer": str(numbers(prompt)[-1]), "solution": solution})


def numbers(prompt: Prompt) -> list[int]:
    """The right number before every operation, and the last result."""
    first, *ops = prompt.inputs["question"].split()
    values = [int(first)]
    for op in ops:
        values.append(_APPLY[op[0]](values[-1], int(op[1:])))
    return values


def write(prompt: Prompt, start: int, value: int, wrong: int | None = None, shift: int = 1) -> tuple[str, ...]:
    """Steps from number `start` on, beginning with `value`; step `wrong` miscounts by `shift`. Separators included."""
    ops, out = prompt.inputs["question"].split()[1:], []
    for t in range(start, len(ops)):
        after = _APPLY[ops[t][0]](value, int(ops[t][1:])) + (shift if t == wrong else 0)
        out.append(f"{value} {ops[t][0]} {ops[t][1:]} = {after}\n")
        value = after
    return (*out, f"answer: {value + (shift if wrong == len(ops) else 0)}") if start <= len(ops) else ()


def planted(prompt: Prompt, wrong: int | None, name: str | None = None) -> SolutionRecord:
    """The solution whose first wrong step is `wrong` (None: all right), for a chain or its answer step."""
    steps = write(prompt, 0, numbers(prompt)[0], wrong)
    texts = tuple(Step(s.removesuffix("\n")) for s in steps)
    answer = prompt.reference["answer"]
    return SolutionRecord(name or f"{prompt.id}/{wrong}", prompt.inputs["question"], texts, answer=answer)


def first_wrong(prompt: Prompt, steps: Sequence[str]) -> int:
    """0-based index of the first wrong step, -1 without one."""
    right = write(prompt, 0, numbers(prompt)[0])
    return next((i for i, s in enumerate(steps) if s.strip() != right[i].strip()), -1)


def verify(samples: Sequence[Sample]) -> list[float | None]:
    """1 for the right answer, 0 for a wrong one or none, None where the reference has none."""
    return [_verdict(s) for s in samples]


def _verdict(sample: Sample) -> float | None:
    answer = (sample.prompt.reference or {}).get("answer")
    return None if answer is None else float(sample.output.rpartition("answer: ")[2] == answer)


@dataclass
class ToyExtender:
    """Goes on from any prefix of a chain, from the number that the prefix ends with.

    slips: share of the n continuations, the first ones, that make one mistake. With 0 < slips < 1 a right prefix has
        right and wrong continuations for certain; with 0 the completer is perfect.
    repairs: probability that a continuation of a wrong prefix goes on from the right number instead.
    fails: probability that a continuation makes a mistake, slips or not.
    die_at: number of the call (from 0) that raises `Killed`, as a kill before it returns.
    seen: texts of all states asked so far. Tokens are words, each with log-prob -1.
    """

    slips: float = 0.0
    repairs: float = 0.0
    fails: float = 0.0
    die_at: int | None = None
    calls: int = 0
    completions: int = 0
    seen: list[str] = field(default_factory=list)

    def extend(
        self,
        states: Sequence[State],
        n: int,
        *,
        seed: int,
        steps: int | None = None,
        temperature: float | None = None,
    ) -> list[list[Continuation]]:
        self.calls += 1
        if self.die_at == self.calls - 1:
            raise Killed(f"call {self.die_at}")
        assert not any(s.done for s in states)
        self.completions += n * len(states)
        self.seen += [s.text for s in states]
        return [self._continuations(s, n, seed, steps, temperature) for s in states]

    def _continuations(
        self, state: State, n: int, seed: int, steps: int | None, temperature: float | None
    ) -> list[Continuation]:
        rng = random.Random(f"{seed}/{state.prompt.id}/{state.text}")
        slips = 0 if temperature == 0 else round(self.slips * n)
        return [self._one(state, rng, i < slips, steps) for i in range(n)]

    def _one(self, state: State, rng: random.Random, slip: bool, limit: int | None) -> Continuation:
        right = numbers(state.prompt)
        written = state.text.splitlines()
        start = len(written)
        value = int(re.findall(r"-?\d+", written[-1])[-1]) if written else right[0]
        if value != right[start] and rng.random() < self.repairs:
            value = right[start]
        slip = (rng.random() < self.fails) or slip
        wrong = rng.randint(start, len(right) - 1) if slip else None
        new = write(state.prompt, start, value, wrong, rng.choice((1, 2, 3)))
        cut = new[:limit]
        return Continuation(cut, tuple((-1.0,) * len(s.split()) for s in cut), done=len(cut) == len(new))
