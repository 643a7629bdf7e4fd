import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_tree import TRAP, KnownTree, chain, complete_tree, leaves

from mmrl.reasoning.canonical import canonical_answer
from mmrl.registry import find, names
from mmrl.rollout import Prompt, State
from mmrl.search.beam import beam, dvts, keep_best, keep_per_subtree
from mmrl.search.best_of_n import best_of_n, join_steps
from mmrl.search.greedy import first_good, greedy, greedy_backtrack
from mmrl.search.mcts import alphazero, children_value, mcts, policy_prior, propa_pick, puct, uct
from mmrl.search.pats import next_mode, pats
from mmrl.search.step_co import step_co

P0 = Prompt("p", {})
SETTINGS = {
    "best_of_n": {"n": 4},
    "beam": {"n": 4, "width": 2},
    "dvts": {"n": 4, "width": 2},
    "mcts": {"iterations": 12},
}


def one(search, policy, **options):
    return search(policy.problem(), [P0], **options)[0]


def answer(found):
    return found.candidates[found.answer]


# ---- worked numbers -------------------------------------------------------------------------------------------------


def test_worked_selection_scores():
    assert puct(0.3, 0.4, 10, 2, c=1.5) == pytest.approx(0.932456, abs=1e-6)
    assert alphazero(0.3, 0.4, 10, 2) == pytest.approx(0.827282, abs=1e-6)
    assert uct(2, 4, 10, c=2) == pytest.approx(2.017427, abs=1e-6)
    assert uct(0.6 * 5, 5, 20, c=math.sqrt(2)) == pytest.approx(1.6946656, abs=1e-6)  # PROPA with w = 1
    assert policy_prior([-0.5, -0.25, -0.25]) == pytest.approx(0.776252, abs=1e-6)
    assert children_value([0, 2, 4], [0.5, 0.2, -0.1]) == pytest.approx(0.071429, abs=1e-6)


def test_unvisited_children_come_first_or_are_guarded():
    assert uct(0, 0, 10) == math.inf
    assert uct(0, 0, 10, guard=True) == pytest.approx(2 * math.sqrt(math.log(10)))
    assert policy_prior([]) == 1
    with pytest.raises(ValueError, match="without children"):
        children_value([], [])


@pytest.mark.parametrize(
    "scores, of_beam, of_dvts", [((0.1, 0.8, 0.3, 0.6), [1, 3], [1, 3]), ((0.8, 0.7, 0.2, 0.1), [0, 1], [0, 2])]
)
def test_worked_keep(scores, of_beam, of_dvts):
    assert keep_best(scores, 2) == of_beam
    assert keep_per_subtree(scores, 2) == of_dvts


def test_worked_trace_of_pats():
    mode, rejections, trace = 0, 0, []
    for reward in (0.9, 0.8, 0.7, 0.3, 0.2, 0.9):
        used = mode
        accepted, mode = next_mode(mode, reward, may_reject=rejections < 1)
        rejections = 0 if accepted else rejections + 1
        trace.append((used, accepted, mode))
    assert [used for used, _, _ in trace] == [0, 1, 1, 0, 0, 0]
    assert [accepted for _, accepted, _ in trace] == [True, True, True, False, True, True]
    assert [mode for _, _, mode in trace] == [1, 1, 0, 0, 0, 1]
    assert next_mode(2, 0.85, may_reject=True) == (True, 2)


def test_propa_counts_the_root():
    assert propa_pick([[0.9], [0.7, 0.7], [0.6, 0.6, 0.6]]) == 1  # .45, .4667, .45
    assert propa_pick([[0.9], [0.9]]) == 0


# ---- the known tree -------------------------------------------------------------------------------------------------


