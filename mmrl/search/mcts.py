"""Monte-Carlo tree search over steps: values of leaves come from the scorer, not from random playouts.

The selection scores and backups of the published methods are functions of their own, see `uct`, `puct`, `alphazero`.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from mmrl.growth import ROOT, GrowingTree
from mmrl.registry import register
from mmrl.rollout import Prompt, State
from mmrl.search.core import (
    Candidate,
    SearchResult,
    Turn,
    best,
    propose,
    ranking,
    result,
    score_candidates,
    side_by_side,
)
from mmrl.search.problem import Problem
from mmrl.search.votes import weighted

Form = Literal["uct", "puct", "alphazero"]


# ---- formulas -------------------------------------------------------------------------------------------------------


def uct(total: float, visits: int, parent_visits: int, *, c: float = 2.0, guard: bool = False) -> float:
    """total / N + c sqrt(ln N_parent / N) (rStar-Math, MASPRM; PROPA's w is c / sqrt(2)).

    An unvisited child is explored first (inf), or with `guard` counts as visited once with mean 0 (MASPRM).
    """
    if not visits and not guard:
        return math.inf
    counted = max(visits, 1)
    return total / counted + c * math.sqrt(math.log(max(parent_visits, 1)) / counted)


def puct(q: float, prior: float, parent_visits: int, visits: int, *, c: float = 1.5) -> float:
    """q + c P sqrt(N_parent) / (1 + N) (AlphaMath, SVPO; MCTS-DPO with c = 1)."""
    return q + c * prior * math.sqrt(parent_visits) / (1 + visits)


def alphazero(
    value: float, prior: float, parent_visits: int, visits: int, *, base: float = 19652, init: float = 1.25
) -> float:
    """value + P (ln((N_parent + base + 1) / base) + init) sqrt(N_parent) / (1 + N) (OpenR)."""
    rate = math.log((parent_visits + base + 1) / base) + init
    return value + prior * rate * math.sqrt(parent_visits) / (1 + visits)


def policy_prior(logps: Sequence[float], *, length_power: float = 1.25) -> float:
    """exp(sum logp / len^1.25), the prior of a step from the log-probs of its tokens (MCTS-DPO); 1 without tokens."""
    return math.exp(sum(logps) / len(logps) ** length_power) if logps else 1.0


def children_value(visits: Sequence[int], q: Sequence[float]) -> float:
    """V = sum max(1, N_c) Q_c / sum max(1, N_c) over the children (MCTS-DPO's backup)."""
    if not visits:
        raise ValueError("children_value: a node without children has no value to back up")
    weights = [max(1, count) for count in visits]
    return math.fsum(weight * value for weight, value in zip(weights, q, strict=True)) / sum(weights)


def propa_pick(step_scores: Sequence[Sequence[float]]) -> int:
    """Index of the path with the highest mean value along it, the root counted with value 0 (PROPA)."""
    return best([math.fsum(row) / (len(row) + 1) for row in step_scores])


# ---- the search -----------------------------------------------------------------------------------------------------


class _SearchTree:
    """Statistics of the nodes of a GrowingTree at which a proposal ended; ROOT is the prompt.

    paths: node -> the path to it with its scores. above, below: parent and children of a node.
    prior: its probability in the selection score. visits, total: number and sum of the values backed up through it.
    q: their mean, or reward + value of the children, see `back_up`.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.paths = {ROOT: Candidate(State(prompt), (), -math.inf)}
        self.above: dict[int, int] = {}
        self.below: dict[int, list[int]] = defaultdict(list)
        self.prior: dict[int, float] = {}
        self.visits: Counter[int] = Counter()
        self.total: dict[int, float] = defaultdict(float)
        self.q: dict[int, float] = defaultdict(float)

    def value(self, node: int) -> float:
        """The scorer's value of a node; 0 for the prompt and for a path without steps, which have none."""
        path = self.paths[node]
        return path.score if path.step_scores else 0.0

    def add(self, parent: int, candidate: Candidate, prior: float) -> None:
        """Add the node at the end of a candidate's path as a child of `parent`."""
        node = candidate.state.path[-1]
        self.paths[node], self.above[node], self.prior[node] = candidate, parent, prior
        self.below[parent].append(node)
        if not math.isfinite(self.value(node)):
            raise ValueError(
                f"mcts: {candidate.state.text[-60:]!r} has value {candidate.score}; backups need finite ones"
            )

    def descend(self, score: Callable[[_SearchTree, int], float]) -> list[int]:
        """The path from the prompt to a node without children that goes to the child with the best `score`."""
        path = [ROOT]
        while self.below[path[-1]]:
            children = self.below[path[-1]]
            path.append(children[best([score(self, child) for child in children])])
        return path

    def back_up(self, path: Sequence[int], value: float, backup: str) -> None:
        """Count a visit of value `value` for every node of `path`, the deepest first.

        backup: "mean" of the values, or "children": value(node) - value(parent) + `children_value`.
        """
        for node in reversed(path):
            self.visits[node] += 1
            self.total[node] += value
            if backup == "mean":
                self.q[node] = self.total[node] / self.visits[node]
                continue
            children = self.below[node]
            later = 0.0
            if children:
                later = children_value([self.visits[c] for c in children], [self.q[c] for c in children])
            value_above = self.value(self.above[node]) if node in self.above else 0.0
            self.q[node] = self.value(node) - value_above + later

    def most_visited(self, ends: Sequence[int]) -> int:
        """The end that is reached from the prompt by always taking the most visited child.

        Only children that lead to one of `ends` count; equal visits are decided by q, then by order.
        """
        leads_to_end = set(ends)
        for node in ends:
            while node in self.above:
                node = self.above[node]
                leads_to_end.add(node)

        def rank(node: int) -> tuple[int, float, int]:
            return self.visits[node], self.q[node], -node

        node = ROOT
        while self.below[node]:
            node = max((child for child in self.below[node] if child in leads_to_end), key=rank)
        return node

    def write(self, tree: GrowingTree) -> None:
        """Write visits, q_sum (so that q is its mean) and q as the value of visited nodes into `tree`."""
        for node in self.paths:
            tree.numbers["visits"][node] = self.visits[node]
            tree.numbers["q_sum"][node] = self.q[node] * self.visits[node]
            if self.visits[node]:
                tree.numbers["value"][node] = self.q[node]


@register(
    "searches",
    "mcts",
    source="AlphaMath, SVPO (puct), rStar-Math, MASPRM (uct), OpenR (alphazero), MCTS-DPO (policy, children), PROPA",
)
@side_by_side
def mcts(
    problem: Problem,
    prompt: Prompt,
    *,
    form: Form = "puct",
    c: float | None = None,
    prior: Literal["one", "policy"] = "one",
    backup: Literal["mean", "children"] = "mean",
    iterations: int = 40,
    n: int = 5,
    depth: int = 8,
    temperature: float | None = None,
    aggregate: str = "last",
    answer: Literal["visits", "weighted", "mean"] = "visits",
    canonical: Callable[[Prompt, str], str | None] | None = None,
) -> Turn[SearchResult]:
    """Each iteration descends by the selection score to a leaf, expands it by n children, and backs up a value.

    The value is the scorer's of the leaf, at the root the mean of its children's. A child at `depth` is written to the
    end. Ended paths are the candidates, in the order of their proposal; open leaves if none has ended.

    Args:
        form: selection score; c its exploration constant (by default 2 for uct, 1.5 for puct, 1.25 for alphazero).
        prior: 1 for every child, or `policy_prior` of its step.
        backup: mean of the values added along the path, or MCTS-DPO's Q = v(node) - v(parent) + `children_value`.
        answer: the most visited path, a vote weighted by scores, or `propa_pick`.
        canonical: (prompt, text) -> the answer that a vote compares; `mmrl search` gives the stated answer.
    Raises:
        ValueError: a vote without `canonical`.
    """
    if answer == "weighted" and canonical is None:
        raise ValueError("answer='weighted' counts equal answers: give canonical=, (prompt, text) -> answer")
    if iterations < 1 or depth < 1:
        raise ValueError(f"mcts: iterations={iterations} and depth={depth} must be at least 1")
    tree, select = _SearchTree(prompt), _selector(form, c)
    for _ in range(iterations):
        path = tree.descend(select)
        leaf = path[-1]
        state = tree.paths[leaf].state
        if not problem.is_done(state):
            if problem.spent(prompt):
                break
            steps = 1 if len(path) < depth else None
            (children,) = yield from propose([state], n, temperature=temperature, steps=steps)
            candidates = yield from score_candidates(problem, children, aggregate)
            for candidate in candidates:
                probability = policy_prior(problem.logps(candidate.state)) if prior == "policy" else 1.0
                tree.add(leaf, candidate, probability)
        if leaf == ROOT:
            value = math.fsum(tree.value(child) for child in tree.below[ROOT]) / n
        else:
            value = tree.value(leaf)
        tree.back_up(path, value, backup)
    if problem.scored:
        tree.write(problem.tree(prompt))
    leaves = [node for node in tree.paths if not tree.below[node]]
    ends = [node for node in leaves if tree.paths[node].state.done] or leaves
    candidates = [tree.paths[node] for node in ends]
    if answer == "visits":
        chosen = ends.index(tree.most_visited(ends))
    elif answer == "weighted":
        chosen = _voted(candidates, canonical)
    else:
        chosen = propa_pick([candidate.step_scores for candidate in candidates])
    return result(problem, prompt, candidates, chosen)


def _selector(form: Form, c: float | None) -> Callable[[_SearchTree, int], float]:
    """The selection score of a node: (tree, node) -> a number; the child with the largest is descended to."""

    def uct_score(tree: _SearchTree, node: int) -> float:
        visits = tree.visits[node]
        return uct(tree.q[node] * visits, visits, tree.visits[tree.above[node]], c=2.0 if c is None else c)

    def puct_score(tree: _SearchTree, node: int) -> float:
        parent_visits = tree.visits[tree.above[node]]
        return puct(tree.q[node], tree.prior[node], parent_visits, tree.visits[node], c=1.5 if c is None else c)

    def alphazero_score(tree: _SearchTree, node: int) -> float:
        visits, parent_visits = tree.visits[node], tree.visits[tree.above[node]]
        value = tree.q[node] if visits else tree.value(node)
        return alphazero(value, tree.prior[node], parent_visits, visits, init=1.25 if c is None else c)

    scores = {"uct": uct_score, "puct": puct_score, "alphazero": alphazero_score}
    if form not in scores:
        raise ValueError(f"mcts: form {form!r} is none of {', '.join(scores)}")
    return scores[form]


def _voted(candidates: Sequence[Candidate], canonical: Callable[[Prompt, str], str | None] | None) -> int:
    """Index of the first candidate with the answer that a vote weighted by scores chooses."""
    # Checked before the search began.
    assert canonical is not None
    answers = [canonical(candidate.state.prompt, candidate.state.text) for candidate in candidates]
    chosen = weighted(answers, [candidate.score for candidate in candidates])
    # Unreadable answers do not vote; where all are unreadable the best candidate stands.
    if chosen is None:
        return ranking(candidates)[0]
    return answers.index(chosen)
