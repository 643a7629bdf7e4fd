"""OmegaPRM: the first wrong step of a wrong rollout by binary search, in a tree whose states share their rollouts.

OmegaPRM with the settings of MM-PRM and openr. A state is a prefix; its wrong rollouts are candidates while some, not
all, of its rollouts are right. The best candidate is searched, and each prefix probed becomes a state of its own.
Costs O(k log T) completions per error instead of O(k T).

A wrong rollout of 8 steps: the prefix of 4 steps has a value above 0, so the error is behind it; that of 6 steps has
the value 0, that of 5 steps one above 0: step 5 (counted from 0) is the first wrong one, after three probes.

Everything that needs completions is a generator: it yields the state to sample and is sent the answer. `omega_trees`
runs the generators of many questions side by side, so that one call of the policy serves all of them.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrl.growth import ROOT, GrowingTree
from mmrl.reasoning.annotate.monte_carlo import step_text, whole_steps
from mmrl.reasoning.annotate.store import Completion, Estimator, Tally
from mmrl.reasoning.annotate.trees import attach, note_counts
from mmrl.reasoning.records import Counts, SolutionRecord, record_of
from mmrl.registry import register
from mmrl.rollout import Prompt, State

# The reply to a state that a search yields: its counts and its completions.
Answer = tuple[Tally, list[Completion]]


@register("annotations", "omega", source="OmegaPRM with the settings of MM-PRM and openr")
@dataclass(frozen=True)
class Omega:
    """Options. k: completions per state. searches, budget: most searches and completions per question.

    alpha, beta in (0, 1], c_puct >= 0: of the priority. max_words: the L of the priority, words of a long rollout.
    The budget is looked at between searches, so that one search may exceed it. min_words: a training text has more.
    """

    k: int = 16
    searches: int = 20
    budget: int = 200
    alpha: float = 0.5
    beta: float = 0.9
    c_puct: float = 0.125
    max_words: int = 500
    min_words: int = 10

    def __post_init__(self) -> None:
        if self.k < 1 or self.max_words < 1:
            raise ValueError(f"omega: k={self.k} and max_words={self.max_words} must be at least 1")
        if not (0 < self.alpha <= 1 and 0 < self.beta <= 1):
            raise ValueError(f"omega: alpha={self.alpha} and beta={self.beta} must be in (0, 1]")


def quality(value: float, words: int, *, alpha: float = 0.5, beta: float = 0.9, max_words: int = 500) -> float:
    """Q(s, r) = alpha^(1 - MC(s)) beta^(len(r) / L), len in words, L = max_words."""
    return float(alpha ** (1 - value) * beta ** (words / max_words))


def exploration(visits: int, all_visits: int, c_puct: float = 0.125) -> float:
    """U(s) = c_puct sqrt(sum_i N(s_i)) / (1 + N(s)); the sum is over the whole tree."""
    return c_puct * float(all_visits**0.5) / (1 + visits)


def locate_error(first: int, last: int) -> Generator[int, float | None, int]:
    """Binary search for the first wrong step among `first`..`last`; -1 when the last one is right.

    A generator: yields the step t to probe and is sent MC after it, None = unknown. MC before `first` must be above 0.
    The boundary is checked, MC[t* - 1] > 0 and MC[t*] = 0; where unknown values leave none, all steps are probed from
    the first on, none of them twice.
    """
    values: dict[int, float | None] = {}
    low, high = first, last
    while low <= high:
        middle = (low + high) // 2
        values[middle] = yield middle
        if values[middle] is None:
            break
        if values[middle] == 0:
            high = middle - 1
        else:
            low = middle + 1
    if low > last and values[last]:
        return -1
    value_before = 1.0 if low == first else values.get(low - 1)
    if value_before and values.get(low) == 0:
        return low
    # An unknown value broke the search off: look at every step.
    for t in range(first, last + 1):
        if t not in values:
            values[t] = yield t
        if values[t] == 0:
            return t
    return -1


def grow(prompt: Prompt, options: Omega, separator: str = "\n") -> Generator[State, Answer, OmegaTree]:
    """The search of one question, as a generator: yields a state and is sent its tally and completions.

    What comes out depends on the answers alone, so that the store replays it. Ties between candidates: the state
    with fewer visits, then the rollout that sorts first, then the older state.
    """
    tree = OmegaTree(prompt, options, separator)
    yield from tree.reach(State(prompt), None)
    while tree.candidates and len(tree.log) < options.searches and tree.rollouts < options.budget:
        yield from tree.search()
    note_counts(tree.steps, {text: tree.counts[node] for text, node in tree.states.items()})
    return tree


class OmegaTree:
    """The tree of one question: completions, and the states among their steps that were looked at.

    Attributes:
        steps: all completions; the numbers below are by its nodes.
        states: by text, so that no prefix has two states. Leaves are no states: another state may reach the same
            solution and needs a leaf too.
        counts: of a state's own completions; of a whole solution, of itself. pieces: steps of a node, after those of
            its parent (separators included). below: its children, the older first.
        right, wrong: a state's distinct rollouts, as written after it. visits: how often one of them was chosen.
        candidates: (state, wrong rollout) not searched yet, the rollout as a path of whole steps from the prompt on.
        log: one entry per search, in order. rollouts: completions that the tree stands on.
    """

    def __init__(self, prompt: Prompt, options: Omega, separator: str = "\n") -> None:
        self.prompt, self.options, self.separator = prompt, options, separator
        self.steps = GrowingTree(prompt)
        self.states: dict[str, int] = {}
        self.counts: dict[int, Counts] = {}
        self.pieces: dict[int, tuple[str, ...]] = {}
        self.below: dict[int, list[int]] = defaultdict(list)
        self.right: dict[int, list[State]] = defaultdict(list)
        self.wrong: dict[int, list[State]] = defaultdict(list)
        self.visits: Counter[int] = Counter()
        self.candidates: list[tuple[int, State]] = []
        self.log: list[dict[str, Any]] = []
        self.rollouts = 0

    @property
    def root(self) -> int | None:
        """The state of the question, None when no completion of it could be scored."""
        return ROOT if ROOT in self.counts else None

    def value(self, node: int) -> float:
        """MC(s) in [0, 1]. States without any scored completion do not enter the tree."""
        return self.counts[node].correct / self.counts[node].total

    def search(self) -> Generator[State, Answer, None]:
        """Take the best candidate out for good and find its first wrong step."""
        node, rollout = self.pop()
        self.visits[node] += 1
        entry: dict[str, Any] = {"after": self._whole(node), "rollout": list(rollout.steps), "probes": []}
        # Number of steps of the rollout -> the state after them, where its value is above 0. A probed state becomes a
        # child of the longest of these that it goes on from.
        above = {0: node}
        finding = locate_error(0, len(rollout.steps) - 1)
        try:
            t = next(finding)
            while True:
                start = max(num_steps for num_steps in above if num_steps <= t)
                state = yield from self._probe(rollout, above[start], start, t)
                value = None if state is None else self.value(state)
                entry["probes"].append([t, value])
                if state is not None and value:
                    above[t + 1] = state
                t = finding.send(value)
        except StopIteration as end:
            entry["first_error"] = end.value
        self.log.append(entry | {"rollouts": self.rollouts})

    def _probe(self, rollout: State, parent: int, start: int, t: int) -> Generator[State, Answer, int | None]:
        """The state after step t of a wrong rollout; the rollout's last step has its own outcome, no completions."""
        node, piece = rollout.path[t], rollout.steps[start : t + 1]
        if t == len(rollout.steps) - 1:
            return self._add(node, Counts(0, 1), piece, parent)
        return (yield from self.reach(self.steps.state(node), parent, piece))

    def reach(
        self, state: State, parent: int | None, piece: tuple[str, ...] = ()
    ) -> Generator[State, Answer, int | None]:
        """The node of a state, sampled if it is new; None when no completion of it could be scored."""
        if state.text in self.states:
            return self.states[state.text]
        tally, completions = yield state
        self.rollouts += tally.drawn
        node = self.steps.node(state)
        chains = attach(self.steps, node, completions)
        if not tally.total:
            return None
        self._add(node, tally.counts, piece, parent)
        right, wrong = [], []
        for chain, completion in zip(chains, completions, strict=True):
            if completion.correct is True:
                right.append(chain)
            elif completion.correct is False:
                wrong.append(chain)
        self.right[node] += self._distinct(right)
        self.wrong[node] += self._distinct(wrong)
        for rollout in self.right[node]:
            leaf = rollout.path[-1]
            self.counts[leaf], self.pieces[leaf] = Counts(1, 1), rollout.steps
            self.below[node].append(leaf)
        if 0 < self.value(node) < 1:
            self.candidates += [(node, rollout) for rollout in self.wrong[node]]
        return node

    def _distinct(self, chains: Sequence[Sequence[int]]) -> list[State]:
        """Chains of nodes as rollouts of whole steps, the first of equal ones; those that say nothing are left out."""
        rollouts: dict[tuple[str, ...], State] = {}
        for chain in chains:
            written = State(self.prompt, tuple(self.steps.texts[node] for node in chain), path=tuple(chain))
            rollout = whole_steps(written, self.separator)
            rollouts.setdefault(rollout.steps, rollout)
        return [rollout for steps, rollout in rollouts.items() if steps]

    def _add(self, node: int, counts: Counts, piece: tuple[str, ...], parent: int | None) -> int:
        """The state with the text of `node`: the one there is, else `node` itself, a child of `parent` from now on."""
        text = self.steps.text(node)
        if text not in self.states:
            self.states[text] = node
            self.counts[node], self.pieces[node] = counts, piece
            if parent is not None:
                self.below[parent].append(node)
        return self.states[text]

    def _whole(self, node: int) -> int:
        """The number of whole steps that lead to a state."""
        return len(whole_steps(self.steps.state(node), self.separator).steps)

    def pop(self) -> tuple[int, State]:
        """Take out the candidate with the highest priority."""
        options, all_visits = self.options, sum(self.visits.values())

        # The smallest rank is taken: the highest priority first, then the order for ties that `grow` names.
        def rank(index: int) -> tuple[float, int, tuple[str, ...], int]:
            node, rollout = self.candidates[index]
            num_words = len(rollout.text.split())
            priority = quality(
                self.value(node), num_words, alpha=options.alpha, beta=options.beta, max_words=options.max_words
            ) + exploration(self.visits[node], all_visits, options.c_puct)
            return -priority, self.visits[node], rollout.steps, index

        return self.candidates.pop(min(range(len(self.candidates)), key=rank))