def test_greedy_falls_below_beam_and_beam_below_the_whole_tree():
    policy = KnownTree(TRAP)
    by_greedy = answer(one(greedy, policy, n=4))
    by_beam = answer(one(beam, policy, n=4, width=2))
    whole = answer(one(best_of_n, policy, n=8, aggregate="last"))
    assert by_greedy.state.text == "a a1 " and by_greedy.step_scores == (0.9, 0.3)
    assert by_beam.state.text == "b b2 "
    assert whole.state.text == "c c2 " and whole.score == max(leaves(TRAP).values())
    assert by_greedy.score < by_beam.score <= whole.score


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_no_search_beats_the_whole_tree_and_a_full_beam_equals_it(seed):
    tree = complete_tree(2, 3, seed)
    top = max(leaves(tree).values())
    policy = KnownTree(tree)
    for name in names("searches"):
        found = one(find("searches", name).target, policy, **SETTINGS.get(name, {}))
        assert answer(found).score <= top
        assert found.answer in range(len(found.candidates))
    everything = one(beam, policy, n=16, width=2, dedupe=True)  # keeps 8 paths: all
    assert answer(everything).score == top


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 2))
def test_dvts_with_one_subtree_is_greedy(seed, m, lookahead):
    policy = KnownTree(complete_tree(3, 4, seed), random=True)
    a = one(greedy, policy, n=m, lookahead=lookahead)
    b = one(dvts, policy, n=m, width=m, lookahead=lookahead)
    assert (a.candidates, a.answer) == (b.candidates, b.answer)
    assert a.budget.generated_tokens == b.budget.generated_tokens


def test_dvts_never_compares_subtrees_and_returns_n():
    found = one(dvts, KnownTree(TRAP), n=4, width=2)
    assert [s.text for s in found.states] == ["a a1 ", "a a2 ", "c c1 ", "c c2 "]
    assert answer(found).state.text == "c c2 "
    with pytest.raises(ValueError, match="no multiple"):
        one(dvts, KnownTree(TRAP), n=5, width=2)
    with pytest.raises(ValueError, match="width=9"):
        one(beam, KnownTree(TRAP), n=4, width=9)


def test_a_finished_beam_frees_its_place_and_competes_at_the_end():
    tree = {"stop": (0.5, {}), "a ": (0.4, {"a1": (0.45, {}), "a2": (0.9, {})}), "b ": (0.3, {"b1": (0.2, {})})}
    found = one(beam, KnownTree(tree), n=3, width=1)
    assert found.states[0].text == "stop"
    assert all(s.done for s in found.states) and len(found.states) == 3
    found = one(beam, KnownTree(tree), n=6, width=3)
    assert answer(found).state.text == "a a2" and len(found.states) == 6


def test_equal_texts_are_removed_before_ranking():
    tree = {"a ": (0.9, {"x": (0.9, {})}), "b ": (0.8, {"y": (0.95, {})})}
    policy = KnownTree(tree)
    plain = one(beam, policy, n=4, width=2)  # a, b, a, b: both places go to a
    apart = one(beam, policy, n=4, width=2, dedupe=True)
    assert answer(plain).state.text == "a x"
    assert answer(apart).state.text == "b y"


def test_lookahead_sees_through_the_trap_and_keeps_own_steps():
    tree = {"a ": (0.9, {"a1 ": (0.1, {"a2": (0.1, {})})}), "b ": (0.2, {"b1 ": (0.8, {"b2": (0.8, {})})})}
    for search, options in ((greedy, {"n": 2}), (beam, {"n": 2, "width": 2})):
        assert answer(one(search, KnownTree(tree), **options)).state.text.startswith("a")
        found = answer(one(search, KnownTree(tree), lookahead=1, **options))
        assert found.state.steps == ("b ", "b1 ", "b2") and found.step_scores == (0.2, 0.8, 0.8)


def test_the_last_round_writes_to_the_end():
    policy = KnownTree(chain(depth=30))
    for search in (greedy, beam, dvts, pats, greedy_backtrack, mcts):
        limit = {"depth": 3} if search is mcts else {"rounds": 3}
        found = one(search, policy, **limit)
        assert answer(found).state.done and len(answer(found).state.steps) == 30, search.__name__


def test_first_good_of_the_candidates():
    assert first_good([0.1, 0.85, 0.95], positive=0.8, negative=0.5) == 1
    assert first_good([0.1, 0.6, 0.7], positive=0.8, negative=0.5) == 2
    assert first_good([0.1, 0.4], positive=0.8, negative=0.5) is None


def test_backtracking_leaves_a_dead_end():
    """b is good but all that follows is bad; n = 1 in turn would take it for ever, so draws are random."""
    tree = {"b ": (0.9, {"b1": (0.1, {})}), "a ": (0.6, {"a1": (0.9, {})})}
    policy = KnownTree(tree, random=True)
    ends = {answer(greedy_backtrack(policy.problem(seed=s), [P0], n=1, backtracks=20)[0]).state.text for s in range(8)}
    assert ends == {"a a1"}
    without = {
        answer(greedy_backtrack(policy.problem(seed=s), [P0], n=1, backtracks=0)[0]).state.text for s in range(8)
    }
    assert without == {"a a1", "b b1"}


