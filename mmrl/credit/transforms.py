"""Reward transforms: pure functions tree -> tree, applied before the estimator in the order they are listed.

Transformed step rewards are 0 on invalid nodes. NaN ("not scored") reads 0 where a formula sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl.credit.reward_machine import RewardMachine
from mmrl.credit.table import transform
from mmrl.tree import FINISHED, UNFINISHED, StepTree
from mmrl.tree_ops import before, leaf_share, lift, path_max, path_sum, run_head


@transform("clip", source="On Designing Effective RL Reward (Clip)")
def clip(tree: StepTree, *, eta: float) -> StepTree:
    """r' = min(r - eta, 0): every path sum is at most 0, so adding steps never pays."""
    return _steps(tree, (tree.step_reward - eta).clamp(max=0.0))


@transform("delta", differences=True, source="On Designing Effective RL Reward (Delta)")
def delta(tree: StepTree) -> StepTree:
    """Inner step: r(n) minus the leaf-weighted mean of its inner children's r; leaf: 0.

    Then togo(r', 1)(n) = r(n) on inner steps: the return cannot grow with length.
    """
    inner = ~tree.is_leaf & tree.valid
    r = torch.where(inner, _read(tree), 0.0)
    below = torch.zeros_like(r).index_add_(
        0, tree.parent.clamp(min=0), torch.where(tree.parent >= 0, leaf_share(tree) * r, 0.0)
    )
    return _steps(tree, torch.where(inner, r - below, 0.0))


@transform("potential", reads=("value", "root_value"), source="Ng, Harada, Russell 1999")
def potential(tree: StepTree, *, gamma: float = 1.0) -> StepTree:
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
    """r_t = s_t - s_(t-1): `step_reward` is a reward model's score of the prefix, root_value of the empty one."""
    return _steps(tree, tree.step_reward - before(tree, tree.step_reward, tree.root_value))


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


@transform("mix", reads=("step_reward", "outcome"), source="RED")
def mix(tree: StepTree, *, dense: float) -> StepTree:
    """dense * step rewards and (1 - dense) * outcome: a path's total is kept when both sum to R."""
    return _steps(tree, dense * tree.step_reward).replace(outcome=(1 - dense) * tree.outcome)


@transform("fold", writes=("outcome",), reads=("step_reward", "outcome"), source="R1-VL StepGRPO as released")
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
    base = tree.tags["baseline"].double()
    return tree.replace(outcome=tree.outcome - (base.mean(1) if base.ndim == 2 else base))


@transform("alarm", writes=("outcome",), reads=("outcome", "tags.aspect"), source="ALaRM; constants as defined here")
def alarm(tree: StepTree, *, threshold: float = 0.5, weight: float = 0.3) -> StepTree:
    """R' = R + [R > threshold] weight sigmoid(aspect): aspects cannot rescue a bad holistic score."""
    bonus = weight * torch.sigmoid(tree.tags["aspect"].double())
    return tree.replace(outcome=tree.outcome + torch.where(tree.outcome > threshold, bonus, 0.0))


@transform("mixed_grained", writes=("outcome",), reads=("outcome", "step_reward"), source="PageLLM")
def mixed_grained(tree: StepTree, *, page: float) -> StepTree:
    """R' = page * R + (1 - page) * mean of the scored step rewards on the path (items)."""
    count = path_sum(tree, (~tree.step_reward.isnan()).double()).clamp(min=1)
    return tree.replace(outcome=page * tree.outcome + (1 - page) * path_sum(tree, _read(tree)) / count)


