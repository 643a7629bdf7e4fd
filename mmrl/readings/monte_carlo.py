"""Values of states by completions: what the policy, or a prover, reaches from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.capabilities import Completer, begin_iteration, build_policy, policy_section, require
from mmrl.readings.base import ReadingContext, Values
from mmrl.registry import of_kind, register
from mmrl.rollout import Place, Rollout
from mmrl.seeding import named_generator
from mmrl.tree import StepTree
from mmrl.tree_ops import before


@register(
    "readings",
    "monte_carlo",
    reads=("outcome",),
    writes=("value", "root_value", "tags.visits", "tags.q_sum"),
    source="VinePPO; a prover's values: Rewarding Progress (PAV)",
    policy=lambda options: Completer if options["policy"] is None else None,
    costs=("completions",),
)
class MonteCarlo:
    """Values of all states by `n` completions of each: the mean of the outcomes that the recipe's rewards give them.

    value: of the state after a step; an end is worth its own outcome, a state without any outcome as much as the one
    before it. root_value: of the prompt. visits: completions with an outcome, q_sum: sum of these. States share what
    leads to them: a text's prefix is run once for all that continue it, a latent's course goes on where it stands.

    Args:
        n: completions of each state.
        temperature: of the completions; None = as in rollouts. 0: greedy tokens, or the ODE from the latent, once.
        policy: a section like the recipe's `policy`: another one completes (a prover); its weights stay as they are.
    """

    def __init__(
        self,
        n: Annotated[int, Field(ge=1)] = 4,
        temperature: Annotated[float, Field(ge=0)] | None = None,
        policy: Annotated[Mapping[str, Any], of_kind("policies"), policy_section(Completer)] | None = None,
    ) -> None:
        self._n, self._temperature = n, temperature
        self._prover = None if policy is None else build_policy("policy", policy, Completer)
        self.model: nn.Module | None = None if self._prover is None else self._prover.model.requires_grad_(False)

    def begin_iteration(self) -> None:
        """The prover's own; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self._prover)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """The fields of a rollout; random numbers depend on (seed, iteration, prompt id, place) alone."""
        tree, prompts = rollout.tree, rollout.prompts
        policy: Completer = require("reading 'monte_carlo'", Completer, self._prover or context.policy, "policies")
        places = [Place(g) for g in range(len(prompts))]
        places += [Place(int(tree.group[v]), int(v)) for v in (~tree.is_finished).nonzero().flatten()]
        inner = place_in_prompt(tree)
        seeds = []
        for place in places:
            at = "prompt" if place.step < 0 else int(inner[place.step])
            name = (context.seed, context.iteration, prompts[place.prompt].id, "monte_carlo", at)
            seeds.append(named_generator(*name).initial_seed())
        completions = policy.complete(rollout, places, self._n, seeds=seeds, temperature=self._temperature)
        samples = [sample for own in completions for sample in own]
        outcome = context.outcome(samples) if samples else torch.zeros(0, dtype=torch.float64)
        owner = torch.tensor([i for i, own in enumerate(completions) for _ in own], dtype=torch.long)
        context.cost["completions"] += len(samples)
        scored = ~outcome.isnan()
        visits = torch.bincount(owner[scored], minlength=len(places))
        q_sum = torch.zeros(len(places), dtype=torch.float64).index_add(0, owner[scored], outcome[scored])
        return _fields(tree, places, visits, q_sum)


def _fields(tree: StepTree, places: Sequence[Place], visits: Tensor, q_sum: Tensor) -> Values:
    """Values of steps and prompts from the sums over each place's completions; prompts are the first places."""
    prompts = tree.num_groups
    steps = torch.tensor([p.step for p in places[prompts:]], dtype=torch.long)
    node_visits, node_sum = tree.is_finished.long(), torch.where(tree.is_finished, tree.outcome, 0.0)
    node_visits[steps], node_sum[steps] = visits[prompts:], q_sum[prompts:]
    root_value = q_sum[:prompts] / visits[:prompts]
    value = node_sum / node_visits
    for level in tree.levels if bool((node_visits == 0).any()) else []:
        above = before(tree, value, root_value)
        value[level] = torch.where(node_visits[level] == 0, above[level], value[level])
    return {"value": value, "root_value": root_value, "tags.visits": node_visits, "tags.q_sum": node_sum}


def place_in_prompt(tree: StepTree) -> Tensor:
    """(N,) int, how many steps of the same prompt come before each: a name of the step that holds in any batch."""
    order = torch.argsort(tree.group, stable=True)
    count = torch.bincount(tree.group, minlength=tree.num_groups)
    out = torch.empty(len(tree), dtype=torch.long)
    out[order] = torch.arange(len(tree)) - (count.cumsum(0) - count).repeat_interleave(count)
    return out