def test_pats_follows_its_rewards():
    tree = {"easy ": (0.9, {"fair ": (0.8, {"hard ": (0.7, {"bad ": (0.3, {"end": (0.9, {})})})})})}
    policy = KnownTree(tree)
    one(pats, policy, widths=(8, 4, 2))
    assert [n for _, n in policy.calls] == [8, 4, 4, 8, 8, 8]  # bad is proposed twice, then accepted
    with pytest.raises(ValueError, match="give 3"):
        one(pats, policy, widths=(8, 4))


def test_step_co_revises_from_the_first_bad_step():
    tree = {"1 ": (0.9, {"bad ": (0.2, {"\\boxed{3}": (0.1, {})}), "good ": (0.8, {"\\boxed{4}": (0.9, {})})})}
    policy = KnownTree(tree, random=True)
    runs = [step_co(policy.problem(seed=s), [P0], rounds=30, canonical=lambda p, t: None)[0] for s in range(6)]
    assert {answer(r).state.text for r in runs} == {"1 good \\boxed{4}"}
    longest = max(runs, key=lambda r: len(r.candidates))
    assert len(longest.candidates) > 1
    assert longest.budget.generated_tokens == 30 + 20 * (len(longest.candidates) - 1)  # the first step is kept


def test_step_co_stops_at_a_repeated_answer_and_after_its_rounds():
    tree = {"a ": (0.9, {"bad \\boxed{3}": (0.1, {})})}
    assert len(one(step_co, KnownTree(tree)).candidates) == 2
    assert len(one(step_co, KnownTree(tree), rounds=3, canonical=lambda p, t: None).candidates) == 4
    nothing_bad = {"a ": (0.6, {"b": (0.6, {})})}
    assert len(one(step_co, KnownTree(nothing_bad), aggregate="product").candidates) == 1


@pytest.mark.parametrize("form", ["uct", "puct", "alphazero"])
@pytest.mark.parametrize("backup", ["mean", "children"])
@pytest.mark.parametrize("prior", ["one", "policy"])
def test_tree_search_leaves_the_trap(form, backup, prior):
    found = one(mcts, KnownTree(TRAP), form=form, backup=backup, prior=prior, n=4, iterations=60)
    assert answer(found).state.text in ("b b2 ", "b b1 ", "c c2 ")
    assert all(s.done for s in found.states) and len({s.text for s in found.states}) >= 4


def test_tree_search_by_hand():
    """PUCT, c 1, two children of 0.9 and 0.5: the root is opened, then the first child (q 0 for both), and so on."""
    tree = {"a ": (0.9, {"a1": (0.2, {}), "a2": (0.1, {})}), "b ": (0.5, {"b1": (0.6, {}), "b2": (0.4, {})})}
    policy = KnownTree(tree)
    found = one(mcts, policy, c=1.0, n=2, iterations=2)
    # root backs up 0.7; then both children have q 0, N 0, so the first is opened
    assert [s.text for s in found.states] == ["a a1", "a a2"]
    # N 2: a has q .9 + sqrt(2)/2 = 1.607, b 0 + sqrt(2) = 1.414: a again, its children tie and a1 ends: q .55
    # N 3: a .55 + sqrt(3)/3 = 1.127, b 1.732: b is opened, q .5
    found = one(mcts, policy, c=1.0, n=2, iterations=4)
    assert [s.text for s in found.states] == ["a a1", "a a2", "b b1", "b b2"]
    assert found.budget.model_calls == 6
    assert answer(found).state.text == "a a1"  # a was visited twice, a1 once


