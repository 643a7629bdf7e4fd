"""Codecs in containers: every frame read on its own is the one that decoding in order gives."""

import logging
from pathlib import Path

import av
import pytest
from codec_pairs import Pair, read_all, read_alone, table, write_pair

from video.reading.reader import VideoReader

DOCS = Path(__file__).parents[2] / "docs" / "reference" / "video_reading.md"


@pytest.fixture(scope="module")
def reader():
    with VideoReader(cache_bytes=0, timeout_s=20) as shared:
        yield shared


# each of these gave frames from elsewhere when stamps and key marks of the container were believed
@pytest.mark.parametrize(
    "pair, way",
    [
        (Pair("libx264", "", "mp4"), "decord"),
        (Pair("libx264", "refresh", "mp4"), "PyAV by its packets"),
        (Pair("mjpeg", "", "asf"), "PyAV by checksums"),
        (Pair("libx264", "no B", "asf"), "PyAV by checksums"),
        (Pair("wmv1", "", "asf"), "PyAV by checksums"),
        (Pair("wmv2", "", "asf"), "PyAV by checksums"),
        (Pair("h263p", "", "avi"), "PyAV by checksums"),
        (Pair("mpeg1video", "", "avi"), "PyAV by checksums"),
        (Pair("mpeg1video", "", "mpeg"), "PyAV by checksums"),
        (Pair("mpeg2video", "", "vob"), "PyAV by checksums"),
        (Pair("mpeg4", "B", "mpegts"), "PyAV by checksums"),
        (Pair("huffyuv", "", "nut"), "PyAV by checksums"),
        (Pair("svq1", "", "mov"), "PyAV by checksums"),
        (Pair("tiff", "", "mov"), "decord"),
    ],
    ids=lambda value: f"{value.codec} in {value.container}" if isinstance(value, Pair) else "",
)
def test_each_frame_of_a_pair_is_the_one_in_order(reader, tmp_path, pair, way):
    if pair.encoder not in av.codecs_available:
        pytest.skip(f"this PyAV cannot encode with {pair.encoder}")
    path = tmp_path / f"clip.{pair.container}"
    due = write_pair(path, pair)
    assert len(due) == 36
    assert read_alone(reader, path, due) == way


@pytest.mark.slow
def test_every_pair_is_read_and_the_docs_say_how(caplog):
    caplog.set_level(logging.CRITICAL)
    found = table(read_all())
    assert found in DOCS.read_text(), found
