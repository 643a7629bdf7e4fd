"""`Problem`, the interface of every search: it proposes steps, scores paths, and counts the cost."""

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

# States -> per state, one score per step of its path.
Scorer = Callable[[Sequence[State]], list[list[float]]]


class Problem:
    """A policy, a scorer and a budget per prompt.

    Random numbers: the continuations of a state depend on the seed, its prompt, its text, and the number of earlier
    proposals from that text. They do not depend on other prompts, so prompts can be searched alone or side by side
    with the same result. Since texts seldom recur, nearly every batch is served by one call of the policy.

    Args:
        scorer: states -> per state one number per step; higher is better. None: every step scores 0, and the trees
            hold no values.
        budget: limit and parameter counts that hold for each prompt.
        prompt_tokens: length of a prompt in tokens, images included; without it prompts count as 0 tokens.
        stop: text -> True when it is finished although the policy has not ended it (a boxed answer, for example).
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

        keep: add them to the prompt's tree.

        Raises:
            ValueError: n < 1, or a state has already ended.
        """
        if n < 1:
            raise ValueError(f"propose: n={n} must be at least 1")
        for state in states:
            if state.done:
                raise ValueError(
                    f"prompt {state.prompt.id!r}: cannot go on from an ended state ({state.text[-60:]!r})"
                )
        children: list[list[State]] = [[] for _ in states]
        for seed, rows in self._rows_by_seed(states).items():
            start = time.perf_counter()
            batch = self.extender.extend([states[i] for i in rows], n, seed=seed, steps=steps, temperature=temperature)
            seconds = (time.perf_counter() - start) / len(rows)
            for i, continuations in zip(rows, batch, strict=True):
                self._account(states[i].prompt).propose(states[i], continuations, seconds)
                children[i] = [self._after(states[i], new, temperature, keep) for new in continuations]
        return children

    def score(self, states: Sequence[State]) -> list[list[float]]:
        """One score per step of each state's whole path; a state without steps gets [].

        Raises:
            ValueError: the scorer gave another number of rows or of steps, a score that is not finite, or a state was
                not proposed by this object.
        """
        scores_of_state: list[list[float]] = [[] for _ in states]
        rows = [i for i, state in enumerate(states) if state.steps]
        if not rows:
            return scores_of_state
        # Raises for states from elsewhere, before the scorer is run.
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
            scores_of_state[i] = list(row)
        return scores_of_state

    def is_done(self, state: State) -> bool:
        """True for a state that has ended."""
        return state.done

    def budget(self, prompt: Prompt) -> Budget:
        """The cost of this prompt so far."""
        return self._account(prompt).budget

    def spent(self, prompt: Prompt) -> bool:
        """True when the prompt's budget allows no further proposal."""
        return self._account(prompt).budget.spent

    def tree(self, prompt: Prompt) -> GrowingTree:
        """The tree of all proposals after a prompt."""
        return self._account(prompt).tree

    def temperature(self, prompt: Prompt) -> float | None:
        """Temperature of all proposals in a prompt's tree; None for the policy's default, or for several."""
        temperatures = self._account(prompt).temperatures
        return next(iter(temperatures)) if len(temperatures) == 1 else None

    def logps(self, state: State) -> tuple[float, ...]:
        """Log-probs of the tokens of a state's last step as sampled; () before the first step."""
        tree = self.tree(state.prompt)
        return tree.logps[tree.node(state)]

    def forget(self, prompts: Sequence[Prompt]) -> None:
        """Drop the accounts of finished prompts, which hold every text that was proposed."""
        for prompt in prompts:
            self._accounts.pop(prompt.id, None)

    def _rows_by_seed(self, states: Sequence[State]) -> dict[int, list[int]]:
        """Seed of a call of the policy -> indices of the states that it serves; counts a proposal from each state."""
        rows: dict[int, list[int]] = defaultdict(list)
        for i, state in enumerate(states):
            proposals = self._account(state.prompt).proposals
            rows[_mixed(self.seed, proposals[state.text])].append(i)
            proposals[state.text] += 1
        return rows

    def _after(self, state: State, new: Continuation, temperature: float | None, keep: bool) -> State:
        """The state after a continuation; with `keep` it is added to the tree, and the state has a path in it."""
        after = state.then(new)
        if self.stop is not None and not after.done and self.stop(after.text):
            after = replace(after, done=True)
        if not keep:
            return after
        account = self._account(state.prompt)
        account.temperatures.add(temperature)
        tree = account.tree
        node = tree.node(state)
        path = tree.path(node) + tree.grow(node, replace(new, done=after.done))
        return replace(after, path=tuple(path))

    def _account(self, prompt: Prompt) -> _Account:
        if prompt.id not in self._accounts:
            tokens = 0 if self.prompt_tokens is None else self.prompt_tokens(prompt)
            images = len(prompt.inputs.get("images", ()))
            self._accounts[prompt.id] = _Account(prompt, self.limits.fresh(), tokens, images)
        return self._accounts[prompt.id]