def test_answers_of_tree_search():
    tree = {
        "a": (0.5, {"\\boxed{1}": (0.9, {})}), "b": (0.5, {"\\boxed{2}": (0.6, {})}), "c": (0.5, {"\\boxed{2}": (0.5, {})}),
    }  # fmt: skip
    policy = KnownTree(tree)
    vote = {"canonical": canonical_answer}
    texts = {
        a: answer(one(mcts, policy, n=3, iterations=30, answer=a, **vote)).state.text for a in ("weighted", "mean")
    }
    assert texts["mean"] == "a\\boxed{1}"
    found = one(mcts, policy, n=3, iterations=4, answer="weighted", **vote)  # three copies of each path
    assert answer(found).state.text == "b\\boxed{2}"  # 3 * .6 + 3 * .5 against 3 * .9
    with pytest.raises(ValueError, match="canonical"):
        one(mcts, policy, n=3, iterations=4, answer="weighted")


def test_tree_search_without_an_end_answers_with_a_leaf():
    found = mcts(KnownTree(chain()).problem(max_tokens=10), [P0], n=2)[0]
    assert not answer(found).state.done and found.budget.generated_tokens == 20
    with pytest.raises(ValueError, match="form"):
        one(mcts, KnownTree(TRAP), form="ucb")


# ---- scorers and invariances ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", names("searches"))
def test_permuting_prompts_permutes_results(method):
    trees = {str(i): complete_tree(3, 3, i) for i in range(5)}
    prompts = [Prompt(k, {}) for k in trees]
    options, search = SETTINGS.get(method, {}), find("searches", method).target
    straight = search(KnownTree(trees, random=True).problem(), prompts, **options)
    back = search(KnownTree(trees, random=True).problem(), prompts[::-1], **options)
    alone = [search(KnownTree(trees, random=True).problem(), [p], **options)[0] for p in prompts]
    for a, b, c in zip(straight, back[::-1], alone, strict=True):
        assert (a.candidates, a.answer) == (b.candidates, b.answer) == (c.candidates, c.answer)
        assert a.budget.generated_tokens == b.budget.generated_tokens == c.budget.generated_tokens


def test_a_constant_scorer_gives_the_first_candidate():
    policy = KnownTree(complete_tree(3, 3, 0), random=True)
    problem = policy.problem(scorer=lambda states: [[0.5] * len(s.steps) for s in states])
    for method in ("best_of_n", "greedy", "beam", "dvts"):
        (found,) = find("searches", method).target(problem, [P0], **SETTINGS.get(method, {}))
        assert found.answer == 0 and found.ranked == list(range(len(found.candidates)))


def test_a_perfect_scorer_gives_pass_at_n():
    tree = complete_tree(3, 3, 5)
    right = set(sorted(leaves(tree))[::9])
    policy = KnownTree(tree, random=True)
    hits = []
    for seed in range(20):
        problem = policy.problem(
            seed=seed, scorer=lambda states: [[float(s.text in right)] * len(s.steps) for s in states]
        )
        (found,) = best_of_n(problem, [P0], n=4)
        assert (answer(found).state.text in right) == any(s.text in right for s in found.states)
        hits.append(answer(found).state.text in right)
    assert 0 < sum(hits) < 20


def test_the_whole_solution_as_one_step():
    seen = []

    def outcome(states):
        seen.extend(states)
        return [[float(s.text == "c c1 ")] * len(s.steps) for s in states]

    found = best_of_n(KnownTree(TRAP).problem(scorer=outcome), [P0], n=8, max_steps=1)[0]
    assert {len(s.steps) for s in seen} == {1} and {len(s.steps) for s in found.states} == {2}
    assert answer(found).state.text == "c c1 " and answer(found).step_scores == (1.0,)
    by_last = one(best_of_n, KnownTree(TRAP), n=8, aggregate="last")
    assert answer(by_last).state.text == "c c2 "


@pytest.mark.parametrize("steps, most, want", [(13, 12, 7), (24, 12, 12), (25, 12, 9), (3, 12, 3), (0, 12, 0)])
def test_joined_steps_keep_the_text(steps, most, want):
    state = State(P0, tuple(f"s{i}\n\n" for i in range(steps)), True)
    joined = join_steps(state, most)
    assert len(joined.steps) == want and joined.text == state.text and joined.done


def test_aggregates_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="gives a pair"):
        one(greedy, KnownTree(TRAP), aggregate="min_then_last")
    with pytest.raises(ValueError, match="did you mean"):
        one(greedy, KnownTree(TRAP), aggregate="lats")
    with pytest.raises(ValueError, match="occurs twice"):
        greedy(KnownTree(TRAP).problem(), [P0, P0])
