"""The reader on ordinary clips: indices, times, cache, limits, and the process it decodes in."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make_clips import number, write_avi, write_clip

from mmrl.byte_cache import ByteCache
from video.reading.clip_index import index_clip
from video.reading.reader import ReadLimits, VideoDecodeError, VideoInfo, VideoReader

SIZE = (96, 128)


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """120 numbered frames, ten a second."""
    return write_clip(tmp_path_factory.mktemp("bars") / "bars.mp4", frames=120)


@pytest.fixture(scope="module")
def reader():
    with VideoReader() as shared:
        yield shared


@pytest.fixture
def fresh(reader):
    """The shared reader, with nothing kept."""
    reader._cache.clear()
    reader._infos.clear()
    return reader


@pytest.fixture(scope="module")
def av_reader():
    with VideoReader(backend="av") as shared:
        yield shared


@pytest.fixture
def asked(monkeypatch):
    """Requests that reach a worker from now on."""
    from mmrl.worker import Worker

    seen, call = [], Worker.call

    def noted(self, request, seconds):
        seen.append(request)
        return call(self, request, seconds)

    monkeypatch.setattr(Worker, "call", noted)
    return seen


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pid, seconds):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not alive(pid)


# ---- frames and times -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index", [[0, 3, 119], [100, 3, 57], [5, 5, 5, 2], list(range(120)), np.array([7, 8])], ids=str
)
def test_frames_come_in_the_order_asked_for_with_repeats(reader, bars, index):
    frames = reader.read(bars, index)
    assert [number(p) for p in frames.pixels] == list(index)
    assert frames.index.tolist() == list(index)
    np.testing.assert_allclose(frames.times, np.array(index) * 0.1, atol=1e-6)
    assert frames.pixels.shape == (len(index), *SIZE, 3)
    assert frames.pixels.dtype == np.uint8


def test_no_index_no_frames(reader, bars):
    assert reader.read(bars, [], size=(10, 20)).pixels.shape == (0, 10, 20, 3)


def test_info_of_a_plain_clip(reader, bars):
    info = reader.info(str(bars))
    assert (info.frames, info.height, info.width, info.backend) == (120, *SIZE, "decord")
    assert (info.path, info.lost) == (str(bars), "")
    np.testing.assert_allclose(info.starts, np.arange(120) / 10, atol=1e-6)
    assert info.duration == pytest.approx(12.0)
    assert info.fps == pytest.approx(10.0)
    with pytest.raises(ValueError, match="read-only"):
        info.starts[0] = 1


@pytest.mark.parametrize(
    "seconds, want", [(-1, 0), (0, 0), (0.05, 0), (0.25, 2), (3.001, 30), (11.95, 119), (99, 119)]
)
def test_index_at(reader, bars, seconds, want):
    assert reader.info(bars).index_at(seconds) == want


def test_index_at_follows_the_times_not_the_rate():
    info = VideoInfo("", np.array([0.5, 0.6, 3.0]), 4.0, 1, 1, "av")
    assert [info.index_at(t) for t in (0.0, 0.5, 0.59, 0.6, 2.9, 3.0, 10.0)] == [0, 0, 0, 1, 1, 2, 2]
    assert info.fps == pytest.approx(3 / 3.5)


def test_a_second_look_at_three_to_five_seconds_shows_only_frames_30_to_49(reader, bars):
    info = reader.info(bars)
    first = info.index_at(3.0 + 1e-6)
    last = int(np.searchsorted(info.starts, 5.0 - 1e-6)) - 1
    seen = [number(p) for p in reader.read(bars, np.linspace(first, last, 8).round().astype(int)).pixels]
    assert (seen[0], seen[-1], len(seen)) == (30, 49, 8)
    assert all(30 <= i <= 49 for i in seen)


@pytest.mark.parametrize("index", [-1, 120, 10**9])
def test_an_index_outside_names_itself_and_the_range(reader, bars, index):
    with pytest.raises(ValueError, match=f"no frame {index}, valid are 0 to 119"):
        reader.read(bars, [0, index])


@pytest.mark.parametrize("index", [[0.5], ["1"]])
def test_an_index_is_a_whole_number(reader, bars, index):
    with pytest.raises(TypeError):
        reader.read(bars, index)


@pytest.mark.parametrize("size", [(48, 64), (24, 200), SIZE])
def test_both_backends_scale_alike(reader, av_reader, bars, size):
    one, two = reader.read(bars, [0, 40], size), av_reader.read(bars, [0, 40], size)
    assert one.pixels.shape == (2, *size, 3)
    assert np.abs(one.pixels.astype(int) - two.pixels).mean() < 1.0
    assert [number(p) for p in two.pixels] == [0, 40]


@pytest.mark.parametrize("size", [(0, 4), (-1, 4)])
def test_a_size_is_positive(reader, bars, size):
    with pytest.raises(ValueError, match="must be positive"):
        reader.read(bars, [0], size)


# ---- the cache ------------------------------------------------------------------------------------------------------


def test_only_missing_frames_are_decoded(fresh, bars, asked):
    fresh.read(bars, [4, 2, 2], (48, 64))
    fresh.read(bars, [2, 3, 4], (48, 64))
    fresh.read(bars, [4, 3], (48, 64))
    fresh.read(bars, [4], (48, 60))
    assert [(r["do"], r.get("index")) for r in asked] == [
        ("info", None), ("read", [2, 4]), ("read", [3]), ("read", [4]),
    ]  # fmt: skip


def test_the_native_size_is_one_size(fresh, bars, asked):
    fresh.read(bars, [4])
    fresh.read(bars, [4], SIZE)
    assert len(asked) == 2


def test_a_caller_may_write_into_its_frames(reader, bars):
    reader.read(bars, [1]).pixels[:] = 0
    assert number(reader.read(bars, [1]).pixels[0]) == 1


def test_an_overwritten_file_is_another_file(reader, tmp_path):
    path = write_avi(tmp_path / "a.avi", frames=5)
    assert reader.info(path).frames == 5
    write_avi(path, frames=9)
    os.utime(path, ns=(1, 1))
    assert [number(p) for p in reader.read(path, [8]).pixels] == [8]


def test_kept_frames_stay_under_the_limit(bars):
    frame = 48 * 64 * 3
    with VideoReader(cache_bytes=10 * frame) as reader:
        reader.read(bars, range(100), (48, 64))
        cache = reader._cache
        kept = [value for value, _ in cache._entries.values()]
        assert 5 < len(kept) < 10
        assert all(p.base is None and p.nbytes == frame for p in kept)  # a view would keep its whole batch
        assert sum(p.nbytes for p in kept) <= cache.used <= cache.limit
        assert reader.read(bars, range(100), (48, 64)).pixels.shape[0] == 100


def test_without_cache(bars, asked):
    with VideoReader(cache_bytes=0) as reader:
        reader.read(bars, [1])
        reader.read(bars, [1])
    assert [r["do"] for r in asked] == ["info", "read", "read"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 6000), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2000)), max_size=40))
def test_the_cache_never_exceeds_its_limit_and_drops_the_oldest(limit, entries):
    cache = ByteCache(limit)
    for key, size in entries:
        cache.put(key, (key, size), size)
        assert cache.used <= limit
        assert cache.get(key) == ((key, size) if size + 512 <= limit else None)
    assert cache.used == sum(size for _, size in cache._entries.values())
    cache.clear()
    assert (len(cache), cache.used) == (0, 0)


def test_the_entry_used_longest_ago_leaves():
    cache = ByteCache(3 * 612)
    for key in "abc":
        cache.put(key, key, 100)
    cache.get("a")
    cache.put("d", "d", 100)
    assert [cache.get(k) for k in "abcd"] == ["a", None, "c", "d"]


# ---- limits and options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits, reason, told",
    [
        ({"max_frames": 119}, "too_long", "max_frames=119"),
        ({"max_seconds": 11.9}, "too_long", "12 s exceed max_seconds=11.9"),
        ({"max_pixels": 96 * 128 - 1}, "too_large", f"96 x 128 exceed max_pixels={96 * 128 - 1}"),
    ],
)
def test_limits_of_a_file(bars, limits, reason, told):
    with pytest.raises(VideoDecodeError, match=told) as caught:
        index_clip(str(bars), ReadLimits(**limits))
    assert caught.value.reason == reason
    assert "raise the limit" in str(caught.value)
    assert len(index_clip(str(bars), ReadLimits(120, 12.1, 96 * 128)).stamps) == 120


@pytest.mark.multiproc
def test_limits_of_a_read(bars):
    with VideoReader(limits=ReadLimits(max_pixels=96 * 128, max_read_bytes=2 * 96 * 128 * 3)) as reader:
        assert reader.read(bars, [0, 1]).pixels.shape[0] == 2
        for index, size, told in (([0, 1, 1], None, "max_read_bytes=73728"), ([0], (96, 129), "96 x 129")):
            with pytest.raises(VideoDecodeError, match=told) as caught:
                reader.read(bars, index, size)
            assert caught.value.reason == "too_large"
    with VideoReader(limits=ReadLimits(max_frames=100)) as reader, pytest.raises(VideoDecodeError, match="too_long"):
        reader.info(bars)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"cache_bytes": -1}, "cache_bytes=-1"),
        ({"backend": "opencv"}, "backend='opencv'"),
    ],
)
def test_wrong_options(options, told):
    with pytest.raises(ValueError, match=told):
        VideoReader(**options)


def test_wrong_limits():
    with pytest.raises(ValueError, match="max_frames=0 must be above 0"):
        ReadLimits(max_frames=0)


def test_the_error_survives_pickling():
    error = VideoDecodeError("a.mp4", "timeout", "not done after 1 s", backend="decord")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.reason, copy.backend) == (str(error), "a.mp4", "timeout", "decord")
    assert str(error).startswith("a.mp4: timeout (decord): not done after 1 s. Raise timeout_s")


# ---- the process ----------------------------------------------------------------------------------------------------


@pytest.mark.multiproc
def test_a_decoder_that_dies_costs_one_call(bars):
    with VideoReader(backend="stub_backends:die") as reader:
        for starts in (1, 2):
            with pytest.raises(VideoDecodeError, match="ended by SIGABRT") as caught:
                reader.read(bars, [0])
            assert caught.value.reason == "crash"
            assert reader._worker.starts == starts


@pytest.mark.multiproc
def test_a_decoder_that_hangs_is_killed_in_time_and_the_next_read_is_fine(bars):
    with VideoReader(backend="stub_backends:hang_at_frame_7", timeout_s=1.0) as reader:
        before, pid = reader.read(bars, [6]).pixels, reader._worker.pid
        began = time.monotonic()
        with pytest.raises(VideoDecodeError, match="not done after 1 s") as caught:
            reader.read(bars, [6, 7])
        assert time.monotonic() - began < 3
        assert caught.value.reason == "timeout"
        assert not alive(pid)
        assert number(reader.read(bars, [8]).pixels[0]) == 8
        np.testing.assert_array_equal(reader.read(bars, [6]).pixels, before)


@pytest.mark.multiproc
def test_a_worker_killed_from_outside_is_replaced(bars):
    with VideoReader() as reader:
        reader.read(bars, [0])
        os.kill(reader._worker.pid, signal.SIGKILL)
        time.sleep(0.1)
        assert number(reader.read(bars, [1]).pixels[0]) == 1


@pytest.mark.multiproc
def test_a_backend_that_is_not_there_is_no_fault_of_the_file(bars):
    with VideoReader(backend="stub_backends:nobody") as reader, pytest.raises(RuntimeError, match="nobody"):
        reader.read(bars, [0])


@pytest.mark.multiproc
def test_the_worker_imports_no_torch(bars):
    with VideoReader(backend="stub_backends:environment") as reader:
        assert reader.read(bars, [0]).pixels.max() == 0


@pytest.mark.multiproc
def test_threads_share_a_reader(bars):
    seen, errors = {}, []
    with VideoReader() as reader:

        def look(k):
            try:
                for j in range(4):
                    index = [(17 * k + 3 * j + n) % 120 for n in (0, 40, 80)]
                    seen[k, j] = index == [number(p) for p in reader.read(bars, index).pixels]
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=look, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not errors
        assert len(seen) == 32
        assert all(seen.values())
        assert reader._worker.starts == 1


@pytest.mark.multiproc
@pytest.mark.parametrize("held", [False, True], ids=["lock_free", "lock_held_by_another_thread"])
def test_a_forked_child_reads_with_a_worker_of_its_own(bars, held):
    with VideoReader() as reader:
        reader.read(bars, [0])
        pid = reader._worker.pid
        if held:
            reader._lock.acquire()
        source, sink = os.pipe()
        child = os.fork()
        if not child:
            try:
                seen = number(reader.read(bars, [33]).pixels[0])
                own = reader._worker.pid != pid
                reader.close()
                os.write(sink, bytes([seen, own]))
            finally:
                os._exit(0)
        if held:
            reader._lock.release()
        os.close(sink)
        with os.fdopen(source, "rb") as pipe:
            assert list(pipe.read()) == [33, 1]
        os.waitpid(child, 0)
        assert number(reader.read(bars, [34]).pixels[0]) == 34
        assert reader._worker.pid == pid


@pytest.mark.multiproc
def test_a_pickled_reader_reads(bars):
    with VideoReader(cache_bytes=1000, timeout_s=5.0, backend="av") as reader:
        reader.read(bars, [0])
        with pickle.loads(pickle.dumps(reader)) as copy:
            assert copy._options == reader._options
            assert number(copy.read(bars, [5]).pixels[0]) == 5


@pytest.mark.multiproc
@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), 9)"], ids=["leaves", "is_killed"])
def test_no_worker_outlives_its_program(bars, end):
    script = f"""
        import os
        from video.reading.reader import VideoReader
        reader = VideoReader()
        reader.read({str(bars)!r}, [0])
        print(reader._worker.pid, flush=True)
        {end}
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip().isdigit(), run.stderr
    assert gone_within(int(run.stdout), 5)


@pytest.mark.multiproc
def test_closing_ends_the_worker_and_reading_starts_another(bars):
    reader = VideoReader()
    reader.read(bars, [0])
    pid = reader._worker.pid
    reader.close()
    assert not alive(pid)
    assert number(reader.read(bars, [2]).pixels[0]) == 2
    reader.close()


# ---- memory ---------------------------------------------------------------------------------------------------------


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.multiproc
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("opens", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_memory_is_flat_over_many_opens(tmp_path, opens):
    paths = [write_avi(tmp_path / "a.avi", frames=20), write_clip(tmp_path / "b.mp4", frames=20)]
    with VideoReader(cache_bytes=2**20) as reader:

        def look(times):
            for n in range(times):
                path = paths[n % 2]
                os.utime(path, ns=(n, n))  # another file, to the reader
                reader.read(path, range(0, 20, 4), (48, 64))

        look(20)
        before = resident_mib(os.getpid()), resident_mib(reader._worker.pid)
        look(opens)
        assert resident_mib(os.getpid()) - before[0] < 20
        assert resident_mib(reader._worker.pid) - before[1] < 20
        assert reader._worker.starts == 1
