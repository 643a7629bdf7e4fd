"""Tags as the credit functions read them: numbers of a known shape and class, NaN = not scored."""

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
    x = tree.tags[name].double()
    n = len(tree)
    if x.ndim != ndim:
        want = f"one number per step, shape ({n},)" if ndim == 1 else f"one row per step, shape ({n}, D)"
        raise ValueError(f"tags[{name!r}] has shape {tuple(x.shape)}; give {want}")
    used = x[tree.valid]
    if used.numel() and bool(used.isnan().all()):
        raise ValueError(
            f"tags[{name!r}] is NaN (not scored) on every step; score some steps, or leave its reader out"
        )
    bad = x.isinf()
    allowed = "a finite number, or NaN for 'not scored'"
    if classes is not None:
        bad = bad | (x < 0) | (x >= classes) | (x != x.floor()) & ~x.isnan()
        allowed = f"a whole number from 0 to {classes - 1}, or NaN for 'not judged'"
    bad_steps = bad.reshape(n, -1).any(1) & tree.valid
    if bool(bad_steps.any()):
        i = int(bad_steps.nonzero()[0])
        raise ValueError(f"tags[{name!r}] of step {i} is {tree.tags[name][i].tolist()}; give {allowed}")
    return x
