"""The worked tables and scalars of the specification: two small forests, every quantity, to 1e-6."""

import json
from pathlib import Path

import pytest
import torch

from mmrl.credit import estimate
from mmrl.credit.estimate import apply_transform
from mmrl.credit.reward_machine import RewardMachine
from mmrl.credit.steps import judged_wrong
from mmrl.credit.transforms import thought_reward, thoughts
from mmrl.tree import StepTree
from mmrl.tree_ops import backup, returns

WORKED = dict(
    zip(("t8", "c7"), json.loads((Path(__file__).parent / "data" / "credit_worked.json").read_text()), strict=True)
)
nan = float("nan")


def adv(name, transforms=(), **options):
    return lambda t: estimate(t, name, transforms, **options).adv


def rewards(*specs):
    def run(tree):
        for spec in specs:
            tree = apply_transform(tree, spec)
        return tree.step_reward

    return run


def potential_term(t):
    return torch.where(
        t.valid, apply_transform(t, {"name": "potential", "gamma": 0.9}).step_reward - t.step_reward, 0.0
    )


def thought_rewards(t):
    return torch.where(t.valid, thought_reward(t), 0.0)


ROWS = {
    "V leaf_mean": lambda t: backup(t, "leaf_mean"),
    "V child_mean": lambda t: backup(t, "child_mean"),
    "V edge_softmax": lambda t: backup(t, "edge_softmax"),
    "V path_prob": lambda t: backup(t, "path_prob"),
    "returns γ=0.9": lambda t: returns(t, 0.9),
    "grpo": adv("grpo"),
    "dr_grpo": adv("dr_grpo"),
    "rloo": adv("rloo"),
    "reinforce_pp_baseline": adv("reinforce_pp_baseline"),
    "tree_rpo child_mean std inherit": adv("tree_rpo"),
    "tree_rpo child_mean std zero": adv("tree_rpo", unary="zero"),
    "tree_rpo child_mean none": adv("tree_rpo", scale="none"),
    "tree_rpo child_mean loo": adv("tree_rpo", scale="loo"),
    "tree_rpo child_mean bernoulli": adv("tree_rpo", scale="bernoulli"),
    "tree_rpo leaf_mean none": adv("tree_rpo", value="leaf_mean", scale="none"),
    "tree_rpo leaf_mean std (propa)": adv("propa"),
    "branch_depth leaf_mean": adv("branch_depth"),
    "branch_depth edge_softmax": adv("branch_depth", value="edge_softmax"),
    "portool defaults": adv("portool"),
    "portool γ=.9 fork .5 fmt .2 max": adv("portool", gamma=0.9, w_fork=0.5, w_format=0.2, agg="max"),
    "gigpo std trajectory": adv("gigpo"),
    "gigpo std step": adv("gigpo", episode_stats="step"),
    "gigpo none trajectory": adv("gigpo", scale="none"),
    "salt (grpo)": adv("salt"),
    "salt (rloo)": adv("salt", base="rloo"),
    "process_grpo": adv("process_grpo"),
    "step_grpo": adv("step_grpo"),
    "fold_grpo w=0.1": adv("fold_grpo", step_weight=0.1),
    "gated fold_grpo w=1 δ=.5": adv("fold_grpo", threshold=0.5),
    "renorm → step_grpo": adv("step_grpo", ["renorm"]),
    "renorm → process_grpo": adv("ppr"),
    "ui_s1 std": adv("ui_s1"),
    "srgpo ω=.5": adv("srgpo", episode_stats="trajectory"),
    "pav α=3 K=1": adv("pav"),
    "pav α=5 K=4": adv("pav", alpha=5, best_of=4),
    "igpo joint": adv("igpo"),
    "igpo separate γ=.9": adv("igpo", pool="separate", gamma=0.9),
    "capo": adv("capo"),
    "gae 1, .95": adv("gae"),
    "gae .9, .8": adv("gae", gamma=0.9, lam=0.8),
    "oprl α=1": adv("oprl"),
    "delta": rewards({"name": "delta"}),
    "clip(.3) → delta": rewards({"name": "clip", "eta": 0.3}, {"name": "delta"}),
    "potential term γ=.9 (Φ=value)": potential_term,
    "gate δ=.5": rewards({"name": "gate"}),
    "renorm": rewards({"name": "renorm"}),
    "progress": rewards({"name": "progress"}),
    "tp_grpo step reward": thought_rewards,
    "thoughts (label = wrong)": lambda t: thoughts(t).double(),
    "vsrm": rewards({"name": "vsrm"}),
    "spa exact β=.5": rewards({"name": "spa", "exact": True}),
}


