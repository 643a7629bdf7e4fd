import math

import pytest
from known_tree import TRAP, KnownTree, chain, complete_tree

from mmrl.registry import find, names
from mmrl.rollout import Prompt, State
from mmrl.search.beam import beam
from mmrl.search.budget import Budget
from mmrl.search.greedy import greedy
from mmrl.search.problem import Problem

P0 = Prompt("p", {"images": ["a.png", "b.png"]})


def test_worked_budget_of_a_beam():
    """n 4, S 3, l 10, P 50, k 0: 120 generated; 720 prefill and 840 PRM tokens without cache; 170 with; 12 scores."""
    trees = {f"{i}.": (0.5, {"x.": (0.5, {"y": (0.5, {})})}) for i in range(4)}
    problem = KnownTree(trees).problem(prompt_tokens=lambda p: 50)
    (found,) = beam(problem, [P0], n=4, width=1)
    b = found.budget
    assert (b.generated_tokens, b.prompt_tokens, b.prm_tokens, b.prm_tokens_cached) == (120, 720, 840, 170)
    assert (b.prm_calls, b.model_calls, b.prompt_tokens_cached, b.image_encodings) == (12, 12, 50, 4)
    report = b.report()
    assert report["flops"] == 2 * (3 * (120 + 720) + 2 * 840)
    assert report["flops_cached"] == 2 * (3 * (120 + 50) + 2 * 170)
    assert report["wall_s"] == b.policy_s + b.prm_s > 0
    assert Budget().report()["flops"] is None


@pytest.mark.parametrize("k", [0, 1, 2])
def test_worked_budget_with_lookahead(k):
    n, rounds, length, prompt = 4, 3, 10, 50
    tree = {f"{i}.": (0.5, chain(depth=20)) for i in range(4)}
    limit = n * rounds * length * (1 + k)
    problem = KnownTree(tree).problem(prompt_tokens=lambda p: prompt, max_tokens=limit)
    b = beam(problem, [P0], n=n, width=1, lookahead=k)[0].budget
    assert b.generated_tokens == limit
    assert b.prm_tokens == sum(n * (prompt + (t + 1 + k) * length) for t in range(rounds))


def test_a_path_that_is_scored_twice_is_read_once():
    problem = KnownTree(TRAP).problem(prompt_tokens=lambda p: 5)
    (states,) = problem.propose([State(P0)], 4, steps=None)
    problem.score(states)
    problem.score(states)
    b = problem.budget(P0)
    assert (b.prm_tokens, b.prm_tokens_cached, b.prm_calls) == (2 * 4 * 25, 5 + 4 * 20, 8)
    problem.score([State(P0, (states[0].text,), True)])  # the whole as one step is the same text
    assert problem.budget(P0).prm_tokens_cached == 5 + 4 * 20


@pytest.mark.parametrize("method", names("searches"))
@pytest.mark.parametrize("limit", [1, 35, 150])
def test_no_search_exceeds_its_budget_by_more_than_a_batch(method, limit):
    policy = KnownTree(complete_tree(3, 6, seed=1), random=True)
    sizes = []
    problem = policy.problem(max_tokens=limit)
    before = problem.propose

    def watched(states, n, **options):
        assert not any(problem.spent(s.prompt) for s in states), "a proposal after the budget was spent"
        old = problem.budget(states[0].prompt).generated_tokens
        out = before(states, n, **options)
        sizes.append(problem.budget(states[0].prompt).generated_tokens - old)
        return out

    problem.propose = watched
    (found,) = find("searches", method).target(problem, [P0])
    assert found.budget.generated_tokens < limit + max(sizes)
    assert found.budget.generated_tokens == sum(sizes) and len(found.candidates) > 0


def test_the_result_does_not_change_with_the_problem():
    problem = KnownTree(TRAP).problem()
    (found,) = greedy(problem, [P0], n=2)
    spent = found.budget.generated_tokens
    greedy(problem, [P0], n=2)
    assert found.budget.generated_tokens == spent < problem.budget(P0).generated_tokens


def test_noise_is_fresh_and_reproducible():
    tree = complete_tree(8, 4, seed=0)

    def draws(seed):
        problem = KnownTree(tree, random=True).problem(seed=seed)
        twice = problem.propose([State(P0), State(P0)], 4, steps=None)
        return [[s.text for s in row] for row in [*twice, *problem.propose([State(P0)], 4, steps=None)]]

    first = draws(0)
    assert first == draws(0) != draws(1)
    assert len({t for row in first for t in row}) == 12


def test_equal_requests_of_many_prompts_are_one_call():
    policy = KnownTree(TRAP, random=True)
    greedy(policy.problem(), [Prompt(str(i), {}) for i in range(6)], n=3)
    assert policy.calls == [(6, 3), (6, 3)]


def test_a_stop_rule_ends_a_path():
    policy = KnownTree(TRAP)
    problem = policy.problem(stop=lambda text: text.startswith("a"))
    (row,) = problem.propose([State(P0)], 2)
    assert [problem.is_done(s) for s in row] == [True, False]


def test_logps_of_the_last_step():
    problem = KnownTree(TRAP, tokens=2).problem()
    (row,) = problem.propose([State(P0)], 1)
    assert problem.logps(row[0]) == (-0.1, -0.1) and problem.logps(State(P0)) == ()


def test_steps_that_are_not_there_have_no_score():
    assert KnownTree(TRAP).problem().score([State(P0)]) == [[]]


@pytest.mark.parametrize(
    "scorer, match",
    [
        (lambda states: [], "0 rows for 1"),
        (lambda states: [[0.1, 0.2]], "2 scores for 1 steps"),
        (lambda states: [[math.nan]], "step 0 of 1 scored nan"),
    ],
)
def test_scorers_that_break_their_contract(scorer, match):
    problem = Problem(KnownTree(TRAP), scorer)
    (row,) = problem.propose([State(P0)], 1)
    with pytest.raises(ValueError, match=match):
        problem.score(row)


def test_errors_of_a_problem():
    problem = KnownTree(TRAP).problem()
    with pytest.raises(ValueError, match="was not proposed here"):
        problem.score([State(P0, ("foreign",))])
    with pytest.raises(ValueError, match="ended state"):
        problem.propose([State(P0, ("a ",), True)], 1)
    with pytest.raises(ValueError, match="n=0"):
        problem.propose([State(P0)], 0)
    with pytest.raises(ValueError, match="max_tokens=0"):
        Budget(max_tokens=0)
