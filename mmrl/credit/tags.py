"""Tags of a tree, read with a check of their shape and range. NaN means that a step was not scored."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmrl.tree import StepTree


def tag(tree: StepTree, name: str, *, ndim: Literal[1, 2] = 1, classes: int | None = None) -> Tensor:
    """tags[name] in float64: (N,), or (N, D) with `ndim` 2.

    Args:
        classes: entries are whole numbers from 0 to `classes` - 1, or NaN; 2 for a verdict.
    Raises:
        ValueError: no such tag, another shape, NaN on every step, or an entry that is infinite or of no class. Steps
            without a finished leaf below may hold anything.
    """
    if name not in tree.tags:
        raise ValueError(
            f"the tree has no tags[{name!r}]; it has {sorted(tree.tags) or 'none'}: write it into the tree"
        )
    scores = tree.tags[name].double()
    n = len(tree)
    if scores.ndim != ndim:
        expected = f"one number per step, shape ({n},)" if ndim == 1 else f"one row per step, shape ({n}, D)"
        raise ValueError(f"tags[{name!r}] has shape {tuple(scores.shape)}; give {expected}")
    used = scores[tree.valid]
    if used.numel() and bool(used.isnan().all()):
        raise ValueError(
            f"tags[{name!r}] is NaN (not scored) on every step; score some steps, or leave its reader out"
        )
    bad = scores.isinf()
    allowed = "a finite number, or NaN for 'not scored'"
    if classes is not None:
        outside = (scores < 0) | (scores >= classes)
        fraction = (scores != scores.floor()) & ~scores.isnan()
        bad = bad | outside | fraction
        allowed = f"a whole number from 0 to {classes - 1}, or NaN for 'not judged'"
    # A row of several numbers is bad when one of them is.
    bad_steps = bad.reshape(n, -1).any(1) & tree.valid
    if bool(bad_steps.any()):
        i = int(bad_steps.nonzero()[0])
        raise ValueError(f"tags[{name!r}] of step {i} is {tree.tags[name][i].tolist()}; give {allowed}")
    return scores
