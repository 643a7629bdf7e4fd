"""The reading `monte_carlo`: values of states as mean outcomes of completions by the policy or by a prover."""

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
        """Start an iteration of the prover; see `mmrl.capabilities.EncodingCache`."""
        begin_iteration(self._prover)

    def __call__(self, rollout: Rollout, context: ReadingContext) -> Values:
        """The fields of a rollout; random numbers depend on (seed, iteration, prompt id, place) alone."""
        tree, prompts = rollout.tree, rollout.prompts
        policy: Completer = require("reading 'monte_carlo'", Completer, self._prover or context.policy, "policies")
        # Finished leaves have an outcome and need no completion.
        places = [Place(prompt_index) for prompt_index in range(len(prompts))]
        for step in (~tree.is_finished).nonzero().flatten().tolist():
            places.append(Place(int(tree.group[step]), step))
        index_in_prompt = place_in_prompt(tree)
        seeds = []
        for place in places:
            position = "prompt" if place.step < 0 else int(index_in_prompt[place.step])
            name = (context.seed, context.iteration, prompts[place.prompt].id, "monte_carlo", position)
            seeds.append(named_generator(*name).initial_seed())
        completions = policy.complete(rollout, places, self._n, seeds=seeds, temperature=self._temperature)
        # Completions in one list, and the index of the place that each belongs to.
        samples, owners = [], []
        for i, of_place in enumerate(completions):
            samples += of_place
            owners += [i] * len(of_place)
        outcome = context.outcome(samples) if samples else torch.zeros(0, dtype=torch.float64)
        owner = torch.tensor(owners, dtype=torch.long)
        context.cost["completions"] += len(samples)
        scored = ~outcome.isnan()
        visits = torch.bincount(owner[scored], minlength=len(places))
        q_sum = torch.zeros(len(places), dtype=torch.float64).index_add(0, owner[scored], outcome[scored])
        return _fields(tree, places, visits, q_sum)


def _fields(tree: StepTree, places: Sequence[Place], visits: Tensor, q_sum: Tensor) -> Values:
    """Fields of steps and prompts from the completions of each place.

    Args:
        places: prompts first, then steps. visits, q_sum: (P,) number and summed outcome of each place's completions.
    """
    num_prompts = tree.num_groups
    steps = torch.tensor([place.step for place in places[num_prompts:]], dtype=torch.long)
    # (N,) a finished leaf counts as visited once, with its outcome
    node_visits, node_sum = tree.is_finished.long(), torch.where(tree.is_finished, tree.outcome, 0.0)
    node_visits[steps], node_sum[steps] = visits[num_prompts:], q_sum[num_prompts:]
    root_value = q_sum[:num_prompts] / visits[:num_prompts]
    value = node_sum / node_visits
    if bool((node_visits == 0).any()):
        # From the first steps down, a state without outcome takes the value of the state before it.
        for level in tree.levels:
            above = before(tree, value, root_value)
            value[level] = torch.where(node_visits[level] == 0, above[level], value[level])
    return {"value": value, "root_value": root_value, "tags.visits": node_visits, "tags.q_sum": node_sum}


def place_in_prompt(tree: StepTree) -> Tensor:
    """(N,) int, index of each step among the steps of its prompt: a name of the step that holds in any batch."""
    order = torch.argsort(tree.group, stable=True)
    count = torch.bincount(tree.group, minlength=tree.num_groups)
    start = (count.cumsum(0) - count).repeat_interleave(count)
    index = torch.empty(len(tree), dtype=torch.long)
    index[order] = torch.arange(len(tree)) - start
    return index
