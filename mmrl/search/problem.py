"""What every search stands on: proposing steps, scoring paths, counting what it costs."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from mmrl.capabilities import Extender
from mmrl.growth import GrowingTree
from mmrl.rollout import Continuation, Prompt, State
from mmrl.search.budget import Budget

Scorer = Callable[[Sequence[State]], list[list[float]]]  # per state, one score per step of its path


class Problem:
    """A policy, a scorer and a budget per prompt.

    Fresh noise: what a state draws depends on the seed, its prompt, its text and how often that text has been proposed
    from before. It does not depend on the other prompts, so prompts can be searched alone or side by side with the
    same result; and since texts seldom recur, one call serves nearly every batch.

    Args:
        scorer: states -> per state one number per step; higher is better. None: every step scores 0, and the trees say
            nothing of values.
        budget: limit and parameter counts that hold for each prompt.
        prompt_tokens: length of a prompt in tokens, images included; without it prompts count as 0 tokens.
        stop: text -> whether it is finished although the policy has not ended it (a boxed answer, for example).
    """

    def __init__(
        self,
        extender: Extender,
        scorer: Scorer | None,
        budget: Budget | None = None,
        seed: int = 0,
        *,
        prompt_tokens: Callable[[Prompt], int] | None = None,
        stop: Callable[[str], bool] | None = None,
    ) -> None:
        self.extender, self.seed = extender, seed
        self.scorer: Scorer = scorer or _indifferent
        self.scored = scorer is not None
        self.limits = budget or Budget()
        self.prompt_tokens = prompt_tokens
        self.stop = stop
        self._accounts: dict[str, _Account] = {}

    def propose(
        self,
        states: Sequence[State],
        n: int,
        *,
        temperature: float | None = None,
        steps: int | None = 1,
        keep: bool = True,
    ) -> list[list[State]]:
        """n continuations of each state, by `steps` steps or (None) to the end.

        keep: they become part of the prompt's tree.

        Raises:
            ValueError: n < 1, or a state has already ended.
        """
        if n < 1:
            raise ValueError(f"propose: n={n} must be at least 1")
        ended = next((s for s in states if s.done), None)
        if ended is not None:
            raise ValueError(f"prompt {ended.prompt.id!r}: cannot go on from an ended state ({ended.text[-60:]!r})")
        out: list[list[State]] = [[] for _ in states]
        for seed, rows in self._draws(states).items():
            start = time.perf_counter()
            batch = self.extender.extend([states[i] for i in rows], n, seed=seed, steps=steps, temperature=temperature)
            seconds = (time.perf_counter() - start) / len(rows)
            for i, continuations in zip(rows, batch, strict=True):
                self._account(states[i].prompt).propose(states[i], continuations, seconds)
                out[i] = [self._after(states[i], c, temperature, keep) for c in continuations]
        return out

    def score(self, states: Sequence[State]) -> list[list[float]]:
        """One score per step of each state's whole path; a state without steps gets [].

        Raises:
            ValueError: the scorer gave another number of rows or of steps, a score that is not finite, or a state was
                not proposed by this object.
        """
        rows = [i for i, s in enumerate(states) if s.steps]
        out: list[list[float]] = [[] for _ in states]
        if not rows:
            return out
        for i in rows:
            self._account(states[i].prompt).length(states[i])
        start = time.perf_counter()
        scores = self.scorer([states[i] for i in rows])
        seconds = (time.perf_counter() - start) / len(rows)
        if len(scores) != len(rows):
            raise ValueError(f"the scorer gave {len(scores)} rows for {len(rows)} states; return one per state")
        for i, row in zip(rows, scores, strict=True):
            _check_scores(states[i], row)
            self._account(states[i].prompt).score(states[i], seconds)
            out[i] = list(row)
        return out

    def is_done(self, state: State) -> bool:
        """Whether it has ended."""
        return state.done

    def budget(self, prompt: Prompt) -> Budget:
        """What this prompt has cost so far."""
        return self._account(prompt).budget

    def spent(self, prompt: Prompt) -> bool:
        """Whether its budget allows no further proposal."""
        return self._account(prompt).budget.spent

    def tree(self, prompt: Prompt) -> GrowingTree:
        """What has been proposed after a prompt."""
        return self._account(prompt).tree

    def temperature(self, prompt: Prompt) -> float | None:
        """Of all proposals in its tree; None where it was the policy's own, or where several were used."""
        used = self._account(prompt).temperatures
        return next(iter(used)) if len(used) == 1 else None

    def logps(self, state: State) -> tuple[float, ...]:
        """Log-probs of the tokens of its last step as sampled; () before the first step."""
        tree = self.tree(state.prompt)
        return tree.logps[tree.node(state)]

    def forget(self, prompts: Sequence[Prompt]) -> None:
        """Drop the ledgers of finished prompts, which hold every text that was proposed."""
        for p in prompts:
            self._accounts.pop(p.id, None)

    def _draws(self, states: Sequence[State]) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = defaultdict(list)
        for i, s in enumerate(states):
            visits = self._account(s.prompt).visits
            groups[_mixed(self.seed, visits[s.text])].append(i)
            visits[s.text] += 1
        return groups

    def _after(self, state: State, new: Continuation, temperature: float | None, keep: bool) -> State:
        after = state.then(new)
        if self.stop is not None and not after.done and self.stop(after.text):
            after = replace(after, done=True)
        if not keep:
            return after
        account = self._account(state.prompt)
        account.temperatures.add(temperature)
        tree = account.tree
        path = tree.path(tree.node(state)) + tree.grow(tree.node(state), replace(new, done=after.done))
        return replace(after, path=tuple(path))

    def _account(self, prompt: Prompt) -> _Account:
        if prompt.id not in self._accounts:
            tokens = 0 if self.prompt_tokens is None else self.prompt_tokens(prompt)
            images = len(prompt.inputs.get("images", ()))
            self._accounts[prompt.id] = _Account(prompt, self.limits.fresh(), tokens, images)
        return self._accounts[prompt.id]