def flags(text):
    return torch.tensor([c == "T" for c in text.split()])


@pytest.fixture
def forests(t8, c7):
    return {
        "t8": t8.replace(tags={
            "wrong": flags("F T F F T F T F"), "set_id": torch.tensor([0, 0, 1, 1, 0, 1, 1, 0]),
            "implicit": torch.tensor([0.1, -0.2, 0.3, 0.05, -0.4, 0.2, -0.1, 0.0], dtype=torch.float64),
        }),
        "c7": c7.replace(tags={
            "wrong": flags("F T T F T F F"), "set_id": torch.tensor([0, 1, 0, 1, 0, 1, 0]),
            "implicit": torch.tensor([0.1, 0.2, 0.3, -0.2, -0.1, 0.1, 0.05], dtype=torch.float64),
            "contribution": torch.tensor([0.2, 0.3, 0.4, 0.1, 0.2, 0.3, 0.5], dtype=torch.float64),
            "grounded": flags("T T T F T T T"),
        }),
    }  # fmt: skip


def test_no_row_of_the_tables_is_left_out():
    assert set(ROWS) == set(WORKED["t8"]) | set(WORKED["c7"]) and len(WORKED["t8"]) == 49


@pytest.mark.parametrize("forest, row", [(f, r) for f in WORKED for r in WORKED[f]])
def test_worked_tables(forests, forest, row):
    got = ROWS[row](forests[forest])
    torch.testing.assert_close(got, torch.tensor(WORKED[forest][row], dtype=torch.float64), atol=1.01e-6, rtol=0)


def check_close(x, want, atol=1e-6):
    torch.testing.assert_close(torch.as_tensor(x).double(), torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0)


def chains(*rewards_per_chain, outcomes, **tags):
    """One prompt, chains with the given step rewards."""
    parent, status, outcome = [], [], []
    for steps, r in zip(rewards_per_chain, outcomes, strict=True):
        for k in range(len(steps)):
            parent.append(len(parent) - 1 if k else -1)
            status.append(1 if k == len(steps) - 1 else 0)
            outcome.append(r if k == len(steps) - 1 else nan)
    flat = [x for steps in rewards_per_chain for x in steps]
    return StepTree(
        parent,
        [0] * len(parent),
        status,
        outcome,
        step_reward=flat,
        tags={k: torch.tensor(v) for k, v in tags.items()},
    )


def test_rapo():
    tree = StepTree([-1] * 6, [0, 0, 1, 1, 2, 2], [1] * 6, [1.0, 0, 1, 1, 0, 0])
    out = estimate(tree, "rapo")
    check_close(out.adv, [2.121317, -2.121317, 0, 0, 0, 0])
    assert out.info["rapo_factor"] == 3 and estimate(tree, "rapo", cap=2.0).info["rapo_factor"] == 2


PRIME = {
    "paper": [-0.916667, -0.958333, 1.0, -0.5, -0.5, 0.583333, 1.291667],
    "code": [-0.916667, -1.333333, 1.0, -0.916667, -0.583333, 0.583333, 1.666667],
}


@pytest.mark.parametrize("form", PRIME)
def test_prime(form):
    tokens = [[0.1, -0.2], [0.3, 0.0, 0.1], [-0.1, 0.2]]
    tree = chains(*tokens, outcomes=[1.0, 0.0, 1.0], implicit=[x for row in tokens for x in row])
    check_close(estimate(tree, "prime", form=form).returns, PRIME[form])
    check_close(estimate(tree, "prime", form=form, whitened=False).adv, PRIME[form])


