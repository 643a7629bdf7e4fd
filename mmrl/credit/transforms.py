"""Reward transforms: pure functions tree -> tree, applied before the estimator in the order they are listed.

Docstrings give the new reward r' (of a step) or R' (outcome of a leaf) in terms of the old one.

Steps without a score. NaN in `step_reward` or in a tag says "not scored", which is another thing than 0. All
transforms treat such a step alike:

- It keeps none: a formula of the step's own score leaves NaN where that score is missing. A term that is added to the
  score, such as `blend`'s auxiliary reward, reads 0 where it is missing.
- Differences are taken to the nearest scored step above (`red`) or below (`delta`), so that sums still telescope.
- Sums over a path read it as 0; means and counts are of the scored steps alone (`fold`, `mixed_grained`, `spark`).
- `potential` and `reward_machine` give every step a reward of their own and read a missing score as 0: their terms
  cancel along a path only when no step lacks one.

Estimators leave unscored steps out of their statistics and add 0 for them to sums. Transformed step rewards are 0 on
invalid nodes, those without a finished leaf below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from mmrl.credit.norm import Unit, set_range, unknown_choice
from mmrl.credit.reward_machine import RewardMachine
from mmrl.credit.table import transform
from mmrl.credit.tags import tag
from mmrl.tree import FINISHED, UNFINISHED, StepTree
from mmrl.tree_ops import (
    before,
    last_scored,
    leaf_share,
    leaf_sum,
    lift,
    need_chains,
    path_max,
    path_sum,
    prompt_sum,
    run_head,
)

SparkRule = Literal["mean", "all"]


@transform("clip", source="On Designing Effective RL Reward (Clip)")
def clip(tree: StepTree, *, eta: float) -> StepTree:
    """r' = min(r - eta, 0): every path sum is at most 0, so adding steps never pays."""
    return _steps(tree, (tree.step_reward - eta).clamp(max=0.0))


@transform("delta", differences=True, source="On Designing Effective RL Reward (Delta)")
def delta(tree: StepTree) -> StepTree:
    """Inner step: r(n) minus the leaf-weighted mean of its inner children's r; leaf: 0.

    Then to_go(r', 1)(n) = r(n) on scored inner steps: the return cannot grow with length.
    """
    inner = ~tree.is_leaf & tree.valid
    scored = inner & ~tree.step_reward.isnan()
    reward = torch.where(scored, tree.step_reward, 0.0)
    share, above = leaf_share(tree), tree.parent.clamp(min=0)
    # (N,) the step's own score; an unscored step stands for the nearest scored steps below it
    represented = tree.accumulate(reward, torch.where(scored[above], 0.0, share))
    from_child = torch.where(tree.parent >= 0, share * represented, 0.0)
    below = torch.zeros_like(reward).index_add_(0, above, from_child)
    unscored = torch.where(inner, torch.nan, 0.0)
    return _steps(tree, torch.where(scored, reward - below, unscored))


@transform("potential", reads=("value", "root_value"), source="Ng, Harada, Russell 1999")
def potential(tree: StepTree, *, gamma: Unit = 1.0) -> StepTree:
    """r' = r + gamma Phi(n) [n not terminal] - Phi(parent), Phi = value (root_value for the prompt).

    The discounted sum over a path changes by -Phi(prompt) only, so the optimal policy stays.
    """
    after = torch.where(tree.is_finished, 0.0, gamma * tree.value)
    return _steps(tree, _read(tree) + after - before(tree, tree.value, tree.root_value))


@transform("progress", reads=("value", "root_value"), differences=True, source="Rewarding Progress (PAV)")
def progress(tree: StepTree) -> StepTree:
    """r' = value(n) - value(parent); telescopes to V(leaf) - V(prompt)."""
    return _steps(tree, tree.value - before(tree, tree.value, tree.root_value))


@transform("red", reads=("step_reward", "root_value"), differences=True, source="RED")
def red(tree: StepTree) -> StepTree:
    """r_t = s_t - s_(t-1): `step_reward` is a reward model's score of the prefix, root_value of the empty one.

    s_(t-1) is the score of the nearest scored step above, so that a path's sum is its last score minus root_value.
    """
    root = tree.root_value[tree.group]
    previous = before(tree, last_scored(tree, tree.step_reward), tree.root_value)
    return _steps(tree, tree.step_reward - torch.where(previous.isnan(), root, previous))


