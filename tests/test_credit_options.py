"""Options of estimators and transforms: a wrong value is named with its range, whoever calls."""

import math

import pytest
import torch
from tiny import lone_chain

from mmrl.credit import compose, estimate
from mmrl.credit.estimate import apply_transform
from mmrl.credit.select import prune_width
from mmrl.registry import find, names
from mmrl.tree import StepTree

n = math.nan


def check_close(x, want, atol=1e-6):
    torch.testing.assert_close(x, torch.tensor(want, dtype=torch.float64), atol=atol, rtol=0, equal_nan=True)


def transformed(tree, name, **options):
    return apply_transform(tree, {"name": name, **options})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: compose(t, []), "estimators is empty: name at least one of branch_depth, capo"),
        (lambda t: compose(t, "grpo"), r"estimators='grpo' must be a list, such as \['grpo'\]"),
        (lambda t: compose(t, ["grpo"], {"name": "delta"}), "transforms={'name': 'delta'} must be a list"),
        (lambda t: compose(t, [{"scale": "std"}]), "estimators: {'scale': 'std'} needs a name"),
        (lambda t: compose(t, ["grppo"]), r"unknown estimator 'grppo' \(did you mean grpo\?\)"),
        (lambda t: estimate(t, "srgpo", set_size=0), "srgpo.set_size=0: input should be greater than 0"),
        (lambda t: estimate(t, "rapo", cap=-1), "rapo.cap=-1: input should be greater than 0"),
        (lambda t: compose(t, ["step_grpo"], [{"name": "blend", "phi": [0, 1]}]), r"blend.phi=\[0, 1\]: value should have at least 3 items"),
        (lambda t: transformed(t, "clip"), "clip.eta is missing"),
        (lambda t: transformed(t, "mix", dense=1.5), "mix.dense=1.5: input should be less than or equal to 1"),
        (lambda t: estimate(t, "gae", lam=1.1), "gae.lam=1.1: input should be less than or equal to 1"),
        (lambda t: estimate(t, "prime", form="papr"), "prime.form='papr': input should be 'paper' or 'code'"),
        (lambda t: estimate(t, "salt", base="dr_grpo"), "salt.base='dr_grpo': input should be 'grpo' or 'rloo'"),
        (lambda t: estimate(t, "portool", agg="median"), "portool.agg='median': input should be 'mean' or 'max'"),
        (lambda t: estimate(t, "branch_depth", spread="leafs"), "branch_depth.spread='leafs': input should be 'depth' or 'leaf'"),
        (lambda t: estimate(t, "grpo", singleton="rw"), "grpo.singleton='rw': input should be 'zero' or 'raw'"),
    ],
)  # fmt: skip
def test_unclear_calls_are_refused_by_name_and_range(t8, call, message):
    with pytest.raises(ValueError, match=message):
        call(t8)


def _direct():
    from mmrl.credit import Norm, norm, outcome, steps, transforms
    from mmrl.tree_ops import discounted_leaf

    implicit = {"implicit": [0.1, 0.2], "auxiliary": [0.0, 0.0]}
    tree = StepTree([-1, -1], [0, 0], [1, 1], [1.0, 0.0], step_reward=[0.1, 0.2], edge_key=[1, 2], tags=implicit)
    return [
        (lambda: outcome.rapo(tree, cap=-1), "rapo.cap=-1 must be above 0"),
        (lambda: steps.srgpo(tree, set_size=0), "srgpo.set_size=0 must be at least 1"),
        (lambda: transforms.blend(tree, phi=[0, 1]), r"blend.phi=\[0, 1\] must hold 3 numbers"),
        (lambda: steps.prime(tree, form="papr"), r"prime.form 'papr' is none of paper, code \(did you mean paper\?\)"),
        (lambda: outcome.salt(tree, base="dr_grpo"), "salt.base 'dr_grpo' is none of grpo, rloo"),
        (lambda: prune_width(tree, "best", 0), "prune.width 'best' is none of none, top, extreme, best_of_n"),
        (lambda: discounted_leaf(tree, 1.0, "median"), "agg 'median' is none of mean, max"),
        (lambda: outcome.branch_depth(tree, spread="leafs"), r"branch_depth.spread 'leafs' .*did you mean leaf"),
        (lambda: outcome.tree_rpo(tree, unary="one"), "unary 'one' is none of inherit, zero"),
        (lambda: outcome.episode(tree, stats="steps"), r"episode_stats 'steps' is none of .*did you mean step"),
        (lambda: outcome.reinforce_pp_baseline(tree, count_by="tokens"), "count_by 'tokens' is none of"),
        (lambda: steps.igpo(tree, pool="both"), "igpo.pool 'both' is none of joint, separate"),
        (lambda: steps.spark(tree, rule="any"), "spark.rule 'any' is none of mean, all"),
        (lambda: steps.judged_wrong(torch.ones(1, 2), "most"), "judged_wrong.rule 'most' is none of"),
        (lambda: norm(tree.outcome, tree.group, Norm(scale="max")), "scale 'max' is none of"),
        (lambda: norm(tree.outcome, tree.group, Norm(singleton="rw")), "singleton 'rw' is none of"),
    ]


@pytest.mark.parametrize("case", range(16))
def test_plain_calls_select_no_other_method(case):
    call, message = _direct()[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_no_estimator_has_an_option_that_a_recipe_cannot_set(tmp_path, monkeypatch):
    assert not any({"weight", "name"} & set(find("estimators", e).options) for e in names("estimators"))
    (tmp_path / "heavy_credit.py").write_text(
        "from mmrl.credit.outcome import grpo\ndef heavy(tree, *, weight: float = 1.0):\n    return grpo(tree)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'heavy_credit:heavy' has an option 'weight'.*rename it"):
        compose(lone_chain([0.1]), ["heavy_credit:heavy"])


def test_an_entry_without_weight_on_the_others_decides_nothing():
    from mmrl.credit import Norm, norm

    sets = torch.zeros(4, dtype=torch.long)
    z = norm(torch.tensor([1.0, 3.0, 9.0, 2.0]), sets, Norm(eps=0.0), weight=torch.tensor([1.0, 1.0, 0.0, 0.0]))
    check_close(z.z, [-0.707107, 0.707107, 4.949747, 0.0])
    assert z.size.tolist() == [2]
    equal = norm(torch.tensor([2.0, 2.0, 9.0]), sets[:3], weight=torch.tensor([1.0, 1.0, 0.0]))
    assert equal.z.tolist() == [0, 0, 0] and bool(equal.constant[0])
