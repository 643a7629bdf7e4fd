"""Stored rollouts as data of a value model: values by hand, siblings together, and training on them."""

import json
import math

import pytest
import torch
from torch import nn

from mmrl.config import parse_config
from mmrl.rollout import Actions, Prompt, Rollout
from mmrl.scorers.labelled import solution_forest
from mmrl.scorers.tree_values import TreeValues
from mmrl.trainers.step_reward import RewardModelConfig, StepRewardTrainer
from mmrl.tree import INTERNAL, UNFINISHED, StepTree

SOLUTIONS = [["a", "x"], ["a", "y"], ["b", "x"], ["b", "z"], ["c", "x"]]
OUTCOMES = [1.0, 0.0, 1.0, 1.0, math.nan]
VALUES = {"a": 0.5, "b": 1.0, "c": math.nan, "ax": 1, "ay": 0, "bx": 1, "bz": 1, "cx": math.nan}


def store(folder, names, outcomes=OUTCOMES):
    prompts = [Prompt(n, {"question": n}) for n in names]
    rollout, paths = solution_forest(prompts, [SOLUTIONS] * len(prompts))
    leaves = torch.tensor([path[-1] for own in paths for path in own])
    tree = rollout.tree.with_outcomes(leaves, torch.tensor(outcomes * len(prompts), dtype=torch.float64))
    return rollout.with_tree(tree).save(folder)


@pytest.fixture
def task(tmp_path):
    store(tmp_path / "train" / "000000-00", ["p", "q"])
    store(tmp_path / "train" / "000001-00", ["p"])  # the same question again
    store(tmp_path / "eval", ["r"])
    return TreeValues(str(tmp_path / "train"), str(tmp_path / "eval"))


def test_every_step_has_the_value_below_it(task):
    assert len(task.prompts) == 3 and len(task.eval_prompts) == 1
    data = task.labelled(task.prompts)
    tree, texts = data.rollout.tree, data.rollout.texts
    for v, y in zip(data.node.tolist(), data.label.tolist(), strict=True):
        above = int(tree.parent[v])
        assert y == pytest.approx(VALUES[(texts[above] if above >= 0 else "") + texts[v]], nan_ok=True)
    assert sorted(data.node.tolist()) == list(range(3 * 8))
    for rows in data.paths:  # a path is the children of one state
        nodes = data.node[rows]
        assert len(tree.sibling_set[nodes].unique()) == 1 and len(nodes) == int(
            (tree.sibling_set == tree.sibling_set[nodes[0]]).sum()
        )


def test_measures_by_hand(task):
    data = task.labelled(task.eval_prompts)
    said = {"a": 0.7, "b": 0.6, "ax": 0.4, "ay": 0.4}
    tree, texts = data.rollout.tree, data.rollout.texts
    names = [(texts[tree.parent[v]] if tree.parent[v] >= 0 else "") + texts[v] for v in data.node.tolist()]
    score = torch.tensor([said.get(n, math.nan) for n in names], dtype=torch.float64)
    got = task.measures(data, score)
    # b over a is missed, ax over ay a draw; squares .04, .16, .36, .16
    assert got == pytest.approx({"value_mse": 0.18, "pair_acc": 0.25, "pairs": 2})
    assert task.measures(data, torch.full((8,), math.nan)) == {}


def test_siblings_that_say_the_same_lead_to_one_state(tmp_path):
    """Sampled trees repeat themselves: a twice, right below the first once of two times, below the other always."""
    tree = StepTree(
        torch.tensor([-1, -1, -1, 0, 0, 1, 1, 2]), torch.zeros(8, dtype=torch.long),
        torch.tensor([INTERNAL] * 3 + [UNFINISHED] * 5), torch.full((8,), math.nan),
        tok_start=torch.zeros(8, dtype=torch.long), tok_end=torch.zeros(8, dtype=torch.long),
    )  # fmt: skip
    tree = tree.with_outcomes(torch.arange(3, 8), torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64))
    none = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    texts = ["a\n", "a", "b", "x", "y", "x", "z", "x"]
    Rollout([Prompt("p", {})], tree, none, texts=texts).save(tmp_path / "000000-00")
    task = TreeValues(str(tmp_path), str(tmp_path))
    data = task.labelled(task.prompts)
    by_path = {tuple(rows.tolist()): data.node[rows].tolist() for rows in data.paths}
    assert sorted(by_path.values()) == [[0, 2], [3, 4, 6], [7]]
    assert dict(zip(data.node.tolist(), data.label.tolist(), strict=True)) == {0: 0.75, 2: 0, 3: 1, 4: 0, 6: 1, 7: 0}


def test_units_of_two_steps(tmp_path):
    """HRM: beside each first step the unit with every second one, whose value is that of the second; HNC: other trees.
    The held-out trees stay as they are."""
    store(tmp_path / "train", ["p"])
    store(tmp_path / "eval", ["r"])
    task = TreeValues(str(tmp_path / "train"), str(tmp_path / "eval"), units="pairs")
    data = task.labelled(task.prompts)
    labels = {data.rollout.texts[v]: y for v, y in zip(data.node.tolist(), data.label.tolist(), strict=True)}
    assert {k: labels[k] for k in ("a\nx", "a\ny", "b\nz")} == {"a\nx": 1, "a\ny": 0, "b\nz": 1}
    assert math.isnan(labels["c\nx"]) and len(data.node) == 8 + 5
    assert len(task.labelled(task.eval_prompts).node) == 8
    tree = {"a": {"x": 1, "y": 0}, "b": {"x": 1}, "c": {"x": 0}, "d": {"x": 1}}
    wide, paths = solution_forest([Prompt("p", {})], [[[s, e] for s, own in tree.items() for e in own]])
    leaves = torch.tensor([path[-1] for path in paths[0]])
    outcomes = torch.tensor([y for own in tree.values() for y in own.values()], dtype=torch.float64)
    wide.with_tree(wide.tree.with_outcomes(leaves, outcomes)).save(tmp_path / "wide")
    changed = 0
    for seed in range(8):
        task = TreeValues(str(tmp_path / "wide"), str(tmp_path / "eval"), units="contracted", seed=seed)
        changed += any("\n" in t for t in task.labelled(task.prompts).rollout.texts)
    assert 0 < changed < 8


