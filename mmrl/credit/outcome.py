"""Estimators that read the outcomes of finished leaves and keys of states, but no step rewards.

Each is a function tree -> `Credit`, whose docstring gives the formula: A is the advantage of a step, R the outcome of
a leaf, and lift(x) the mean of x over the finished leaves below a step. `how` and `all_sum` are those of `norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from mmrl.credit.norm import AllSum, Norm, Normed, Unit, moments, norm, unknown_choice, whiten
from mmrl.credit.table import Credit, estimator
from mmrl.credit.tags import tag
from mmrl.tree import StepTree
from mmrl.tree_ops import Backup, backup, before, discounted_leaf, lift, path_sum, prompt_sum, returns, run_head

# Earlier outcomes of each prompt, oldest first.
Past = Sequence[Sequence[float]]
EpisodeStats = Literal["trajectory", "step"]
CountBy = Literal["token", "trajectory"]
Unary = Literal["inherit", "zero"]
Spread = Literal["depth", "leaf"]
Base = Literal["grpo", "rloo"]


def episode(
    tree: StepTree, how: Norm = Norm(), stats: EpisodeStats = "trajectory", all_sum: AllSum | None = None
) -> Normed:
    """Outcomes normalised over the finished leaves of each prompt; 0 on every other node.

    `stats="step"` counts a trajectory once per step in mean and std, as some released code does.
    """
    if stats == "trajectory":
        weight = None
    elif stats == "step":
        weight = tree.depth.double() + 1
    else:
        raise unknown_choice("episode_stats", stats, EpisodeStats)
    return norm(tree.outcome, tree.group, how, weight=weight, all_sum=all_sum)


@estimator("grpo", relative=True, source="DeepSeekMath; parity with verl and TRL")
def grpo(tree: StepTree, *, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """A = lift(a), a(leaf) = (R - mean)/(std + eps) over the finished leaves of the prompt.

    A prompt with one finished leaf, or with equal outcomes, gets exactly 0.
    """
    outcomes = episode(tree, how, all_sum=all_sum)
    return Credit(lift(tree, outcomes.z), info=outcomes.info)


@estimator(
    "dr_grpo",
    relative=True,
    source="Dr. GRPO; parity with verl norm_adv_by_std_in_grpo=False and TRL scale_rewards='none'",
    scale="none",
)
def dr_grpo(tree: StepTree) -> Credit:
    """A = lift(R - mean) over the finished leaves of the prompt, unscaled.

    Pair it with `aggregation: constant`; another length normaliser brings the length bias back.
    """
    return grpo(tree, how=Norm(scale="none"))


@estimator("rloo", relative=True, source="Back to Basics (RLOO); parity with verl and OpenRLHF", scale="loo")
def rloo(tree: StepTree) -> Credit:
    """A = lift(R - mean of the other finished leaves of the prompt). A group of one gets 0."""
    return grpo(tree, how=Norm(scale="loo"))


@estimator(
    "reinforce_pp_baseline",
    relative=True,
    scale="std",
    source="REINFORCE++ with baseline; parity with verl (OpenRLHF: ddof 0)",
)
def reinforce_pp_baseline(
    tree: StepTree,
    *,
    count_by: CountBy = "token",
    ddof: Annotated[int, Field(ge=0, le=1)] = 1,
    all_sum: AllSum | None = None,
) -> Credit:
    """a = R - prompt mean, then one whitening over the batch: A = lift((a - mean)/sqrt(var + 1e-8)).

    Mean and var count a trajectory by the tokens on its path (`token`: long ones count more) or once (`trajectory`).
    The population is the batch of all processes. A batch without spread gets 0.
    """
    centred = episode(tree, Norm(scale="none"))
    if count_by == "token":
        count = path_sum(tree, tree.span.double())
    elif count_by == "trajectory":
        count = torch.ones(len(tree), dtype=torch.float64)
    else:
        raise unknown_choice("reinforce_pp_baseline.count_by", count_by, CountBy)
    # Several processes must all take part in the sums of `whiten`, also those without spread.
    if not bool(centred.z.any()) and all_sum is None:
        return Credit(torch.zeros_like(centred.z), info=centred.info)
    weight = torch.where(tree.is_finished, count, 0.0)
    whitened = whiten(centred.z, weight, all_sum, ddof=ddof)
    return Credit(lift(tree, whitened), info=centred.info)


@estimator(
    "tree_rpo", reads=("outcome", "forks"), fits="forks", source="TreeRPO; structure from the paper, as defined here"
)
def tree_rpo(
    tree: StepTree,
    *,
    value: Backup = "child_mean",
    unary: Unary = "inherit",
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """A(n) = V(n) normalised over the siblings of n, V backed up from the leaves.

    A sibling set without spread gives 0. An only active child has no siblings: `inherit` copies its parent's
    advantage, so that a forest of chains reduces exactly to grpo; `zero` is the literal reading. A lone first step
    of a prompt gets 0.
    """
    return _among_siblings(tree, backup(tree, value), how, unary, all_sum)


@estimator(
    "propa",
    may_read=("tags.visits", "tags.q_sum"),
    reads=("outcome", "forks"),
    fits="forks",
    source="PROPA (MCTS + GRPO); as defined here",
)
def propa(tree: StepTree, *, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """tree_rpo with leaf_mean over a search tree; with tags `q_sum` and `visits`, V(n) = q_sum/visits instead.

    A step that the search never visited has no such value: it is compared with nothing and gets 0.
    """
    if "visits" not in tree.tags or "q_sum" not in tree.tags:
        return tree_rpo(tree, value="leaf_mean", how=how, all_sum=all_sum)
    visits = tag(tree, "visits")
    value = torch.where(visits > 0, tag(tree, "q_sum") / visits.clamp(min=1), torch.nan)
    return _among_siblings(tree, value, how, all_sum=all_sum)


@estimator(
    "branch_depth",
    reads=("outcome", "forks"),
    fits="denoising; elsewhere only with aligned depths",
    source="BranchGRPO; parity with the released depth-wise form",
)
def branch_depth(
    tree: StepTree,
    *,
    value: Backup = "leaf_mean",
    spread: Spread = "depth",
    how: Norm = Norm(eps=1e-8, std_floor=1e-6),
    all_sum: AllSum | None = None,
) -> Credit:
    """A(n) = (V(n) - mean)/(std + eps) over all nodes of the same prompt and depth; 0 if alone or std < 1e-6.

    Every node counts once, so a leaf-rich branch does not dominate. `value`: leaf_mean, edge_softmax (their code)
    or path_prob (their text). `spread="leaf"` divides by the std of the prompt's leaf outcomes instead, which keeps
    magnitudes: with `depth`, two nodes at a depth always get +-0.7071 whatever their gap. info["singleton_nodes"] is
    the share of valid nodes alone at their depth; above 0.2 (ragged depths) the estimator is a poor choice.
    """
    values = torch.where(tree.valid, backup(tree, value), torch.nan)
    # One set per (prompt, depth).
    sets = tree.depth * tree.num_groups + tree.group
    if spread == "depth":
        normed = norm(values, sets, how, all_sum=all_sum)
        adv = normed.z
    elif spread == "leaf":
        normed = norm(values, sets, how._replace(scale="none"))
        adv = _over_leaf_std(tree, normed.z, how)
    else:
        raise unknown_choice("branch_depth.spread", spread, Spread)
    alone = (normed.size[sets] == 1) & tree.valid
    share_alone = float(alone.sum() / tree.valid.sum().clamp(min=1))
    return Credit(adv, info=normed.info | {"singleton_nodes": share_alone})


@estimator("child_minus_parent", reads=("outcome", "forks"), fits="forks", source="as defined here")
def child_minus_parent(tree: StepTree, *, how: Norm = Norm(eps=1e-8)) -> Credit:
    """A(n) = (V(n) - V(parent))/(std of the prompt's leaf outcomes + eps), V = leaf_mean; local credit of a fork.

    V of the virtual root is the prompt's mean outcome, so the terms telescope: along any path they sum to the
    leaf's grpo advantage. An only child gets 0. Prompts without spread get 0.
    """
    outcomes = episode(tree, Norm(scale="none"))
    # V minus the prompt's mean, for steps (N,) and their parents (N,); exactly 0 without spread.
    value = lift(tree, outcomes.z)
    value_above = before(tree, value, torch.zeros(tree.num_groups, dtype=torch.float64))
    return Credit(_over_leaf_std(tree, value - value_above, how), info=outcomes.info)


@estimator(
    "portool",
    reads=lambda options: ("outcome", "forks", *(("step_reward",) if options["w_format"] else ())),
    fits="forks",
    source="PORTool; structure from the paper, constants as defined here",
)
def portool(
    tree: StepTree,
    *,
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0,
    w_traj: float = 1.0,
    w_fork: float = 1.0,
    w_format: float = 0.0,
    agg: Literal["mean", "max"] = "mean",
    how: Norm = Norm(scale="none"),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = w_traj grpo + w_fork norm over siblings of rho.

    rho(n) = agg over leaves below of gamma^(depth(leaf) - depth(n)) R + w_format r(n); `max` asks whether some
    descendant is right. NaN step rewards read 0. An only child's fork part is 0.
    """
    rho = discounted_leaf(tree, gamma, agg) + w_format * tree.step_reward.nan_to_num(nan=0.0)
    fork = norm(torch.where(tree.valid, rho, torch.nan), tree.sibling_set, how, all_sum=all_sum)
    whole = grpo(tree, how=how, all_sum=all_sum)
    return Credit(w_traj * whole.adv + w_fork * fork.z, info=fork.info)


@estimator(
    "gigpo",
    reads=("outcome", "state_key"),
    may_read=("step_reward",),
    sums_steps=True,
    fits="text and GUI states, tool states; not latents",
    source="GiGPO; parity with verl-agent",
)
def gigpo(
    tree: StepTree,
    *,
    gamma: Unit = 0.95,
    omega: NonNegativeFloat = 1.0,
    episode_stats: EpisodeStats = "trajectory",
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = A_E + omega A_S. A_E: grpo. A_S: returns(gamma) normalised over the steps of a prompt with equal state_key.

    Steps without key, or alone with it, get A_S = 0. info["mean_set_size"] near 1 means plain GRPO.
    """
    outcomes = episode(tree, how, episode_stats, all_sum)
    anchored = tree.valid & (tree.state_key >= 0)
    anchored_returns = torch.where(anchored, returns(tree, gamma), torch.nan)
    same_state = norm(anchored_returns, dense_sets(tree, tree.state_key, anchored), how, all_sum=all_sum)
    sizes = same_state.size[same_state.size > 0].double()
    info = outcomes.info | {"mean_set_size": float(sizes.mean()) if sizes.numel() else 0.0}
    return Credit(lift(tree, outcomes.z) + omega * same_state.z, info=info)


@estimator(
    "salt",
    relative=True,
    scale=lambda options: "std" if options["base"] == "grpo" else "loo",
    reads=("outcome", "edge_key"),
    fits="text and GUI states, tool states",
    source="SALT; averaging rule from the paper",
)
def salt(tree: StepTree, *, base: Base = "grpo") -> Credit:
    """Steps of one prompt with equal edge_key share the m-weighted mean of their base advantage; others keep theirs.

    A step that good and bad trajectories have in common becomes neutral, diverging steps keep credit.
    """
    if base == "grpo":
        credit = grpo(tree)
    elif base == "rloo":
        credit = rloo(tree)
    else:
        raise unknown_choice("salt.base", base, Base)
    merged = tree.valid & (tree.edge_key >= 0)
    sets = dense_sets(tree, tree.edge_key, merged)
    num_sets = int(sets.max()) + 1 if len(tree) else 0
    if num_sets == 0:
        return credit
    # Steps outside any set are summed into set 0 with weight 0.
    set_of = sets.clamp(min=0)
    weight = torch.where(merged, tree.leaves_below.double(), 0.0)
    zero = torch.zeros(num_sets, dtype=torch.float64)
    mean = zero.index_add(0, set_of, weight * credit.adv) / zero.index_add(0, set_of, weight).clamp(min=1)
    return Credit(torch.where(merged, mean[set_of], credit.adv), info=credit.info)


@estimator("rapo", relative=True, source="Fathom-DeepResearch (RAPO); scaling as defined here")
def rapo(
    tree: StepTree, *, cap: PositiveFloat | None = None, how: Norm = Norm(), all_sum: AllSum | None = None
) -> Credit:
    """A = grpo * f, f = prompts with a finished leaf / prompts with spread, over all processes, at most `cap`.

    Keeps the size of the update when many prompts have no spread. Replayed rollouts need behaviour `logp`.
    """
    if cap is not None and cap <= 0:
        raise ValueError(f"rapo.cap={cap} must be above 0: it bounds the factor that all advantages are multiplied by")
    outcomes = episode(tree, how, all_sum=all_sum)
    has_leaf = outcomes.size > 0
    has_spread = (outcomes.size > 1) & ~outcomes.constant
    counts = torch.tensor([float(has_leaf.sum()), float(has_spread.sum())], dtype=torch.float64)
    # Counted over all processes, so that every one scales by the same factor.
    if all_sum is not None:
        counts = all_sum(counts)
    with_leaf, with_spread = counts.tolist()
    factor = with_leaf / max(with_spread, 1.0)
    if cap is not None:
        factor = min(factor, cap)
    return Credit(factor * lift(tree, outcomes.z), info=outcomes.info | {"rapo_factor": factor})


@estimator(
    "ddpo",
    scale="std",
    remembers="buffer",
    source="DDPO; parity with the statistics per prompt of the released code",
)
def ddpo(
    tree: StepTree,
    *,
    buffer: Annotated[int, Field(ge=2)] = 16,
    min_count: PositiveInt = 16,
    eps: NonNegativeFloat = 1e-6,
    past: Past = (),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = lift((R - mean)/(std + eps)) over the newest `buffer` outcomes of the prompt, earlier iterations included.

    A prompt with fewer than `min_count` outcomes so far is compared with all outcomes of the batch, of all processes.
    The std has ddof 0; without spread A is exactly 0. On a tree a shared step gets the mean over the leaves below.

    Args:
        past: earlier outcomes of each prompt, oldest first; none when left out.
    Raises:
        ValueError: a buffer that never holds `min_count` outcomes, or `past` for another number of prompts.
    """
    if min_count > buffer:
        raise ValueError(f"ddpo.min_count={min_count} is above ddpo.buffer={buffer}, so no prompt would ever reach it")
    if past and len(past) != tree.num_groups:
        raise ValueError(f"ddpo: past holds outcomes of {len(past)} prompts, the tree has {tree.num_groups}")
    leaves = tree.is_finished.nonzero().flatten()
    now, prompt_now = tree.outcome[leaves], tree.group[leaves]
    # (E,) earlier outcomes and the prompt of each; behind them stand this iteration's, so the newest come last.
    earlier = torch.tensor([outcome for outcomes in past for outcome in outcomes], dtype=torch.float64)
    counts = torch.tensor([len(outcomes) for outcomes in past], dtype=torch.long)
    prompt_earlier = torch.repeat_interleave(torch.arange(len(past)), counts)
    prompt = torch.cat([prompt_earlier, prompt_now])
    # Outcomes that have left the buffer keep their place, with weight 0.
    in_buffer = _newest(prompt, buffer)
    of_prompt = norm(torch.cat([earlier, now]), prompt, Norm(eps=eps, ddof=0), weight=in_buffer.double())

    mean, var = moments(now, torch.ones_like(now), all_sum, ddof=0)
    spread = var.sqrt() > 1e-8 * mean.abs().clamp(min=1)
    of_batch = torch.where(spread, (now - mean) / (var.sqrt() + eps), 0.0)

    has_history = torch.bincount(prompt, minlength=tree.num_groups)[prompt_now] >= min_count
    leaf_adv = torch.zeros(len(tree), dtype=torch.float64)
    leaf_adv[leaves] = torch.where(has_history, of_prompt.z[len(earlier) :], of_batch)
    return Credit(lift(tree, leaf_adv), info=of_prompt.info)


def _newest(sets: Tensor, count: int) -> Tensor:
    """(N,) bool, the last `count` entries of each set."""
    # Sorted by set, an entry is among the last `count` when at most that many entries lead to the end of its set.
    order = torch.argsort(sets, stable=True)
    end = torch.bincount(sets).cumsum(0)[sets[order]]
    newest = torch.empty(len(sets), dtype=torch.bool)
    newest[order] = end - torch.arange(len(sets)) <= count
    return newest


def dense_sets(tree: StepTree, key: Tensor, member: Tensor) -> Tensor:
    """(N,) dense id of (group, key) for members, -1 elsewhere. Keys may be any int64 (hashes)."""
    # Keys are hashes of 64 bits; numbering them first keeps the product below within range.
    dense = torch.unique(key, return_inverse=True)[1]
    pair = tree.group * (int(dense.max()) + 1 if len(tree) else 1) + dense
    return torch.where(member, torch.unique(pair, return_inverse=True)[1], -1)


def _over_leaf_std(tree: StepTree, x: Tensor, how: Norm) -> Tensor:
    """x divided by the std of its prompt's finished outcomes; 0 in prompts without spread."""
    outcome = torch.where(tree.is_finished, tree.outcome, 0.0)
    # (G,) number, mean and variance of each prompt's finished outcomes
    count = prompt_sum(tree, tree.is_finished.double())
    mean = prompt_sum(tree, outcome) / count.clamp(min=1)
    centred = torch.where(tree.is_finished, outcome - mean[tree.group], 0.0)
    var = prompt_sum(tree, centred**2) / (count - how.ddof).clamp(min=1)
    return x / (var.sqrt() + how.eps)[tree.group]


def _among_siblings(
    tree: StepTree, value: Tensor, how: Norm, unary: Unary = "inherit", all_sum: AllSum | None = None
) -> Credit:
    """`value` (N,) normalised over each sibling set; an only active child inherits its parent's result, or gets 0."""
    value = torch.where(tree.valid, value, torch.nan)
    normed = norm(value, tree.sibling_set, how, all_sum=all_sum)
    if unary == "zero":
        return Credit(normed.z, info=normed.info)
    if unary != "inherit":
        raise unknown_choice("unary", unary, Unary)
    # A run of only children takes the result of the step that it begins with, which has siblings or is a first step.
    only = ~value.isnan() & (normed.size[tree.sibling_set] == 1)
    return Credit(normed.z[run_head(tree, only)], info=normed.info)