@transform("gate", reads=("step_reward", "outcome"), source="G-RA")
def gate(tree: StepTree, *, threshold: float = 0.5) -> StepTree:
    """r' = share of the leaves below with R >= threshold, times r: no immediate reward on failed trajectories."""
    passed = torch.where(tree.is_finished, (tree.outcome >= threshold).double(), 0.0)
    return _steps(tree, lift(tree, passed) * tree.step_reward)


@transform("renorm", reads=("step_reward", "outcome"), source="PPR; as defined here")
def renorm(tree: StepTree) -> StepTree:
    """Inner step: r + lift(R) - 1; leaf: R. With r, R in [0, 1]: in [0, 1] on success, [-1, 0] on failure."""
    _check_range(tree, tree.outcome[tree.is_finished], "outcomes", "renorm")
    outcome = lift(tree, torch.where(tree.is_finished, tree.outcome, 0.0))
    return _steps(tree, torch.where(tree.is_leaf, outcome, tree.step_reward + outcome - 1))


@transform("mix", writes=("step_reward", "outcome"), reads=("step_reward", "outcome"), source="RED")
def mix(tree: StepTree, *, dense: Unit) -> StepTree:
    """dense * step rewards and (1 - dense) * outcome: a path's total is kept when both sum to R."""
    return _steps(tree, dense * tree.step_reward).replace(outcome=(1 - dense) * tree.outcome)


@transform(
    "fold",
    sums_steps=True,
    writes=("outcome",),
    reads=("step_reward", "outcome"),
    source="R1-VL StepGRPO as released",
)
def fold(tree: StepTree, *, step_weight: float = 1.0, threshold: float | None = None) -> StepTree:
    """R' = R + step_weight * sum of step rewards on the path (NaN reads 0).

    With `threshold`, only trajectories with R >= threshold get their sum: the gate taken per trajectory, which on a
    tree is stricter than the `gate` transform, whose shared steps keep the share of their successful leaves.
    """
    total = step_weight * path_sum(tree, _read(tree))
    if threshold is not None:
        total = torch.where(tree.outcome >= threshold, total, 0.0)
    return tree.replace(outcome=tree.outcome + total)


@transform("contrastive", writes=("outcome",), reads=("outcome", "tags.baseline"), source="Contrastive Rewards")
def contrastive(tree: StepTree) -> StepTree:
    """R' = R - mean reward of the prompt's offline baseline answers, tags["baseline"] (N,) or (N, K)."""
    if "baseline" in tree.tags and tree.tags["baseline"].ndim == 2:
        base = tag(tree, "baseline", ndim=2).nanmean(1)
    else:
        base = tag(tree, "baseline")
    missing = tree.is_finished & base.isnan()
    if bool(missing.any()):
        i = int(missing.nonzero()[0])
        raise ValueError(
            f"contrastive: leaf {i} has no baseline answer in tags['baseline']; sample one for its prompt"
        )
    return tree.replace(outcome=tree.outcome - base)


@transform("alarm", writes=("outcome",), reads=("outcome", "tags.aspect"), source="ALaRM; constants as defined here")
def alarm(tree: StepTree, *, threshold: float = 0.5, weight: NonNegativeFloat = 0.3) -> StepTree:
    """R' = R + [R > threshold] weight sigmoid(aspect): aspects cannot rescue a bad holistic score.

    A leaf without aspect in tags["aspect"] gets no bonus.
    """
    bonus = weight * torch.sigmoid(tag(tree, "aspect")).nan_to_num(nan=0.0)
    return tree.replace(outcome=tree.outcome + torch.where(tree.outcome > threshold, bonus, 0.0))


@transform("mixed_grained", writes=("outcome",), reads=("outcome", "step_reward"), source="PageLLM")
def mixed_grained(tree: StepTree, *, page: Unit) -> StepTree:
    """R' = page * R + (1 - page) * mean of the scored step rewards on the path (items); R where it has none."""
    items = _path_mean(tree)
    mixed = page * tree.outcome + (1 - page) * items
    return tree.replace(outcome=torch.where(items.isnan(), tree.outcome, mixed))