def test_prime_whitened():
    tokens = [[0.1, -0.2], [0.3, 0.0, 0.1], [-0.1, 0.2]]
    tree = chains(*tokens, outcomes=[1.0, 0.0, 1.0], implicit=[x for row in tokens for x in row])
    want = [-0.737506, -1.101065, 0.934866, -0.737506, -0.446658, 0.571307, 1.516561]
    check_close(estimate(tree, "prime", form="code").adv, want)


def test_contrastive_attribution_mixed_severity():
    one = StepTree([-1], [0], [1], [0.8], tags={"baseline": torch.tensor([[0.2, 0.5, 0.4, 0.3, 0.6]])})
    check_close(apply_transform(one, {"name": "contrastive"}).outcome, [0.4])
    phi = torch.tensor([[0.5, 0.1], [0.3, 0.6], [0.2, 0.3]])
    tree = chains([nan] * 3, outcomes=[2.0], attribution=phi.tolist())
    check_close(apply_transform(tree, {"name": "attribution", "weights": [0.25, 0.75]}).step_reward, [0.4, 1.05, 0.55])
    items = chains([1.0, 0.0, 1.0], outcomes=[0.5])
    check_close(apply_transform(items, {"name": "mixed_grained", "page": 0.6}).outcome[-1:], [0.566667])
    classes = chains([0.0] * 4, outcomes=[1.0], severity=[0, 1, 3, 2])
    check_close(apply_transform(classes, {"name": "severity"}).step_reward, [0, -1, -10, -5])


MACHINE = {"events": ["a", "b", "c"], "start": "u0", "edges": [["u0", "a", "u1"], ["u1", "b", "accept"]]}


def test_reward_machine():
    events = [[True, False, False], [False, False, True], [False, True, False]]
    tree = chains([0.0] * 3, outcomes=[1.0], events=events)
    out = apply_transform(tree, {"name": "reward_machine", "machine": MACHINE})
    check_close(out.step_reward, [0, 0, 1])
    names = RewardMachine.parse(MACHINE).states
    assert [names[s] for s in out.tags["machine_state"]] == ["u1", "u1", "accept"]
    shaped = apply_transform(tree, {"name": "reward_machine", "machine": MACHINE, "gamma": 1.0})
    check_close(shaped.step_reward - out.step_reward, [1, 0, 1])


def test_hierarchical_machine_equals_the_flat_one():
    """Fetch (a then b) is called, then c: the same language as the flat chain a, b, c."""
    called = {
        "events": ["a", "b", "c"], "start": "s", "edges": [["s", "true", "got", {"call": "fetch"}], ["got", "c", "accept"]],
        "machines": {"fetch": {"start": "f0", "edges": [["f0", "a", "f1"], ["f1", "b", "accept"]]}},
    }  # fmt: skip
    flat = {"events": ["a", "b", "c"], "start": "0", "edges": [["0", "a", "1"], ["1", "b", "2"], ["2", "c", "accept"]]}
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        events = (torch.rand((12, 3), generator=g) < 0.4).tolist()
        tree = chains([0.0] * 12, outcomes=[1.0], events=events)
        a, b = (apply_transform(tree, {"name": "reward_machine", "machine": m}).step_reward for m in (called, flat))
        assert torch.equal(a, b)
    assert RewardMachine.parse(called).potential().tolist() == RewardMachine.parse(flat).potential().tolist()


@pytest.mark.parametrize(
    "guard, message",
    [("a &", "ends too early"), ("(a", "not closed"), ("a b", "unexpected 'b'"), ("d", "unknown event 'd'"), ("a; b", "unexpected ';' at position 1"),
     ("__import__('os')", "unknown event '__import__'|unexpected")],
)  # fmt: skip
def test_guards_are_parsed_not_evaluated(guard, message):
    with pytest.raises(ValueError, match=message):
        RewardMachine.parse(MACHINE | {"edges": [["u0", guard, "accept"]]})


