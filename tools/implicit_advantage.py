"""How well do the step rewards of an implicit PRM tell the advantage of a denoising step, next to the outcome alone?

    mmrl rollouts configs/diffusion/digits_branch.yaml --out runs/tree run.iterations=25
    python tools/implicit_advantage.py runs/tree --updates 25 75 150

Trains a `mmrl.scorers.implicit.ImplicitPrm` on the outcomes of stored rollouts, one update per batch as `online:`
does, and measures on trees of 4 x 4 x 4 x 4 leaves that nothing was trained on. There the advantage of a step is the
mean reward of the leaves below it minus that of its siblings' (64, 16, 4 and 1 leaves below the step), so at the first
forks it is known up to the noise of such means.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from torch import Tensor

from mmrl.config import load_config
from mmrl.losses.reward import step_loss
from mmrl.rollout import BranchPlan, Policy, Rollout
from mmrl.scorers.implicit import ImplicitPrm
from mmrl.trainers.branch_grpo import BranchGrpoConfig
from mmrl.trainers.run import Run
from mmrl.trainers.stored import StoredRollouts
from mmrl.tree import StepTree
from mmrl.tree_ops import backup

FORKS = (0, 2, 4, 6)
PROMPTS = 8


def held_out(run: Run, seed: int) -> Rollout:
    """Rewarded trees of every prompt of the task, 256 leaves each."""
    plan = BranchPlan(dict.fromkeys(FORKS, 4))
    rollout = run.policy.rollout(list(run.task.prompts), plan, seed=seed)
    return run.rewarder.reward_leaves(rollout, {})


def sibling_gap(tree: StepTree, x: Tensor) -> Tensor:
    """(N,) x minus its mean over the siblings of each step."""
    total = torch.zeros(int(tree.sibling_set.max()) + 1, dtype=x.dtype).index_add(0, tree.sibling_set, x)
    return x - (total / torch.bincount(tree.sibling_set))[tree.sibling_set]


def paths(tree: StepTree) -> Tensor:
    """(L, 4) int: of each leaf, its steps at the forks."""
    at, rows = tree.is_leaf.nonzero().flatten(), []
    while bool((at >= 0).any()):
        rows.append(at)
        at = tree.parent[at]
    by_depth = torch.stack(rows[::-1], 1)
    return by_depth[:, list(FORKS)]


def correlations(tree: StepTree, estimate: Tensor) -> dict[str, float]:
    """Pearson correlation with the true advantage over (leaf, fork), at each fork and over all of them.

    estimate: (L, 4) of each leaf's steps at the forks, see `centred`.
    """
    path = paths(tree)
    truth = sibling_gap(tree, backup(tree, "leaf_mean"))[path]
    told = {f"depth {d}": _pearson(truth[:, i], estimate[:, i]) for i, d in enumerate(FORKS)}
    return told | {"all": _pearson(truth.flatten(), estimate.flatten())}


def centred(tree: StepTree, estimate: Tensor) -> Tensor:
    """(L, 4) estimates minus their mean over the leaves of a prompt, in units of the standard deviation of all."""
    group = tree.group[tree.is_leaf]
    mean = torch.stack([estimate[group == g].mean(0) for g in range(tree.num_groups)])[group]
    return (estimate - mean) / (estimate - mean).std()


def _pearson(a: Tensor, b: Tensor) -> float:
    table = torch.corrcoef(torch.stack([a.double(), b.double()]))
    return round(float(table[0, 1]), 3)


def train(prm: ImplicitPrm, stored: StoredRollouts, optimizer: torch.optim.Optimizer, batches: range) -> float:
    """One step per stored batch on the cross-entropy of its outcomes; the mean loss of the last ten."""
    loss_of, last = step_loss("bce"), []
    for i in batches:
        rollout = stored.batch(i)
        leaves = rollout.tree.is_finished.nonzero().flatten()
        loss = loss_of(prm.logits(rollout, leaves), rollout.tree.outcome[leaves].clamp(0, 1).float()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last = [*last[-9:], float(loss.detach())]
    return sum(last) / max(len(last), 1)


def main() -> None:
    """Print the correlations of the broadcast, and of the implicit rewards after each number of updates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", help="folder that `mmrl rollouts` wrote from the recipe")
    parser.add_argument("--recipe", default="configs/diffusion/digits_branch.yaml")
    parser.add_argument("--beta", type=float, default=20.0)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weight", type=float, default=0.2, help="of the implicit reward beside the outcome")
    parser.add_argument("--updates", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--seed", type=int, default=7, help="of the held-out trees")
    a = parser.parse_args()
    config = load_config(a.recipe, ["run.trackers=[]", "run.cpu=true"])
    assert isinstance(config, BranchGrpoConfig)
    run = Run(config)
    trees = held_out(run, a.seed)
    tree, path = trees.tree, paths(trees.tree)
    broadcast = centred(tree, tree.outcome[tree.is_leaf][:, None].expand(path.shape))
    print(json.dumps({"outcome broadcast": correlations(tree, broadcast)}))
    policy: Policy = type(run.policy).build(**config.policy.options)  # type: ignore[attr-defined]
    prm, stored, done = ImplicitPrm(policy, beta=a.beta), StoredRollouts(a.rollouts, PROMPTS), 0
    optimizer = torch.optim.AdamW(prm.model.parameters(), lr=a.lr, weight_decay=0.0)
    start = time.process_time()
    for n in a.updates:
        loss, done = train(prm, stored, optimizer, range(done, n)), n
        own = centred(tree, prm(trees).nan_to_num()[path])
        print(json.dumps({"updates": n, "loss": round(loss, 4), "cpu_s": round(time.process_time() - start),
                          "implicit": correlations(tree, own),
                          "both": correlations(tree, broadcast + a.weight * own)}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