@transform("step_prune", writes=("outcome",), reads=("outcome",), source="Step Pruner; formula as defined here")
def step_prune(tree: StepTree, *, penalty: Unit = 0.5, max_step_tokens: PositiveInt | None = None) -> StepTree:
    """Correct (R >= 0.5): 1 - penalty (K - K_min)/max(K_max - K_min, 1) over the prompt's correct answers; wrong: 0.

    K is the number of steps. A trajectory with a step above `max_step_tokens` becomes unfinished: merging steps to
    save steps must not pay.
    """
    right = tree.is_finished & (tree.outcome >= 0.5)
    num_steps = tree.depth.double() + 1
    # (N,) K_min and K_max of each step's prompt
    low, high = (bound[tree.group] for bound in set_range(num_steps, tree.group, right, tree.num_groups))
    reward = torch.where(right, 1 - penalty * (num_steps - low) / (high - low).clamp(min=1), 0.0)
    pruned = tree.replace(outcome=torch.where(tree.is_finished, reward, torch.nan))
    if max_step_tokens is None:
        return pruned
    long_steps_on_path = path_sum(tree, (tree.span > max_step_tokens).long())
    leaves = ((long_steps_on_path > 0) & tree.is_finished).nonzero().flatten()
    return pruned.with_outcomes(leaves, torch.full((len(leaves),), torch.nan))


@transform("overlong", writes=("outcome",), reads=("outcome",), source="DAPO, soft overlong punishment")
def overlong(tree: StepTree, *, limit: PositiveInt, buffer: PositiveInt, weight: NonNegativeFloat = 1.0) -> StepTree:
    """R' = R - weight min(max((L - (limit - buffer)) / buffer, 0), 1), L the actions (tokens) on the path.

    No cost up to limit - buffer, then linear, all of it from `limit` on, which is the policy's max_new_tokens.
    """
    if buffer > limit:
        raise ValueError(f"overlong: buffer={buffer} must lie in 1..limit ({limit})")
    length = path_sum(tree, tree.span.double())
    cost = ((length - (limit - buffer)) / buffer).clamp(0, 1)
    return tree.replace(outcome=tree.outcome - weight * cost)


@transform("severity", reads=("tags.severity",), source="xCOMET/MQM; as defined here")
def severity(
    tree: StepTree, *, rewards: Annotated[Sequence[float], Field(min_length=1)] = (0.0, -1.0, -5.0, -10.0)
) -> StepTree:
    """r' = rewards[class], tags["severity"] 0 none, 1 minor, 2 major, 3 critical."""
    category = tag(tree, "severity", classes=len(rewards))
    judged = tree.valid & ~category.isnan()
    reward = torch.tensor(rewards, dtype=torch.float64)[torch.where(judged, category, 0.0).long()]
    return _steps(tree, torch.where(judged, reward, torch.nan))


@transform(
    "attribution",
    writes=("step_reward", "outcome"),
    reads=("outcome", "tags.attribution"),
    source="Explainable dense reward shapes",
)
def attribution(tree: StepTree, *, weights: Sequence[float]) -> StepTree:
    """r_t = lift(R) sum_i w_i phi_(i,t), tags["attribution"] (N, I), each summing to 1 on a path; w on the simplex.

    The outcome becomes 0: its whole is in the steps. Raises ValueError when w is off the simplex, or not one weight
    per attribution.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-6:
        raise ValueError(f"attribution weights {list(weights)} must be >= 0 and sum to 1")
    phi = tag(tree, "attribution", ndim=2)
    if phi.shape[1] != len(w):
        raise ValueError(f"attribution: {len(w)} weights for the {phi.shape[1]} columns of tags['attribution']")
    mean_outcome = lift(tree, torch.where(tree.is_finished, tree.outcome, 0.0))
    # times 0: 0 on finished leaves, and still NaN on the other steps
    return _steps(tree, mean_outcome * (phi @ w)).replace(outcome=tree.outcome * 0)


@transform(
    "blend", reads=("step_reward", "tags.auxiliary"), source="Behavior Alignment via Reward Function Optimization"
)
def blend(
    tree: StepTree, *, phi: Annotated[Sequence[float], Field(min_length=3, max_length=3)] = (0.0, 1.0, 0.0)
) -> StepTree:
    """r' = phi_1 + phi_2 r + phi_3 tags["auxiliary"]; (0, 1, 0) is the task itself. phi is tuned by an outer loop."""
    if len(phi) != 3:
        raise ValueError(f"blend.phi={list(phi)} must hold 3 numbers: constant, weight of r, weight of the auxiliary")
    auxiliary = tag(tree, "auxiliary").nan_to_num(nan=0.0)
    return _steps(tree, phi[0] + phi[1] * tree.step_reward + phi[2] * auxiliary)