def test_other_values_may_be_named(tmp_path):
    store(tmp_path, ["p"])
    data = TreeValues(str(tmp_path), str(tmp_path), by="best").labelled([Prompt(f"{tmp_path}/p", {})])
    best = dict(zip(data.node.tolist(), data.label.tolist(), strict=True))
    first = [v for v, p in enumerate(data.rollout.tree.parent.tolist()) if p < 0]
    assert [best[v] for v in first[:2]] == [1, 1]


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no rollout in .*mmrl rollouts RECIPE"):
        TreeValues(str(tmp_path), str(tmp_path))
    store(tmp_path / "a", ["p"], [1.5, -1.0, 1.0, 1.0, math.nan])
    with pytest.raises(ValueError, match="values by outcome go from -1 to 1.5"):
        TreeValues(str(tmp_path / "a"), str(tmp_path / "a"))
    store(tmp_path / "b", ["p"], [math.nan] * 5)
    with pytest.raises(ValueError, match="no step of the rollout has one"):
        TreeValues(str(tmp_path / "b"), str(tmp_path / "b"))


def test_solutions_are_labelled_with_their_outcome(tmp_path):
    store(tmp_path, ["p", "q"])
    data = TreeValues(str(tmp_path), str(tmp_path), paths="solutions").labelled([Prompt(f"{tmp_path}/p", {})])
    texts = [[data.rollout.texts[v] for v in data.node[rows].tolist()] for rows in data.paths]
    labels = [data.label[rows].tolist() for rows in data.paths]
    known = [(s, [y] * len(s)) for s, y in zip(SOLUTIONS, OUTCOMES, strict=True) if y == y]
    assert sorted(zip(texts, labels, strict=True)) == sorted(known)
    with pytest.raises(ValueError, match="labelled with its outcome"):
        TreeValues(str(tmp_path), str(tmp_path), by="value", paths="solutions")


def test_contributions_are_learned_from_outcomes(tmp_path):
    """SPA's estimator: the contributions of a solution add up to its outcome, so what decides gets the larger share."""
    store(tmp_path / "t", ["p", "q"])
    store(tmp_path / "e", ["r"])
    task, scorer = TreeValues(str(tmp_path / "t"), str(tmp_path / "e"), paths="solutions"), Lookup()
    tree = {
        "trainer": "step_reward", "task": {"name": "tree_values"}, "scorer": {"name": "implicit_prm"},
        "loss": {"name": "return_decomposition", "balance": "solution"}, "optim": {"lr": 0.1, "weight_decay": 0.0},
        "run": {"output": str(tmp_path / "run"), "iterations": 80, "prompts_per_iteration": 2, "eval_every": 80,
                "trackers": [], "report": False},
    }  # fmt: skip
    StepRewardTrainer(parse_config(tree), scorer=scorer, task=task).train()
    c = dict(zip(VALUES, scorer.model.weight.detach()[:, 0].tolist(), strict=True))
    for steps, outcome in zip(SOLUTIONS[:4], OUTCOMES, strict=False):
        assert c[steps[0]] + c["".join(steps)] == pytest.approx(outcome, abs=0.02)
    assert c["ax"] - c["ay"] == pytest.approx(1, abs=0.03)  # after a, the second step decides


class Lookup:
    """A logit per path of texts."""

    def __init__(self):
        self.model, self.asked = nn.Embedding(len(VALUES), 1), []
        nn.init.zeros_(self.model.weight)

    def admit(self, prompts):
        return list(prompts)

    def readable(self, rollout):
        return torch.ones(len(rollout.tree), dtype=torch.bool)

    def micro_batches(self, rollout, steps, *, whole_prompts=False):
        self.asked.append(whole_prompts)
        return [steps]

    def logits(self, rollout, steps):
        tree, texts, names = rollout.tree, rollout.texts, list(VALUES)
        keys = [(texts[tree.parent[v]] if tree.parent[v] >= 0 else "") + texts[v] for v in steps.tolist()]
        return self.model(torch.tensor([names.index(k) for k in keys]))

    def save(self, folder, state_dict=None):
        folder.mkdir(parents=True, exist_ok=True)


def test_a_value_model_learns_values_and_order(task, tmp_path):
    tree = {
        "trainer": "step_reward",
        "task": {"name": "tree_values"},
        "scorer": {"name": "implicit_prm"},
        "loss": {"name": "value_margin"},
        "optim": {"lr": 0.3},
        "run": {
            "output": str(tmp_path / "run"), "iterations": 30, "prompts_per_iteration": 2, "eval_every": 30,
            "trackers": [], "report": False,
        },
    }  # fmt: skip
    scorer = Lookup()
    StepRewardTrainer(parse_config(tree, model=RewardModelConfig), scorer=scorer, task=task).train()
    assert scorer.asked.count(True) == 30  # siblings are not torn apart in training
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [r for r in rows if "eval/pair_acc" in r]
    assert found[0]["eval/pair_acc"] == 0.5 and found[-1]["eval/pair_acc"] == 1
    assert found[-1]["eval/value_mse"] < 0.01 < found[0]["eval/value_mse"]
