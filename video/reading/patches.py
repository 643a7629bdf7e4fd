"""Frames as the rows that a Qwen vision tower reads: resize, normalise, patchify. Plain numpy and Pillow.

    frames = resize(frames, (56, 84))                        # (8, 56, 84, 3) uint8
    rows, grid = patchify(frames, patch=14, merge=2)         # (4 * 4 * 6, 3 * 2 * 14 * 14) float32, (4, 4, 6)

transformers' own video processors need torchvision; the rows here are those of its Pillow image processor, with two
frames per temporal patch where a still image has the same one twice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

Grid = tuple[int, int, int]  # temporal patches, patches down, patches across


class Norm(NamedTuple):
    """Mean and standard deviation per channel (RGB) of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# of Qwen2-VL and Qwen2.5-VL
CLIP = Norm((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# of Qwen3-VL
HALF = Norm((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def resize(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(n, H, W, 3) uint8 -> (n, h, w, 3) uint8, Pillow's bicubic filter. `size` is (height, width); equal = as it is.

    Raises:
        ValueError: other shapes or dtypes, a side below 1.
    """
    _check(frames)
    height, width = size
    if min(size) < 1:
        raise ValueError(f"size {height}x{width}: both sides must be at least 1")
    if frames.shape[1:3] == tuple(size):
        return frames
    resized = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        resized[i] = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    return resized


def patchify(
    frames: np.ndarray, *, patch: int, merge: int, temporal: int = 2, norm: Norm = CLIP
) -> tuple[np.ndarray, Grid]:
    """(n, H, W, 3) uint8 -> rows (t h w, 3 temporal patch^2) float32 and their grid (t, h, w).

    x = (pixel / 255 - mean) / std. Frames are taken in groups of `temporal`, the last repeated until the group is
    full. Rows run over (t, h / merge, w / merge, merge, merge): the patches that become one token are neighbours; a
    row is (channel, temporal, patch, patch). The tokens are t h w / merge^2.

    Raises:
        ValueError: other shapes or dtypes, no frame, sides that are no multiples of patch * merge.
    """
    _check(frames)
    count, height, width, _ = frames.shape
    factor = patch * merge
    if count == 0 or height % factor or width % factor:
        raise ValueError(
            f"{count} frames of {height}x{width}: needs at least one, with sides in multiples of {factor} "
            f"(patch {patch} x merge {merge}); resize them with the size of video.reading.sampling.frame_size"
        )
    if count % temporal:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -count % temporal, axis=0)])
    t, h, w = len(frames) // temporal, height // patch, width // patch
    # (t, temporal, h / merge, merge, patch, w / merge, merge, patch, channel)
    cells = frames.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, 3)
    # (t, h / merge, w / merge, merge, merge, channel, temporal, patch, patch), of which the first five are one row
    cells = cells.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, 3, temporal * patch**2)
    # still uint8 so far: as float32 the reordering would move four times the bytes
    scale, shift = _affine(norm)
    rows = cells.astype(np.float32)
    rows *= scale[:, None]
    rows += shift[:, None]
    return rows.reshape(t * h * w, -1), (t, h, w)


def _affine(norm: Norm) -> tuple[np.ndarray, np.ndarray]:
    """(3,) scale and shift, float32, with pixel * scale + shift = (pixel / 255 - mean) / std."""
    mean, std = np.array(norm.mean, np.float64), np.array(norm.std, np.float64)
    return (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)


def _check(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames {frames.shape} {frames.dtype}: needs (n, height, width, 3) uint8, RGB")
