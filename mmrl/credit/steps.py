"""Estimators that read step rewards or values beside the outcome."""

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
    need_chains,
    renorm,
    spark_outcome,
    stepsearch_reward,
    thought_reward,
    thoughts,
    vsrm,
)
from mmrl.seeding import named_generator
from mmrl.tree import StepTree
from mmrl.tree_ops import before, leaf_share, leaf_sum, lift, run_head, togo

Pool = Literal["joint", "separate"]
VoteRule = Literal["intersection", "majority"]
PrimeForm = Literal["paper", "code"]


def scored_steps(tree: StepTree, how: Norm, all_sum: AllSum | None = None) -> tuple[Tensor, dict[str, float]]:
    """(N,) step rewards normalised over all scored valid steps of the prompt, each once; 0 where not scored."""
    x = torch.where(tree.valid, tree.step_reward, torch.nan)
    z = norm(x, tree.group, how, all_sum=all_sum)
    return z.z, z.info


@estimator(
    "process_grpo",
    reads=("step_reward",),
    sums_steps=True,
    source="DeepSeekMath 4.1.3; intent of WebGen-Agent's cumulative form",
)
def process_grpo(tree: StepTree, *, gamma: Unit = 1.0, how: Norm = Norm(), all_sum: AllSum | None = None) -> Credit:
    """z = step reward normalised over all scored steps of the prompt; A = togo(z, gamma).

    The outcome is not used unless folded in. Unscored steps (NaN) add 0.
    """
    z, info = scored_steps(tree, how, all_sum)
    return Credit(togo(tree, z, gamma), info=info)


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
    return Credit(togo(normed, z) if accumulate else z, info=info)


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
    r = torch.where(valid, tree.step_reward.nan_to_num(nan=0.0), 0.0)
    g = tree.accumulate(r, gamma * leaf_share(tree) * tree.ok.double() * tree.ok[above].double())
    s = norm(torch.where(valid, g, torch.nan), tree.depth * tree.num_groups + tree.group, how, all_sum=all_sum)
    e = episode(tree, how, episode_stats, all_sum)
    return Credit(w_episode * lift(tree, e.z) + w_step * s.z, info=e.info)


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
    e = episode(tree, how, episode_stats, all_sum)
    s = norm(torch.where(scored, tree.step_reward, torch.nan), sets, how, all_sum=all_sum)
    return Credit(w_episode * lift(tree, e.z) + omega * s.z, info=e.info | {"set_id": sets})


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
    e = episode(tree, Norm(scale="none"))
    mu = 1 - (1 - tree.value) ** best_of
    root = 1 - (1 - tree.root_value) ** best_of
    return Credit(lift(tree, e.z) + alpha * (mu - before(tree, mu, root)), info=e.info)


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
    """A = togo(z, gamma); z of an inner turn is its information gain (`step_reward`), of a leaf its outcome.

    `joint` normalises gains and outcomes of a prompt in one set, `separate` in two. A leaf's own step reward is
    ignored. gain(n) = p(answer | after n) - p(answer | before n).
    """
    x = torch.where(tree.is_finished, tree.outcome, tree.step_reward)
    x = torch.where(tree.valid, x, torch.nan)
    if pool == "joint":
        sets = tree.group
    elif pool == "separate":
        sets = 2 * tree.group + tree.is_leaf.long()
    else:
        raise unknown_choice("igpo.pool", pool, Pool)
    z = norm(x, sets, how, all_sum=all_sum)
    return Credit(togo(tree, z.z, gamma), info=z.info)


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
    w = tree.span.double()
    wrong = (tree.valid & (tag(tree, "wrong", classes=2) == 1)).double()
    m = tree.m.double()
    centred = episode(tree, Norm(scale="none"))
    # Every trajectory through a node gives its tokens another reward. Their mean and the sum of their squares follow
    # from sums over the leaves below, so that no trajectory is written out. r: mean centred outcome below each node.
    r = w_out * lift(tree, centred.z)
    r2 = w_out**2 * leaf_sum(tree, centred.z**2)
    x = r - w_proc * wrong
    zero = torch.zeros(tree.num_groups, dtype=torch.float64)
    n = zero.index_add(0, tree.group, w * m)
    mean = zero.index_add(0, tree.group, w * m * x) / n.clamp(min=1)
    c = w_proc * wrong + mean[tree.group]
    # The sum over the leaves below of (w_out R - c)^2.
    squares = w * (r2 - 2 * c * r * m + m * c**2)
    var = zero.index_add(0, tree.group, squares).clamp(min=0) / (n - ddof).clamp(min=1)
    largest = zero.scatter_reduce(0, tree.group, x.abs(), "amax").clamp(min=1)
    flat = var.sqrt() <= 1e-8 * largest
    adv = (x - mean[tree.group]) / (var.sqrt() + eps)[tree.group]
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
    after = torch.where(finished & ~cut, 0.0, gamma * tree.value)
    outcome = torch.where(finished, tree.outcome, 0.0)
    delta = torch.where(valid, tree.step_reward.nan_to_num(nan=0.0) + outcome + after - value_before, 0.0)
    adv = togo(tree, delta, gamma * lam)
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
    z = norm(reward, tree.group, how, weight=first.double(), all_sum=all_sum)
    return Credit(z.z, info=z.info)


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
    e = episode(tree, how, all_sum=all_sum)
    x = torch.where(tree.valid, tag(tree, "implicit"), torch.nan)
    return Credit(lift(tree, e.z) + alpha * norm(x, tree.group, how, all_sum=all_sum).z, info=e.info)


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
    chain = run_head(tree, torch.ones(len(tree), dtype=torch.bool))
    length = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, chain, scored.double())
    mean = torch.zeros(len(tree), dtype=torch.float64).index_add_(0, chain, r) / length.clamp(min=1)
    zero = torch.zeros(tree.num_groups, dtype=torch.float64)
    finished = tree.is_finished
    n = zero.index_add(0, tree.group, finished.double())[tree.group]
    total = zero.index_add(0, tree.group, torch.where(finished, mean[chain], 0.0))[tree.group]
    others = (n - 1).clamp(min=1)
    if form == "paper":
        centred = r - (total - mean[chain]) / others
    elif form == "code":
        centred = r * n / others - total / others
    else:
        raise unknown_choice("prime.form", form, PrimeForm)
    process = torch.where(scored & (n > 1), centred, 0.0)
    outcome = episode(tree, Norm(scale="loo"))
    returned = w_process * togo(tree, process, gamma) + w_outcome * togo(tree, outcome.z, gamma)
    adv = whiten(returned, valid.double(), all_sum) if whitened else returned
    return Credit(adv, returns=returned, info=outcome.info)