def omega_trees(
    estimator: Estimator, prompts: Sequence[Prompt], options: Omega, *, separator: str = "\n"
) -> list[OmegaTree]:
    """The trees of some questions, grown side by side: each call of the policy has one state of every open tree."""
    searches = [grow(prompt, options, separator) for prompt in prompts]
    trees: dict[int, OmegaTree] = {}
    # By the index of an open search: the state that it waits for.
    waiting = {i: next(search) for i, search in enumerate(searches)}
    while waiting:
        tallies = estimator.estimate(list(waiting.values()), options.k)
        answers = list(zip(waiting.items(), tallies, strict=True))
        waiting = {}
        for (i, state), tally in answers:
            try:
                waiting[i] = searches[i].send((tally, estimator.store.completions(state)))
            except StopIteration as end:
                trees[i] = end.value
    return [trees[i] for i in range(len(prompts))]


def tree_json(tree: OmegaTree, separator: str = "\n") -> dict[str, Any]:
    """The tree in MM-PRM's node format, with `counts` ([correct, total]) in every node and the log at the root."""
    record = record_of(tree.prompt, ())
    about = {
        "id": tree.prompt.id,
        "question": record.question,
        "answer": record.answer,
        "image_path": record.images[0] if len(record.images) == 1 else list(record.images),
        "rollouts": tree.rollouts,
        "log": tree.log,
    }
    if tree.root is None:
        return about | {"mc_value": None, "children": []}
    return about | _node_json(tree, tree.root, separator)