class _Account:
    """The tree and the costs of one prompt.

    temperatures: of the proposals in the tree. proposals: text -> number of proposals from it.
    """

    def __init__(self, prompt: Prompt, budget: Budget, prompt_tokens: int, images: int) -> None:
        self.tree = GrowingTree(prompt)
        self.budget = budget
        self.prompt_tokens, self.images = prompt_tokens, images
        self.temperatures: set[float | None] = set()
        self.proposals: Counter[str] = Counter()
        # Text -> number of generated tokens in it.
        self._tokens = {"": 0}
        # Texts that the scorer has read, which a perfect cache would hold.
        self._read: set[str] = set()

    def propose(self, state: State, new: Sequence[Continuation], seconds: float) -> None:
        """Count continuations of a state, and note the lengths of the new texts."""
        budget, prefix = self.budget, self.length(state)
        # With a cache the prompt is read once, and prefixes were computed when they were generated.
        if not budget.model_calls:
            budget.prompt_tokens_cached += self.prompt_tokens
            budget.image_encodings += self.images
        budget.model_calls += len(new)
        budget.prompt_tokens += len(new) * (self.prompt_tokens + prefix)
        budget.policy_s += seconds
        for continuation in new:
            budget.generated_tokens += continuation.tokens
            budget.truncated += continuation.truncated
            text, length = state.text, prefix
            for step, logps in zip(continuation.steps, continuation.logps, strict=True):
                text, length = text + step, length + len(logps)
                self._tokens[text] = length

    def score(self, state: State, seconds: float) -> None:
        """Count a scored path."""
        budget, length = self.budget, self.length(state)
        prefixes = list(accumulate(state.steps, initial=""))
        # With a cache, tokens are read from the end of the longest prefix that was read before.
        cached_lengths = [self._tokens[text] for text in prefixes if text in self._read]
        if not budget.prm_calls:
            budget.image_encodings += self.images
        budget.prm_calls += 1
        budget.prm_tokens += self.prompt_tokens + length
        if cached_lengths:
            budget.prm_tokens_cached += length - cached_lengths[-1]
        else:
            budget.prm_tokens_cached += length + self.prompt_tokens
        budget.prm_s += seconds
        self._read.update(text for text in prefixes if text in self._tokens)

    def length(self, state: State) -> int:
        """Generated tokens of a state; raises ValueError for a text that was not proposed."""
        if state.text not in self._tokens:
            raise ValueError(
                f"prompt {state.prompt.id!r}: the state ending in {state.text[-60:]!r} was not proposed here, so its "
                "length is unknown; take states from propose()"
            )
        return self._tokens[state.text]


def _indifferent(states: Sequence[State]) -> list[list[float]]:
    """The scorer of a search without scorer: 0 for every step."""
    return [[0.0] * len(state.steps) for state in states]


def _mixed(*parts: int) -> int:
    """A seed of 48 bits that depends on all parts."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def _check_scores(state: State, row: Sequence[float]) -> None:
    """Raises ValueError unless `row` has one finite score per step, or per step that is not blank."""
    where = f"prompt {state.prompt.id!r}"
    not_blank = sum(bool(text.strip()) for text in state.steps)
    if len(row) not in (not_blank, len(state.steps)):
        raise ValueError(
            f"{where}: the scorer gave {len(row)} scores for {len(state.steps)} steps; return one per step"
        )
    for step, score in enumerate(row):
        if not math.isfinite(score):
            raise ValueError(f"{where}: step {step} of {len(row)} scored {score}; a search needs finite scores")
