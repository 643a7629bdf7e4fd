"""The store of an annotation: completions of prefixes with their verdicts, in a database that only grows.

A prefix is known by what decides its value: the question, its answer, the text written so far, and a fingerprint of
policy and sampling. Whoever asks for the value of a prefix again, later, in another solution or after a kill, gets
what is there, and only what is missing is sampled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmrl.capabilities import Extender
from mmrl.reasoning.records import Counts
from mmrl.rewards.scoring import RewardError, wrong_count
from mmrl.rollout import Continuation, OutcomeReward, Sample, State
from mmrl.workdir import open_database, write_lines

log = logging.getLogger(__name__)

STORE = "store.sqlite"  # in the folder of an annotation

# Completions after which the share of unscored ones is a reason to stop; of a few, one may be many.
_ENOUGH = 200


@dataclass(frozen=True)
class Completion:
    """One way on from a prefix, to its end. correct: None = the verifier could not score it. tokens: what it cost."""

    written: Continuation
    correct: bool | None
    tokens: int


@dataclass(frozen=True)
class Tally:
    """Counts of a prefix: `correct` of `total` scored completions, `drawn` in all, `tokens` they took."""

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
    identity = json.dumps([fingerprint, dict(state.prompt.inputs), answer, state.text], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


_SCHEMA = """
CREATE TABLE IF NOT EXISTS completions (
    key TEXT, draw INTEGER,           -- of one prefix, in the order in which they were drawn
    prompt TEXT, after INTEGER,       -- for readers: the prompt's id, and how many steps the prefix has
    correct INTEGER, tokens INTEGER,  -- correct: 1, 0, or NULL without a verdict
    entry TEXT,                       -- JSON, see `_entry`; NULL where texts are not kept
    PRIMARY KEY (key, draw)
);
"""


class CompletionStore:
    """Completions in an SQLite database, to which all ranks of an annotation add; see `workdir.open_database`.

    A new one begins with what earlier versions left in `store*.jsonl` files beside it.

    Args:
        file: `store.sqlite` in the folder of the annotation. rank: of this process.
        fingerprint: names policy and sampling settings; prefixes stored under another one are not used.
        keep: keep the texts of completions. Those of empty prefixes, which are solutions, are kept in any case.
    Raises:
        ValueError: the file cannot be used, or a `store*.jsonl` has a broken line that is not the last.
    """

    def __init__(self, file: str | Path, *, fingerprint: str = "", keep: bool = True, rank: int = 0) -> None:
        self.file, self.fingerprint, self.keep = Path(file), fingerprint, keep
        self.database = open_database(self.file, _SCHEMA, rank, fill=self._take_earlier)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self.database.close()

    def key(self, state: State) -> str:
        """The state's name in this store."""
        return prefix_key(state, self.fingerprint)

    def get(self, state: State) -> Tally:
        """The counts of a state; all zeros when nothing was sampled."""
        numbers = self.database.execute(
            "SELECT total(correct), count(correct), count(*), total(tokens) FROM completions WHERE key = ?",
            (self.key(state),),
        ).fetchone()
        return Tally(*map(int, numbers))

    def completions(self, state: State) -> list[Completion]:
        """The completions of a state, in the order in which they were drawn.

        Raises:
            ValueError: their texts were not kept.
        """
        entries = self.database.execute(
            "SELECT entry FROM completions WHERE key = ? ORDER BY draw", (self.key(state),)
        ).fetchall()
        if (None,) in entries:
            raise ValueError(
                f"{self.file}: completions of prompt {state.prompt.id!r} after {len(state.steps)} steps were not "
                "kept; annotate in another folder with keep=True"
            )
        return [_completion(json.loads(entry)) for (entry,) in entries]

    def add(self, state: State, new: Sequence[Completion], first: int | None = None) -> None:
        """Keep completions of a state; a kill after this returns does not lose them.

        Args:
            first: how many there were when these were drawn. Where another process has added the same draws
                meanwhile, its own stay. None: add behind what is there.
        """
        start = self.get(state).drawn if first is None else first
        kept = self.keep or not state.text
        key, num_steps = self.key(state), len(state.steps)
        rows = []
        for draw, completion in enumerate(new, start):
            entry = json.dumps(_entry(completion)) if kept else None
            rows.append((key, draw, state.prompt.id, num_steps, completion.correct, completion.tokens, entry))
        with self.database:
            self.database.executemany(_ADD, rows)

    @property
    def spent(self) -> dict[str, int]:
        """Totals of the store: prefixes, completions, unscored, tokens."""
        numbers = self.database.execute(
            "SELECT count(DISTINCT key), count(*), count(*) - count(correct), total(tokens) FROM completions"
        ).fetchone()
        return dict(zip(("prefixes", "completions", "unscored", "tokens"), map(int, numbers), strict=True))

    def export(self, file: Path) -> None:
        """Publish everything as JSON lines, one per prefix."""
        write_lines(file, (line for (line,) in self.database.execute(_EXPORT)))

    def _take_earlier(self, database: sqlite3.Connection) -> None:
        """Add the completions of `store*.jsonl` files, which ranks of earlier versions wrote."""
        for file in sorted(self.file.parent.glob("store*.jsonl")):
            log.info("the completions of %s are taken into %s", file, self.file)
            with file.open("rb") as f:
                for number, line in enumerate(f, start=1):
                    # The last line may have been cut by a kill.
                    if not line.endswith(b"\n"):
                        break
                    try:
                        database.executemany(_ADD, _earlier_rows(json.loads(line)))
                    except (ValueError, KeyError, TypeError) as error:
                        raise ValueError(
                            f"{file} line {number} is broken ({error}); delete that line and run again"
                        ) from error
        # Where the file of a rank is gone, draws are missing in the middle. Later draws are counted from the number of
        # those there are, so what lies behind a gap has to go, until draws are 0, 1, 2 ... again.
        delete_behind_gap = (
            "DELETE FROM completions WHERE draw >= (SELECT count(*) FROM completions c WHERE c.key = completions.key)"
        )
        while database.execute(delete_behind_gap).rowcount:
            pass