def test_guard_language():
    from mmrl.credit.reward_machine import parse_guard

    events = torch.tensor([[a, b, c] for a in (False, True) for b in (False, True) for c in (False, True)])
    a, b, c = events.T
    assert torch.equal(parse_guard("a & !b | c", ["a", "b", "c"])(events), (a & ~b) | c)
    assert torch.equal(parse_guard("!(a | b) & c", ["a", "b", "c"])(events), ~(a | b) & c)


def test_machines_that_call_themselves_or_nobody():
    with pytest.raises(ValueError, match="machine has no start, edges; it needs events, start and edges"):
        RewardMachine.parse({"events": ["a"]})
    loop = MACHINE | {
        "edges": [["u0", "a", "accept", {"call": "x"}]],
        "machines": {"x": {"start": "y", "edges": [["y", "a", "accept", {"call": "x"}]]}},
    }
    with pytest.raises(ValueError, match="machine 'x' calls itself"):
        RewardMachine.parse(loop)
    with pytest.raises(ValueError, match="calls unknown machine 'z'"):
        RewardMachine.parse(MACHINE | {"edges": [["u0", "a", "accept", {"call": "z"}]]})


def test_red_info_gain_redundancy():
    tree = chains([0.1, 0.4, 0.35, 0.8], outcomes=[1.0]).replace(root_value=[0.05])
    red = apply_transform(tree, {"name": "red"}).step_reward
    check_close(red, [0.05, 0.3, -0.05, 0.45])
    check_close(red.sum(), 0.75)
    sim = chains([0.0] * 3, outcomes=[1.0], similarity=[[0.5, 0.1], [0.4, 0.7], [0.6, 0.7]])
    check_close(apply_transform(sim, {"name": "info_gain"}).step_reward, [0.3, 0.3, 0.05])
    docs = chains([0.0] * 3, outcomes=[1.0], documents=[[True, True, False], [True, False, True], [True, True, False]])
    check_close(apply_transform(docs, {"name": "redundancy"}).step_reward, [0, 0.5, 1])


def test_prune_and_alarm():
    tree = chains(*[[0.0] * k for k in (3, 5, 2, 9)], outcomes=[1.0, 1.0, 0.0, 1.0])
    pruned = apply_transform(tree, {"name": "step_prune", "penalty": 0.5})
    check_close(pruned.outcome[pruned.is_finished], [1, 0.833333, 0, 0.5])
    long = tree.replace(
        tok_start=torch.arange(19) * 10, tok_end=torch.arange(19) * 10 + torch.where(torch.arange(19) == 4, 9, 1)
    )
    assert int(apply_transform(long, {"name": "step_prune", "max_step_tokens": 5}).is_finished.sum()) == 3
    leaves = StepTree([-1] * 3, [0] * 3, [1] * 3, [0.2, 0.9, 0.6], tags={"aspect": torch.tensor([1, -0.5, 2])})
    check_close(apply_transform(leaves, {"name": "alarm"}).outcome, [0.2, 1.013262, 0.864239])


def test_clip_of_c7(c7):
    check_close(apply_transform(c7, {"name": "clip", "eta": 0.5}).step_reward, [0, 0, 0, -0.3, -0.2, 0, 0])


def test_spark_and_judges():
    tree = chains([1.0, 1.0, 0.0], [1.0], outcomes=[0.0, 0.0])
    out = apply_transform(tree, {"name": "spark"})
    check_close(out.outcome[out.is_finished], [0.666667, 1])
    strict = apply_transform(tree, {"name": "spark", "rule": "all"})
    check_close(strict.outcome[strict.is_finished], [0, 1])
    check_close(estimate(tree, "spark").adv, [-0.707104, -0.707104, -0.707104, 0.707104], 1e-5)
    votes = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert judged_wrong(votes).tolist() == [True, True, False]
    assert judged_wrong(votes, "intersection").tolist() == [False, True, False]
