"""Signs in an iteration's metrics that a run cannot learn: doctor reads them before it starts, the loop while it runs.

One table of rules serves both, so that what doctor calls hopeless is what the trainer warns of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

MOST = 0.5  # share of completions cut from which that is told
NEARLY_ALL = 0.9  # share cut, or of ratios clipped, that leaves nothing to learn from
PATIENCE = 3  # iterations in a row before the loop tells what a single unlucky batch may show too

# What each trainer learns from, by the metric that is 0 when there is nothing; the remedy.
_LEARNT_FROM = {
    "credit/adv_abs_max": (
        "every advantage is 0",
        "look at the rewards of single samples, sample more rollouts of a prompt (plan), or take prompts that are "
        "neither always nor never solved",
    ),
    "preference/pairs": ("no pair of steps differs", "look at the rewards, lower pairs.threshold, or widen the plan"),
    "sample_loss/differing_prompts": ("no reward of a prompt differs", "look at the rewards, or widen the plan"),
    "sample_loss/rows": ("no sample enters the loss", "look at the rewards, or widen the plan"),
    "imitation/actions": ("no sample is above keep_above", "lower keep_above, widen the plan, or learn references"),
    "data/labelled_steps": ("no step has a label that can be read", "look at the labels, or raise scorer.max_length"),
    "policy/grad_norm": ("the gradient is 0", "look at the rewards, and at what of the model is trained"),
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What an iteration shows.

    name: which rule. text: what is wrong, with its share, and what to change. hopeless: nothing, or nearly nothing,
    can be learnt like this. patience: iterations in a row before the loop warns; 0: the trainer has warned already.
    """

    name: str
    text: str
    hopeless: bool
    patience: int = 1


def verdicts(metrics: Mapping[str, float]) -> list[Verdict]:
    """What the metrics of one iteration, summed over all processes, say about the run; [] = nothing is wrong."""
    rules = (
        _nothing_to_learn(metrics), _cut(metrics), _cut_references(metrics), _clipped(metrics), _not_finite(metrics)
    )  # fmt: skip
    return [verdict for verdict in rules if verdict is not None]


def is_idle(metrics: Mapping[str, float]) -> bool:
    """Nothing was there to learn from in an iteration with these metrics."""
    return _nothing_to_learn(metrics) is not None


def _nothing_to_learn(metrics: Mapping[str, float]) -> Verdict | None:
    if metrics.get("imitation/grad_norm"):  # prompts without a right answer learn their references
        return None
    for name, (what, remedy) in _LEARNT_FROM.items():
        if metrics.get(name) == 0:
            about = ""
            if metrics.get("reward/zero_spread_frac") == 1:
                about = f": the rewards of each prompt's rollouts are equal (mean {metrics['reward/mean']:.3g})"
            elif "reward/mean" in metrics:
                about = f" (rewards: mean {metrics['reward/mean']:.3g}, std {metrics['reward/std']:.3g})"
            return Verdict("idle", f"nothing to learn: {what}{about}; {remedy}", True, PATIENCE)
    return None


def _cut(metrics: Mapping[str, float]) -> Verdict | None:
    share = metrics.get("rollout/truncated_per_leaf", 0.0)
    if share < MOST:
        return None
    text = (
        f"{share:.0%} of the completions were cut at the longest length, before they had ended; raise "
        "policy.max_new_tokens, or teach the model to be brief first"
    )
    return Verdict("cut", text, share >= NEARLY_ALL)


def _cut_references(metrics: Mapping[str, float]) -> Verdict | None:
    share = metrics.get("imitation/cut_frac", 0.0)
    if share == 0:
        return None
    text = (
        f"{share:.0%} of the reference solutions are longer than sampling may write, so what is learnt from them will "
        "be cut; raise policy.max_new_tokens (the longest turn of a conversation) or policy.max_steps"
    )
    return Verdict("cut_references", text, share >= NEARLY_ALL, patience=0)


def _clipped(metrics: Mapping[str, float]) -> Verdict | None:
    share = metrics.get("policy/clip_frac", 0.0)
    if share < NEARLY_ALL:
        return None
    text = (
        f"{share:.0%} of the ratios of the last update lie outside the clip range, which takes away their gradient; "
        "widen loss.clip_low and loss.clip_high, lower optim.lr or optim.updates_per_rollout, or, where another "
        "engine samples, set loss.recompute_old_logp=true"
    )
    return Verdict("clipped", text, True)


def _not_finite(metrics: Mapping[str, float]) -> Verdict | None:
    norm = metrics.get("policy/grad_norm", 0.0)
    if norm - norm == 0:
        return None
    text = (
        f"the gradient is {norm}, so the update was skipped: the loss overflows; lower optim.lr, or set "
        "run.mixed_precision: no or bf16"
    )
    return Verdict("not_finite", text, True, PATIENCE)


class Watch:
    """Warns once of each verdict, after as many iterations in a row as it has patience.

    What is hopeless and shows in every iteration of a run shorter than that is told at its end.
    """

    def __init__(self) -> None:
        self._iterations = 0
        self._in_a_row: Counter[str] = Counter()
        self._told: set[str] = set()

    def look(self, metrics: Mapping[str, float], *, last: bool) -> list[Verdict]:
        """The verdicts to tell now, of an iteration's metrics. last: no more will come."""
        self._iterations += 1
        shown = {v.name: v for v in verdicts(metrics)}
        self._in_a_row = Counter({name: self._in_a_row[name] + 1 for name in shown})
        due = []
        for name, verdict in shown.items():
            always = last and self._in_a_row[name] == self._iterations
            if verdict.patience and name not in self._told and (self._in_a_row[name] >= verdict.patience or always):
                self._told.add(name)
                due.append(verdict)
        return due
