import json
import math
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_extender import ToyExtender, chain, first_wrong, numbers, verify, write

from mmrl.growth import rollout_of
from mmrl.reasoning.annotate.omega import (
    Omega,
    OmegaTree,
    exploration,
    locate_error,
    omega_trees,
    quality,
    traverse,
    tree_json,
)
from mmrl.reasoning.annotate.store import CompletionStore, Estimator
from mmrl.reasoning.records import Counts
from mmrl.rollout import Continuation, Prompt, State

QUESTION = chain("q", 7)  # eight steps


@contextmanager
def asking(folder, policy, verifier=verify, **options):
    with CompletionStore(folder / "store.sqlite") as store:
        yield Estimator(policy, verifier, store, **options)


def probe(values, first=0):
    """What `locate_error` finds and where it looks, on a list of MC values."""
    finding, probes = locate_error(first, len(values) - 1), []
    try:
        probes.append(next(finding))
        while True:
            probes.append(finding.send(values[probes[-1]]))
    except StopIteration as end:
        return end.value, probes


@pytest.mark.parametrize(
    "values, want, probes",
    [
        ((0.75, 0.5, 0.5, 0.25, 0, 0, 0, 0), 4, [3, 5, 4]),
        ((1, 1, 0, 0), 2, [1, 2]),
        ((1, 1, 1, 0), 3, [1, 2, 3]),
        ((0, 0, 0, 0), 0, [1, 0]),
        ((0,), 0, [0]),
        ((1, 1), -1, [0, 1]),
        ((0.5, 0, 0.5, 0.5, 0, 0), 4, [2, 4, 3]),  # not monotone: a boundary
        ((1, None, 0, 0), 2, [1, 0, 2]),  # unknown: linear from the first on
        ((1, 1, 1, None, 1, 0, 0, 0), 5, [3, 0, 1, 2, 4, 5]),
        ((None, None), -1, [0, 1]),
    ],
)
def test_binary_search_by_hand(values, want, probes):
    assert probe(values) == (want, probes)


def test_the_search_starts_where_it_is_told():
    assert probe((9, 9, 9, 1, 0, 0), first=3) == (4, [4, 3])


@given(st.integers(0, 40), st.integers(0, 40))
def test_binary_search_finds_the_boundary_in_log_steps(right, wrong):
    if right + wrong:
        found, probes = probe([1] * right + [0] * wrong)
        assert found == (right if wrong else -1)
        assert len(probes) <= math.floor(math.log2(right + wrong)) + 1 and len(set(probes)) == len(probes)


@given(st.lists(st.sampled_from([0, 0.5, 1]), min_size=1, max_size=12))
def test_any_profile_gives_a_boundary(values):
    values = [*values, 0]
    found, _ = probe(values)
    assert values[found] == 0 and (found == 0 or values[found - 1] > 0)


@pytest.mark.parametrize("value, want", [(0.25, 0.5822051), (0.75, 0.8233623), (1 / 16, 0.5112495)])
def test_quality_by_hand(value, want):
    assert quality(value, 100) == pytest.approx(want, abs=1e-6)


def test_exploration_by_hand():
    assert exploration(3, 25) == pytest.approx(0.15625)
    assert exploration(2, 9) == pytest.approx(0.125)
    assert quality(0.75, 100) + exploration(2, 9) == pytest.approx(0.9483623, abs=1e-6)


def popped(*candidates):
    """Order of candidates (right completions of 4, visits of the state, wrong rollout)."""
    tree = OmegaTree(QUESTION, Omega())
    for i, (correct, visits, rollout) in enumerate(candidates):
        tree.counts[i], tree.visits[i] = Counts(correct, 4), visits
        tree.candidates.append((i, State(QUESTION, (rollout,))))
    return [tree.pop()[0] for _ in candidates]


def test_candidates_by_priority_then_visits_then_text_then_age():
    words = "w " * 100
    assert popped((1, 0, words), (3, 0, words), (2, 0, words)) == [1, 2, 0]
    assert popped((2, 0, words), (2, 0, "w"), (2, 0, "b"), (2, 0, "b")) == [2, 3, 1, 0]
    assert popped((2, 2, "b"), (2, 1, "b")) == [1, 0]


def test_a_perfect_completer_finds_every_first_error_exactly(tmp_path):
    prompts = [chain(f"q{i}", 7) for i in range(5)]
    with asking(tmp_path, ToyExtender(slips=0.5)) as estimator:
        trees = omega_trees(estimator, prompts, Omega(k=8, searches=12))
    found = 0
    for prompt, tree in zip(prompts, trees, strict=True):
        for entry in tree.log:
            before = write(prompt, 0, numbers(prompt)[0])[: entry["after"]]
            assert entry["first_error"] == first_wrong(prompt, (*before, *entry["rollout"])) - entry["after"]
            found += 1
    assert found > 40


