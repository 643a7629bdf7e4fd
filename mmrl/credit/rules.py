"""Which combinations have a meaning. Every refusal names both offenders and the fix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl.credit.table import Spec, estimator_of, transform_of
from mmrl.credit.tags import tag
from mmrl.registry import REQUIRED, Row, writers
from mmrl.tree import StepTree

Kind = Literal["reward", "value"]


def check_recipe(
    transforms: Sequence[Spec],
    estimators: Sequence[Spec],
    *,
    kind: Kind = "reward",
    whiten: bool = False,
    allow_double_norm: bool = False,
    counting: str = "node",
    repeats_prefix: bool = False,
) -> None:
    """Refuse what can be seen without a tree.

    kind: what `step_reward` holds; a "value" is a score of the state and must be differenced before it is summed.
    repeats_prefix: the trainer already trains a shared step once per trajectory.

    Raises:
        ValueError: naming both offenders and the fix.
    """
    for e in estimators:
        _check_ignored_steps(transforms, estimators, e)
        _check_summed_values(transforms, e, kind)
        _check_discounts(transforms, e)
        if whiten and not allow_double_norm and _scale(e) == "std":
            raise ValueError(
                f"whiten with {e['name']!r} (scale 'std') normalises twice; use scale: none, drop whiten, or set "
                "allow_double_norm: true"
            )
    changing = [t["name"] for t in transforms if transform_of(t)[0].facts.get("differences")]
    if len(changing) > 1:
        raise ValueError(
            f"transforms {changing[0]!r} and {changing[1]!r} both difference the step rewards; keep one of them"
        )
    if counting == "leaf" and repeats_prefix:
        raise ValueError(
            "counting 'leaf' with a trainer that repeats shared prefixes per trajectory counts them twice; use "
            "counting: node, or train on the packed tree"
        )


def check_tree(tree: StepTree, estimators: Sequence[Spec], transforms: Sequence[Spec] = ()) -> None:
    """Refuse estimators whose needs the (transformed) tree does not meet.

    Raises:
        ValueError: naming the estimator, what is missing, the first step concerned and the fix.
    """
    for spec in estimators:
        row, options = estimator_of(spec)
        for need in row.reads(options):
            check_need(tree, need, f"estimator {row.name!r}")
        if row.name == "srgpo":
            _check_sources(tree)
        if _optimistic(spec):
            _warn_optimism(tree, row.name)
    if "off_policy" in tree.tags:
        bad = (tag(tree, "off_policy", classes=2) == 1) & tree.valid & tree.logp.isnan()
        if bool(bad.any()):
            raise ValueError(
                f"step {_first(bad)} is replayed (tags['off_policy']) but has no behaviour logp, so its ratio is "
                "unknown; store logp with the rollout or drop it"
            )


def check_need(tree: StepTree, need: str, who: str) -> None:
    """One need of the table against one tree; see `mmrl.credit.table`."""
    if need.startswith("tags."):
        name = need.removeprefix("tags.")
        if name not in tree.tags:
            filling = writers(need)
            raise ValueError(
                f"{who} needs tags[{name!r}] and the tree has {sorted(tree.tags) or 'no tags'}; "
                + (f"readings that write it: {', '.join(filling)}" if filling else "write it into the tree")
            )
        return
    _NEEDS[need](tree, who)


def _need_outcome(tree: StepTree, who: str) -> None:
    """Missing outcomes are refused by the tree itself; prompts without finished leaf get 0."""


def _need_step_reward(tree: StepTree, who: str) -> None:
    if len(tree) and bool(tree.step_reward[tree.valid].isnan().all()) and bool(tree.valid.any()):
        raise ValueError(f"{who} needs step_reward, but every step is NaN (not scored); add a step reward or a judge")


def _need_value(tree: StepTree, who: str) -> None:
    bad = tree.valid & tree.value.isnan()
    if bool(bad.any()):
        raise ValueError(
            f"{who} needs value on every step; step {_first(bad)} has none: run the critic or prover first"
        )


def _need_root_value(tree: StepTree, who: str) -> None:
    seen = torch.zeros(tree.num_groups, dtype=torch.bool)
    seen[tree.group[tree.valid]] = True
    bad = seen & tree.root_value.isnan()
    if bool(bad.any()):
        raise ValueError(f"{who} needs root_value, the value of each prompt; prompt {_first(bad)} has none")


def _need_ok(tree: StepTree, who: str) -> None:
    if tree.ok is None:
        raise ValueError(f"{who} needs ok, whether each step agrees with the reference; give StepTree(ok=...)")


def _need_logp(tree: StepTree, who: str) -> None:
    bad = tree.valid & tree.logp.isnan()
    if bool(bad.any()):
        raise ValueError(f"{who} needs logp; step {_first(bad)} has none")


def _need_key(name: str) -> Callable[[StepTree, str], None]:
    def check(tree: StepTree, who: str) -> None:
        if len(tree) and bool((getattr(tree, name) < 0).all()):
            raise ValueError(f"{who} needs {name}, but every step has -1 (none); hash the state, or use grpo")

    return check


def _need_forks(tree: StepTree, who: str) -> None:
    first = torch.bincount(tree.group[tree.parent < 0], minlength=tree.num_groups)
    if len(tree) and tree.is_chains and int(first.max()) <= 1:
        raise ValueError(
            f"{who} compares steps of one prompt, but every prompt is a single chain; sample a group or a tree"
        )


def _need_chains(tree: StepTree, who: str) -> None:
    if not tree.is_chains:
        i = _first(tree.num_children > 1)
        raise ValueError(f"{who} needs chains, but step {i} branches; take a plan that forks at the prompt alone")


_NEEDS: dict[str, Callable[[StepTree, str], None]] = {
    "outcome": _need_outcome,
    "step_reward": _need_step_reward,
    "value": _need_value,
    "root_value": _need_root_value,
    "ok": _need_ok,
    "logp": _need_logp,
    "state_key": _need_key("state_key"),
    "edge_key": _need_key("edge_key"),
    "forks": _need_forks,
    "chains": _need_chains,
}


def _check_ignored_steps(transforms: Sequence[Spec], estimators: Sequence[Spec], e: Spec) -> None:
    if any(_reads_steps(other) for other in estimators):
        return
    rewarding = [i for i, t in enumerate(transforms) if "step_reward" in transform_of(t)[0].writes()]
    if not rewarding:
        return
    if not any(_folds(t) for t in transforms[rewarding[-1] + 1 :]):
        raise ValueError(
            f"estimator {e['name']!r} does not read step rewards, so those of transform "
            f"{transforms[rewarding[-1]]['name']!r} would be ignored; append the fold transform, or use process_grpo, "
            "step_grpo or gae"
        )


def _folds(t: Spec) -> bool:
    """The transform carries step rewards into the outcome."""
    row, options = transform_of(t)
    return "step_reward" in row.reads(options) and row.writes(options) == ("outcome",)


def _check_summed_values(transforms: Sequence[Spec], e: Spec, kind: Kind) -> None:
    if kind != "value":
        return
    differenced = False
    for t in transforms:
        facts = transform_of(t)[0].facts
        differenced = differenced or facts.get("differences", False)
        if facts.get("sums_steps") and not differenced:
            raise _summed(t["name"])
    if estimator_of(e)[0].facts.get("sums_steps") and not differenced:
        raise _summed(e["name"])


def _summed(name: str) -> ValueError:
    return ValueError(
        f"step_reward_kind 'value' with {name!r} sums state values: longer answers win; put delta or progress before "
        "it"
    )


def _check_discounts(transforms: Sequence[Spec], e: Spec) -> None:
    for t in transforms:
        row, options = transform_of(t)
        mine = options.get("gamma", _default(row, "gamma", None))
        theirs = e.get("gamma", _default(estimator_of(e)[0], "gamma", 1.0))
        if mine is not None and abs(mine - theirs) > 1e-12:
            raise ValueError(
                f"transform {row.name!r} has gamma {mine} and estimator {e['name']!r} {theirs}; with unequal "
                "discounts the shaping no longer telescopes: set both alike"
            )


def _reads_steps(e: Spec) -> bool:
    row, options = estimator_of(e)
    if row.declared.reads is None:
        return True  # a function that declares nothing may read them
    return "step_reward" in (*row.reads(options), *row.facts.get("may_read", ()))


def _scale(e: Spec) -> str:
    row, options = estimator_of(e)
    fixed = row.facts.get("scale")
    if callable(fixed):
        fixed = fixed({name: _default(row, name, None) for name in row.options} | options)
    return str(fixed or options.get("scale", _default(row, "scale", "none")))


def _default(row: Row, name: str, otherwise: Any) -> Any:
    option = row.options.get(name)
    return otherwise if option is None or option.default is REQUIRED else option.default


def _check_sources(tree: StepTree) -> None:
    if "reward_source" not in tree.tags:
        return
    sources = tag(tree, "reward_source")[tree.valid]
    kinds = sources[~sources.isnan()].unique().tolist()
    if len(kinds) > 1:
        raise ValueError(
            f"srgpo draws sets across prompts, but tags['reward_source'] has {len(kinds)} values {kinds[:4]}: rewards "
            "of different functions share no scale; use step_grpo, which stays inside a prompt"
        )


def _optimistic(e: Spec) -> bool:
    return (e["name"] == "portool" and e.get("agg") == "max") or e.get("value") == "leaf_max"


def _warn_optimism(tree: StepTree, name: str) -> None:
    r = tree.outcome[tree.is_finished]
    if bool(((r != 0) & (r != 1)).any()):
        warnings.warn(f"{name} takes the maximum over leaves of real-valued rewards: optimism bias", stacklevel=4)


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])
