"""The table of presented frames of a file.

    clip = index_clip("film.mp4", ReadLimits())
    clip.stamps     # (T,) int64 ticks: frame i is the picture stamped stamps[i]
    clip.starts     # (T,) float64 seconds of the same

Packets are enough where they prove what decoding in order gives: MP4 and Matroska, which keep each packet's time and
place, with a codec whose key pictures can be told. Any other file is decoded once from its start, and the checksum of
each picture is kept: what a seek gives later is taken only where it has the checksum of its place.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from video.reading.clip import ReadLimits, Reason, VideoDecodeError
from video.reading.key_pictures import Starts, key_check

# frames decoded to see whether the packets' stamps come out as the frames' stamps
_HEAD = 4
# containers that keep the time and the place of every packet
_INDEXED = ("mov,mp4", "matroska")
# AV_CODEC_FLAG_COPY_OPAQUE: a frame carries the `opaque` value of its packet
_COPY_OPAQUE = 1 << 7
# messages of the H.264 and the H.265 decoder where pictures are missing; they make some up and mark none of them
_MISSING_PICTURES = ("Frame num gap", "Could not find ref")
# in the place of a checksum: the picture is damaged, or drawn from a missing one
_UNSOUND = -1
# position in a file -> the bytes there of some kind of video
_SIGNATURES = {4: (b"ftyp", b"moov", b"mdat", b"wide", b"free"), 0: (b"\x1a\x45\xdf\xa3", b"RIFF", b"FLV", b"OggS")}
# lists of other files, a still picture, text
_NO_VIDEO = ("hls", "concat", "dash", "image2", "tty")


class Orientation(NamedTuple):
    """How a stored picture is presented: with rows and columns exchanged first, then flipped."""

    transposed: bool = False
    upside_down: bool = False
    mirrored: bool = False

    @property
    def is_rotation(self) -> bool:
        """True when quarter turns alone present it."""
        return sum(self) % 2 == 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as presented of a picture stored so, and the other way round."""
        return (width, height) if self.transposed else (height, width)

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A view of (H, W, 3) pixels as presented."""
        if self.transposed:
            pixels = pixels.swapaxes(0, 1)
        return pixels[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


@dataclass(frozen=True, eq=False)
class ClipIndex:
    """Where the presented frames of a file are.

    stamps: (T,) int64, ascending, in ticks of the stream: frame i is the picture stamped `stamps[i]`. Where `counted`
        is set they do not tell pictures apart: frame i is the i-th that the decoder gives.
    keys: (K,) int64, ascending: stamps of the pictures where decoding can begin, hidden ones included.
    starts, duration, height, width, lost: see `VideoInfo`.
    stored: (height, width) of the pictures in the file.
    orientation: from the stored picture to the presented one.
    checksums: (T,) int64, `checksum` of every picture as decoding in order gives it, -1 where it is damaged; None
        where the packets prove that decoding from a key gives the same.
    ahead: ticks by which a packet may come before its picture is shown; a seek without a table goes by the packets.
    odd: why counting packets may give other frames than a player shows, empty when it does not.
    """

    stamps: np.ndarray
    keys: np.ndarray
    starts: np.ndarray
    duration: float
    height: int
    width: int
    stored: tuple[int, int]
    orientation: Orientation = Orientation()  # noqa: RUF009  # immutable
    counted: bool = False
    checksums: np.ndarray | None = None
    ahead: int = 0
    odd: str = ""
    lost: str = ""


@dataclass(frozen=True)
class _Stream:
    """The container's description of its video. tick: seconds. rate: frames per second. origin: seconds of the start.
    promised: seconds that it should last. pixel_aspect: width / height of a pixel. bits: of a channel."""

    container: str
    codec: str
    stored: tuple[int, int]
    pixel_aspect: Fraction
    tick: Fraction
    rate: Fraction
    origin: float
    promised: float
    bits: int


@dataclass
class _Packets:
    """The packets of a stream in the order of the file.

    stamps: of the shown ones, ticks; end: of the last of them. keys: stamps of the pictures where decoding can start.
    ahead: most ticks from a packet's own time to that of its picture. is_key, is_cut: one per packet, True where the
    container calls it a key, and where it is not whole. gaps: numbers of packets before which something is missing.
    late: number of a packet -> ticks by which its stamp is too small.
    leading: the number of those shown before the key that they follow; hidden: of those not shown; unclear: of keys
    where decoding cannot start, or of which it is not known.
    """

    stamps: list[int | None] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    is_key: list[bool] = field(default_factory=list)
    is_cut: list[bool] = field(default_factory=list)
    ahead: int = 0
    gaps: set[int] = field(default_factory=set)
    late: dict[int, int] = field(default_factory=dict)
    end: int = 0
    leading: int = 0
    hidden: int = 0
    unclear: int = 0

    @property
    def damaged(self) -> int:
        """The number of packets that are cut short or missing."""
        return sum(self.is_cut) + len(self.gaps)


@dataclass
class _Table:
    """The frames of a file. stamps: ascending; end: of the last one; tick: seconds of both. origin: seconds. damaged:
    packets that are missing or fail. unproven: the reason why packets alone do not tell, empty where they do. counted,
    checksums: as `ClipIndex`."""

    stamps: Sequence[int]
    end: int
    tick: Fraction
    origin: float
    damaged: int
    unproven: str = ""
    counted: bool = False
    checksums: np.ndarray | None = None


def index_clip(path: str, limits: ReadLimits) -> ClipIndex:
    """Read the packets of `path` and decide what its frames are.

    Raises:
        VideoDecodeError: no video in there, nothing decodes, or beyond a limit.
    """
    with open_stream(path) as (container, stream):
        described = _described(container, stream)
        # before anything is decoded: one frame of a hostile file may take all memory
        _check_size(path, *described.stored, limits)
        packets = _packets(path, container, stream, limits)
    head = _head(path, len(packets.stamps))
    stored, orientation = (head[0].height, head[0].width), _orientation(head[0])
    height, width = orientation.size(stored[0], max(round(stored[1] * described.pixel_aspect), 1))
    _check_size(path, height, width, limits)
    table = _table(path, described, packets, head)
    # second 0 is where a player starts, as far as that is not behind the first frame
    starts = np.array(table.stamps, np.int64) * float(table.tick)
    starts -= min(max(table.origin, 0.0), starts[0])
    duration = _end(starts, (table.end - table.stamps[-1]) * float(table.tick), described.rate)
    if duration > limits.max_seconds:
        detail = f"{duration:.0f} s exceed max_seconds={limits.max_seconds:g}"
        raise VideoDecodeError(path, "too_long", detail)
    return ClipIndex(
        stamps=np.array(table.stamps, np.int64),
        keys=np.unique(np.array(packets.keys, np.int64)),
        starts=starts,
        duration=duration,
        height=height,
        width=width,
        stored=stored,
        orientation=orientation,
        counted=table.counted,
        checksums=table.checksums,
        ahead=packets.ahead if table.unproven else 0,
        odd=_odd(described, packets, orientation, table.unproven),
        lost=_lost(table.damaged, duration + max(table.origin, 0.0), described.promised),
    )


@contextmanager
def open_stream(path: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream, for PyAV.

    Raises:
        VideoDecodeError: it does not open, or holds no video that can be decoded.
    """
    try:
        # nothing but the file itself: a playlist must not make the reader fetch addresses
        container = av.open(path, options={"protocol_whitelist": "file"}, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _unopened(path, error) from None
    with container:
        stream: Any = container.streams.best("video")
        name = container.format.name
        if name.startswith(_NO_VIDEO) or name.endswith("_pipe"):
            raise VideoDecodeError(path, "no_video_stream", f"FFmpeg takes it for {name!r}, which is no video file")
        has_video = stream is not None and not stream.disposition & av.stream.Disposition.attached_pic
        if (not has_video or stream.codec_context is None) and _is_cut_short(path):
            raise _without_table(path)
        if not has_video:
            kinds = sorted({str(s.type) for s in container.streams}) or ["nothing"]
            raise VideoDecodeError(path, "no_video_stream", f"it holds {', '.join(kinds)} and no video")
        if stream.codec_context is None:
            raise VideoDecodeError(path, "unsupported_codec", "FFmpeg has no decoder for its video stream")
        # threads per frame at times lose the mark of a damaged frame (8 of 1500 decodes), threads per slice never did
        stream.thread_type, stream.codec_context.thread_count = "SLICE", 2
        yield container, stream


def decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames from where the container stands, in the order of presentation, up to the first error, which is raised.
    Packets that were cut short are left out: some decoders make half a picture of them."""
    for packet in container.demux(stream):
        if not packet.is_corrupt:
            yield from packet.decode()


def in_order(
    container: Any, stream: Any, failed: set[int], complaints: list[Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """(number of its packet, frame) of all frames from the start of the file, in the order of presentation.

    Packets that do not decode are passed over, as players do, and their numbers added to `failed`; so are those before
    which the decoder misses pictures, by its `complaints`. Packets cut short are not decoded, but in MPEG-TS: there a
    whole packet is marked too where two files were joined.
    """
    context = stream.codec_context
    context.flags |= _COPY_OPAQUE
    skips_cut = container.format.name != "mpegts"
    number = -1
    with suppress(av.FFmpegError):
        for packet in container.demux(stream):
            # an empty packet would end the decoder
            if not packet.size:
                continue
            number += 1
            if packet.is_corrupt and skips_cut:
                continue
            packet.opaque = number
            try:
                frames = context.decode(packet)
            except av.FFmpegError:
                failed.add(number)
                continue
            if complaints:
                if any(message.startswith(_MISSING_PICTURES) for _, _, message in complaints):
                    failed.add(number)
                complaints.clear()
            for frame in frames:
                yield _packet_number(frame, number), frame
    # the frames that the decoder still holds
    with suppress(av.FFmpegError):
        for frame in context.decode(None):
            yield _packet_number(frame, number), frame


def _packet_number(frame: Any, last: int) -> int:
    """The number of the packet that a frame came from; that of the last one for decoders that do not hand it on."""
    return frame.opaque if isinstance(frame.opaque, int) else last


def checksum(frame: Any, stored: tuple[int, int], scale: Any) -> int:
    """CRC-32 of the pixels of a frame in the `stored` size (height, width), as RGB."""
    plain = scale.reformat(frame, stored[1], stored[0], "rgb24", interpolation="BILINEAR")
    return zlib.crc32(np.ascontiguousarray(plain.to_ndarray()).data)


def _unopened(path: str, error: Exception) -> VideoDecodeError:
    if _starts_as_video(path):
        return _without_table(path)
    return VideoDecodeError(path, "no_video_stream", f"it is no video file ({type(error).__name__})")


def _without_table(path: str) -> VideoDecodeError:
    return VideoDecodeError(path, "truncated", "it begins as a video file, but has no usable table of frames")


def _starts_as_video(path: str) -> bool:
    with Path(path).open("rb") as file:
        start = file.read(8)
    return any(start[at:].startswith(signs) for at, signs in _SIGNATURES.items())


def _is_cut_short(path: str) -> bool:
    """True when the boxes of an ISO file (MP4, MOV) go on beyond its end."""
    if not _starts_as_video(path):
        return False
    size = Path(path).stat().st_size
    position = 0
    with Path(path).open("rb") as file:
        while position + 8 <= size:
            # a box begins with its length, 4 bytes, and its name; a length of 1 stands for one of 8 bytes behind them
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:], "big")
            if length < 8 or not head[4:8].isascii():
                return False
            position += length
    return position > size


def _check_size(path: str, height: int, width: int, limits: ReadLimits) -> None:
    if height * width > limits.max_pixels:
        detail = f"frames of {height} x {width} exceed max_pixels={limits.max_pixels}"
        raise VideoDecodeError(path, "too_large", detail)


def _described(container: Any, stream: Any) -> _Stream:
    context = stream.codec_context
    layout = context.format
    bits = [component.bits for component in layout.components] if layout else []
    stream_seconds = float((stream.duration or 0) * stream.time_base)
    return _Stream(
        container=container.format.name,
        codec=context.codec.canonical_name,
        stored=(context.height, context.width),
        pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
        tick=stream.time_base,
        rate=stream.guessed_rate or stream.average_rate or Fraction(25),
        origin=(container.start_time or 0) / av.time_base,
        promised=stream_seconds or (container.duration or 0) / av.time_base,
        bits=max(bits, default=8),
    )


def _packets(path: str, container: Any, stream: Any, limits: ReadLimits) -> _Packets:
    """Read all packets of a stream, decoding none.

    Raises:
        VideoDecodeError: no whole frame, or more than the limit.
    """
    packets = _Packets()
    times = _index_times(container, stream)
    codec = stream.codec_context.codec
    can_start = key_check(codec.canonical_name, stream.codec_context.extradata, intra_only=codec.intra_only)
    last_key: int | None = None
    late = 0
    try:
        for packet, is_after_gap in _demuxed(container, stream):
            number = len(packets.is_key)
            if is_after_gap:
                packets.gaps.add(number)
            if not packet.size:
                continue
            if packet.pos in times and packet.dts is not None:
                # a change of the distance to the table says that packets were overlooked before this one
                if late != times[packet.pos] - packet.dts:
                    late = times[packet.pos] - packet.dts
                    packets.gaps.add(number)
                if late:
                    packets.late[number] = late
            packets.is_key.append(packet.is_keyframe)
            packets.is_cut.append(packet.is_corrupt)
            if packet.is_corrupt:
                continue
            if packet.is_keyframe and packet.pts is not None:
                last_key = packet.pts
                _add_key(packets, packet, can_start)
            if packet.is_discard:
                packets.hidden += 1
                continue
            _add_shown(packets, packet, late, last_key)
            if len(packets.stamps) > limits.max_frames:
                raise VideoDecodeError(path, "too_long", f"more frames than max_frames={limits.max_frames}")
    except av.FFmpegError:
        packets.gaps.add(len(packets.is_key))
    if len(packets.is_key) < len(times):
        packets.gaps.add(len(packets.is_key))
    if not packets.stamps:
        reason: Reason = "truncated" if packets.damaged or stream.frames else "too_short"
        raise VideoDecodeError(path, reason, "it holds not one whole frame")
    return packets


def _add_key(packets: _Packets, packet: Any, can_start: Starts | None) -> None:
    """Count a packet that the container calls a key; where its codec is not read here it is a key, but unclear."""
    if can_start is None:
        packets.unclear += 1
        packets.keys.append(packet.pts)
    elif can_start(memoryview(packet)):
        packets.keys.append(packet.pts)
    else:
        packets.unclear += 1


def _add_shown(packets: _Packets, packet: Any, late: int, last_key: int | None) -> None:
    """Count a packet whose picture is shown."""
    packets.stamps.append(packet.pts)
    if packet.pts is None:
        return
    if packet.dts is not None:
        packets.ahead = max(packets.ahead, packet.pts - packet.dts)
    packets.end = max(packets.end, packet.pts + late + (packet.duration or 0))
    packets.leading += last_key is not None and packet.pts < last_key


def _index_times(container: Any, stream: Any) -> dict[int, int]:
    """Place of a packet in an AVI -> its time by the table at the end of the file. The packets themselves carry no
    times and are counted, so that one that is overlooked moves all that follow."""
    if container.format.name != "avi":
        return {}
    # the table points to the head of a chunk, a packet begins behind it
    chunk_head = 8
    return {entry.pos + chunk_head: entry.timestamp for entry in stream.index_entries if entry.size}


def _demuxed(container: Any, stream: Any) -> Iterator[tuple[Any, bool]]:
    """Packets, each with True where the reader of Matroska complained on the way to it: then something before it is
    lost, of which neither a packet nor an exception tells."""
    name = container.format.name
    if not name.startswith("matroska"):
        for packet in container.demux(stream):
            yield packet, False
        return
    with _complaints(av.logging.ERROR) as complaints:
        for packet in container.demux(stream):
            yield packet, any(sender == name for _, sender, _ in complaints)
            complaints.clear()


@contextmanager
def _complaints(level: int) -> Iterator[list[Any]]:
    """The messages of FFmpeg from now on, from this level upwards: (level, sender, text) each."""
    before = av.logging.get_level()
    av.logging.set_level(level)
    try:
        with av.logging.Capture() as complaints:
            yield complaints
    finally:
        av.logging.set_level(before)


def _head(path: str, count: int) -> list[Any]:
    """The first frames, fewer where an error comes before."""
    frames: list[Any] = []
    problem = "the decoder gives no frame"
    with open_stream(path) as (container, stream):
        try:
            frames.extend(islice(decoded(container, stream), min(_HEAD, count)))
        except av.FFmpegError as error:
            problem = f"the first frames do not decode ({error.strerror})"
    if not frames:
        raise VideoDecodeError(path, "corrupt_frame", problem, backend="av")
    return frames


def _table(path: str, described: _Stream, packets: _Packets, head: Sequence[Any]) -> _Table:
    """The frames by their packets where these prove what decoding gives, else by decoding the file from its start."""
    stamps = sorted(stamp for stamp in packets.stamps if stamp is not None)
    unproven = _unproven(described, packets)
    if len(set(stamps)) < len(packets.stamps) or [frame.pts for frame in head] != stamps[: len(head)]:
        unproven = "times that do not tell its frames apart"
    table = _Table(stamps, packets.end, described.tick, described.origin, packets.damaged, unproven)
    if not unproven:
        return table
    decoded_stamps, table.checksums, table.damaged = _decode_all(path, packets, (head[0].height, head[0].width))
    table.stamps = stamps = sorted(stamp for stamp in decoded_stamps if stamp is not None)
    table.counted = stamps != decoded_stamps
    count = len(decoded_stamps)
    if len(set(stamps)) < count:
        # frames without a time of their own: they follow each other at the container's rate
        table.stamps, table.end, table.tick, table.origin = range(count), count, 1 / described.rate, 0.0
        table.counted = True
    elif table.counted and table.damaged:
        # some containers put right times on the wrong frames; of a damaged file nobody knows
        table.checksums[np.array(stamps) != np.array(decoded_stamps)] = _UNSOUND
    return table


def _decode_all(path: str, packets: _Packets, stored: tuple[int, int]) -> tuple[list[int | None], np.ndarray, int]:
    """Stamps and checksums of all frames of a file, decoded from its start, and how much is damaged or missing."""
    numbers: list[int] = []
    stamps: list[int | None] = []
    checksums: list[int] = []
    failed: set[int] = set()
    scale = av.video.reformatter.VideoReformatter()
    with open_stream(path) as (container, stream), _complaints(av.logging.DEBUG) as complaints:
        for number, frame in in_order(container, stream, failed, complaints):
            numbers.append(number)
            stamps.append(None if frame.pts is None else frame.pts + packets.late.get(number, 0))
            checksums.append(checksum(frame, stored, scale))
            if frame.is_corrupt:
                failed.add(number)
    whole = set(numbers) - failed
    for number, is_cut in enumerate(packets.is_cut):
        if is_cut and not _ends_a_part(number, packets, whole):
            failed.add(number)
    sound = _sound(numbers, packets, failed)
    return stamps, np.where(sound, np.array(checksums, np.int64), _UNSOUND), len(failed) + len(packets.gaps)


def _ends_a_part(number: int, packets: _Packets, whole: set[int]) -> bool:
    """True when a packet that the container calls cut short is the last of one of several joined files: all up to the
    next key decode, of which there is one at most, since the parser hands out a packet when the next one begins."""
    for following in (number + 1, number + 2):
        if following < len(packets.is_key) and packets.is_key[following]:
            return whole.issuperset(range(number, following))
    return False


def _sound(numbers: list[int], packets: _Packets, failed: set[int]) -> np.ndarray:
    """(T,) bool: True for a frame, given by its packet's number, that is neither damaged nor drawn from damage.

    All that follows damage may be drawn from it up to the next key, and so may pictures shown before that key.
    """
    # packets are in the order of decoding, places in that of presentation
    place = {number: position for position, number in enumerate(numbers)}
    unsound: set[int] = set()
    is_spoiled, resumed_at = False, 0
    for number, is_key in enumerate(packets.is_key):
        is_spoiled |= number in packets.gaps
        if is_key and is_spoiled and number not in failed:
            is_spoiled, resumed_at = False, place.get(number, 0)
        is_spoiled |= number in failed
        if is_spoiled or place.get(number, resumed_at) < resumed_at:
            unsound.add(number)
    return np.array([number not in unsound for number in numbers], bool)


def _end(starts: np.ndarray, seconds: float, rate: Fraction) -> float:
    """The end of the last frame: it is shown for `seconds`, or as long as the mean of the others if that is 0."""
    if seconds > 0:
        return float(starts[-1]) + seconds
    if len(starts) > 1:
        return float(starts[-1]) + float(np.diff(starts).mean())
    return float(starts[-1]) + float(1 / rate)


def _orientation(frame: Any) -> Orientation:
    """From the display matrix of a frame; turns by other angles go to the nearest quarter."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV 18 cannot list the side data of a frame with EXIF; it knows the angle all the same
        by_quarter_turns = {1: (True, True, False), 2: (False, True, True), 3: (True, False, True)}
        return Orientation(*by_quarter_turns.get(round(frame.rotation / 90) % 4, ()))
    if matrix is None:
        return Orientation()
    # x' = a x + c y and y' = b x + d y, with a, b, _, c, d in the first five places
    a, b, _, c, d = np.frombuffer(bytes(matrix)[:20], np.int32).tolist()
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(False, d < 0, a < 0)
    return Orientation(True, b < 0, c < 0)


def _unproven(described: _Stream, packets: _Packets) -> str:
    """The reason why decoding from a key may give other pictures than decoding in order, as far as packets tell."""
    if not described.container.startswith(_INDEXED):
        return f"a container without exact places ({described.container})"
    if packets.damaged:
        return "damaged packets"
    if described.codec == "mpeg4" and described.container.startswith("matroska"):
        return "packets that may hold several pictures (mpeg4 in matroska)"
    if not packets.is_key[0] or not packets.keys or packets.unclear == packets.is_key.count(True):
        return f"{described.codec} without a key that is known to be one"
    return ""


def _odd(described: _Stream, packets: _Packets, orientation: Orientation, unproven: str) -> str:
    """The reasons why counting packets may give other frames than a player shows."""
    reasons = {
        unproven: bool(unproven),
        "edit list": packets.hidden > 0,
        "open GOP": packets.leading > 0,
        "keys where decoding cannot start": packets.unclear > 0 and not unproven,
        f"{described.bits} bits a channel": described.bits > 8,
        "a mirrored picture": not orientation.is_rotation,
        "pixels that are not square": described.pixel_aspect != 1,
    }
    return ", ".join(name for name, applies in reasons.items() if applies)


def _lost(damaged: int, end: float, promised: float) -> str:
    """The parts that a file promises and does not hold; a little less than promised is usual."""
    losses = []
    if damaged:
        losses.append(f"damaged packets: {damaged}")
    if end < 0.95 * promised - 0.1:
        losses.append(f"frames up to {end:.2f} s, but the container says {promised:.2f} s")
    return " and ".join(losses)
