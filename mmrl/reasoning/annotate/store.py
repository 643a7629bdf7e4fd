"""What annotation has paid for: completions of prefixes with their verdicts, in a file that only grows.

A prefix is known by what decides its value: the question, its answer, the text written so far, and a fingerprint of
policy and sampling. Whoever asks for the value of a prefix again, later, in another solution or after a kill, gets
what is there, and only what is missing is sampled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from mmrl.capabilities import Extender
from mmrl.reasoning.records import Counts
from mmrl.rewards.scoring import RewardError, wrong_count
from mmrl.rollout import Continuation, OutcomeReward, Sample, State

log = logging.getLogger(__name__)

_ENOUGH = 200  # completions after which a share of unscored ones means something


@dataclass(frozen=True)
class Completion:
    """One way on from a prefix, to its end. correct: None = the verifier could not score it. tokens: what it cost."""

    written: Continuation
    correct: bool | None
    tokens: int


@dataclass(frozen=True)
class Tally:
    """What is known of a prefix: `correct` of `total` scored completions, `drawn` in all, `tokens` they took."""

    correct: int = 0
    total: int = 0
    drawn: int = 0
    tokens: int = 0

    @property
    def counts(self) -> Counts:
        """The numbers that belong into a record."""
        return Counts(self.correct, self.total)

    @property
    def value(self) -> float | None:
        """Monte-Carlo value correct / total in [0, 1]; None when no completion could be scored."""
        return self.correct / self.total if self.total else None


def prefix_key(state: State, fingerprint: str = "") -> str:
    """Hash of (fingerprint, inputs, answer, text): equal for one prefix of different solutions and prompt ids.

    The answer is `reference["answer"]`, or the whole reference without one; what else a reference holds may differ
    from solution to solution.
    """
    reference = state.prompt.reference
    answer = reference["answer"] if isinstance(reference, Mapping) and "answer" in reference else reference
    what = json.dumps([fingerprint, dict(state.prompt.inputs), answer, state.text], sort_keys=True)
    return hashlib.sha256(what.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Row:
    """Where one line lies and what it counts; completions stay on disk. start: how many were drawn before."""

    start: int
    drawn: int
    correct: int
    total: int
    tokens: int
    file: Path
    offset: int


class CompletionStore:
    """An append-only JSON-lines file of completions; other files `store*.jsonl` beside it are read, never written.

    A last line that a kill cut is removed from the own file and ignored in the others. When two files hold the same
    draws of a prefix (two ranks paid for it), they count once.

    Args:
        file: written by this process alone; a lock beside it sees to that.
        fingerprint: names policy and sampling settings; prefixes stored under another one are not used.
        keep: keep the texts of completions. Those of empty prefixes, which are solutions, are kept in any case.
    Raises:
        ValueError: another process writes the file, or a line that is not the last is broken.
    """

    def __init__(self, file: str | Path, *, fingerprint: str = "", keep: bool = True) -> None:
        self.file, self.fingerprint, self.keep = Path(file), fingerprint, keep
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(f"{self.file}.lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"{self.file} is being written by another process; give every rank its own file"
            ) from error
        try:
            self._rows, self._spent = _read_all(self.file)
            self._out = self.file.open("ab")
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let another process write it."""
        self._out.close()
        self._lock.release()

    def key(self, state: State) -> str:
        """The state's name in this store."""
        return prefix_key(state, self.fingerprint)

    def get(self, state: State) -> Tally:
        """What is known of a state; all zeros when nothing is."""
        rows = self._rows.get(self.key(state), [])
        return Tally(*(sum(getattr(r, n) for r in rows) for n in ("correct", "total", "drawn", "tokens")))

    def completions(self, state: State) -> list[Completion]:
        """The completions of a state, in the order in which they were drawn.

        Raises:
            ValueError: their texts were not kept.
        """
        found: list[Completion] = []
        for row in self._rows.get(self.key(state), []):
            with row.file.open("rb") as f:
                f.seek(row.offset)
                texts = json.loads(f.readline())["completions"]
            if texts is None:
                raise ValueError(
                    f"{row.file}: completions of prompt {state.prompt.id!r} after {len(state.steps)} steps were not "
                    "kept; annotate in another folder with keep=True"
                )
            found += map(_completion, texts)
        return found

    def add(self, state: State, new: Sequence[Completion]) -> None:
        """Append completions of a state; they are on disk when this returns."""
        key, before = self.key(state), self.get(state).drawn
        scored = [c.correct for c in new if c.correct is not None]
        numbers = {
            "start": before, "drawn": len(new), "correct": sum(scored), "total": len(scored),
            "tokens": sum(c.tokens for c in new),
        }  # fmt: skip
        kept = self.keep or not state.text
        texts = [_entry(c) for c in new] if kept else None
        about = {"key": key, "prompt": state.prompt.id, "after": len(state.steps)}
        row = _Row(**numbers, file=self.file, offset=self._out.tell())
        self._out.write(json.dumps(about | numbers | {"completions": texts}).encode() + b"\n")
        self._out.flush()
        self._rows.setdefault(key, []).append(row)
        _count(self._spent, row)

    @property
    def spent(self) -> dict[str, int]:
        """What the folder's files have cost: prefixes, completions, unscored, tokens; paid twice counts twice."""
        return {"prefixes": len(self._rows)} | self._spent