def test_the_budget_is_exceeded_by_one_search_at_most(tmp_path):
    for budget in (8, 9, 40, 100):
        policy = ToyExtender(slips=0.5)
        with asking(tmp_path / str(budget), policy) as estimator:
            (tree,) = omega_trees(estimator, [QUESTION], Omega(k=8, budget=budget, searches=1000))
        assert tree.rollouts == policy.completions <= budget - 1 + 8 * math.ceil(math.log2(8))
        before = [8, *(e["rollouts"] for e in tree.log)]
        assert all(b < budget for b in before[:-1])  # no search began without budget
        assert budget > 8 or not tree.log


def test_the_number_of_searches_is_bounded_and_no_rollout_is_searched_twice(tmp_path):
    with asking(tmp_path, ToyExtender(slips=0.5)) as estimator:
        (tree,) = omega_trees(estimator, [QUESTION], Omega(k=4, searches=7, budget=10_000))
        (all_of_it,) = omega_trees(estimator, [QUESTION], Omega(k=4, searches=10_000, budget=10_000))
    assert len(tree.log) == 7 and tree.log == all_of_it.log[:7]
    searched = [(e["after"], *e["rollout"]) for e in all_of_it.log]
    assert len(set(searched)) == len(searched) < 10_000


@pytest.mark.parametrize("slips, value", [(0.0, 1.0), (1.0, 0.0)])
def test_questions_that_are_all_right_or_all_wrong_are_left_alone(tmp_path, slips, value):
    policy = ToyExtender(slips=slips)
    with asking(tmp_path, policy) as estimator:
        (tree,) = omega_trees(estimator, [QUESTION], Omega(k=4))
    assert tree.value(tree.root) == value and policy.completions == 4 and not tree.log and traverse(tree) == []


def test_trees_grow_side_by_side_and_do_not_see_each_other(tmp_path):
    prompts = [chain(f"q{i}", 7) for i in range(6)]
    policy = ToyExtender(slips=0.5)
    with asking(tmp_path / "together", policy) as estimator:
        together = omega_trees(estimator, prompts, Omega(k=4, searches=5))
        most = max(sum(len(e["probes"]) for e in t.log) for t in together)
    assert policy.calls <= 1 + most
    with asking(tmp_path / "alone", ToyExtender(slips=0.5)) as estimator:
        alone = [omega_trees(estimator, [p], Omega(k=4, searches=5))[0] for p in prompts]
    assert [tree_json(t) for t in alone] == [tree_json(t) for t in together]


def test_the_store_replays_a_tree_without_a_policy(tmp_path):
    with asking(tmp_path, ToyExtender(slips=0.5)) as estimator:
        first = omega_trees(estimator, [QUESTION], Omega(k=4))
    with asking(tmp_path, ToyExtender(die_at=0)) as estimator:
        again = omega_trees(estimator, [QUESTION], Omega(k=4))
    assert tree_json(first[0]) == tree_json(again[0])


class Scripted:
    """Completions by text of the prefix; a star ends a right one."""

    def __init__(self, script):
        self.script, self.asked = script, []

    def extend(self, states, n, *, seed, steps=None, temperature=None):
        self.asked += [s.text for s in states]
        return [[self._continuation(t) for t in self.script[s.text].split()] for s in states]

    def _continuation(self, text):
        steps = tuple(f"{c}\n" for c in text)
        return Continuation(steps, ((-1.0,),) * len(steps), done=True)


def star(samples):
    return [None if "?" in s.output else float("*" in s.output) for s in samples]


SCRIPT = {"": "abcd abcd ef* ef*", "a\nb\n": "x* x* y z", "a\nb\nc\n": "d u v w", "a\n": "* * * *"}
PLAIN = Prompt("p", {"question": "What?", "images": ["a.png"]}, {"answer": "f"})


def test_a_tree_by_hand(tmp_path):
    policy = Scripted(SCRIPT)
    with asking(tmp_path, policy, star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=1))
    assert policy.asked == ["", "a\nb\n", "a\nb\nc\n"] and tree.rollouts == 12
    row = json.loads(json.dumps(tree_json(tree)))
    assert [row[k] for k in ("id", "question", "answer", "image_path")] == ["p", "What?", "f", "a.png"]
    entry = {"after": 0, "rollout": ["a\n", "b\n", "c\n", "d\n"], "probes": [[1, 0.5], [2, 0.0]], "first_error": 2}
    assert row["log"] == [entry | {"rollouts": 12}]
    assert (row["mc_value"], row["counts"], row["visit_count"]) == (0.5, [2, 4], 1)  # duplicates count in MC
    assert row["correct_rollouts"] == [["e", "f", "*"]] and row["incorrect_rollouts"] == [["a", "b", "c", "d"]]
    leaf, middle = row["children"]
    assert (leaf["partial_solution"], leaf["mc_value"], leaf["children"]) == (["e", "f", "*"], 1.0, [])
    assert (middle["partial_solution"], middle["mc_value"], middle["visit_count"]) == (["a", "b"], 0.5, 0)
    assert middle["incorrect_rollouts"] == [["y"], ["z"]]
    right, wrong = middle["children"]
    assert (right["partial_solution"], right["mc_value"]) == (["x", "*"], 1.0)
    assert (wrong["partial_solution"], wrong["mc_value"], wrong["children"]) == (["c"], 0.0, [])