@transform("info_gain", reads=("tags.similarity",), source="StepSearch")
def info_gain(tree: StepTree) -> StepTree:
    """r' = mean over gold texts of max(sim - best on the path before, 0), tags["similarity"] (N, D) in [0, 1].

    A prompt with fewer than D gold texts has NaN in the columns that it does not use.
    """
    return _steps(tree, _gain(tree))


@transform("redundancy", reads=("tags.documents",), source="StepSearch")
def redundancy(tree: StepTree) -> StepTree:
    """r' = share of the step's documents that the path has already seen, tags["documents"] (N, D) bool."""
    return _steps(tree, _repeated(tree))


@transform("stepsearch", reads=("tags.similarity", "tags.documents"), source="StepSearch")
def stepsearch_reward(tree: StepTree, *, scale: float = 0.6) -> StepTree:
    """r' = scale * (info_gain - redundancy)."""
    return _steps(tree, scale * (_gain(tree) - _repeated(tree)))


@transform(
    "vsrm", reads=("value", "root_value", "chains"), differences=True, fits="chains", source="VSRM; as defined here"
)
def vsrm(
    tree: StepTree, *, threshold: NonNegativeFloat = 0.05, discount: Unit = 0.7, window: PositiveInt = 5
) -> StepTree:
    """d = progress. |d| > threshold: r' = d; else the next such d at distance q <= window, times discount^q; else 0.

    Chains only: on a branching tree the look-ahead is ambiguous.
    """
    need_chains(tree, "vsrm", "its look-ahead is ambiguous there: use the progress transform, which lifts")
    change = torch.where(tree.valid, tree.value - before(tree, tree.value, tree.root_value), 0.0)
    significant = change.abs() > threshold
    reward, decided = torch.where(significant, change, 0.0), significant
    # On a chain every step has at most one child, so looking ahead follows one pointer: `ahead` is the step at
    # distance q, -1 behind the end.
    child = ahead = tree.only_child
    for q in range(1, window + 1):
        below = ahead.clamp(min=0)
        reached = ~decided & (ahead >= 0) & significant[below]
        reward = torch.where(reached, discount**q * change[below], reward)
        decided = decided | reached
        ahead = torch.where(ahead >= 0, child[below], -1)
    return _steps(tree, reward)


@transform(
    "spa",
    writes=("step_reward", "outcome"),
    reads=lambda options: ("outcome", "tags.contribution", *(("chains",) if options["exact"] else ())),
    source="SPA-RL; parity, with the exact option",
)
def spa(tree: StepTree, *, exact: bool = False, alpha: float = 1.0, beta: float = 0.5) -> StepTree:
    """r_t = alpha c_t + beta g_t, tags["contribution"] and optionally tags["grounded"] (0/1).

    `exact` first adds (R - sum c)/T to each of the T contributions of a chain, so that they sum to R. The outcome
    becomes 0.
    """
    contribution = tag(tree, "contribution")
    if exact:
        need_chains(tree, "spa(exact)", "use exact: false")
        scored = tree.valid & ~contribution.isnan()
        missing = tree.outcome - path_sum(tree, torch.where(scored, contribution, 0.0))
        per_step = missing / path_sum(tree, scored.double()).clamp(min=1)
        # On a chain, lift carries the leaf's number to every step above it.
        contribution = contribution + lift(tree, torch.where(tree.is_finished, per_step, 0.0))
    if "grounded" in tree.tags:
        grounded = tag(tree, "grounded", classes=2) == 1
    else:
        grounded = torch.zeros(len(tree))
    reward = alpha * contribution + beta * grounded.double()
    return _steps(tree, reward).replace(outcome=tree.outcome * 0)