def _entry(completion: Completion) -> list[Any]:
    """A completion as it is written: with its token ids and log-probs, where the policy tells ids."""
    written = completion.written
    entry = [written.steps, completion.correct, completion.tokens, written.truncated]
    if not written.ids:
        return entry
    # nine digits are a float32
    logps = [[float(f"{x:.9g}") for x in step] for step in written.logps]
    return [*entry, written.ids, logps]


def _completion(entry: Sequence[Any]) -> Completion:
    steps, correct, tokens, truncated, *sampled = entry
    ids, logps = (tuple(map(tuple, x)) for x in sampled) if sampled else ((), ())
    return Completion(Continuation(tuple(steps), logps, True, truncated, ids), correct, tokens)


def _count(spent: dict[str, int], row: _Row) -> None:
    spent["completions"] += row.drawn
    spent["unscored"] += row.drawn - row.total
    spent["tokens"] += row.tokens


def _read_all(own: Path) -> tuple[dict[str, list[_Row]], dict[str, int]]:
    """Rows of every key that follow on each other, and what all rows cost. A half line of the own file is cut off."""
    found, end = _read(own) if own.is_file() else ([], 0)
    if own.is_file() and end < own.stat().st_size:
        log.warning("%s: the last line was cut by a kill; %d bytes removed", own, own.stat().st_size - end)
        with own.open("r+b") as f:
            f.truncate(end)
    for other in sorted(own.parent.glob("store*.jsonl")):
        if other != own:
            found += _read(other)[0]
    rows: dict[str, list[_Row]] = {}
    spent = dict.fromkeys(("completions", "unscored", "tokens"), 0)
    for key, row in sorted(found, key=lambda pair: (pair[1].start, -pair[1].drawn)):
        chain = rows.setdefault(key, [])
        if row.start == sum(r.drawn for r in chain):  # else another file has these draws
            chain.append(row)
        _count(spent, row)
    return rows, spent


def _read(file: Path) -> tuple[list[tuple[str, _Row]], int]:
    """Key and row of every whole line, and where the last one ends."""
    found, offset = [], 0
    with file.open("rb") as f:
        for number, line in enumerate(f, start=1):
            if not line.endswith(b"\n"):
                break  # a rank is writing it, or was killed
            try:
                row: dict[str, Any] = json.loads(line)
                numbers = {k: int(row[k]) for k in ("start", "drawn", "correct", "total", "tokens")}
                found.append((str(row["key"]), _Row(**numbers, file=file, offset=offset)))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file} line {number} is broken ({error}); delete that line and run again"
                ) from error
            offset += len(line)
    return found, offset