def test_training_rows_by_hand(tmp_path):
    with asking(tmp_path, Scripted(SCRIPT), star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=1))
    rows = traverse(tree, min_words=0)
    negative = next(r for r in rows if r.mc[-1].correct == 0)
    assert negative.texts == ("a\n\nb", "c") and negative.mc == (Counts(2, 4), Counts(0, 4))
    assert negative.final_correct is None and negative.meta["pieces"] == [2, 1] and negative.meta["root"] == [2, 4]
    assert len(rows) == 2  # one of the two positives
    positive = next(r for r in rows if r is not negative)
    assert positive.final_correct and positive.mc[-1] == Counts(1, 1)
    assert {r.id for r in rows} == {"p/0", "p/1"} and traverse(tree, min_words=0) == rows
    assert len({traverse(tree, min_words=0, seed=s)[0].texts for s in range(20)}) == 2
    assert traverse(tree, min_words=2)[0].texts in {("a\n\nb", "c"), ("e\n\nf\n\n*",), ("a\n\nb", "x\n\n*")}
    assert [len(" ".join(r.texts).split()) for r in traverse(tree, min_words=3)] == []


def test_an_error_at_the_last_step_is_the_rollout_itself(tmp_path):
    policy = Scripted({"": "ab ab c* c*", "a\n": "* * * q"})
    with asking(tmp_path, policy, star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=1))
    assert tree.log[0]["probes"] == [[0, 0.75], [1, 0.0]] and policy.asked == ["", "a\n"]
    (child,) = tree.below[tree.below[tree.root][-1]][-1:]
    assert [tree.pieces[n] for n in tree.below[tree.below[tree.root][-1]]] == [("*\n",), ("b\n",)]
    assert tree.counts[child] == Counts(0, 1)


def test_a_state_without_verdicts_is_skipped_and_the_rest_scanned(tmp_path):
    policy = Scripted({"": "abcd c* c* c*", "a\nb\n": "? ? ? ?", "a\n": "* r s t", "a\nb\nc\n": "d e f g"})
    with asking(tmp_path, policy, star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=1))
    assert tree.log[0]["probes"] == [[1, None], [0, 0.25], [2, 0.0]] and tree.log[0]["first_error"] == 2
    child = tree.below[tree.root][-1]
    assert tree.pieces[child] == ("a\n",)
    assert [tree.pieces[n] for n in tree.below[child]] == [("*\n",), ("b\n", "c\n")]


def test_a_question_without_any_verdict_has_no_tree(tmp_path):
    with asking(tmp_path, Scripted({"": "? ? ?"}), star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=3))
    assert tree.root is None and tree.rollouts == 3 and traverse(tree) == []
    assert tree_json(tree)["mc_value"] is None


def test_two_states_may_reach_one_solution_and_it_is_a_row_once(tmp_path):
    """The state of `a` draws the solution ab that the question drew as well."""
    policy = Scripted({"": "ab* acd acd z", "a\n": "b* c c z", "a\nc\n": "d d d d"})
    with asking(tmp_path, policy, star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=2))
    ends = [n for n in tree.counts if tree.steps.text(n) == "a\nb\n*\n"]
    assert len(ends) == 2
    rows = traverse(tree, min_words=0)
    assert sorted(r.texts for r in rows) == [("a\n\nb\n\n*",), ("a\n\nc",), ("z",)]


def test_the_rollout_of_a_tree(tmp_path):
    """The tree by hand with all its completions: counts where states were, outcomes at the ends."""
    with asking(tmp_path, Scripted(SCRIPT), star) as estimator:
        (tree,) = omega_trees(estimator, [PLAIN], Omega(k=4, searches=1))
    rollout = rollout_of([tree.steps])
    t = rollout.tree
    whole = []
    for v, p in enumerate(t.parent.tolist()):
        whole.append((whole[p] if p >= 0 else "") + rollout.texts[v].strip())
    assert int(t.is_finished.sum()) == tree.rollouts == 12 and t.root_value.tolist() == [0.5]
    rows = {w: (t.value[v].item(), t.tags["visits"][v].item(), t.tags["q_sum"][v].item()) for v, w in enumerate(whole)}
    assert rows["ab"] == (0.5, 4, 2) and rows["abc"] == (0, 4, 0)
    assert rows["abx*"] == (1, 1, 1) and rows["aby"] == (0, 1, 0)
    assert math.isnan(rows["a"][0]) and rows["abcd"] == (0, 1, 0)
    assert whole.count("abcd") == 3 and whole.count("ef*") == 2  # as often as drawn


@pytest.mark.parametrize("options", [{"k": 0}, {"max_words": 0}, {"alpha": 0}, {"beta": 1.5}])
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Omega(**options)
