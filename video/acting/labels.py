"""Numbers painted on frames, so that a model can name a segment or a frame: `Segment-3` over `Frame-57`, from 1.

Video-CoM re-encodes whole files with OpenCV for this; here the few frames that are shown are painted when read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WHITE, RED = (255, 255, 255), (255, 0, 0)


def number(frame: int | None = None, segment: int | None = None) -> str:
    """The label of a 0-based source frame and the 1-based segment it lies in; either may be left out."""
    lines = []
    if segment is not None:
        lines.append(f"Segment-{segment}")
    if frame is not None:
        lines.append(f"Frame-{frame + 1}")
    return "\n".join(lines)


def paint(frames: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """A copy of (n, H, W, 3) uint8 frames with a label each in the top left corner, line under line.

    Paint after resizing: letters are 1/25 of the height, at least 11 pixels. Each line is white, or red where what
    lies under it is bright (mean of its pixels 150 or more) and not red itself (R > 150 and 50 above G and B).

    Raises:
        ValueError: not one label per frame.
    """
    if len(labels) != len(frames):
        raise ValueError(f"{len(labels)} labels for {len(frames)} frames; give one per frame")
    painted = np.empty_like(frames)
    size = max(11, round(frames.shape[1] / 25))
    font = ImageFont.load_default(size)
    for i, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        image = Image.fromarray(frame)
        _write(image, label.split("\n"), font, margin=size // 3)
        painted[i] = np.asarray(image)
    return painted


def ink(background: np.ndarray) -> tuple[int, int, int]:
    """White or red, whichever is read better on the pixels (.., 3) it is written over."""
    if background.size == 0:
        return WHITE
    red, green, blue = background.reshape(-1, 3).mean(axis=0).tolist()
    is_dark = (red + green + blue) / 3 < 150
    is_red = red > 150 and red - green > 50 and red - blue > 50
    return WHITE if is_dark or is_red else RED


def _write(
    image: Image.Image, lines: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, margin: int
) -> None:
    draw = ImageDraw.Draw(image)
    top_of_line = margin
    for line in lines:
        corner = (margin, top_of_line)
        left, top, right, bottom = map(round, draw.textbbox(corner, line, font=font))
        background = np.asarray(image)[max(top, 0) : bottom, left:right]
        draw.text(corner, line, fill=ink(background), font=font)
        top_of_line = bottom + max(1, margin // 2)
