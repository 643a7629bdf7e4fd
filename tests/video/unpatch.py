"""The inverse of `video.reading.patches.patchify`, for tests that look at the frames a model was given."""

import numpy as np

from video.reading.patches import CLIP


def unpatchify(rows, grid, *, patch, merge, temporal=2, norm=CLIP):
    """(t h w, 3 temporal patch^2) rows -> (t temporal, h patch, w patch, 3) uint8 frames."""
    t, h, w = grid
    x = rows.reshape(t, h // merge, w // merge, merge, merge, 3, temporal, patch, patch)
    x = x.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t * temporal, h * patch, w * patch, 3)
    x = 255 * (x * np.array(norm.std) + np.array(norm.mean))
    return np.rint(x).clip(0, 255).astype(np.uint8)
