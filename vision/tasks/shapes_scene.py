"""Scenes of coloured shapes on a grid: sampled, drawn and questioned by program, so that every step can be checked.

A cell is a number: -1 for empty, else the index of a sprite (`kind * VARIANTS + variant`); a kind is a colour and a
shape. A scene is its (n, n) cells; the picture is a table look-up.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmrl.seeding import numpy_generator

CELL = 16  # side in pixels
VARIANTS = 8  # jittered drawings of each kind
COLOURS = {"red": (214, 48, 49), "green": (39, 174, 96), "blue": (41, 98, 217), "yellow": (241, 196, 15)}
SHAPES = ("circle", "square", "triangle")
KINDS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
WORDS = (*COLOURS, *SHAPES)
OPERATIONS = ("sum", "gap")
BACKGROUND = 232
# The eighths of all layouts that a split may draw from: no two splits can share a layout, whatever their seeds.
EIGHTHS = {"train": (0, 1, 2), "held_out": (3, 4), "sft": (5, 6, 7)}

Cells = NDArray[np.int64]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Question:
    """`operation` over the counts of `terms` (words or kinds), e.g. sum of red and circle."""

    operation: str
    terms: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operation} of {' and '.join(self.terms)} ?"


def sample_scene(rng: np.random.Generator, split: str, *, grid: int, filled: tuple[int, int]) -> Cells:
    """(grid, grid) cells with between filled[0] and filled[1] sprites, from the layouts that belong to `split`.

    Raises:
        ValueError: more sprites than cells, an empty range, or fewer than 3 sprites: too few layouts to keep apart.
    """
    low, high = filled
    if not 3 <= low <= high <= grid * grid:
        raise ValueError(f"filled={filled}: give (low, high) with 3 <= low <= high <= {grid * grid} cells")
    # There are 12^3 layouts at the least, so that each eighth comes up within a few draws.
    while True:
        cells = np.full(grid * grid, -1, dtype=np.int64)
        places = rng.permutation(grid * grid)[: rng.integers(low, high + 1)]
        cells[places] = rng.integers(len(KINDS) * VARIANTS, size=len(places))
        if layout_eighth(cells) in EIGHTHS[split]:
            return cells.reshape(grid, grid)


def layout_eighth(cells: Cells) -> int:
    """0..7, from the kinds in the cells: two scenes that differ only in the variants share it."""
    return zlib.crc32((cells.ravel() // VARIANTS).astype(np.int8).tobytes()) % 8


def sample_question(rng: np.random.Generator, *, terms: int, conjunctions: bool = False) -> Question:
    """Distinct terms, colours and shapes (with `conjunctions` also kinds); a gap has two terms, a sum any number."""
    pool = WORDS + KINDS if conjunctions else WORDS
    operation = OPERATIONS[int(rng.integers(2))] if terms == 2 else "sum"
    chosen = rng.permutation(len(pool))[:terms]
    return Question(operation, tuple(pool[index] for index in chosen))


def count_kinds(cells: Cells) -> dict[str, int]:
    """Kind -> its number, only of those that occur, in the order of KINDS."""
    counts = np.bincount(cells[cells >= 0] // VARIANTS, minlength=len(KINDS))
    return {kind: int(n) for kind, n in zip(KINDS, counts, strict=True) if n}


def count(kinds: Mapping[str, int], term: str) -> int:
    """The number of sprites that a term (`red`, `circle`, `red circle`) names."""
    words = set(term.split())
    return sum(number for kind, number in kinds.items() if words <= set(kind.split()))


def solve(question: Question, counts: Sequence[int]) -> list[str]:
    """The correct trace, one step a line: each count, the arithmetic, the answer."""
    if question.operation == "gap":
        result = abs(counts[0] - counts[1])
        arithmetic = f"| {counts[0]} - {counts[1]} | = {result}"
    else:
        result = sum(counts)
        arithmetic = f"{' + '.join(map(str, counts))} = {result}"
    perception = [f"{term} = {number}" for term, number in zip(question.terms, counts, strict=True)]
    return [*perception, arithmetic, f"answer {result}"]


@lru_cache(maxsize=1)
def sprites() -> Pixels:
    """(kinds * VARIANTS + 1, CELL, CELL, 3): every sprite, and the empty cell last, where index -1 finds it."""
    pictures = np.full((len(KINDS) * VARIANTS + 1, CELL, CELL, 3), BACKGROUND, dtype=np.uint8)
    for index, kind in enumerate(KINDS):
        colour, shape = kind.split()
        for variant in range(VARIANTS):
            rng = numpy_generator("sprite", kind, variant)
            pictures[index * VARIANTS + variant] = _draw(shape, COLOURS[colour], rng)
    return pictures


def draw(cells: Cells) -> Pixels:
    """(n, n) cells -> (16 n, 16 n, 3) picture, RGB."""
    side = len(cells) * CELL
    # (n, n, CELL, CELL, 3): cell row and column, then pixel row and column; rows and columns come together
    return sprites()[cells].transpose(0, 2, 1, 3, 4).reshape(side, side, 3)


def _draw(shape: str, colour: tuple[int, int, int], rng: np.random.Generator) -> Pixels:
    """One sprite with jittered place, size and brightness; edges are smoothed over one pixel."""
    x, y = np.meshgrid(np.arange(CELL) + 0.5, np.arange(CELL) + 0.5)
    x, y = x - CELL / 2 - rng.uniform(-1.5, 1.5), y - CELL / 2 - rng.uniform(-1.5, 1.5)
    radius = rng.uniform(4.5, 6.0)
    # The distance of each pixel from the shape's edge, in pixels; negative inside.
    if shape == "circle":
        outside = np.hypot(x, y) - radius
    elif shape == "square":
        outside = np.maximum(abs(x), abs(y)) - 0.85 * radius
    else:  # an upright triangle: below its two slopes and above its base
        outside = np.maximum((abs(x) * 2 - y - radius) / np.sqrt(5), y - 0.9 * radius)
    cover = np.clip(0.5 - outside, 0, 1)[..., None]
    paint = np.clip(np.array(colour) + rng.integers(-14, 15), 0, 255)
    return np.round(cover * paint + (1 - cover) * BACKGROUND).astype(np.uint8)