@transform("tp_reward", reads=("outcome", "tags.wrong"), source="TP-GRPO; as defined here")
def tp_reward(tree: StepTree) -> StepTree:
    """The reward of each thought in equal shares to its steps on a path; mean over the leaves below.

    A thought is a maximal run of steps with equal tags["wrong"] along a path, and earns
    r = (1-p) explore[o, l] + p exploit[o, l], o = outcome right, l = step right, p = the prompt's success rate.
    explore (1,1) 1, (1,0) 0, (0,1) .5, (0,0) 0; exploit (1,1) 1, (1,0) -1, (0,1) 0, (0,0) -1. A weak policy is not
    punished for wrong attempts, a strong one is. A trajectory thus earns one reward per thought, and cutting a step in
    two changes no sum. The estimator `tp_grpo` sums nothing, and gives every step the whole reward of its thought.
    """
    return _steps(tree, _per_thought(tree, partial(_shared_in_thought, tree)))


def thought_reward(tree: StepTree) -> Tensor:
    """(N,) whole reward of each step's thought, see `tp_reward`; mean over the leaves below, NaN where not judged."""
    return _per_thought(tree, partial(leaf_sum, tree))


def thoughts(tree: StepTree) -> Tensor:
    """(N,) int, the first step of each step's thought: the maximal run of equal tags["wrong"] along the path.

    A step that was not judged belongs to the thought before it.
    """
    label = last_scored(tree, tag(tree, "wrong", classes=2))
    return run_head(tree, label == label[tree.parent.clamp(min=0)])


@transform("spark", writes=("outcome",), reads=("step_reward",), source="SPARK")
def spark_outcome(tree: StepTree, *, rule: SparkRule = "mean") -> StepTree:
    """R' = mean of the path's verdicts (or 1 if all are right); 0 where tags["format_ok"] is false.

    A leaf whose path has no verdict becomes unfinished: nothing says how good it is.
    """
    share = _path_mean(tree)
    if rule == "mean":
        verdict = share
    elif rule == "all":
        verdict = torch.where(share.isnan(), torch.nan, (share >= 1 - 1e-9).double())
    else:
        raise unknown_choice("spark.rule", rule, SparkRule)
    if "format_ok" in tree.tags:
        verdict = torch.where(tag(tree, "format_ok", classes=2) == 0, 0.0, verdict)
    leaves = tree.is_finished.nonzero().flatten()
    return tree.with_outcomes(leaves, verdict[leaves])


@transform(
    "reward_machine",
    writes=("step_reward", "tags.machine_state"),
    reads=("tags.events",),
    source="Hierarchies of Reward Machines",
)
def reward_machine(
    tree: StepTree, *, machine: Mapping[str, Any], gamma: Unit | None = None, state_key: bool = False
) -> StepTree:
    """r' = r + 1 on reaching acceptance; tags["machine_state"] is the machine's state after the step.

    tags["events"] (N, E) bool, columns in the order of machine["events"]. With `gamma`, the potential
    Phi = -(distance to acceptance) is added. With `state_key`, methods that group steps by their state (gigpo) group
    by the machine's state before the step.
    """
    compiled = RewardMachine.parse(machine)
    state, reward = compiled.run(tree, tag(tree, "events", ndim=2, classes=2) == 1)
    if gamma is not None:
        phi = compiled.potential()
        phi_start = phi[compiled.start].expand(tree.num_groups)
        reward = reward + gamma * phi[state] - before(tree, phi[state], phi_start)
    rewarded = _steps(tree, _read(tree) + reward).replace(tags=tree.tags | {"machine_state": state})
    if not state_key:
        return rewarded
    start = torch.full((tree.num_groups,), compiled.start)
    state_before = before(tree, state, start)
    # The prompt is part of the key: only states of one prompt are compared.
    return rewarded.replace(state_key=state_before + len(compiled.states) * tree.group)


@transform("unfinished_outcome", writes=("outcome",), reads=("outcome",), source="MASPRM (-1)")
def unfinished_outcome(tree: StepTree, *, outcome: float) -> StepTree:
    """Unfinished leaves count as finished with this outcome."""
    cut = tree.status == UNFINISHED
    return tree.replace(
        status=torch.where(cut, FINISHED, tree.status), outcome=torch.where(cut, outcome, tree.outcome)
    )