def _node_json(tree: OmegaTree, node: int, separator: str) -> dict[str, Any]:
    def texts(steps: Sequence[str]) -> list[str]:
        return [step_text(step, separator) for step in steps]

    return {
        "partial_solution": texts(tree.pieces[node]),
        "mc_value": tree.value(node),
        "counts": [tree.counts[node].correct, tree.counts[node].total],
        "visit_count": tree.visits[node],
        "correct_rollouts": [texts(rollout.steps) for rollout in tree.right[node]],
        "incorrect_rollouts": [texts(rollout.steps) for rollout in tree.wrong[node]],
        "children": [_node_json(tree, child, separator) for child in tree.below[node]],
    }


def traverse(tree: OmegaTree, *, min_words: int = 10, seed: int = 0, separator: str = "\n") -> list[SolutionRecord]:
    """Unlabelled training records with counts, MM-PRM's rule: what lies in one node is one step, joined by "\\n\\n".

    Depth first; a path ends at the first node with MC 0 (negative) or at a leaf (positive). None from a tree whose
    root has MC 0 or 1. Texts of at most `min_words` words and repeated texts are left out; of the positives, a random
    sample as large as the negatives is kept (per question, as defined here).
    """
    if tree.root is None or tree.value(tree.root) in (0, 1):
        return []
    paths: dict[str, list[int]] = {}
    for path in _paths(tree):
        text = tree.steps.text(path[-1])
        if len(text.split()) > min_words:
            paths.setdefault(text, path)
    negatives, positives = [], []
    for text, path in paths.items():
        if tree.value(path[-1]) == 0:
            negatives.append(text)
        else:
            positives.append(text)
    rng = random.Random(f"{seed}/{tree.prompt.id}")
    kept = set(negatives) | set(rng.sample(positives, min(len(positives), len(negatives))))
    records: list[SolutionRecord] = []
    for text, path in paths.items():
        if text in kept:
            records.append(_record(tree, path, f"{tree.prompt.id}/{len(records)}", separator))
    return records


