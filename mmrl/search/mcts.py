"""Monte-Carlo tree search over steps with the scorer's value at the leaves, and its formulas as functions."""

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
    n = max(visits, 1)
    return total / n + c * math.sqrt(math.log(max(parent_visits, 1)) / n)


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
    weights = [max(1, n) for n in visits]
    return math.fsum(w * x for w, x in zip(weights, q, strict=True)) / sum(weights)


def propa_pick(step_scores: Sequence[Sequence[float]]) -> int:
    """Index of the path with the highest mean value along it, the root counted with value 0 (PROPA)."""
    return best([math.fsum(row) / (len(row) + 1) for row in step_scores])


# ---- the search -----------------------------------------------------------------------------------------------------


class _Walked:
    """What the search knows of nodes of a GrowingTree, those at which a proposal ended; ROOT is the prompt.

    q: mean of what was backed up, or reward + value of the children (`backup`).
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
        """The scorer's value, 0 for the prompt and for a path without steps, of which it has none."""
        path = self.paths[node]
        return path.score if path.step_scores else 0.0

    def add(self, parent: int, found: Candidate, prior: float) -> None:
        """A new child of `parent`."""
        node = found.state.path[-1]
        self.paths[node], self.above[node], self.prior[node] = found, parent, prior
        self.below[parent].append(node)
        if not math.isfinite(self.value(node)):
            raise ValueError(f"mcts: {found.state.text[-60:]!r} has value {found.score}; backups need finite ones")

    def descend(self, score: Callable[[_Walked, int], float]) -> list[int]:
        """From the prompt to a node without children, each time to the child with the best `score`."""
        path = [ROOT]
        while children := self.below[path[-1]]:
            path.append(children[best([score(self, v) for v in children])])
        return path

    def back_up(self, path: Sequence[int], value: float, backup: str) -> None:
        """Count a visit of value `value` for every node of `path`."""
        for v in reversed(path):
            self.visits[v] += 1
            self.total[v] += value
            if backup == "mean":
                self.q[v] = self.total[v] / self.visits[v]
                continue
            below = self.below[v]
            later = children_value([self.visits[c] for c in below], [self.q[c] for c in below]) if below else 0.0
            self.q[v] = self.value(v) - (self.value(self.above[v]) if v in self.above else 0.0) + later

    def most_visited(self, ends: Sequence[int]) -> int:
        """Down from the prompt by visits, then by q, then by order, among children that lead to one of `ends`."""
        leads = set(ends)
        for v in ends:
            while v in self.above:
                v = self.above[v]
                leads.add(v)
        at = ROOT
        while self.below[at]:
            at = max((v for v in self.below[at] if v in leads), key=lambda v: (self.visits[v], self.q[v], -v))
        return at

    def write(self, tree: GrowingTree) -> None:
        """Visits, and q as the mean of `q_sum`, into the tree; q is the value of nodes that were visited."""
        for v in self.paths:
            tree.numbers["visits"][v] = self.visits[v]
            tree.numbers["q_sum"][v] = self.q[v] * self.visits[v]
            if self.visits[v]:
                tree.numbers["value"][v] = self.q[v]


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
    """Each iteration walks down by the selection score, gives the open leaf it meets n children, and backs up a value.

    The value is the leaf's own by the scorer, of the root the mean of its children's. A child at `depth` is written to
    the end. Ended paths are the candidates, in the order found; open leaves if none has ended.

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
    walked, select = _Walked(prompt), _selector(form, c)
    for _ in range(iterations):
        path = walked.descend(select)
        leaf = path[-1]
        if not problem.is_done(walked.paths[leaf].state):
            if problem.spent(prompt):
                break
            steps = 1 if len(path) < depth else None
            state = walked.paths[leaf].state
            (children,) = yield from propose([state], n, temperature=temperature, steps=steps)
            found = yield from score_candidates(problem, children, aggregate)
            for candidate in found:
                own = policy_prior(problem.logps(candidate.state)) if prior == "policy" else 1.0
                walked.add(leaf, candidate, own)
        value = math.fsum(walked.value(v) for v in walked.below[leaf]) / n if leaf == ROOT else walked.value(leaf)
        walked.back_up(path, value, backup)
    if problem.scored:
        walked.write(problem.tree(prompt))
    leaves = [v for v in walked.paths if not walked.below[v]]
    ends = [v for v in leaves if walked.paths[v].state.done] or leaves
    candidates = [walked.paths[v] for v in ends]
    picks = {
        "visits": lambda: ends.index(walked.most_visited(ends)),
        "weighted": lambda: _voted(candidates, canonical),
        "mean": lambda: propa_pick([x.step_scores for x in candidates]),
    }
    return result(problem, prompt, candidates, picks[answer]())


def _selector(form: Form, c: float | None) -> Callable[[_Walked, int], float]:
    def uct_score(walked: _Walked, v: int) -> float:
        visits = walked.visits[v]
        return uct(walked.q[v] * visits, visits, walked.visits[walked.above[v]], c=2.0 if c is None else c)

    def puct_score(walked: _Walked, v: int) -> float:
        above = walked.visits[walked.above[v]]
        return puct(walked.q[v], walked.prior[v], above, walked.visits[v], c=1.5 if c is None else c)

    def alphazero_score(walked: _Walked, v: int) -> float:
        visits, above = walked.visits[v], walked.visits[walked.above[v]]
        worth = walked.q[v] if visits else walked.value(v)
        return alphazero(worth, walked.prior[v], above, visits, init=1.25 if c is None else c)

    scores = {"uct": uct_score, "puct": puct_score, "alphazero": alphazero_score}
    if form not in scores:
        raise ValueError(f"mcts: form {form!r} is none of {', '.join(scores)}")
    return scores[form]


def _voted(found: Sequence[Candidate], canonical: Callable[[Prompt, str], str | None] | None) -> int:
    assert canonical is not None  # checked before the search began
    answers = [canonical(c.state.prompt, c.state.text) for c in found]
    chosen = weighted(answers, [c.score for c in found])
    # unreadable answers do not vote; when there is nothing else the best of them stands
    return ranking(found)[0] if chosen is None else answers.index(chosen)
