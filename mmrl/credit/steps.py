"""Estimators that read step rewards or values beside the outcome.

Notation of the docstrings: A advantage, R outcome, r step reward, V value; to_go(x, gamma) is the discounted sum of x
from a step on, averaged over the finished leaves below, and lift(x) the mean of a leaf quantity over these leaves.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from mmrl.credit.norm import AllSum, Norm, Unit, norm, unknown_choice, whiten
from mmrl.credit.outcome import EpisodeStats, episode, grpo
from mmrl.credit.table import Credit, estimator
from mmrl.credit.tags import tag
from mmrl.credit.transforms import (
    SparkRule,
    fold,
    renorm,
    spark_outcome,
    stepsearch_reward,
    thought_reward,
    thoughts,
    vsrm,
)
from mmrl.seeding import named_generator
from mmrl.tree import StepTree
from mmrl.tree_ops import before, leaf_share, leaf_sum, lift, need_chains, prompt_sum, run_head, to_go

Pool = Literal["joint", "separate"]
VoteRule = Literal["intersection", "majority"]
PrimeForm = Literal["paper", "code"]


def scored_steps(tree: StepTree, how: Norm, all_sum: AllSum | None = None) -> tuple[Tensor, dict[str, float]]:
    """(N,) step rewards normalised over all scored valid steps of the prompt, each once; 0 where not scored."""
    rewards = torch.where(tree.valid, tree.step_reward, torch.nan)
    normed = norm(rewards, tree.group, how, all_sum=all_sum)
    return normed.z, normed.info


@estimator(
    "process_grpo",
    reads=("step_reward",),
    sums_steps=True,
    source="DeepSeekMath 4.1.3; intent of WebGen-Agent's cumulative form",
)
def process_grpo(tree: StepTree, *, gamma: Unit = 1.0, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """z = step reward normalised over all scored steps of the prompt; A = to_go(z, gamma).

    The outcome is not used unless folded in. Unscored steps (NaN) add 0.
    """
    z, info = scored_steps(tree, how, all_sum)
    return Credit(to_go(tree, z, gamma), info=info)


@estimator("step_grpo", reads=("step_reward",), source="WebGen-Agent; parity")
def step_grpo(tree: StepTree, *, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """A = step reward normalised over all scored steps of the prompt, without accumulation."""
    z, info = scored_steps(tree, how, all_sum)
    return Credit(z, info=info)


@estimator(
    "fold_grpo",
    relative=True,
    reads=("outcome", "step_reward"),
    sums_steps=True,
    source="R1-VL StepGRPO as released; parity",
)
def fold_grpo(
    tree: StepTree,
    *,
    step_weight: float = 1.0,
    threshold: float | None = None,
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """grpo on R' = R + step_weight * sum of the step rewards on the path; see the `fold` transform."""
    return grpo(fold(tree, step_weight=step_weight, threshold=threshold), how=how, all_sum=all_sum)