def _paths(tree: OmegaTree) -> list[list[int]]:
    """Paths from below the root to the nodes where they end, depth first, the older child first."""
    paths, stack = [], [[child] for child in reversed(tree.below[ROOT])]
    while stack:
        path = stack.pop()
        node = path[-1]
        if tree.value(node) == 0 or not tree.below[node]:
            paths.append(path)
        else:
            stack += [[*path, child] for child in reversed(tree.below[node])]
    return paths


def _record(tree: OmegaTree, path: Sequence[int], name: str, separator: str) -> SolutionRecord:
    """The record of a path: one step per node, with the counts of the node."""
    texts = []
    for node in path:
        steps = [step_text(step, separator) for step in tree.pieces[node]]
        texts.append("\n\n".join(steps))
    record = record_of(tree.prompt, texts)
    about: dict[str, Any] = {
        "question_id": tree.prompt.id,
        "root": [tree.counts[ROOT].correct, tree.counts[ROOT].total],
        # For each step of the record the number of steps of the policy in it.
        "pieces": [len(tree.pieces[node]) for node in path],
    }
    # A path that ends at value 0 is a prefix, not an answer: it has no outcome of its own.
    final_correct = tree.value(path[-1]) == 1 or None
    counts = tuple(tree.counts[node] for node in path)
    return replace(record, id=name, mc=counts, final_correct=final_correct, meta=dict(record.meta) | about)
