"""An implicit process reward model: a policy trained on outcomes, whose log-ratio to its start is the step reward.

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
from mmrl.model_names import model_name
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

    # Its rewards are increments of a value along a path already, so transforms must not difference or clip them.
    increments = True

    def __init__(
        self,
        policy: Policy,
        beta: float = 0.05,
        reference: Policy | None = None,
        section: Mapping[str, Any] | None = None,
        reduce: Reduce = "sum",
    ) -> None:
        """Wrap a policy.

        Args:
            beta: scale of the log-ratio, above 0.
            reference: the policy before training; by default `policy` remembers its present weights.
            section: the recipe section of the policy, for the record of a saved scorer.
            reduce: log-ratios of a step's actions are added up, or averaged (SWEET-RL).
        """
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
        model: Annotated[str, model_name()] | None = None,
    ) -> ImplicitPrm:
        """A scorer from a recipe, or from the folder of a saved one.

        Args:
            policy: a section like a trainer's, with `name` and options.
            beta: .05 as PRIME.
            model: folder of a saved scorer; its record names the policy that it started from, beta and reduce.

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
        """(N,) float64 step rewards r_t = beta * log-ratio of the actions that the step owns."""
        return self.step_rewards(rollout)

    def step_rewards(self, rollout: Rollout, against: Against = "reference") -> Tensor:
        """(N,) float64 step rewards against the reference, or the policy that sampled; without gradient."""
        rollout = self._with_actions(rollout)
        with torch.no_grad():
            rewards = self._rewards(rollout, torch.arange(len(rollout.tree)), against).double().cpu()
        check_finite(rewards, "the policy of implicit_prm", "steps")
        return rewards

    def root_scores(self, rollout: Rollout) -> Tensor:
        """(G,) zeros: nothing has been done yet, so there is no log-ratio."""
        return torch.zeros(len(rollout.prompts), dtype=torch.float64)

    def begin_iteration(self) -> None:
        """Start an iteration of the policy; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self.policy)

    def admit(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that the policy can take."""
        return self.policy.admit(prompts)

    def readable(self, rollout: Rollout) -> Tensor:
        """(N,) bool, all True: every step has a density."""
        return torch.ones(len(rollout.tree), dtype=torch.bool)

    def micro_batches(self, rollout: Rollout, steps: Tensor, *, whole_prompts: bool = False) -> list[Tensor]:
        """The policy's micro-batches of whole prompts: the logit of a step needs all steps before it."""
        return self.policy.micro_batches(self._with_actions(rollout), steps, whole_prompts=True)

    def logits(self, rollout: Rollout, steps: Tensor) -> Tensor:
        """(S, 1) q_t of each step: the sum of r along its path."""
        rollout = self._with_actions(rollout)
        tree = rollout.tree
        # A logit sums over the path, so rewards are needed of the given steps and of all steps above them.
        requested_below = tree.accumulate(torch.zeros(len(tree)).index_fill(0, steps, 1.0))
        needed = (requested_below > 0).nonzero().flatten()
        rewards = self._rewards(rollout, needed).cpu()
        reward_of_step = rewards.new_zeros(len(tree)).index_add(0, needed, rewards)
        return path_sum(tree, reward_of_step)[steps][:, None]

    def save(self, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """The policy in its ecosystem's format, and a record of the policy it started from, its reference."""
        self.policy.save(folder, state_dict)
        record = {
            "scorer": "implicit_prm",
            "policy": dict(self._section or {}),
            "beta": self.beta,
            "reduce": self.reduce,
            "format": {"aggregate": "min"},
        }
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")

    def _rewards(self, rollout: Rollout, steps: Tensor, against: Against = "reference") -> Tensor:
        """(S,) beta * log-ratio of the actions of ascending `steps`, differentiable."""
        return self.beta * step_log_ratios(
            self.policy, rollout, steps, against=against, reference=self.reference, reduce=self.reduce
        )

    def _with_actions(self, rollout: Rollout) -> Rollout:
        """The rollout; one of texts alone gets the actions that the policy makes of its texts."""
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
    """(S,) log-ratio of the actions of ascending `steps`, added up or averaged per step, differentiable.

    Args:
        against: the policy before training, or the policy that sampled, by the log-probs of the rollout.
        reference: the policy before training, where `policy` does not remember it itself.
    """
    total: Tensor | None = None
    owners = rollout.tree.step_of_action(rollout.actions.logp.numel())
    remembers_reference = against == "reference" and reference is None
    for part in policy.micro_batches(rollout, steps):
        new = policy.log_probs(rollout, part, reference=remembers_reference)
        # (A,) log-ratio of each action of the part, and the row of its step among `steps`
        ratio = new.logp.float() - _old_logp(rollout, part, new, against, reference).to(new.logp.device)
        row = torch.searchsorted(steps, owners[new.index]).to(ratio.device)
        if reduce == "mean":
            ratio = ratio / torch.bincount(row, minlength=len(steps))[row]
        if total is None:
            total = ratio.new_zeros(len(steps))
        total = total.index_add(0, row, ratio)
    assert total is not None
    return total


def _old_logp(
    rollout: Rollout, steps: Tensor, new: ActionLogProbs, against: Against, reference: Policy | None
) -> Tensor:
    """(A,) log-probs of the same actions under the policy that `new` is compared with."""
    if against == "behaviour":
        return rollout.actions.logp[new.index].float()
    if reference is None:
        assert new.ref_logp is not None
        return new.ref_logp.float().detach()
    with torch.no_grad():
        return reference.log_probs(rollout, steps).logp.float()