@transform("step_prune", writes=("outcome",), reads=("outcome",), source="Step Pruner; formula as defined here")
def step_prune(tree: StepTree, *, penalty: float = 0.5, max_step_tokens: int | None = None) -> StepTree:
    """Correct (R >= 0.5): 1 - penalty (K - K_min)/max(K_max - K_min, 1) over the prompt's correct answers; wrong: 0.

    K is the number of steps. A trajectory with a step above `max_step_tokens` becomes unfinished: merging steps to
    save steps must not pay.
    """
    right = tree.is_finished & (tree.outcome >= 0.5)
    k = tree.depth.double() + 1
    empty = torch.full((tree.num_groups,), torch.inf, dtype=torch.float64)
    low = empty.clone().scatter_reduce_(0, tree.group, torch.where(right, k, torch.inf), "amin")[tree.group]
    high = (-empty).scatter_reduce_(0, tree.group, torch.where(right, k, -torch.inf), "amax")[tree.group]
    reward = torch.where(right, 1 - penalty * (k - low) / (high - low).clamp(min=1), 0.0)
    out = tree.replace(outcome=torch.where(tree.is_finished, reward, torch.nan))
    if max_step_tokens is None:
        return out
    too_long = (path_sum(tree, (tree.span > max_step_tokens).long()) > 0) & tree.is_finished
    leaves = too_long.nonzero().flatten()
    return out.with_outcomes(leaves, torch.full((len(leaves),), torch.nan))


@transform("severity", reads=("tags.severity",), source="xCOMET/MQM; as defined here")
def severity(tree: StepTree, *, rewards: Sequence[float] = (0.0, -1.0, -5.0, -10.0)) -> StepTree:
    """r' = rewards[class], tags["severity"] 0 none, 1 minor, 2 major, 3 critical."""
    return _steps(tree, torch.tensor(rewards, dtype=torch.float64)[tree.tags["severity"].long()])


@transform("attribution", reads=("outcome", "tags.attribution"), source="Explainable dense reward shapes")
def attribution(tree: StepTree, *, weights: Sequence[float]) -> StepTree:
    """r_t = lift(R) sum_i w_i phi_(i,t), tags["attribution"] (N, I), each summing to 1 on a path; w on the simplex.

    The outcome becomes 0: its whole is in the steps. Raises ValueError when w is off the simplex.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if bool((w < 0).any()) or abs(float(w.sum()) - 1) > 1e-6:
        raise ValueError(f"attribution weights {list(weights)} must be >= 0 and sum to 1")
    r = lift(tree, torch.where(tree.is_finished, tree.outcome, 0.0)) * (tree.tags["attribution"].double() @ w)
    return _steps(tree, r).replace(outcome=tree.outcome * 0)


@transform(
    "blend", reads=("step_reward", "tags.auxiliary"), source="Behavior Alignment via Reward Function Optimization"
)
def blend(tree: StepTree, *, phi: Sequence[float] = (0.0, 1.0, 0.0)) -> StepTree:
    """r' = phi_1 + phi_2 r + phi_3 tags["auxiliary"]; (0, 1, 0) is the task itself. phi is tuned by an outer loop."""
    return _steps(tree, phi[0] + phi[1] * tree.step_reward + phi[2] * tree.tags["auxiliary"].double())


@transform("info_gain", reads=("tags.similarity",), source="StepSearch")
def info_gain(tree: StepTree) -> StepTree:
    """r' = mean over gold texts of max(sim - best on the path before, 0), tags["similarity"] (N, D) in [0, 1]."""
    return _steps(tree, _gain(tree))


@transform("redundancy", reads=("tags.documents",), source="StepSearch")
def redundancy(tree: StepTree) -> StepTree:
    """r' = share of the step's documents that the path has already seen, tags["documents"] (N, D) bool."""
    return _steps(tree, _repeated(tree))


@transform("stepsearch", reads=("tags.similarity", "tags.documents"), source="StepSearch")
def stepsearch_reward(tree: StepTree, *, scale: float = 0.6) -> StepTree:
    """r' = scale * (info_gain - redundancy)."""
    return _steps(tree, scale * (_gain(tree) - _repeated(tree)))


