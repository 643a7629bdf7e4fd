"""The scenes of the clips task: a sampled clip, its pixels, its questions and their right episodes.

A clip has 32 frames, one each 2.5 seconds: 80 seconds, cut into 8 segments by `video.acting.segments`. Throughout one
segment a lamp along the lower edge glows. In one of that segment's frames a box appears in a cell of a 4 x 4 grid and
lights up the ground. Its dots have a colour that only native pixels show: they and what lies between them average to
the same grey for all colours. The ground's colour tells the place and two hands, along the upper and the left edge,
the time. `contrast` is the opacity of lamp, box and light.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

FRAMES, SIZE, FPS = 32, 128, Fraction(2, 5)
SECONDS = FRAMES / float(FPS)
SEGMENTS = 8
PER_SEGMENT = FRAMES // SEGMENTS
GRID = 4
# everything but the dots lies on a grid of 16 x 16 units, 8 pixels each
UNIT = 16
COLOURS = {"red": (255, 60, 60), "green": (60, 255, 60), "blue": (60, 60, 255), "yellow": (255, 255, 60)}
# mean of a box, whatever its colour
GREY = 170
LAMP = np.array([230, 220, 160], dtype=np.float32)
# levels by which the box lights up the ground
GLOW = 25
HAND = 240
# standard deviation of a unit's brightness, and of a clip's
CLUTTER = 3.0
QUESTIONS = ("when", "where", "colour")
SEGMENT, FRAME, ZOOM, ANSWER = "FIND_SEGMENT(event)", "FIND_FRAME(event)", "SPATIAL_ZOOM(event)", "FINAL_ANSWER:"
# which eighths of all layouts a split may draw from: no two splits can share a layout, whatever their seeds
EIGHTHS = {"train": (0, 1, 2), "held_out": (3, 4), "sft": (5, 6, 7)}

Pixels = NDArray[np.uint8]
Levels = NDArray[np.float32]  # 0..255


@dataclass(frozen=True)
class Clip:
    """One scene. frame: 0..31, when the box is there. cell: 0..15 in reading order. colour: index into COLOURS.
    contrast: (0, 1]. clutter: (16, 16, 3) levels added to the ground's units, the same in all frames."""

    frame: int
    cell: int
    colour: int
    contrast: float
    clutter: Levels

    @property
    def segment(self) -> int:
        """0..7, the one with the lamp."""
        return self.frame // PER_SEGMENT


def sample_clip(rng: np.random.Generator, split: str, *, contrast: tuple[float, float]) -> Clip:
    """A clip from the layouts that belong to `split`, its contrast uniform between the two.

    Raises:
        ValueError: contrasts outside (0, 1], or the larger first.
    """
    low, high = contrast
    if not 0 < low <= high <= 1:
        raise ValueError(f"task.contrast={list(contrast)}: give [low, high] with 0 < low <= high <= 1")
    tint = rng.normal(0, CLUTTER, 3)
    clutter = (tint + rng.normal(0, CLUTTER, (UNIT, UNIT, 3))).astype(np.float32)
    while True:
        frame, cell, colour = (int(rng.integers(count)) for count in (FRAMES, GRID**2, len(COLOURS)))
        if layout_eighth(frame, cell, colour) in EIGHTHS[split]:
            return Clip(frame, cell, colour, float(rng.uniform(low, high)), clutter)


def layout_eighth(frame: int, cell: int, colour: int) -> int:
    """0..7, from what happens when and where."""
    return zlib.crc32(bytes([frame, cell, colour])) % 8


