"""Encoding drawn frames as video files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# measured on the clips task: tests/video/test_clips.py checks how much of a drawing survives
_X264 = {"preset": "ultrafast", "tune": "zerolatency", "qp": "16", "threads": "1"}


def write_mp4(path: Path, frames: NDArray[np.uint8], fps: Fraction) -> None:
    """(n, H, W, 3) RGB as H.264 in mp4, yuv420p as most decoders want it; frame i starts at i / fps seconds.

    H and W must be even. The same pixels give the same bytes on one build of the encoder.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=_X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        planes = av.video.reformatter.VideoReformatter()
        for pixels in frames:
            rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(planes.reformat(rgb, format="yuv420p", interpolation="POINT", threads=1)))
        container.mux(stream.encode())
