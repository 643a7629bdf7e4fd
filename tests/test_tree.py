import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import random_forest

from mmrl.tree import StepTree
from mmrl.tree_ops import backup, leaf_sum, lift, path_pairs, path_sum, returns, to_go

n = math.nan


def check_close(x, want):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=1e-6, rtol=0)


def test_derived_arrays_of_t8(t8):
    assert t8.depth.tolist() == [0, 0, 1, 1, 2, 2, 1, 1]
    assert t8.leaves_below.tolist() == [3, 1, 1, 2, 1, 1, 1, 0]
    assert [level.tolist() for level in t8.levels] == [[0, 1], [2, 3, 6, 7], [4, 5]]
    assert t8.sibling_set[2] == t8.sibling_set[3] != t8.sibling_set[4]


T8_BACKUP = {
    "leaf_mean": [2 / 3, 0, 1, 0.5, 0, 1, 0, 0],
    "child_mean": [0.75, 0, 1, 0.5, 0, 1, 0, 0],
    "edge_softmax": [0.814392, 0, 1, 0.689974, 0, 1, 0, 0],
    "path_prob": [0.816550, 0, 1, 0.689974, 0, 1, 0, 0],
    "leaf_max": [1, 0, 1, 1, 0, 1, 0, 0],
}


@pytest.mark.parametrize("how", T8_BACKUP)
def test_backup_of_worked_trees(t8, c7, how):
    check_close(backup(t8, how), T8_BACKUP[how])
    check_close(backup(c7, how), [1, 1, 1, 0, 0, 1, 1])


def test_returns_of_worked_trees(t8, c7):
    check_close(returns(t8, 0.9), [1.823, 0.47, 1.9, 1.255, 0.1, 1.8, 0.3, 0])
    check_close(returns(c7, 0.9), [2.669, 2.41, 1.9, 0.47, 0.3, 1.94, 1.6])


def slow(tree, node, x, gamma):
    """to_go by its definition."""
    kids = [c for c in range(len(tree)) if int(tree.parent[c]) == node and tree.leaves_below[c] > 0]
    below = sum(float(tree.leaves_below[c]) / float(tree.leaves_below[node]) * slow(tree, c, x, gamma) for c in kids)
    return float(x[node]) + gamma * below


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([0.0, 0.5, 1.0]), steps=st.integers(3, 30))
def test_operators_against_their_definitions(seed, gamma, steps):
    tree = random_forest(seed, steps=steps)
    x = torch.rand(len(tree), dtype=torch.float64)
    want = [slow(tree, i, x, gamma) if tree.leaves_below[i] > 0 else 0.0 for i in range(len(tree))]
    check_close(to_go(tree, x, gamma), want)
    leaves, nodes = path_pairs(tree)
    sums = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, nodes, x[leaves])
    check_close(leaf_sum(tree, x), sums.tolist())
    assert torch.bincount(nodes, minlength=len(tree)).tolist() == tree.leaves_below.tolist()
    paths = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, leaves, x[nodes])
    finished = tree.is_finished
    check_close(path_sum(tree, x)[finished], paths[finished].tolist())


def test_any_order_is_sorted_and_the_permutation_kept(t8):
    shuffle = torch.tensor([5, 3, 7, 0, 6, 2, 1, 4])  # new position -> old index
    place = torch.argsort(shuffle)
    parent = torch.where(t8.parent[shuffle] >= 0, place[t8.parent[shuffle].clamp(min=0)], -1)
    again = StepTree(parent, t8.group[shuffle], t8.status[shuffle], t8.outcome[shuffle])
    assert bool((again.parent < torch.arange(8)).all())
    back = torch.empty(8, dtype=torch.float64)
    back[shuffle[again.order]] = lift(again, again.outcome)
    check_close(back, T8_BACKUP["leaf_mean"])


def tree_with(**changes):
    base = {"parent": [-1, 0, 0], "group": [0, 0, 0], "status": [0, 1, 1], "outcome": [n, 1.0, 0.0]}
    return StepTree(**base | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"parent": [1, 2, 1], "status": [0, 0, 0], "outcome": [n, n, n]}, "cycle"),
        ({"parent": [-1, 0, 5]}, r"step 2: parent=5 must be another step"),
        ({"parent": [-1, 0, 2]}, r"step 2: parent=2 must be another step"),
        ({"group": [0, 0, 1]}, r"step 2: group=1 differs from its parent's group"),
        ({"parent": [-1, -1, -1], "group": [0, 2, 2], "status": [1, 1, 1], "outcome": [1.0, 1, 1]}, "not contiguous"),
        ({"outcome": [0.5, 1.0, 0.0]}, r"step 0: outcome=0.5 must be NaN except on finished leaves"),
        ({"outcome": [n, n, 0.0]}, r"step 1: outcome=nan on a finished leaf must be finite"),
        ({"status": [1, 1, 1], "outcome": [1.0, 1, 1]}, r"step 1: parent=0 is a leaf"),
        ({"status": [0, 0, 1], "outcome": [n, n, 0.0]}, r"step 1: status=0 is 0 \(internal\) but the step has no child"),
        ({"status": [0, 1, 3]}, r"step 2: status=3 must be 0, 1 or 2"),
        ({"tok_start": [0, 1, 1], "tok_end": [2, 3, 4]}, r"token spans overlap: step 0 owns \[0, 2\)"),
        ({"tok_start": [0, 2, 3]}, "both tok_start and tok_end"),
        ({"step_reward": [0.1, 0.2]}, r"step_reward has shape \(2,\), parent has 3 steps"),
        ({"logp": [0.0, -math.inf, 0.0]}, r"step 1: logp=-inf is infinite"),
        ({"root_value": [0.1, 0.2]}, "root_value has 2 entries for 1 prompts"),
        ({"group": [0.0, 0.0, 0.0]}, "group must be a 1-d integer array"),
        ({"ok": [[True], [True], [False]]}, r"ok must be a 1-d array of True and False, got shape \(3, 1\)"),
        ({"ok": [1.0, n, 0.0]}, r"step 1: ok=nan is neither true nor false"),
        ({"tags": {"texts": ["a", "b", "c"]}}, r"tags\['texts'\] must hold numbers"),
        ({"tags": {"seen": [[1, 0], [1], [0]]}}, r"tags\['seen'\] must hold numbers, rows of equal length"),
        ({"value": ["high", "low", "low"]}, "value must hold numbers"),
    ],
)  # fmt: skip
def test_bad_input_names_index_and_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        tree_with(**changes)


