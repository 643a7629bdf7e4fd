"""Units of neighbouring steps: HRM adds pairs of steps to a tree, HNC contracts some edges of it.

Both give rollouts of texts, for reward models that read them; the text of a unit is that of its steps, in order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from mmrl.rollout import Actions, Rollout
from mmrl.tree import UNFINISHED, StepTree


def with_pairs(rollout: Rollout) -> Rollout:
    """Every step, and beside its parent the two of them as one unit with the step's value (HRM).

    The unit stands after what comes before the parent and ends there: what follows the step stays with the step.
    Values (`tree.value`) are those of the states, which a unit shares with its second step.
    """
    parent = rollout.tree.parent.tolist()
    units = [[step] for step in range(len(parent))]
    unit_parents = list(parent)
    for step, above in enumerate(parent):
        if above >= 0:
            units.append([above, step])
            unit_parents.append(parent[above])
    return _forest(rollout, units, unit_parents, open_from=len(parent))


def contract_edges(rollout: Rollout, seed: int, *, probability: float = 0.5, min_children: int = 4) -> Rollout:
    """A rollout in which some grandchildren hang one level higher, their last two steps in one unit (HNC).

    Each node (the prompt too) with at least `min_children` children contracts, with `probability`, one edge below one
    of its children; child and grandchild are drawn evenly (as defined here). Whole solutions and the mean outcome of
    the prompt stay; the means of inner nodes change, which is the label noise that the method wants. A child that
    loses its only child disappears. Draws depend on the seed and the prompt's id alone.
    """
    tree = rollout.tree
    children_of: list[list[int]] = [[] for _ in range(len(tree))]
    first_steps: list[list[int]] = [[] for _ in rollout.prompts]
    for step, (parent, group) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
        siblings = children_of[parent] if parent >= 0 else first_steps[group]
        siblings.append(step)
    units = [[step] for step in range(len(tree))]
    for prompt, first in zip(rollout.prompts, first_steps, strict=True):
        rng = random.Random(f"{seed}/{prompt.id}")
        # A node before its children: otherwise a unit could be lifted twice and hold three steps.
        stack = [first]
        while stack:
            children = stack.pop()
            inner = [position for position, child in enumerate(children) if children_of[child]]
            if len(children) >= min_children and inner and rng.random() < probability:
                position = rng.choice(inner)
                children[position : position + 1] = _lift_one(children[position], children_of, units, rng)
            stack += [children_of[child] for child in reversed(children)]
    return _depth_first(rollout, units, children_of, first_steps)


def _depth_first(
    rollout: Rollout, units: Sequence[Sequence[int]], children_of: list[list[int]], first_steps: list[list[int]]
) -> Rollout:
    """The rollout of the units that are still reached from the prompts, in depth-first order."""
    kept: list[Sequence[int]] = []
    unit_parents: list[int] = []
    # (step, index of its parent among the kept units); a stack, so siblings go on it last first.
    stack = [(step, -1) for first in reversed(first_steps) for step in reversed(first)]
    while stack:
        step, parent = stack.pop()
        stack += [(child, len(kept)) for child in reversed(children_of[step])]
        kept.append(units[step])
        unit_parents.append(parent)
    return _forest(rollout, kept, unit_parents)


def _lift_one(child: int, children_of: list[list[int]], units: list[list[int]], rng: random.Random) -> list[int]:
    """Merge `child` with one of its children; returns the nodes that take its place among its siblings.

    These are the child itself, if it has other children, and the merged unit.
    """
    lifted = children_of[child].pop(rng.randrange(len(children_of[child])))
    units[lifted] = units[child] + units[lifted]
    return [child, lifted] if children_of[child] else [lifted]


def _forest(
    rollout: Rollout, units: Sequence[Sequence[int]], parent: Sequence[int], *, open_from: int | None = None
) -> Rollout:
    """A rollout with one step per unit of steps: their texts in order, and the numbers of the unit's last step.

    Args:
        units: per new step, the steps of `rollout` that it stands for. parent: per new step, its parent, -1 = prompt.
        open_from: new steps from this index on become leaves without outcome.
    """
    tree = rollout.tree
    last = torch.tensor([unit[-1] for unit in units], dtype=torch.int64)
    status, outcome = tree.status[last], tree.outcome[last]
    if open_from is not None:
        status[open_from:], outcome[open_from:] = UNFINISHED, torch.nan
    no_actions = torch.zeros(len(units), dtype=torch.int64)
    new_tree = StepTree(
        torch.tensor(parent, dtype=torch.int64),
        tree.group[last],
        status,
        outcome,
        step_reward=tree.step_reward[last],
        value=tree.value[last],
        root_value=tree.root_value,
        tok_start=no_actions,
        tok_end=no_actions,
        tags={name: column[last] for name, column in tree.tags.items()},
    )
    texts = [_joined([rollout.texts[step] for step in unit]) for unit in units]
    actions = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    # The tree may have put the units into another order.
    return replace(rollout, tree=new_tree, actions=actions, texts=[texts[i] for i in new_tree.order.tolist()])


def _joined(texts: Sequence[str]) -> str:
    """The texts of steps in order, each on a line of its own."""
    lines = [text if text[-1:].isspace() else f"{text}\n" for text in texts[:-1]]
    return "".join(lines) + texts[-1]