@transform("vsrm", reads=("value", "root_value"), differences=True, fits="chains", source="VSRM; as defined here")
def vsrm(tree: StepTree, *, threshold: float = 0.05, discount: float = 0.7, window: int = 5) -> StepTree:
    """d = progress. |d| > threshold: r' = d; else the next such d at distance q <= window, times discount^q; else 0.

    Chains only: on a branching tree the look-ahead is ambiguous.
    """
    need_chains(tree, "vsrm", "its look-ahead is ambiguous there: use the progress transform, which lifts")
    d = torch.where(tree.valid, tree.value - before(tree, tree.value, tree.root_value), 0.0)
    child = torch.full((len(tree),), -1)
    inner = (tree.parent >= 0).nonzero().flatten()
    child[tree.parent[inner]] = inner
    strong = d.abs() > threshold
    out, found, at = torch.where(strong, d, 0.0), strong.clone(), child
    for q in range(1, window + 1):
        below = at.clamp(min=0)
        hit = ~found & (at >= 0) & strong[below]
        out, found = torch.where(hit, discount**q * d[below], out), found | hit
        at = torch.where(at >= 0, child[below], -1)
    return _steps(tree, out)


@transform("spa", reads=("tags.contribution",), source="SPA-RL; parity, with the exact option")
def spa(tree: StepTree, *, exact: bool = False, alpha: float = 1.0, beta: float = 0.5) -> StepTree:
    """r_t = alpha c_t + beta g_t, tags["contribution"] and optionally tags["grounded"] (0/1).

    `exact` first adds (R - sum c)/T to every c_t of a chain, so that contributions sum to R. The outcome becomes 0.
    """
    c = torch.where(tree.valid, tree.tags["contribution"].double(), 0.0)
    if exact:
        need_chains(tree, "spa(exact)", "use exact: false")
        length = tree.depth.double() + 1
        rest = torch.where(tree.is_finished, (tree.outcome - path_sum(tree, c)) / length, 0.0)
        c = c + lift(tree, rest)
    grounded = tree.tags.get("grounded", torch.zeros(len(tree))).double()
    return _steps(tree, alpha * c + beta * grounded).replace(outcome=tree.outcome * 0)


@transform("tp_reward", reads=("outcome", "tags.wrong"), source="TP-GRPO; as defined here")
def tp_reward(tree: StepTree) -> StepTree:
    """r = (1-p) explore[o, l] + p exploit[o, l], o = outcome right, l = step right, p = the prompt's success rate.

    explore (1,1) 1, (1,0) 0, (0,1) .5, (0,0) 0; exploit (1,1) 1, (1,0) -1, (0,1) 0, (0,0) -1; mean over the leaves
    below. A weak policy is not punished for wrong attempts, a strong one is.
    """
    right = torch.where(tree.is_finished, (tree.outcome >= 0.5).double(), 0.0)
    zero = torch.zeros(tree.num_groups, dtype=torch.float64)
    count = zero.index_add(0, tree.group, tree.is_finished.double()).clamp(min=1)
    p = (zero.index_add(0, tree.group, right) / count)[tree.group]
    o, good = lift(tree, right), ~tree.tags["wrong"].bool()
    explore = torch.where(good, o + 0.5 * (1 - o), 0.0)
    exploit = torch.where(good, o, -1.0)
    return _steps(tree, (1 - p) * explore + p * exploit)


@transform("thoughts", writes=("tags.thought",), reads=("tags.wrong",), source="TP-GRPO")
def thoughts(tree: StepTree) -> StepTree:
    """tags["thought"]: first step of the maximal run of equal tags["wrong"] along the path."""
    label = tree.tags["wrong"]
    thought = run_head(tree, label == label[tree.parent.clamp(min=0)])
    return tree.replace(tags=tree.tags | {"thought": thought})