@estimator("ppr", reads=("outcome", "step_reward"), sums_steps=True, source="PPR (ReNorm); as defined here")
def ppr(tree: StepTree, *, accumulate: bool = True, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """process_grpo (or, without `accumulate`, step_grpo) on ReNorm-ed step rewards; rewards and outcomes in [0, 1]."""
    normed = renorm(tree)
    z, info = scored_steps(normed, how, all_sum)
    return Credit(to_go(normed, z) if accumulate else z, info=info)


@estimator(
    "ui_s1",
    sums_steps=True,
    reads=("outcome", "step_reward", "ok"),
    fits="recorded trajectories with a reference",
    source="UI-S1; parity",
)
def ui_s1(
    tree: StepTree,
    *,
    gamma: Unit = 0.5,
    w_episode: float = 1.0,
    w_step: float = 1.0,
    episode_stats: EpisodeStats = "trajectory",
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = w_episode grpo + w_step norm over (prompt, depth) of the return that breaks at steps without `ok`.

    G(n) = r(n) + gamma * mean over children with ok of G, if ok(n); else G(n) = r(n).
    """
    assert tree.ok is not None
    valid, above = tree.valid, tree.parent.clamp(min=0)
    rewards = torch.where(valid, tree.step_reward.nan_to_num(nan=0.0), 0.0)
    # A child's return reaches its parent only when both agree with the reference.
    both_ok = tree.ok.double() * tree.ok[above].double()
    broken_return = tree.accumulate(rewards, gamma * leaf_share(tree) * both_ok)
    # One set per (prompt, depth).
    sets = tree.depth * tree.num_groups + tree.group
    of_steps = norm(torch.where(valid, broken_return, torch.nan), sets, how, all_sum=all_sum)
    outcomes = episode(tree, how, episode_stats, all_sum)
    return Credit(w_episode * lift(tree, outcomes.z) + w_step * of_steps.z, info=outcomes.info)


@estimator(
    "srgpo",
    reads=("outcome", "step_reward"),
    fits="step rewards on one scale across prompts",
    source="SeeNav-Agent SRGPO; parity",
)
def srgpo(
    tree: StepTree,
    *,
    w_episode: float = 1.0,
    omega: NonNegativeFloat = 0.5,
    set_size: PositiveInt = 16,
    seed: int = 0,
    episode_stats: EpisodeStats = "step",
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = w_episode grpo + omega norm of the immediate step reward over random sets of `set_size` steps of the batch.

    Sets are drawn by a generator seeded with `seed`, or given as tags["set_id"] (negative or NaN = none); they stay
    inside one process. The last set may be smaller, a set of one gives 0. info["set_id"] holds the sets used.
    """
    scored = tree.valid & ~tree.step_reward.isnan()
    if "set_id" in tree.tags:
        sets = tag(tree, "set_id").nan_to_num(nan=-1.0).long()
    else:
        sets = _random_sets(scored, set_size, seed)
    outcomes = episode(tree, how, episode_stats, all_sum)
    of_steps = norm(torch.where(scored, tree.step_reward, torch.nan), sets, how, all_sum=all_sum)
    return Credit(w_episode * lift(tree, outcomes.z) + omega * of_steps.z, info=outcomes.info | {"set_id": sets})


def _random_sets(member: Tensor, size: int, seed: int) -> Tensor:
    """(N,) set of each member in a random partition into sets of `size`, -1 elsewhere."""
    if size < 1:
        raise ValueError(f"srgpo.set_size={size} must be at least 1; sets of one give 0, the released code takes 16")
    index = member.nonzero().flatten()
    rank = torch.randperm(len(index), generator=named_generator("srgpo", seed))
    return torch.full((len(member),), -1).index_put_((index,), rank // size)


@estimator("pav", reads=("outcome", "value", "root_value"), source="Rewarding Progress (PAV); from the paper")
def pav(tree: StepTree, *, alpha: NonNegativeFloat = 3.0, best_of: PositiveInt = 1) -> Credit:
    """A(n) = leaf_mean V(n) - prompt mean + alpha * (V_mu(n) - V_mu(parent)), V_mu = `value` of the prover.

    `best_of` K turns a base value v into the Best-of-K prover's 1 - (1 - v)^K. alpha 3 to 5 in the authors' runs.
    A prover that is the policy itself adds nothing that the outcome does not say.
    """
    outcomes = episode(tree, Norm(scale="none"))
    # Values of the Best-of-K prover, V_mu, at the steps (N,) and at the prompts (G,).
    prover = 1 - (1 - tree.value) ** best_of
    prover_root = 1 - (1 - tree.root_value) ** best_of
    progress = prover - before(tree, prover, prover_root)
    return Credit(lift(tree, outcomes.z) + alpha * progress, info=outcomes.info)


@estimator(
    "igpo",
    sums_steps=True,
    reads=("outcome", "step_reward"),
    fits="turns with a gold answer",
    source="IGPO; from the paper, not the release",
)
def igpo(
    tree: StepTree,
    *,
    pool: Pool = "joint",
    gamma: Unit = 1.0,
    how: Norm = Norm(),
    all_sum: AllSum | None = None,
) -> Credit:
    """A = to_go(z, gamma); z of an inner turn is its information gain (`step_reward`), of a leaf its outcome.

    `joint` normalises gains and outcomes of a prompt in one set, `separate` in two. A leaf's own step reward is
    ignored. gain(n) = p(answer | after n) - p(answer | before n).
    """
    gain_or_outcome = torch.where(tree.is_finished, tree.outcome, tree.step_reward)
    gain_or_outcome = torch.where(tree.valid, gain_or_outcome, torch.nan)
    if pool == "joint":
        sets = tree.group
    elif pool == "separate":
        sets = 2 * tree.group + tree.is_leaf.long()
    else:
        raise unknown_choice("igpo.pool", pool, Pool)
    normed = norm(gain_or_outcome, sets, how, all_sum=all_sum)
    return Credit(to_go(tree, normed.z, gamma), info=normed.info)


@estimator(
    "capo",
    scale="std",
    reads=("outcome", "tags.wrong"),
    fits="steps with a judge's verdict",
    source="CAPO; idea from the paper, weights as defined here",
)
def capo(
    tree: StepTree,
    *,
    w_out: NonNegativeFloat = 2.0,
    w_proc: NonNegativeFloat = 1.0,
    eps: NonNegativeFloat = 1e-6,
    ddof: Annotated[int, Field(ge=0, le=1)] = 1,
) -> Credit:
    """Token reward w_out R - w_proc [step judged wrong], normalised over all tokens of all trajectories of the prompt.

    A(n) = mean over the leaves below n. A step's tokens count once per trajectory that contains them. tags["wrong"]
    is the judges' verdict (see `judged_wrong`); a step that was not judged (NaN) is not wrong.
    """
    tokens = tree.span.double()
    wrong = (tree.valid & (tag(tree, "wrong", classes=2) == 1)).double()
    m = tree.leaves_below.double()
    centred = episode(tree, Norm(scale="none"))
    # Every trajectory through a node gives its tokens another reward. Their mean and the sum of their squares follow
    # from sums over the leaves below, so that no trajectory is written out.
    # (N,) mean over the leaves below of w_out R, the sum of its squares, and the mean token reward of the step.
    mean_outcome = w_out * lift(tree, centred.z)
    sum_squares = w_out**2 * leaf_sum(tree, centred.z**2)
    reward = mean_outcome - w_proc * wrong
    # (G,) number of tokens over all trajectories of a prompt, and their mean reward
    count = prompt_sum(tree, tokens * m)
    mean = prompt_sum(tree, tokens * m * reward) / count.clamp(min=1)
    # A token's reward less the mean is w_out R - c; its squares are summed over the leaves below.
    c = w_proc * wrong + mean[tree.group]
    squares = tokens * (sum_squares - 2 * c * mean_outcome * m + m * c**2)
    var = prompt_sum(tree, squares).clamp(min=0) / (count - ddof).clamp(min=1)
    # Rounding leaves a tiny variance where all rewards are equal; it must not be divided by.
    largest = torch.zeros_like(var).scatter_reduce(0, tree.group, reward.abs(), "amax").clamp(min=1)
    flat = var.sqrt() <= 1e-8 * largest
    adv = (reward - mean[tree.group]) / (var.sqrt() + eps)[tree.group]
    return Credit(torch.where(flat[tree.group], 0.0, adv), info=centred.info)


def judged_wrong(votes: Tensor, rule: VoteRule = "majority") -> Tensor:
    """(N,) bool from the verdicts (N, K) of K critiques, NaN = no opinion: wrong if all of the others say so, or more
    than half of them do; not wrong where nobody has an opinion."""
    share = votes.double().nanmean(1)
    if rule == "intersection":
        return share == 1
    if rule == "majority":
        return share > 0.5
    raise unknown_choice("judged_wrong.rule", rule, VoteRule)


@estimator(
    "gae",
    reads=("outcome", "value", "root_value"),
    may_read=("step_reward",),
    sums_steps=True,
    source="Schulman et al. 2016; one decision per step",
)
def gae(tree: StepTree, *, gamma: Unit = 1.0, lam: Unit = 0.95) -> Credit:
    """delta(n) = r + [leaf] R + gamma value(n) [not finished leaf] - V_before; A = delta + gamma lam mean of children.

    V_before = value(parent) or root_value; NaN r reads 0. returns = A + V_before. A leaf with tags["bootstrapped"]
    (an unfinished one under unfinished="bootstrap") uses its own value as continuation. On a chain of tokens this is
    token-level GAE.
    """
    valid, finished = tree.valid, tree.is_finished
    cut = tree.tags.get("bootstrapped", torch.zeros(len(tree), dtype=torch.bool))
    value_before = before(tree, tree.value, tree.root_value)
    value_after = torch.where(finished & ~cut, 0.0, gamma * tree.value)
    outcome = torch.where(finished, tree.outcome, 0.0)
    delta = tree.step_reward.nan_to_num(nan=0.0) + outcome + value_after - value_before
    delta = torch.where(valid, delta, 0.0)
    adv = to_go(tree, delta, gamma * lam)
    return Credit(adv, returns=adv + torch.where(valid, value_before, 0.0))


@estimator(
    "stepsearch",
    reads=("outcome", "value", "root_value", "tags.similarity", "tags.documents"),
    fits="search turns with gold texts",
    source="StepSearch (StePPO); parity in the reward, without its double counting",
)
def stepsearch(tree: StepTree, *, scale: float = 0.6) -> Credit:
    """gae (gamma = lam = 1) on step rewards scale * (information gain - redundancy)."""
    return gae(stepsearch_reward(tree, scale=scale), gamma=1.0, lam=1.0)


@estimator(
    "vsrm", reads=("outcome", "value", "root_value", "chains"), fits="chains", source="VSRM; details as defined here"
)
def vsrm_gae(
    tree: StepTree,
    *,
    threshold: NonNegativeFloat = 0.05,
    discount: Unit = 0.7,
    window: PositiveInt = 5,
    gamma: Unit = 1.0,
    lam: Unit = 1.0,
) -> Credit:
    """gae on the step rewards of the `vsrm` transform (the next significant change of value, discounted)."""
    return gae(vsrm(tree, threshold=threshold, discount=discount, window=window), gamma=gamma, lam=lam)


@estimator(
    "tp_grpo",
    reads=("outcome", "tags.wrong"),
    fits="steps with a judge's verdict",
    source="TP-GRPO; table as defined here",
)
def tp_grpo(tree: StepTree, *, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """Rewards of thoughts (see `tp_reward`) normalised over those of the prompt, each given to all its steps.

    A thought counts once in mean and std, by its first step, and nothing is accumulated: a long thought earns no more
    than a short one, and cutting a step in two changes no token's advantage. Steps that were not judged get 0.
    """
    reward = torch.where(tree.valid, thought_reward(tree), torch.nan)
    # A thought enters mean and std once, by its first step; its other steps have weight 0.
    first = thoughts(tree) == torch.arange(len(tree))
    normed = norm(reward, tree.group, how, weight=first.double(), all_sum=all_sum)
    return Credit(normed.z, info=normed.info)


@estimator(
    "spark",
    relative=True,
    reads=("step_reward",),
    fits="steps with verdicts, no ground truth",
    source="SPARK; from the paper",
)
def spark(tree: StepTree, *, rule: SparkRule = "mean", how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """grpo on R' = mean of the step verdicts (`step_reward` in {0, 1}) over the path, or 1 if all are right.

    Leaves with tags["format_ok"] false get 0. The recorded outcome is not used.
    """
    return grpo(spark_outcome(tree, rule=rule), how=how, all_sum=all_sum)


@estimator("oprl", reads=("outcome", "tags.implicit"), source="OPRL; from the paper, alpha as defined here")
def oprl(
    tree: StepTree, *, alpha: NonNegativeFloat = 1.0, how: Norm = Norm(), all_sum: AllSum | None = None
) -> Credit:
    """A = grpo + alpha * norm over all steps of the prompt of tags["implicit"] = beta (logp_PRM - logp_old)."""
    outcomes = episode(tree, how, all_sum=all_sum)
    implicit = torch.where(tree.valid, tag(tree, "implicit"), torch.nan)
    of_steps = norm(implicit, tree.group, how, all_sum=all_sum)
    return Credit(lift(tree, outcomes.z) + alpha * of_steps.z, info=outcomes.info)


@estimator(
    "prime",
    scale=lambda options: "std" if options["whitened"] else "loo",
    reads=("outcome", "tags.implicit", "chains"),
    fits="chains; tokens or steps",
    source="PRIME; paper form (default) and code form",
)
def prime(
    tree: StepTree,
    *,
    w_process: float = 5.0,
    w_outcome: float = 1.0,
    gamma: Unit = 1.0,
    form: PrimeForm = "paper",
    whitened: bool = True,
    all_sum: AllSum | None = None,
) -> Credit:
    """Leave-one-out centred process and outcome returns, added, then whitened over the batch.

    tags["implicit"] = beta (log pi_prm - log pi_ref) per node; a node is a token, or a step whose tokens were summed.
    With m_i the mean of sample i of n: paper r_t - mean of the other m_j; code r_t n/(n-1) - sum_j m_j/(n-1). Both
    sum to the same over a sample. returns are the advantages before whitening. A prompt with one sample gets the
    outcome part 0 and its process part uncentred by others: also 0.

    Raises ValueError on branching trees.
    """
    need_chains(tree, "prime", "use oprl, or a plan {0: G}")
    valid, implicit = tree.valid, tag(tree, "implicit")
    scored = valid & ~implicit.isnan()
    r = torch.where(scored, implicit, 0.0)
    # (N,) first step of each step's chain, under which the chain's length and mean reward m_i are kept
    chain = run_head(tree, torch.ones(len(tree), dtype=torch.bool))
    zero = torch.zeros(len(tree), dtype=torch.float64)
    length = zero.index_add(0, chain, scored.double())
    mean = zero.index_add(0, chain, r) / length.clamp(min=1)
    # (N,) number of the prompt's samples, and the sum of their means; a finished leaf stands for its sample
    n = prompt_sum(tree, tree.is_finished.double())[tree.group]
    sum_means = prompt_sum(tree, torch.where(tree.is_finished, mean[chain], 0.0))[tree.group]
    others = (n - 1).clamp(min=1)
    if form == "paper":
        centred = r - (sum_means - mean[chain]) / others
    elif form == "code":
        centred = r * n / others - sum_means / others
    else:
        raise unknown_choice("prime.form", form, PrimeForm)
    process = torch.where(scored & (n > 1), centred, 0.0)
    outcome = episode(tree, Norm(scale="loo"))
    returned = w_process * to_go(tree, process, gamma) + w_outcome * to_go(tree, outcome.z, gamma)
    adv = whiten(returned, valid.double(), all_sum) if whitened else returned
    return Credit(adv, returns=returned, info=outcome.info)