class Estimator:
    """Values of prefixes: asks the store first and the policy for what is missing, many prefixes per call.

    Args:
        extender: the policy. verifier: a completion is correct from 0.5 on; None = not scored, in no total.
        seed: with it, what a prefix draws depends on (seed, prompt id, its text, how many it had) alone.
        temperature: None for the policy's own.
        batch: most prefixes per call of the policy.
        max_unscored: share in [0, 1] of the completions of this run without a verdict, above which it stops.
        on_call: called after every call of the policy.

    Attributes:
        cost: of this run: calls, completions, unscored, tokens, and reused, completions that were asked for again.
    """

    def __init__(
        self,
        extender: Extender,
        verifier: OutcomeReward,
        store: CompletionStore,
        *,
        seed: int = 0,
        temperature: float | None = None,
        batch: int = 64,
        max_unscored: float = 0.2,
        on_call: Callable[[], None] | None = None,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch={batch}: a call needs at least 1 prefix")
        self.extender, self.verifier, self.store = extender, verifier, store
        self.seed, self.temperature, self.batch, self.max_unscored = seed, temperature, batch, max_unscored
        self.on_call = on_call
        self.cost = dict.fromkeys(("calls", "completions", "unscored", "tokens", "reused"), 0)

    def estimate(self, states: Sequence[State], k: int) -> list[Tally]:
        """Estimates of at least `k` completions each, one per state; equal prefixes are sampled once.

        A prefix with more than `k` stored completions keeps them all.

        Raises:
            ValueError: k below 1, a state that has ended, a policy that returns another number of continuations.
            RewardError: the verifier broke its contract, or more than `max_unscored` have no verdict.
        """
        if k < 1:
            raise ValueError(f"k={k}: an estimate needs at least 1 completion")
        first: dict[str, State] = {}
        for state in states:
            if state.done:
                raise ValueError(f"prompt {state.prompt.id!r}: a solution that has ended cannot be completed")
            first.setdefault(self.store.key(state), state)
        jobs: dict[tuple[int, int], list[State]] = {}
        for state in first.values():
            drawn = self.store.get(state).drawn
            if drawn < k:
                jobs.setdefault((drawn, k - drawn), []).append(state)
        before = self.cost["completions"]
        for (drawn, missing), group in sorted(jobs.items(), key=lambda job: job[0]):
            for i in range(0, len(group), self.batch):
                self._draw(group[i : i + self.batch], missing, drawn)
        self.cost["reused"] += k * len(states) - (self.cost["completions"] - before)
        return [self.store.get(s) for s in states]

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """The verifier's verdicts; None where it has none.

        Raises:
            RewardError: it returned another number of values than samples.
        """
        values = list(self.verifier(samples)) if samples else []
        if len(values) != len(samples):
            raise RewardError(wrong_count("verifier", len(values), len(samples)))
        return [None if v is None or math.isnan(v) else v >= 0.5 for v in values]

    def _draw(self, states: Sequence[State], n: int, drawn: int) -> None:
        seed = _seed_of(self.seed, drawn)
        found = self.extender.extend(states, n, seed=seed, temperature=self.temperature)
        sizes = [len(row) for row in found]
        if sizes != [n] * len(states):
            raise ValueError(f"the policy returned {sizes[:8]} continuations for {len(states)} states; {n} were asked")
        samples = [
            Sample(s.prompt, s.then(c).text, len(s.steps) + len(c.steps) - 1)
            for s, row in zip(states, found, strict=True)
            for c in row
        ]
        verdicts = iter(self.verify(samples))
        scored = [[Completion(c, next(verdicts), c.tokens) for c in row] for row in found]
        flat = [c for row in scored for c in row]
        self.cost["calls"] += 1
        self.cost["completions"] += len(flat)
        self.cost["tokens"] += sum(c.tokens for c in flat)
        self.cost["unscored"] += sum(c.correct is None for c in flat)
        self._check_unscored(states[0])
        for state, completions in zip(states, scored, strict=True):
            self.store.add(state, completions)
        if self.on_call:
            self.on_call()

    def _check_unscored(self, state: State) -> None:
        share = self.cost["unscored"] / self.cost["completions"]
        if self.cost["completions"] >= _ENOUGH and share > self.max_unscored:
            raise RewardError(
                f"{share:.0%} of {self.cost['completions']} completions have no verdict, more than max_unscored="
                f"{self.max_unscored}, the last near prompt {state.prompt.id!r}; mend the verifier, or raise the limit"
            )


def _seed_of(seed: int, drawn: int) -> int:
    """Another stream for every refill, so that a prefix never draws the same completions twice."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{drawn}".encode()).digest()[:4], "big")