@transform("bootstrap", writes=("outcome", "tags.bootstrapped"), reads=("value",), source="standard; for gae")
def bootstrap(tree: StepTree) -> StepTree:
    """Unfinished leaves with a value count as finished with outcome 0; gae continues them with their own value."""
    cut = (tree.status == UNFINISHED) & ~tree.value.isnan()
    done = tree.replace(status=torch.where(cut, FINISHED, tree.status), outcome=torch.where(cut, 0.0, tree.outcome))
    return done.replace(tags=tree.tags | {"bootstrapped": cut})


def _steps(tree: StepTree, r: Tensor) -> StepTree:
    """The tree with new step rewards, 0 on invalid nodes."""
    return tree.replace(step_reward=torch.where(tree.valid, r, 0.0))


def _read(tree: StepTree) -> Tensor:
    """(N,) step rewards, 0 where a step was not scored."""
    return tree.step_reward.nan_to_num(nan=0.0)


def _path_mean(tree: StepTree) -> Tensor:
    """(N,) mean of the scored step rewards from the first step to n; NaN where there are none."""
    return path_sum(tree, _read(tree)) / path_sum(tree, (~tree.step_reward.isnan()).double())


def _gain(tree: StepTree) -> Tensor:
    """(N,) information gain, see `info_gain`."""
    similarity = tag(tree, "similarity", ndim=2)
    best_so_far = _best_before(tree, similarity.nan_to_num(nan=0.0))
    return (similarity - best_so_far).clamp(min=0).nanmean(1)


def _repeated(tree: StepTree) -> Tensor:
    """(N,) share of documents that came before, see `redundancy`."""
    documents = (tag(tree, "documents", ndim=2, classes=2) == 1).double()
    repeated = documents * _best_before(tree, documents)
    return repeated.sum(1) / documents.sum(1).clamp(min=1)


def _best_before(tree: StepTree, x: Tensor) -> Tensor:
    """(N, D) maximum of `x` over the strict ancestors, 0 for first steps."""
    best = path_max(tree, x)[tree.parent.clamp(min=0)]
    return torch.where((tree.parent >= 0)[:, None], best, 0.0)


def _per_thought(tree: StepTree, leaf_total: Callable[[Tensor], Tensor]) -> Tensor:
    """(N,) thought rewards of the two outcomes, weighted by `leaf_total` of the right and of the wrong leaves."""
    wrong = tag(tree, "wrong", classes=2)
    solved = torch.where(tree.is_finished, (tree.outcome >= 0.5).double(), 0.0)
    failed = tree.is_finished.double() - solved
    successes, failures = prompt_sum(tree, solved), prompt_sum(tree, failed)
    # (N,) success rate of each step's prompt. The sums below are the tables of `tp_reward`, zero entries left out.
    p = (successes / (successes + failures).clamp(min=1))[tree.group]
    of_right = leaf_total(solved) + 0.5 * (1 - p) * leaf_total(failed)
    of_wrong = -p * (leaf_total(solved) + leaf_total(failed))
    reward = torch.where(wrong == 1, of_wrong, of_right) / tree.leaves_below.clamp(min=1)
    return torch.where(wrong.isnan(), torch.nan, reward)


def _shared_in_thought(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) sum over the leaves below n of `x` (N,), divided by the judged steps of n's thought on the leaf's path."""
    head = thoughts(tree)
    joined = head != torch.arange(len(tree))
    judged = (~tag(tree, "wrong", classes=2).isnan()).double()
    judged_above = path_sum(tree, judged) - judged
    length = path_sum(tree, judged) - judged_above[head]
    # Leaves whose thought ends here: the step itself, or those behind a child that begins another one.
    ending = torch.where(tree.is_finished, x, 0.0)
    begins = (~joined & (tree.parent >= 0)).nonzero().flatten()
    ending = ending.index_add(0, tree.parent[begins], leaf_sum(tree, x)[begins])
    return tree.accumulate(ending / length.clamp(min=1), joined.double())


def _check_range(tree: StepTree, x: Tensor, what: str, name: str) -> None:
    outside = x[(x < 0) | (x > 1)]
    if len(outside):
        raise ValueError(
            f"{name} needs {what} in [0, 1], found {outside[0].item()}; rescale them, or leave {name} out"
        )
