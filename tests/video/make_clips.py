"""Small clips with every property that makes readers fail. Each frame carries its number as eight black or white bars.

`write_clip` encodes with PyAV; `write_avi` makes a motion-JPEG AVI with Pillow and `struct` alone.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

os.environ.setdefault("SVT_LOG", "1")  # errors only, no banner of the AV1 encoder

TICKS = 1000  # per second: the time base of `write_clip`


def painted(i: int, size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """(H, W, 3) uint8: bit k of `i` is bar k, white when set, in the upper third; below, a ramp that moves with `i`."""
    height, width = size
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = ((np.arange(width) * 2 + 5 * i) % 256)[None, :, None] // 2 + np.array([10, 60, 100], np.uint8)
    for k in range(8):
        frame[: height // 3, k * width // 8 : (k + 1) * width // 8] = 255 * (i >> k & 1)
    return frame


def number(frame: np.ndarray) -> int:
    """The number that `painted` wrote, from a frame of any size."""
    frame = frame[:, : frame.shape[1] // 8 * 8]
    height, width = frame.shape[:2]
    bars = frame[height // 12 : height // 4].reshape(-1, 8, width // 8, 3)[:, :, width // 32 : -(width // 32)]
    return sum(int(bar > 128) << k for k, bar in enumerate(bars.mean(axis=(0, 2, 3))))


def write_clip(
    path: Path,
    *,
    frames: int = 48,
    size: tuple[int, int] = (96, 128),
    codec: str = "libx264",
    gop: int = 12,
    times: Sequence[float] | None = None,
    rate: int = 10,
    rotate: int = 0,
    display: Sequence[int] | None = None,
    aspect: Fraction = Fraction(1),
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
) -> Path:
    """Encode `frames` painted frames (height, width = `size`), `rate` a second unless `times` gives their seconds.

    rotate: degrees; display: a whole display matrix; aspect: width / height of a pixel.
    """
    times = [i / rate for i in range(frames)] if times is None else times
    with av.open(str(path), "w", options=container or {}) as out:
        stream: Any = out.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = Fraction(1, TICKS) if rate == 10 else Fraction(1, rate)
        stream.codec_context.sample_aspect_ratio = aspect
        stream.codec_context.gop_size = gop
        if display is not None:
            stream.set_display_matrix(display)
        if rotate:
            stream.set_display_rotation(rotate)
        for i, t in enumerate(times):
            frame = av.VideoFrame.from_ndarray(painted(i, size), format="rgb24")
            frame.pts, frame.time_base = round(t * TICKS), Fraction(1, TICKS)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut_copy(source: Path, path: Path, *, start: float) -> Path:
    """Stream copy without the first `start` seconds: the packets of the running GOP stay, an edit list hides them."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        stream = given.streams.video[0]
        copy = out.add_stream_from_template(stream)
        given.seek(round(start * 1e6))
        for packet in given.demux(stream):
            if packet.dts is None:
                continue
            shift = round(start / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            out.mux(packet)
    return path


def write_sound(path: Path) -> Path:
    """Half a second of silence, no picture."""
    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("aac", rate=8000, layout="mono")
        for i in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, 1024 * i
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut_bytes(source: Path, path: Path, share: float) -> Path:
    """The first `share` of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def write_avi(path: Path, *, frames: int = 120, size: tuple[int, int] = (96, 128), fps: int = 10) -> Path:
    """Motion JPEG: every frame is a key frame, no encoder is needed."""
    height, width = size
    pictures = [_jpeg(painted(i, size)) for i in range(frames)]
    biggest = max(map(len, pictures))
    avih = struct.pack("<14I", 10**6 // fps, biggest * fps, 0, 0x10, frames, 0, 1, biggest, width, height, 0, 0, 0, 0)
    strh = b"vidsMJPG" + struct.pack("<I2H8I", 0, 0, 0, 0, 1, fps, 0, frames, biggest, 0xFFFFFFFF, 0)
    strh += struct.pack("<4h", 0, 0, width, height)
    strf = struct.pack("<3I2H4s5I", 40, width, height, 1, 24, b"MJPG", width * height * 3, 0, 0, 0, 0)
    header = _list(b"hdrl", _chunk(b"avih", avih), _list(b"strl", _chunk(b"strh", strh), _chunk(b"strf", strf)))
    index, offset = b"", 4
    for picture in pictures:
        index += b"00dc" + struct.pack("<3I", 0x10, offset, len(picture))
        offset += 8 + len(picture) + len(picture) % 2
    movi = _list(b"movi", *(_chunk(b"00dc", p) for p in pictures))
    body = b"AVI " + header + movi + _chunk(b"idx1", index)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _list(kind: bytes, *parts: bytes) -> bytes:
    return _chunk(b"LIST", kind + b"".join(parts))
