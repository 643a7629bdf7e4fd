"""Neighbouring steps of a tree as one unit: HRM's pairs of steps beside the steps, HNC's contracted edges.

Both give rollouts of texts, for reward models that read them; a unit says what its steps say, one after the other.
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
    steps = [[v] for v in range(len(parent))]
    pairs = [[p, v] for v, p in enumerate(parent) if p >= 0]
    above = [*parent, *(parent[p] for p, _ in pairs)]
    return _forest(rollout, [*steps, *pairs], above, open_from=len(steps))


def contract_edges(rollout: Rollout, seed: int, *, probability: float = 0.5, min_children: int = 4) -> Rollout:
    """A rollout in which some grandchildren hang one level higher, their last two steps in one unit (HNC).

    Each node (the prompt too) with at least `min_children` children contracts, with `probability`, one edge below one
    of its children; child and grandchild are drawn evenly (as defined here). Whole solutions and the mean outcome of
    the prompt stay; the means of inner nodes change, which is the label noise that is wanted. A child that loses its
    only child disappears. What is drawn depends on the seed and the prompt's id alone.
    """
    tree = rollout.tree
    below: list[list[int]] = [[] for _ in range(len(tree))]
    roots: list[list[int]] = [[] for _ in rollout.prompts]
    for v, (p, g) in enumerate(zip(tree.parent.tolist(), tree.group.tolist(), strict=True)):
        (below[p] if p >= 0 else roots[g]).append(v)
    units = [[v] for v in range(len(tree))]
    for prompt, first in zip(rollout.prompts, roots, strict=True):
        rng = random.Random(f"{seed}/{prompt.id}")
        # a node before its children: otherwise a unit could be lifted twice and hold three steps
        stack = [first]
        while stack:
            children = stack.pop()
            inner = [i for i, c in enumerate(children) if below[c]]
            if len(children) >= min_children and inner and rng.random() < probability:
                at = rng.choice(inner)
                children[at : at + 1] = _lift_one(children[at], below, units, rng)
            stack += [below[c] for c in reversed(children)]
    kept: list[list[int]] = []
    above: list[int] = []
    waiting = [(v, -1) for first in reversed(roots) for v in reversed(first)]
    while waiting:
        v, p = waiting.pop()
        waiting += [(c, len(kept)) for c in reversed(below[v])]
        kept.append(units[v])
        above.append(p)
    return _forest(rollout, kept, above)


def _lift_one(child: int, below: list[list[int]], units: list[list[int]], rng: random.Random) -> list[int]:
    """What stands in the child's place: itself without one of its children, if any are left, and the merged unit."""
    up = below[child].pop(rng.randrange(len(below[child])))
    units[up] = units[child] + units[up]
    return [child, up] if below[child] else [up]


def _forest(
    rollout: Rollout, units: Sequence[Sequence[int]], parent: Sequence[int], *, open_from: int | None = None
) -> Rollout:
    """Steps that say what `units` of steps said; the numbers of each are those of its last step.

    open_from: from this one on they are leaves without outcome.
    """
    tree = rollout.tree
    last = torch.tensor([own[-1] for own in units], dtype=torch.int64)
    status, outcome = tree.status[last], tree.outcome[last]
    if open_from is not None:
        status[open_from:], outcome[open_from:] = UNFINISHED, torch.nan
    none = torch.zeros(len(units), dtype=torch.int64)
    made = StepTree(
        torch.tensor(parent, dtype=torch.int64), tree.group[last], status, outcome,
        step_reward=tree.step_reward[last], value=tree.value[last], root_value=tree.root_value, tok_start=none,
        tok_end=none, tags={name: x[last] for name, x in tree.tags.items()},
    )  # fmt: skip
    texts = [_joined([rollout.texts[v] for v in own]) for own in units]
    actions = Actions(torch.empty(0), torch.empty(0, dtype=torch.bool))
    return replace(rollout, tree=made, actions=actions, texts=[texts[i] for i in made.order.tolist()])


def _joined(texts: Sequence[str]) -> str:
    """Steps one after the other, on a line each."""
    return "".join(t if t[-1:].isspace() else f"{t}\n" for t in texts[:-1]) + texts[-1]
