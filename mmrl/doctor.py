"""What a recipe will cost and whether it holds together, before it runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mmrl.rollout import Rollout
from mmrl.trainers.branch_grpo import BranchGrpo, BranchGrpoConfig
from mmrl.trainers.policy_update import current_logp


def examine(config: BranchGrpoConfig) -> Iterator[str]:
    """Lines of a check-up: world, forecast, memory, one rollout with rewards, the ratio before the first update.

    Raises:
        ValueError, RuntimeError: whatever would stop the run itself.
    """
    trainer = BranchGrpo(config)
    run = config.run
    yield f"world      {trainer.loop.world}"
    yield f"plan       {dict(trainer.plan.factors)}: {trainer.forecast}"
    per_iteration = run.prompts_per_iteration
    f = trainer.forecast
    yield (
        f"cost       {per_iteration} prompts: {f.leaves * per_iteration} samples, {f.calls * per_iteration} network "
        f"calls, {f.trained_states * per_iteration} trained states per iteration; {run.iterations} iterations"
    )
    yield _memory(trainer)
    rollout = trainer.sample(0)
    scored = trainer.last_scores
    for name, part in scored.parts.items():
        bad = int(part.isnan().sum())
        known = part[~part.isnan()]
        yield (
            f"reward     {name}: mean {known.mean():.3f}, std {known.std():.3f}, {bad} of {len(part)} unscored, "
            f"{scored.seconds[name]:.2f} s"
        )
    credit = trainer.credit(rollout)
    info = credit.info
    names = ", ".join(e["name"] for e in info["estimators"])
    yield (
        f"credit     {names}: |advantage| mean {info['adv_abs_mean']:.3f}, max {info['adv_abs_max']:.3f}; "
        f"{info['zero_spread_groups']} of {info['groups']} groups without spread"
    )
    calls = rollout.counts["calls"] / rollout.counts["leaves"]
    bound = f.calls / f.leaves  # reached unless completions may end early
    agrees = (
        "as forecast" if abs(calls - bound) < 1e-9 else "at most as forecast" if calls < bound else "NOT as forecast"
    )
    yield f"rollout    {calls:.3f} calls per leaf, {agrees}"
    yield _ratio(trainer, rollout, config)


def _memory(trainer: BranchGrpo) -> str:
    model = trainer.loop.model
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in trainer.loop.parameters)
    need = total + trained * 4 * 3 + (total if trainer.config.loss.kl > 0 and trained * 4 >= total else 0)
    return (
        f"memory     {trained / 1e6:.2f} M trained parameters; {need / 2**20:.0f} MiB for weights, gradients, AdamW "
        "and reference, without activations"
    )


def _ratio(trainer: BranchGrpo, rollout: Rollout, config: BranchGrpoConfig) -> str:
    old, trainable = rollout.actions.logp, rollout.actions.trainable
    steps = torch.unique(rollout.tree.step_of_action(old.numel())[trainable])
    new = current_logp(trainer.policy, rollout, steps)
    worst = float(((new - old)[trainable].exp() - 1).abs().max())
    limit = min(config.loss.clip_low, config.loss.clip_high) / 2
    verdict = "fine" if worst <= limit else "TOO LARGE: set loss.recompute_old_logp=true"
    return f"ratio      deviates from 1 by at most {worst:.1e} before the first update (limit {limit:.1e}): {verdict}"