def draw(clip: Clip, frames: Sequence[int], size: int = SIZE) -> Pixels:
    """(n, size, size, 3) RGB of some frames. A smaller size (64, 32, 16) is what averaging 128 pixels would give."""
    # sides in pixels of a unit, and of a cell of the 4 x 4 grid
    unit, cell = size // UNIT, size // GRID
    ground = _ground(clip.clutter, size)
    pictures = np.repeat(_as_pixels(ground)[None], len(frames), axis=0)
    # the box fills the middle of its cell
    row, column = divmod(clip.cell, GRID)
    top, left = row * cell + cell // 4, column * cell + cell // 4
    box = slice(top, top + cell // 2), slice(left, left + cell // 2)
    lamp = _blend(ground[-unit:], LAMP, clip.contrast)
    for picture, frame in zip(pictures, frames, strict=True):
        segment, place = divmod(frame, PER_SEGMENT)
        if frame == clip.frame:
            picture[:] = _as_pixels(ground + clip.contrast * GLOW)
            picture[box] = _blend(ground[box], _texture(clip.colour, cell // 2), clip.contrast)
        if segment == clip.segment:
            picture[-unit:] = lamp
        # the hands: along the upper edge the segment, along the left one the frame in it
        picture[:unit, 2 * unit * segment : 2 * unit * (segment + 1)] = HAND
        picture[cell * place : cell * (place + 1), :unit] = HAND
    return pictures


def _blend(below: Levels, above: Levels, opacity: float) -> Pixels:
    return _as_pixels(below + opacity * (above - below))


def _as_pixels(levels: Levels) -> Pixels:
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def _ground(clutter: Levels, size: int) -> Levels:
    """(size, size, 3): red grows to the right, green downwards."""
    # (size,) 0 to 1 along a side, at the middle of each pixel
    share = ((np.arange(size) + 0.5) / size).astype(np.float32)
    ground = np.repeat(np.repeat(clutter, size // UNIT, axis=0), size // UNIT, axis=1) + 70
    ground[:, :, 0] += 80 * share - 30
    ground[:, :, 1] += 80 * share[:, None] - 30
    return ground


def _texture(colour: int, side: int) -> Levels:
    """(side, side, 3) of a box 16 pixels wide: dots of 2 x 2 pixels every 4, the rest such that the mean is grey."""
    dot = np.array(list(COLOURS.values())[colour], dtype=np.float32)
    # a quarter of the pixels are dots, so the other three quarters make up for a third of their distance from grey
    texture = np.full((16, 16, 3), GREY - (dot - GREY) / 3, dtype=np.float32)
    for y in (0, 1):
        for x in (0, 1):
            texture[y::4, x::4] = dot
    # a smaller box is the mean of its pixels
    step = 16 // side
    return texture.reshape(side, step, side, step, 3).mean((1, 3))


def cell_name(cell: int) -> str:
    """a1 upper left, d1 upper right, a4 lower left."""
    row, column = divmod(cell, GRID)
    return f"{'abcd'[column]}{row + 1}"


def cell_box(cell: int) -> tuple[float, float, float, float]:
    """(x1, y1, x2, y2) as shares of the frame."""
    row, column = divmod(cell, GRID)
    return column / GRID, row / GRID, (column + 1) / GRID, (row + 1) / GRID


def second_of(frame: int) -> str:
    """The second in which a frame starts, `0`, `2.5` ... `77.5`."""
    return f"{frame / float(FPS):g}"


def solve(clip: Clip, question: str) -> list[str]:
    """The turns of a correct episode in Video-CoM's words: segment, frame, for a colour the zoom, the answer.

    Segments and frames count from 1, boxes are thousandths of the frame.
    """
    turns = [f"{SEGMENT} = {clip.segment + 1}", f"{FRAME} = {clip.frame + 1}"]
    if question == "colour":
        x1, y1, x2, y2 = (round(1000 * share) for share in cell_box(clip.cell))
        turns.append(f"{ZOOM} = [ {x1}, {y1}, {x2}, {y2} ]")
    return [*turns, f"{ANSWER} {answer_of(clip, question)}"]


def answer_of(clip: Clip, question: str) -> str:
    """The box's colour, its cell, or the second in which it appears."""
    if question == "colour":
        return list(COLOURS)[clip.colour]
    if question == "when":
        return second_of(clip.frame)
    return cell_name(clip.cell)