def test_python_floats_are_kept_in_double_precision():
    tree = tree_with(outcome=[n, 0.1, 1000.1], value=[0.1, 0.2, 0.3], root_value=[0.7], tags={"a": [0.1, 0.2, 0.3]})
    assert tree.outcome.tolist()[1:] == [0.1, 1000.1] and tree.value.tolist() == [0.1, 0.2, 0.3]
    assert tree.root_value.tolist() == [0.7] and tree.tags["a"].tolist() == [0.1, 0.2, 0.3]
    kept = tree_with(tags={"a": torch.ones(3), "b": [1, 2, 3], "c": [True, False, True]})
    assert [kept.tags[k].dtype for k in "abc"] == [torch.float32, torch.int64, torch.bool]


def test_a_forest_without_steps_has_no_advantages():
    from mmrl.credit import estimate

    empty = StepTree([], [], [], [])
    assert len(empty) == 0 and empty.num_groups == 0 and empty.levels == []
    assert len(empty.select(torch.zeros(0))) == 0
    for name in ("grpo", "tree_rpo", "process_grpo", "gae"):
        assert estimate(empty, name).adv.tolist() == []


def test_concatenate_select_and_replace(t8, c7):
    t8, c7 = t8.replace(tags={"a": torch.arange(8)}), c7.replace(tags={"a": torch.arange(7)})
    both = StepTree.concatenate([t8, c7])
    assert both.num_groups == 2 and both.step_of_action().numel() == 32
    second = both.select(both.group == 1)
    assert second.parent.tolist() == c7.parent.tolist() and second.tok_end.tolist() == c7.tok_end.tolist()
    assert second.root_value.tolist() == [0.5] and second.tags["a"].tolist() == list(range(7))
    scored = t8.with_outcomes(torch.tensor([7, 2]), torch.tensor([0.5, n]))
    assert scored.status.tolist() == [0, 0, 2, 0, 1, 1, 1, 1] and scored.leaves_below.tolist() == [
        2,
        2,
        0,
        2,
        1,
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="is dropped while its child is kept"):
        both.select(both.depth > 0)


def test_save_and_load(t8, tmp_path):
    t8 = t8.replace(tags={"timestep": torch.arange(8.0)})
    t8.save(tmp_path)
    again = StepTree.load(tmp_path)
    for name in ("parent", "outcome", "logp", "tok_start", "root_value", "ok"):
        torch.testing.assert_close(getattr(again, name), getattr(t8, name), equal_nan=True)
    assert again.tags["timestep"].tolist() == list(range(8))
    data = (tmp_path / "tree.safetensors").read_bytes()
    (tmp_path / "tree.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="holds no readable StepTree"):
        StepTree.load(tmp_path)


def test_owner_of_actions(t8):
    assert t8.step_of_action(18).tolist() == [0, 0, 1, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 6, 6, 7, 7, -1]
    with pytest.raises(ValueError, match="only 5 actions"):
        t8.step_of_action(5)


def test_chain_of_20000_and_a_million_leaves_are_fast():
    deep = 20_000
    chain = StepTree(torch.arange(deep) - 1, torch.zeros(deep, dtype=torch.long),
                     torch.arange(deep) // (deep - 1), torch.where(torch.arange(deep) == deep - 1, 1.0, n))  # fmt: skip
    start = time.process_time()
    value = to_go(chain, torch.ones(deep), 1.0)
    assert value[0] == deep and value[-1] == 1 and chain.depth[-1] == deep - 1
    wide = 1_000_000
    star = StepTree(torch.where(torch.arange(wide) == 0, -1, 0), torch.zeros(wide, dtype=torch.long),
                    torch.where(torch.arange(wide) == 0, 0, 1), torch.where(torch.arange(wide) == 0, n, 1.0))  # fmt: skip
    assert lift(star, star.outcome)[0] == 1.0
    assert time.process_time() - start < 5
