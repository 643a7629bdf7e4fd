"""Every pair of a video encoder and a container that this PyAV writes, as a small clip, and the table of the docs."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from make_clips import painted

from video.reading.clip_index import index_clip
from video.reading.reader import ReadLimits, VideoDecodeError, VideoReader

_DEVICES = ("_qsv", "_nvenc", "_amf", "_v4l2m2m")
# lists of other files, pictures, networks and devices
_NO_FILES = {
    "alsa", "avif", "dash", "fbdev", "ffmetadata", "hls", "image2", "mkvtimestamp_v2", "rtp", "rtsp", "segment",
    "smoothstreaming", "tee", "webm_chunk", "webm_dash_manifest",
}  # fmt: skip
_SIZES = ((96, 128), (144, 176), (576, 720))
_COLOURS = ("yuv420p", "yuvj420p", "yuv422p", "rgb24", "bgr24", "rgb8", "rgb555le")
_GOP = "keyint=12:min-keyint=12:scenecut=0"
# encoder -> variant -> options
_OPTIONS: dict[str, dict[str, dict[str, str]]] = {
    "libx264": {
        "": {},
        "no B": {"bf": "0"},
        "open GOP": {"x264-params": f"open-gop=1:{_GOP}:bframes=3:b-adapt=0"},
        "refresh": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"},
    },
    "libx265": {
        "": {"x265-params": f"log-level=none:{_GOP}:open-gop=0"},
        "open GOP": {"x265-params": f"log-level=none:{_GOP}"},
    },
    "mpeg1video": {"": {}, "B": {"bf": "2"}},
    "mpeg2video": {"": {}, "B": {"bf": "2"}},
    "mpeg4": {"": {}, "B": {"bf": "2"}},
}
CLASSES = ("decord", "PyAV by its packets", "PyAV by checksums", "refused")


class Pair(NamedTuple):
    """A clip to write: encoder, variant of its options, container."""

    encoder: str
    variant: str
    container: str

    @property
    def codec(self) -> str:
        """As the table names it."""
        return f"{self.encoder} ({self.variant})" if self.variant else self.encoder


def encoders() -> list[str]:
    """Names of the encoders for video that need no device."""
    found = []
    for name in sorted(av.codecs_available):
        try:
            codec = av.Codec(name, "w")
        except ValueError:
            continue
        if codec.type == "video" and codec.name == name and not name.endswith(_DEVICES):
            found.append(name)
    return found


def containers() -> list[str]:
    """Names of the muxers that write one file."""
    found = []
    for name in sorted(av.formats_available - _NO_FILES):
        try:
            muxer = av.ContainerFormat(name, "w")
        except ValueError:
            continue
        if muxer.extensions:
            found.append(name)
    return found


@cache
def _frame_kind(encoder: str) -> tuple[tuple[int, int], str] | None:
    """(height, width) and pixel format that an encoder takes."""
    formats = [f.name for f in av.Codec(encoder, "w").video_formats or ()]
    for size in _SIZES:
        for colours in [c for c in _COLOURS if c in formats] + formats[:1]:
            for container in ("nut", "avi", "mov"):
                with tempfile.NamedTemporaryFile() as file:
                    try:
                        _encode(Path(file.name), Pair(encoder, "", container), size, colours, frames=2)
                    except (av.FFmpegError, ValueError, OSError):
                        continue
                return size, colours
    return None


def _encode(path: Path, pair: Pair, size: tuple[int, int], colours: str, frames: int) -> None:
    options = _OPTIONS.get(pair.encoder, {}).get(pair.variant, {})
    with av.open(str(path), "w", format=pair.container) as out:
        stream: Any = out.add_stream(pair.encoder, rate=Fraction(25), options=options)
        stream.height, stream.width, stream.pix_fmt = *size, colours
        stream.codec_context.gop_size = 12
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(painted(i, size), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_pair(path: Path, pair: Pair, frames: int = 36) -> list[Any]:
    """Write the clip of a pair; its frames in the order of decoding, none where it cannot be written or decoded."""
    kind = _frame_kind(pair.encoder)
    if kind is None:
        return []
    try:
        _encode(path, pair, *kind, frames)
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            return list(container.decode(stream)) if isinstance(stream, av.VideoStream) else []
    except (av.FFmpegError, ValueError, OSError):
        return []


def all_pairs() -> Iterator[Pair]:
    """All that might be written."""
    for encoder in encoders():
        for variant in _OPTIONS.get(encoder, {"": {}}):
            for container in containers():
                yield Pair(encoder, variant, container)


def read_alone(reader: VideoReader, path: Path, due: list[Any]) -> str:
    """Read every frame on its own and compare it with the one of its place in decoding order; who reads the file.

    Raises:
        AssertionError: a frame or the number of frames differs.
    """
    try:
        info = reader.info(path)
    except VideoDecodeError as error:
        assert error.reason == "no_video_stream", error  # a row of pictures
        return "refused"
    assert info.frames == len(due), (path.name, info.frames, len(due))
    for i, frame in enumerate(due):
        expected = frame.reformat(info.width, info.height, "rgb24", interpolation="BILINEAR").to_ndarray()
        try:
            shown = reader.read(path, [i]).pixels[0]
        except VideoDecodeError as error:
            assert error.reason == "corrupt_frame" and info.lost, error
            continue
        np.testing.assert_array_equal(shown, expected, err_msg=f"{path.name} frame {i}")
    if info.backend == "decord":
        return "decord"
    proven = index_clip(str(path), ReadLimits()).checksums is None
    return "PyAV by its packets" if proven else "PyAV by checksums"


def table(readers: dict[Pair, str]) -> str:
    """One line per container, one column per way of reading."""
    cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for pair, way in readers.items():
        cells[pair.container][way].append(pair.codec)
    lines = [f"| container | {' | '.join(CLASSES)} |", "|---" * (len(CLASSES) + 1) + "|"]
    for container in sorted(cells):
        columns = [", ".join(sorted(cells[container][way])) for way in CLASSES]
        lines.append(f"| {container} | {' | '.join(columns)} |")
    return "\n".join(lines)


def read_all() -> dict[Pair, str]:
    """Write and read every pair. Raises AssertionError at the first frame that is another one."""
    readers = {}
    with tempfile.TemporaryDirectory() as folder, VideoReader(cache_bytes=0) as reader:
        for number, pair in enumerate(all_pairs()):
            path = Path(folder) / f"{number}.{pair.container}"
            due = write_pair(path, pair)
            if due:
                readers[pair] = read_alone(reader, path, due)
            path.unlink(missing_ok=True)
    return readers
