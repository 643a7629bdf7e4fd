"""Key pictures by the bits of their packets: from which of them decoding gives what decoding from the start gives.

Containers mark packets as keys by other rules. H.264's intra refresh and the open groups of some encoders are marked
too, though pictures after such a mark may be drawn from pictures before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

_IDR, _SEI = 5, 6  # H.264, table 7-1
_IRAP = range(16, 24)  # H.265, table 7-1
_RECOVERY_POINT = 6  # H.264, annex D.1.1
_SEQUENCE_HEADER = 1  # AV1, section 6.2.2
_OPEN = 2**16  # bytes of a packet in which its first picture header is looked for

Starts = Callable[[memoryview], bool]


def key_check(codec: str, extradata: bytes | None, *, intra_only: bool) -> Starts | None:
    """A function that tells whether decoding can start at a packet; None where nothing here can tell.

    Args:
        codec: FFmpeg's name of it.
        extradata: the decoder configuration of the container: of H.264 and H.265 it has the size of a unit's length.
        intra_only: whether no picture of the codec is drawn from others.
    """
    if intra_only:
        return lambda packet: True
    data = extradata or b""
    if codec == "h264" and len(data) > 6 and data[0] == 1:
        return lambda packet: _starts_h264(packet, (data[4] & 3) + 1)
    if codec == "hevc" and len(data) > 22 and data[0] == 1:
        return lambda packet: _starts_hevc(packet, (data[21] & 3) + 1)
    return _CHECKS.get(codec)


def _starts_h264(packet: memoryview, length_size: int) -> bool:
    """An IDR picture, or a recovery point that is exact from its own picture on."""
    for unit in _units(packet, length_size):
        kind = unit[0] & 31
        if kind == _IDR or (kind == _SEI and _is_exact_recovery(unit)):
            return True
    return False


def _is_exact_recovery(unit: memoryview) -> bool:
    at = 1
    while at + 2 < len(unit):
        kind, size = unit[at], unit[at + 1]
        if kind == 255 or size == 255:
            return False  # a long message; recovery points are short and come early
        if kind == _RECOVERY_POINT:
            # recovery_frame_cnt = 0 is one bit, then exact_match_flag = 1 and broken_link_flag = 0
            return unit[at + 2] & 0b1110_0000 == 0b1100_0000
        at += 2 + size
    return False


def _starts_hevc(packet: memoryview, length_size: int) -> bool:
    return any(unit[0] >> 1 & 63 in _IRAP for unit in _units(packet, length_size))


def _units(packet: memoryview, length_size: int) -> Iterator[memoryview]:
    """NAL units of a packet in which each stands behind its length; up to the first length that does not fit."""
    at = 0
    while at + length_size < len(packet):
        size = int.from_bytes(packet[at : at + length_size], "big")
        at += length_size
        if not 0 < size <= len(packet) - at:
            return
        yield packet[at : at + size]
        at += size


def _starts_vp8(packet: memoryview) -> bool:
    return not packet[0] & 1


def _starts_vp9(packet: memoryview) -> bool:
    # frame_marker, two bits of the profile, a reserved one in profile 3, show_existing_frame, frame_type
    bits = packet[0] << (packet[0] >> 4 & 3 == 3)
    return bits & 0b1100 == 0


def _starts_av1(packet: memoryview) -> bool:
    """A sequence header stands before the first frame; encoders write one with every shown key frame."""
    at = 0
    while at < len(packet):
        header = packet[at]
        if header >> 3 & 15 == _SEQUENCE_HEADER:
            return True
        at += 1 + (header >> 2 & 1)
        if not header & 2 or header >> 3 & 15 in (3, 6):  # the last of the packet, or a frame
            return False
        size = shift = 0
        while at < len(packet):
            byte = packet[at]
            size |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        at += size
    return False


def _starts_mpeg4(packet: memoryview) -> bool:
    head = bytes(packet[:_OPEN])
    at = head.find(b"\0\0\1\xb6")
    return 0 <= at < len(head) - 4 and head[at + 4] >> 6 == 0


def _starts_mpeg12(packet: memoryview) -> bool:
    head = bytes(packet[:_OPEN])
    at = head.find(b"\0\0\1\0")
    return 0 <= at < len(head) - 5 and head[at + 5] >> 3 & 7 == 1


_CHECKS: dict[str, Starts] = {
    "vp8": _starts_vp8,
    "vp9": _starts_vp9,
    "av1": _starts_av1,
    "mpeg4": _starts_mpeg4,
    "mpeg1video": _starts_mpeg12,
    "mpeg2video": _starts_mpeg12,
}
