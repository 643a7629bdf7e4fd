"""What annotation has paid for: completions of prefixes with their verdicts, in a database that only grows.

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
        """What is known of a state; all zeros when nothing is."""
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
        rows = [
            (
                self.key(state), start + i, state.prompt.id, len(state.steps), c.correct, c.tokens,
                json.dumps(_entry(c)) if kept else None,
            )
            for i, c in enumerate(new)
        ]  # fmt: skip
        with self.database:
            self.database.executemany(_ADD, rows)

    @property
    def spent(self) -> dict[str, int]:
        """What is in the store: prefixes, completions, unscored, tokens."""
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
                    if not line.endswith(b"\n"):
                        break  # cut by a kill
                    try:
                        database.executemany(_ADD, _earlier_rows(json.loads(line)))
                    except (ValueError, KeyError, TypeError) as error:
                        raise ValueError(
                            f"{file} line {number} is broken ({error}); delete that line and run again"
                        ) from error
        # draws that follow on none, since the file of another rank is gone
        behind = (
            "DELETE FROM completions WHERE draw >= (SELECT count(*) FROM completions c WHERE c.key = completions.key)"
        )
        while database.execute(behind).rowcount:
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
    if entries is None:
        wrong, unscored = row["total"] - row["correct"], row["drawn"] - row["total"]
        verdicts = [True] * row["correct"] + [False] * wrong + [None] * unscored
        entries = [None] * row["drawn"]
        tokens = [row["tokens"], *[0] * (row["drawn"] - 1)]
    else:
        verdicts, tokens = [e[1] for e in entries], [e[2] for e in entries]
    rows = []
    for i, (correct, cost, entry) in enumerate(zip(verdicts, tokens, entries, strict=True)):
        text = None if entry is None else json.dumps(entry)
        rows.append((row["key"], row["start"] + i, row["prompt"], row["after"], correct, cost, text))
    return rows


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
            self.store.add(state, completions, drawn)
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