_ADD = "INSERT OR IGNORE INTO completions VALUES (?, ?, ?, ?, ?, ?, ?)"
_EXPORT = """
SELECT json_object(
    'key', key, 'prompt', prompt, 'after', after, 'start', 0, 'drawn', count(*),
    'correct', CAST(total(correct) AS INTEGER), 'total', count(correct), 'tokens', sum(tokens),
    'completions', json(CASE WHEN count(entry) = count(*) THEN json_group_array(json(entry)) END)
)
FROM (SELECT * FROM completions ORDER BY key, draw) GROUP BY key ORDER BY key
"""


def _earlier_rows(row: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The rows of a line: `drawn` completions of a prefix from `start` on, or, without texts, rows that add up so."""
    entries = row["completions"]
    verdicts: list[bool | None]
    if entries is None:
        num_wrong, num_unscored = row["total"] - row["correct"], row["drawn"] - row["total"]
        verdicts = [True] * row["correct"] + [False] * num_wrong + [None] * num_unscored
        texts: list[str | None] = [None] * row["drawn"]
        # Only the sum of the tokens is stored; the first row gets all of it.
        tokens = [row["tokens"], *[0] * (row["drawn"] - 1)]
    else:
        # An entry is as `_entry` makes it: steps, verdict, tokens ...
        verdicts = [entry[1] for entry in entries]
        tokens = [entry[2] for entry in entries]
        texts = [json.dumps(entry) for entry in entries]
    rows = []
    for i, (correct, cost, text) in enumerate(zip(verdicts, tokens, texts, strict=True)):
        rows.append((row["key"], row["start"] + i, row["prompt"], row["after"], correct, cost, text))
    return rows


def _entry(completion: Completion) -> list[Any]:
    """A completion as it is written: with its token ids and log-probs, where the policy tells ids."""
    written = completion.written
    entry = [written.steps, completion.correct, completion.tokens, written.truncated]
    if not written.ids:
        return entry
    # Nine digits tell any two float32 numbers apart.
    logps = [[float(f"{logp:.9g}") for logp in step] for step in written.logps]
    return [*entry, written.ids, logps]


def _completion(entry: Sequence[Any]) -> Completion:
    """The completion that `_entry` has written."""
    steps, correct, tokens, truncated, *rest = entry
    ids: tuple[tuple[int, ...], ...] = ()
    logps: tuple[tuple[float, ...], ...] = ()
    if rest:
        ids, logps = (tuple(map(tuple, per_step)) for per_step in rest)
    return Completion(Continuation(tuple(steps), logps, True, truncated, ids), correct, tokens)


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
        distinct: dict[str, State] = {}
        for state in states:
            if state.done:
                raise ValueError(f"prompt {state.prompt.id!r}: a solution that has ended cannot be completed")
            distinct.setdefault(self.store.key(state), state)
        # One call of the policy draws the same number for all its states, and its seed depends on how many there are.
        groups: dict[tuple[int, int], list[State]] = {}
        for state in distinct.values():
            drawn = self.store.get(state).drawn
            if drawn < k:
                groups.setdefault((drawn, k - drawn), []).append(state)
        paid_before = self.cost["completions"]
        for drawn, missing in sorted(groups):
            group = groups[drawn, missing]
            for start in range(0, len(group), self.batch):
                self._draw(group[start : start + self.batch], missing, drawn)
        self.cost["reused"] += k * len(states) - (self.cost["completions"] - paid_before)
        return [self.store.get(state) for state in states]

    def verify(self, samples: Sequence[Sample]) -> list[bool | None]:
        """The verifier's verdicts; None where it has none.

        Raises:
            RewardError: it returned another number of values than samples.
        """
        values = list(self.verifier(samples)) if samples else []
        if len(values) != len(samples):
            raise RewardError(wrong_count("verifier", len(values), len(samples)))
        return [None if value is None or math.isnan(value) else value >= 0.5 for value in values]

    def _draw(self, states: Sequence[State], n: int, drawn: int) -> None:
        """Sample and verify `n` completions of each state that has `drawn` so far, and keep them."""
        seed = _seed_of(self.seed, drawn)
        continuations = self.extender.extend(states, n, seed=seed, temperature=self.temperature)
        sizes = [len(row) for row in continuations]
        if sizes != [n] * len(states):
            raise ValueError(f"the policy returned {sizes[:8]} continuations for {len(states)} states; {n} were asked")
        samples = []
        for state, row in zip(states, continuations, strict=True):
            for written in row:
                last_step = len(state.steps) + len(written.steps) - 1
                samples.append(Sample(state.prompt, state.then(written).text, last_step))
        # In the order of the samples: state by state.
        verdicts = iter(self.verify(samples))
        completions: list[list[Completion]] = []
        for row in continuations:
            completions.append([Completion(written, next(verdicts), written.tokens) for written in row])
        self.cost["calls"] += 1
        for row_of_state in completions:
            self.cost["completions"] += len(row_of_state)
            self.cost["tokens"] += sum(completion.tokens for completion in row_of_state)
            self.cost["unscored"] += sum(completion.correct is None for completion in row_of_state)
        # Before anything is kept: what a broken verifier has not scored must not lie in the store.
        self._check_unscored(states[0])
        for state, row_of_state in zip(states, completions, strict=True):
            self.store.add(state, row_of_state, drawn)
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
