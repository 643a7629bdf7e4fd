"""Key pictures by the bits of their packets: those from which decoding gives the same as decoding from the start.

    starts = key_check("h264", extradata, intra_only=False)
    starts(memoryview(packet))      # True: decoding can begin here

Containers mark packets as keys by other rules. H.264's intra refresh and the open groups of some encoders are marked
too, though pictures after such a mark may be drawn from pictures before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

# types of NAL units: H.264, table 7-1, and H.265, table 7-1
_IDR, _SEI = 5, 6
_IRAP = range(16, 24)
# a type of SEI message: H.264, annex D.1.1
_RECOVERY_POINT = 6
# types of OBUs: AV1, section 6.2.2
_SEQUENCE_HEADER, _FRAME_HEADER, _FRAME = 1, 3, 6
# bytes of a packet in which its first picture header is looked for
_HEADER_BYTES = 2**16

Starts = Callable[[memoryview], bool]


def key_check(codec: str, extradata: bytes | None, *, intra_only: bool) -> Starts | None:
    """A function, packet -> True where decoding can start at it; None for codecs that are not read here.

    Args:
        codec: FFmpeg's name of it.
        extradata: the decoder configuration of the container: of H.264 and H.265 it has the size of a unit's length.
        intra_only: no picture of the codec is drawn from others.
    """
    if intra_only:
        return _starts_anywhere
    data = extradata or b""
    # a configuration of version 1 (ISO 14496-15) holds the bytes of a unit's length, less one, in two bits
    if codec == "h264" and len(data) > 6 and data[0] == 1:
        return partial(_starts_h264, length_size=(data[4] & 3) + 1)
    if codec == "hevc" and len(data) > 22 and data[0] == 1:
        return partial(_starts_hevc, length_size=(data[21] & 3) + 1)
    return _CHECKS.get(codec)


def _starts_anywhere(packet: memoryview) -> bool:
    return True


def _starts_h264(packet: memoryview, length_size: int) -> bool:
    """An IDR picture, or a recovery point that is exact from its own picture on."""
    for unit in _units(packet, length_size):
        kind = unit[0] & 31
        if kind == _IDR or (kind == _SEI and _is_exact_recovery(unit)):
            return True
    return False


def _is_exact_recovery(unit: memoryview) -> bool:
    """True for an SEI unit with the message: from this picture on everything is exact."""
    position = 1
    while position + 2 < len(unit):
        kind, size = unit[position], unit[position + 1]
        # 255 begins a longer number; recovery points are short and come early
        if kind == 255 or size == 255:
            return False
        if kind == _RECOVERY_POINT:
            # recovery_frame_cnt = 0 is one bit, then exact_match_flag = 1 and broken_link_flag = 0
            return unit[position + 2] & 0b1110_0000 == 0b1100_0000
        position += 2 + size
    return False


def _starts_hevc(packet: memoryview, length_size: int) -> bool:
    """An intra random access point."""
    return any(unit[0] >> 1 & 63 in _IRAP for unit in _units(packet, length_size))


def _units(packet: memoryview, length_size: int) -> Iterator[memoryview]:
    """NAL units of a packet in which each stands behind its length; up to the first length that does not fit."""
    position = 0
    while position + length_size < len(packet):
        size = int.from_bytes(packet[position : position + length_size], "big")
        position += length_size
        if not 0 < size <= len(packet) - position:
            return
        yield packet[position : position + size]
        position += size


def _starts_vp8(packet: memoryview) -> bool:
    # the first bit is 0 for a key frame (RFC 6386, section 9.1)
    return not packet[0] & 1


def _starts_vp9(packet: memoryview) -> bool:
    # frame_marker, two bits of the profile, a reserved one in profile 3, show_existing_frame, frame_type
    has_reserved_bit = packet[0] >> 4 & 3 == 3
    bits = packet[0] << has_reserved_bit
    return bits & 0b1100 == 0


def _starts_av1(packet: memoryview) -> bool:
    """A sequence header stands before the first frame; encoders write one with every shown key frame."""
    position = 0
    while position < len(packet):
        # of an OBU: a forbidden bit, four of the type, one for an extension of a byte, one for a size field
        header = packet[position]
        kind, has_extension, has_size = header >> 3 & 15, header >> 2 & 1, header & 2
        if kind == _SEQUENCE_HEADER:
            return True
        # without a size it is the last one of the packet; behind a frame no sequence header helps any more
        if not has_size or kind in (_FRAME_HEADER, _FRAME):
            return False
        position += 1 + has_extension
        # the size in seven bits a byte, the lowest first; the highest bit says that more follow
        size = shift = 0
        while position < len(packet):
            byte = packet[position]
            size |= (byte & 127) << shift
            position, shift = position + 1, shift + 7
            if byte < 128:
                break
        position += size
    return False


def _starts_mpeg4(packet: memoryview) -> bool:
    # vop_coding_type behind the start code of a picture is 0 for an I-VOP (ISO 14496-2)
    head = bytes(packet[:_HEADER_BYTES])
    start = head.find(b"\0\0\1\xb6")
    return 0 <= start < len(head) - 4 and head[start + 4] >> 6 == 0


def _starts_mpeg12(packet: memoryview) -> bool:
    # picture_coding_type behind ten bits of the temporal reference is 1 for an I-picture (ISO 13818-2)
    head = bytes(packet[:_HEADER_BYTES])
    start = head.find(b"\0\0\1\0")
    return 0 <= start < len(head) - 5 and head[start + 5] >> 3 & 7 == 1


_CHECKS: dict[str, Starts] = {
    "vp8": _starts_vp8,
    "vp9": _starts_vp9,
    "av1": _starts_av1,
    "mpeg4": _starts_mpeg4,
    "mpeg1video": _starts_mpeg12,
    "mpeg2video": _starts_mpeg12,
}
