"""Checks of a credit recipe: combinations of transforms and estimators without meaning, and fields that a tree lacks.

Every error names both components that contradict each other and the fix.
"""

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
from mmrl.tree_ops import need_chains

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
    """Refuse combinations without meaning, as far as they can be seen without a tree.

    kind: the meaning of `step_reward`; a "value" is a score of the state and must be differenced before it is summed.
    repeats_prefix: the trainer already trains a shared step once per trajectory.

    Raises:
        ValueError: naming both offenders and the fix.
    """
    for spec in estimators:
        _check_ignored_steps(transforms, estimators, spec)
        _check_summed_values(transforms, spec, kind)
        _check_discounts(transforms, spec)
        if whiten and not allow_double_norm and _scale(spec) == "std":
            raise ValueError(
                f"whiten with {spec['name']!r} (scale 'std') normalises twice; use scale: none, drop whiten, or set "
                "allow_double_norm: true"
            )
    differencing = [spec["name"] for spec in transforms if transform_of(spec)[0].facts.get("differences")]
    if len(differencing) > 1:
        raise ValueError(
            f"transforms {differencing[0]!r} and {differencing[1]!r} both difference the step rewards; keep one of "
            "them"
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
        replayed = tag(tree, "off_policy", classes=2) == 1
        bad = replayed & tree.valid & tree.logp.isnan()
        if bool(bad.any()):
            raise ValueError(
                f"step {_first(bad)} is replayed (tags['off_policy']) but has no behaviour logp, so its ratio is "
                "unknown; store logp with the rollout or drop it"
            )


def check_need(tree: StepTree, need: str, who: str) -> None:
    """Raises ValueError when the tree lacks the field `need` of the component `who`; see `mmrl.credit.table`."""
    if need.startswith("tags."):
        name = need.removeprefix("tags.")
        if name not in tree.tags:
            readings = writers(need)
            remedy = f"readings that write it: {', '.join(readings)}" if readings else "write it into the tree"
            raise ValueError(f"{who} needs tags[{name!r}] and the tree has {sorted(tree.tags) or 'no tags'}; {remedy}")
        return
    _NEEDS[need](tree, who)


def _need_outcome(tree: StepTree, who: str) -> None:
    """Nothing to check: the tree itself refuses missing outcomes, and prompts without finished leaf get 0."""


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
    has_valid_step = torch.zeros(tree.num_groups, dtype=torch.bool)
    has_valid_step[tree.group[tree.valid]] = True
    bad = has_valid_step & tree.root_value.isnan()
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
    first_steps = torch.bincount(tree.group[tree.parent < 0], minlength=tree.num_groups)
    if len(tree) and tree.is_chains and int(first_steps.max()) <= 1:
        raise ValueError(
            f"{who} compares steps of one prompt, but every prompt is a single chain; sample a group or a tree"
        )


def _need_chains(tree: StepTree, who: str) -> None:
    need_chains(tree, who, "take a plan that forks at the prompt alone")


# Field that a component declares under `reads` -> the check that a tree has it; "forks" and "chains" are shapes.
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
    """Refuse a transform that writes step rewards when neither an estimator reads them nor a later fold."""
    if any(_reads_steps(other) for other in estimators):
        return
    rewarding = [i for i, spec in enumerate(transforms) if "step_reward" in transform_of(spec)[0].writes()]
    if not rewarding:
        return
    last = rewarding[-1]
    if not any(_folds(spec) for spec in transforms[last + 1 :]):
        raise ValueError(
            f"estimator {e['name']!r} does not read step rewards, so those of transform "
            f"{transforms[last]['name']!r} would be ignored; append the fold transform, or use process_grpo, "
            "step_grpo or gae"
        )


def _folds(t: Spec) -> bool:
    """True for a transform that carries step rewards into the outcome."""
    row, options = transform_of(t)
    return "step_reward" in row.reads(options) and row.writes(options) == ("outcome",)


def _check_summed_values(transforms: Sequence[Spec], e: Spec, kind: Kind) -> None:
    """Refuse a sum over step rewards that are values, unless a transform differenced them before."""
    if kind != "value":
        return
    differenced = False
    for spec in transforms:
        facts = transform_of(spec)[0].facts
        differenced = differenced or facts.get("differences", False)
        if facts.get("sums_steps") and not differenced:
            raise _summed(spec["name"])
    if estimator_of(e)[0].facts.get("sums_steps") and not differenced:
        raise _summed(e["name"])


def _summed(name: str) -> ValueError:
    return ValueError(
        f"step_reward_kind 'value' with {name!r} sums state values: longer answers win; put delta or progress before "
        "it"
    )


def _check_discounts(transforms: Sequence[Spec], e: Spec) -> None:
    """Refuse a discount of a shaping transform that differs from the estimator's."""
    for spec in transforms:
        row, options = transform_of(spec)
        mine = options.get("gamma", _default(row, "gamma", None))
        theirs = e.get("gamma", _default(estimator_of(e)[0], "gamma", 1.0))
        if mine is not None and abs(mine - theirs) > 1e-12:
            raise ValueError(
                f"transform {row.name!r} has gamma {mine} and estimator {e['name']!r} {theirs}; with unequal "
                "discounts the shaping no longer telescopes: set both alike"
            )


def _reads_steps(e: Spec) -> bool:
    row, options = estimator_of(e)
    # A function that declares nothing may read them.
    if row.declared.reads is None:
        return True
    return "step_reward" in (*row.reads(options), *row.facts.get("may_read", ()))


def _scale(e: Spec) -> str:
    """The normalisation of an estimator with its options: declared, an option, or "none"."""
    row, options = estimator_of(e)
    fixed = row.facts.get("scale")
    if callable(fixed):
        fixed = fixed({name: _default(row, name, None) for name in row.options} | options)
    return str(fixed or options.get("scale", _default(row, "scale", "none")))


def _default(row: Row, name: str, otherwise: Any) -> Any:
    """The default of an option; `otherwise` where the row has no such option, or one without default."""
    option = row.options.get(name)
    if option is None or option.default is REQUIRED:
        return otherwise
    return option.default


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
    """True for an estimator that takes the best leaf below a step as its value."""
    return (e["name"] == "portool" and e.get("agg") == "max") or e.get("value") == "leaf_max"


def _warn_optimism(tree: StepTree, name: str) -> None:
    outcome = tree.outcome[tree.is_finished]
    if bool(((outcome != 0) & (outcome != 1)).any()):
        warnings.warn(f"{name} takes the maximum over leaves of real-valued rewards: optimism bias", stacklevel=4)


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0])