@transform("spark", writes=("outcome",), reads=("step_reward",), source="SPARK")
def spark_outcome(tree: StepTree, *, rule: Literal["mean", "all"] = "mean") -> StepTree:
    """R' = mean of the path's verdicts (or 1 if all are right); 0 where tags["format_ok"] is false."""
    length = tree.depth.double() + 1
    share = path_sum(tree, _read(tree)) / length
    verdict = share if rule == "mean" else (share >= 1 - 1e-9).double()
    well = tree.tags.get("format_ok", torch.ones(len(tree))).double()
    return tree.replace(outcome=torch.where(tree.is_finished, verdict * well, torch.nan))


@transform("reward_machine", reads=("tags.events",), source="Hierarchies of Reward Machines")
def reward_machine(tree: StepTree, *, machine: Mapping[str, Any], gamma: float | None = None) -> StepTree:
    """r' = r + 1 on reaching acceptance; tags["machine_state"] is the machine's state after the step.

    tags["events"] (N, E) bool, columns in the order of machine["events"]. With `gamma`, the potential
    Phi = -(distance to acceptance) is added. Put the machine state into `state_key` where a method groups by state.
    """
    compiled = RewardMachine.parse(machine)
    state, reward = compiled.run(tree, tree.tags["events"].bool())
    if gamma is not None:
        phi = compiled.potential()
        reward = reward + gamma * phi[state] - before(tree, phi[state], phi[compiled.start].expand(tree.num_groups))
    return _steps(tree, _read(tree) + reward).replace(tags=tree.tags | {"machine_state": state})


@transform("unfinished_outcome", writes=("outcome",), reads=("outcome",), source="MASPRM (-1)")
def unfinished_outcome(tree: StepTree, *, outcome: float) -> StepTree:
    """Unfinished leaves count as finished with this outcome."""
    cut = tree.status == UNFINISHED
    return tree.replace(
        status=torch.where(cut, FINISHED, tree.status), outcome=torch.where(cut, outcome, tree.outcome)
    )


@transform("bootstrap", writes=("outcome",), reads=("value",), source="standard; for gae")
def bootstrap(tree: StepTree) -> StepTree:
    """Unfinished leaves with a value count as finished with outcome 0; gae continues them with their own value."""
    cut = (tree.status == UNFINISHED) & ~tree.value.isnan()
    done = tree.replace(status=torch.where(cut, FINISHED, tree.status), outcome=torch.where(cut, 0.0, tree.outcome))
    return done.replace(tags=tree.tags | {"bootstrapped": cut})


def _steps(tree: StepTree, r: Tensor) -> StepTree:
    """The tree with new step rewards, 0 on invalid nodes."""
    return tree.replace(step_reward=torch.where(tree.valid, r, 0.0))


def _read(tree: StepTree) -> Tensor:
    return tree.step_reward.nan_to_num(nan=0.0)


def _gain(tree: StepTree) -> Tensor:
    sim = tree.tags["similarity"].double()
    return (sim - _best_before(tree, sim)).clamp(min=0).mean(1)


def _repeated(tree: StepTree) -> Tensor:
    docs = tree.tags["documents"].double()
    return (docs * _best_before(tree, docs)).sum(1) / docs.sum(1).clamp(min=1)


def _best_before(tree: StepTree, x: Tensor) -> Tensor:
    """(N, D) maximum of `x` over the strict ancestors, 0 for first steps."""
    best = path_max(tree, x)[tree.parent.clamp(min=0)]
    return torch.where((tree.parent >= 0)[:, None], best, 0.0)


def need_chains(tree: StepTree, name: str, fix: str) -> None:
    """Raises ValueError naming the first branching step."""
    if not tree.is_chains:
        i = int((tree.num_children > 1).nonzero()[0])
        raise ValueError(f"{name} needs chains, but step {i} branches; {fix}")


def _check_range(tree: StepTree, x: Tensor, what: str, name: str) -> None:
    if bool(((x < 0) | (x > 1)).any()):
        bad = x[(x < 0) | (x > 1)][0].item()
        raise ValueError(f"{name} needs {what} in [0, 1], found {bad}; rescale them, or leave {name} out")
