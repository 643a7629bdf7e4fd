"""Backends that misbehave, for the reader's tests: `VideoReader(backend="stub_backends:die")`."""

import os
import time

import numpy as np

from video.reading.backends import read_av


def die(path, clip, wanted, size):
    """Ends the process, as decord does when threads share one of its readers."""
    os.abort()


def hang_at_frame_7(path, clip, wanted, size):
    """Fine, except where frame 7 is wanted."""
    if 7 in wanted:
        time.sleep(3600)
    return read_av(path, clip, wanted, size)


def environment(path, clip, wanted, size):
    """Black frames; the first pixel says whether torch was imported."""
    import sys

    return np.full((len(wanted), *size, 3), int("torch" in sys.modules), np.uint8)


def next_frame(path, clip, wanted, size):
    """Every frame but the last is the one after it."""
    last = len(clip.stamps) - 1
    shown = sorted({min(i + 1, last) for i in wanted})
    pixels = read_av(path, clip, shown, size)
    return np.stack([pixels[shown.index(min(i + 1, last))] for i in wanted])
