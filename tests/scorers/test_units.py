import random

import pytest
import torch

from mmrl.growth import ROOT, GrowingTree, rollout_of
from mmrl.preference.scores import step_scores
from mmrl.rollout import Prompt
from mmrl.scorers.units import contract_edges, with_pairs


def build(nested, name="p"):
    """A rollout of a nested description: step -> what follows, or the outcome of a leaf."""
    tree = GrowingTree(Prompt(name, {}))

    def grow(parent, below):
        for text, what in below.items():
            node = tree.add(parent, text)
            if isinstance(what, dict):
                grow(node, what)
            else:
                tree.ended[node], tree.numbers["outcome"][node] = True, float(what)

    grow(ROOT, nested)
    rollout = rollout_of([tree])
    return rollout.with_tree(rollout.tree.replace(value=step_scores(rollout.tree, "outcome")))


def contexts(rollout):
    """(what comes before, the unit, its value) of every step, as lists of lines."""
    rows, whole = [], []
    for v, p in enumerate(rollout.tree.parent.tolist()):
        before = whole[p] if p >= 0 else ()
        unit = tuple(rollout.texts[v].split())
        whole.append(before + unit)
        rows.append((before, unit, round(float(rollout.tree.value[v]), 6)))
    return rows


def root_score(rollout):
    tree = rollout.tree
    return float(tree.outcome[tree.is_finished].mean())


def solutions(rollout):
    rows, leaf, outcome = contexts(rollout), rollout.tree.is_leaf.tolist(), rollout.tree.outcome.tolist()
    return sorted((before + unit, y) for (before, unit, _), end, y in zip(rows, leaf, outcome, strict=True) if end)


def first(rollout):
    """The units below the prompt with their values, in order."""
    return [(unit, value) for before, unit, value in contexts(rollout) if not before]


def test_score_is_the_share_of_right_leaves():
    rollout = build({"a": {"c": 1, "d": 0}, "b": {"e": 1, "f": 1, "g": 0}})
    assert root_score(rollout) == 0.6


def test_hrm_records_of_a_step():
    rollout = build({"a": {"b": {"c": {f"l{i}": i < 3 for i in range(5)}}}})
    rows = contexts(with_pairs(rollout))
    assert (("a", "b"), ("c",), 0.6) in rows
    assert (("a",), ("b", "c"), 0.6) in rows
    assert [r for r in rows if r[1][-1] == "a"] == [((), ("a",), 0.6)]  # nothing before it to merge with
    assert len(rows) == 8 + 7
    assert len(contexts(rollout)) == 8
    assert solutions(rollout) == [s for s in solutions(with_pairs(rollout)) if s[1] == s[1]]


def random_tree(rng, depth, name=""):
    if depth == 0 or (name and rng.random() < 0.1):
        return rng.random() < 0.5
    below = {f"{name}{i}": None for i in range(rng.choice([1, 3, 5]))}
    return {step: random_tree(rng, depth - 1, step) for step in below}


@pytest.mark.parametrize("seed", range(8))
def test_contraction_keeps_solutions_and_the_root_score(seed):
    tree = build(random_tree(random.Random(seed), 4))
    changed = contract_edges(tree, seed, probability=1.0)
    assert solutions(changed) == solutions(tree)
    assert root_score(changed) == root_score(tree)
    assert max(len(unit) for _, unit, _ in contexts(changed)) <= 2
    assert contexts(changed) == contexts(contract_edges(tree, seed, probability=1.0))
    assert sorted(contexts(contract_edges(tree, seed, probability=0.0))) == sorted(contexts(tree))


FOUR = {"a": {"x": 1, "y": 0}, "b": 0, "c": 0, "d": 0}


def test_one_edge_below_a_parent_of_four():
    tree = build(FOUR)
    changed = contract_edges(tree, 0, probability=1.0)
    changed = changed.with_tree(changed.tree.replace(value=step_scores(changed.tree, "outcome")))
    units = first(changed)
    (merged,) = [value for unit, value in units if len(unit) == 2]
    assert len(units) == 5 and dict(units)[("a",)] == 1 - merged  # was 1/2: the noise that is wanted
    assert contexts(contract_edges(tree, 0, probability=1.0, min_children=5)) == contexts(tree)


def test_a_child_without_children_left_disappears():
    changed = contract_edges(build({"a": {"x": 1}, "b": 0, "c": 0, "d": 0}), 0, probability=1.0)
    assert [unit for unit, _ in first(changed)] == [("a", "x"), ("b",), ("c",), ("d",)]


def test_probability_is_met():
    tree = build(FOUR)
    changed = sum(len(first(contract_edges(tree, seed))) == 5 for seed in range(1000))
    assert 450 < changed < 550


def test_prompts_do_not_see_each_other():
    two = type(build(FOUR)).concatenate([build(FOUR, "p"), build(FOUR, "q")])
    changed = contract_edges(two, 3)
    for g, name in enumerate("pq"):
        alone = contract_edges(build(FOUR, name), 3)
        assert torch.equal(changed.select([g]).tree.parent, alone.tree.parent)
        assert changed.select([g]).texts == alone.texts
