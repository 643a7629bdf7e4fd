"""An implicit process reward model: step rewards are log-ratios of a policy against its start, learned from outcomes.

Free Process Rewards without Process Labels (Yuan et al.), PRIME: r_t = beta * sum over the step's actions of
log(pi / pi_ref); q_t, their sum along the path, is a soft value of the prefix under the reference. It needs only
`Policy.log_probs`, so tokens and denoising transitions are served alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from mmrl.capabilities import StepWriter, begin_iteration, build_policy, policy_section
from mmrl.finite import check_finite
from mmrl.registry import of_kind
from mmrl.rollout import ActionLogProbs, Policy, Prompt, Rollout
from mmrl.scorers.scoring import RECORD
from mmrl.tree_ops import path_sum

Against = Literal["reference", "behaviour"]
Reduce = Literal["sum", "mean"]


class ImplicitPrm:
    """A StepScorer around a policy. Its logit at a step is q_t, so cross-entropy on the last step's logit is the CE
    objective on outcomes: train with `loss: {name: bce, last_step_only: true}`.

    Called, it gives the step rewards r_t themselves, which are no probabilities.
    """

    increments = True  # its rewards add up to a value along a path: nothing to difference or to clip

    def __init__(
        self,
        policy: Policy,
        beta: float = 0.05,
        reference: Policy | None = None,
        section: Mapping[str, Any] | None = None,
        reduce: Reduce = "sum",
    ) -> None:
        """reference: the policy before training; by default its weights of now. section: what `build` made it of.
        reduce: log-ratios of a step's actions are added up, or averaged (SWEET-RL)."""
        if beta <= 0:
            raise ValueError(f"scorer.beta={beta}: the scale of the log-ratio is above 0")
        self.policy, self.beta, self.reference, self._section = policy, beta, reference, section
        self.reduce: Reduce = reduce
        if reference is None:
            policy.freeze_reference()

    @classmethod
    def build(
        cls,
        policy: Annotated[Mapping[str, Any], of_kind("policies"), policy_section(Policy)] | None = None,
        beta: float = 0.05,
        reduce: Reduce = "sum",
        model: str | None = None,
    ) -> ImplicitPrm:
        """From a recipe: `policy:` is a section like a trainer's, with `name` and options; beta .05 (PRIME). Or from
        the folder of a saved one, `model`, whose record names the policy it started from, beta and reduce.

        Raises:
            ValueError: neither of the two, or both.
        """
        if (policy is None) == (model is None):
            raise ValueError("implicit_prm: give `policy`, a section with name and options, or `model`, its folder")
        make = partial(build_policy, "scorer.policy", protocol=Policy)
        if model is None:
            assert policy is not None
            return cls(make(policy), beta, section=policy, reduce=reduce)
        record = json.loads((Path(model) / RECORD).read_text())
        section = record["policy"]
        return cls(make({**section, "model": model}), record["beta"], make(section), section, record["reduce"])

    @property
    def model(self) -> nn.Module:
        """The policy's model."""
        return self.policy.model

    @model.setter
    def model(self, model: nn.Module) -> None:
        self.policy.model = model

    def __call__(self, rollout: Rollout) -> Tensor:
        """(N,) float64 step rewards r_t = beta * log-ratio of the step's own actions."""
        return self.step_rewards(rollout)

    def step_rewards(self, rollout: Rollout, against: Against = "reference") -> Tensor:
        """(N,) float64 step rewards, also against the policy that sampled the rollout; without gradient."""
        rollout = self._with_actions(rollout)
        with torch.no_grad():
            rewards = self._rewards(rollout, torch.arange(len(rollout.tree)), against).double().cpu()
        check_finite(rewards, "the policy of implicit_prm", "steps")
        return rewards

    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) zeros: nothing has been done yet, so there is no log-ratio."""
        return torch.zeros(len(rollout.prompts), dtype=torch.float64)

    def begin_iteration(self) -> None:
        """The policy's; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self.policy)

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The policy's."""
        return self.policy.admit(prompts)

    def readable(self, rollout: Rollout) -> Tensor:
        """(N,) bool, all: every step has a density."""
        return torch.ones(len(rollout.tree), dtype=torch.bool)

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """The policy's, whole prompts: the logit of a step needs all steps before it."""
        return self.policy.micro_batches(self._with_actions(rollout), steps, whole_prompts=True)

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, 1) q_t of each step: the sum of r along its path."""
        rollout = self._with_actions(rollout)
        tree = rollout.tree
        below = tree.accumulate(torch.zeros(len(tree)).index_fill(0, steps, 1.0))  # of each step, how many are asked
        needed = (below > 0).nonzero().flatten()
        rewards = self._rewards(rollout, needed).cpu()
        return path_sum(tree, rewards.new_zeros(len(tree)).index_add(0, needed, rewards))[steps][:, None]

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in its ecosystem's format, and a record of the policy it started from, its reference."""
        self.policy.save(folder, state_dict)
        record = {
            "scorer": "implicit_prm", "policy": dict(self._section or {}), "beta": self.beta,
            "reduce": self.reduce, "format": {"aggregate": "min"},
        }  # fmt: skip
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _rewards(self, rollout: Rollout, steps: Tensor, against: Against = "reference") -> Tensor:
        """(S,) beta * log-ratio of the own actions of ascending `steps`, differentiable."""
        return self.beta * step_log_ratios(
            self.policy, rollout, steps, against=against, reference=self.reference, reduce=self.reduce
        )

    def _with_actions(self, rollout: Rollout) -> Rollout:
        """A written rollout gets the policy's own actions for its texts."""
        if rollout.actions.logp.numel():
            return rollout
        if not isinstance(self.policy, StepWriter):
            raise ValueError("the rollout has no actions and this policy cannot make them of texts")
        return self.policy.write_steps(rollout)


def step_log_ratios(
    policy: Policy,
    rollout: Rollout,
    steps: Tensor,
    *,
    against: Against = "reference",
    reference: Policy | None = None,
    reduce: Reduce = "sum",
) -> Tensor:
    """(S,) log-ratio of the own actions of ascending `steps`, added up or averaged per step, differentiable.

    Args:
        against: what the policy was before training, or the policy that sampled, by the rollout's own log-probs.
        reference: the policy before training, where `policy` does not remember it itself.
    """
    tree, out = rollout.tree, None
    owners = tree.step_of_action(rollout.actions.logp.numel())
    for part in policy.micro_batches(rollout, steps):
        lp = policy.log_probs(rollout, part, reference=against == "reference" and reference is None)
        ratio = lp.logp.float() - _old_logp(rollout, part, lp, against, reference).to(lp.logp.device)
        row = torch.searchsorted(steps, owners[lp.index]).to(ratio.device)
        if reduce == "mean":
            ratio = ratio / torch.bincount(row, minlength=len(steps))[row]
        out = (ratio.new_zeros(len(steps)) if out is None else out).index_add(0, row, ratio)
    assert out is not None
    return out


def _old_logp(
    rollout: Rollout, steps: Tensor, lp: ActionLogProbs, against: Against, reference: Policy | None
) -> Tensor:
    """(A,) log-probs of the same actions under what the policy is compared with."""
    if against == "behaviour":
        return rollout.actions.logp[lp.index].float()
    if reference is None:
        assert lp.ref_logp is not None
        return lp.ref_logp.float().detach()
    with torch.no_grad():
        return reference.log_probs(rollout, steps).logp.float()