class _Account:
    """The ledger of one prompt."""

    def __init__(self, prompt: Prompt, budget: Budget, prompt_tokens: int, images: int) -> None:
        self.tree = GrowingTree(prompt)
        self.budget = budget
        self.prompt, self.images = prompt_tokens, images
        self.temperatures: set[float | None] = set()  # of the proposals in the tree
        self.visits: Counter[str] = Counter()  # text -> proposals from it
        self._tokens = {"": 0}  # text -> generated tokens in it
        self._read: set[str] = set()  # prefixes the scorer has read

    def propose(self, state: State, new: Sequence[Continuation], seconds: float) -> None:
        b, prefix = self.budget, self.length(state)
        if not b.model_calls:
            b.prompt_tokens_cached += self.prompt
            b.image_encodings += self.images
        b.model_calls += len(new)
        b.prompt_tokens += len(new) * (self.prompt + prefix)
        b.policy_s += seconds
        for c in new:
            b.generated_tokens += c.tokens
            b.truncated += c.truncated
            text, length = state.text, prefix
            for step, logps in zip(c.steps, c.logps, strict=True):
                text, length = text + step, length + len(logps)
                self._tokens[text] = length

    def score(self, state: State, seconds: float) -> None:
        b, length = self.budget, self.length(state)
        prefixes = list(accumulate(state.steps, initial=""))
        known = next((p for p in reversed(prefixes) if p in self._read), None)
        if not b.prm_calls:
            b.image_encodings += self.images
        b.prm_calls += 1
        b.prm_tokens += self.prompt + length
        b.prm_tokens_cached += length + self.prompt if known is None else length - self._tokens[known]
        b.prm_s += seconds
        self._read.update(p for p in prefixes if p in self._tokens)

    def length(self, state: State) -> int:
        if state.text not in self._tokens:
            raise ValueError(
                f"prompt {state.prompt.id!r}: the state ending in {state.text[-60:]!r} was not proposed here, so its "
                "length is unknown; take states from propose()"
            )
        return self._tokens[state.text]


def _indifferent(states: Sequence[State]) -> list[list[float]]:
    return [[0.0] * len(s.steps) for s in states]


def _mixed(*parts: int) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _check_scores(state: State, row: Sequence[float]) -> None:
    where = f"prompt {state.prompt.id!r}"
    said = sum(bool(t.strip()) for t in state.steps)  # blank steps say nothing that could be scored
    if len(row) not in (said, len(state.steps)):
        raise ValueError(
            f"{where}: the scorer gave {len(row)} scores for {len(state.steps)} steps; return one per step"
        )
    bad = next((t for t, p in enumerate(row) if not math.isfinite(p)), None)
    if bad is not None:
        raise ValueError(f"{where}: step {bad} of {len(row)} scored {row[bad]}; a search needs finite scores")
