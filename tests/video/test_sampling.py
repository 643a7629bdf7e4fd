import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from video.reading.sampling import (
    clip_range,
    frame_cap,
    frame_index,
    frame_size,
    patch_seconds,
    second_marks,
    seconds_per_grid,
    smart_resize,
)


def test_index_lists():
    assert frame_index(132, 10).tolist() == [0, 13, 26, 39, 52, 66, 79, 92, 105, 118]
    assert frame_index(22, 4, first=30).tolist() == [30, 35, 41, 46]  # 35.5, 41, 46.5
    assert frame_index(1, 1).tolist() == [0] and frame_index(4, 4).tolist() == [0, 1, 2, 3]
    assert frame_index(2, 2).dtype == np.int64
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"{n} frames of a clip of 4"):
            frame_index(4, n)


@given(st.integers(1, 5000), st.integers(1, 800))
def test_frames_ascend_inside_the_clip(total, n):
    index = frame_index(total, min(n, total), first=7)
    assert len(index) == min(n, total) and index[0] == 7 and index[-1] < 7 + total
    assert (np.diff(index) >= 1).all()
    if n >= total:
        assert index[-1] == 7 + total - 1


def test_seconds_become_frames_by_the_clock():
    ten = np.arange(100) / 10
    assert clip_range(ten, 3, 5) == (30, 49)
    assert clip_range(ten, 5, 7) == (50, 69)  # no frame in common
    assert clip_range(ten, -4, 0.05) == (0, 0)
    assert clip_range(ten, 9.85, 99) == (99, 99)
    assert clip_range(ten, 3.05, 5) == (31, 49)
    assert clip_range(ten, 3.02, 3.08) == (30, 30)  # nothing starts there; frame 30 is on the screen
    assert clip_range(ten, 50, 60) == (99, 99)
    uneven = np.array([0.0, 0.1, 0.5, 4.0, 4.1])
    assert clip_range(uneven, 0.1, 4.0) == (1, 2) and clip_range(uneven, 1, 2) == (2, 2)
    ntsc = np.arange(300) * 1001 / 30000
    assert clip_range(ntsc.round(6), 1001 / 1000, 2002 / 1000) == (30, 59)  # the container rounds to microseconds
    for start, end, starts in ((5, 5, ten), (5, 4, ten), (0, 1, ten[:0])):
        with pytest.raises(ValueError, match="start < end"):
            clip_range(starts, start, end)


# numbers below were computed with qwen-vl-utils 0.0.14 and the processors of transformers
@pytest.mark.parametrize("size, n, factor, cap, want", [
    ((720, 1280), 10, 28, 602112, (560, 1008)),
    ((720, 1280), 10, 32, 786432, (640, 1152)),
    ((720, 1280), 120, 28, 602112, (560, 1008)),
    ((720, 1280), 120, 32, 786432, (640, 1152)),
    ((720, 1280), 768, 28, 235200, (336, 644)),
    ((720, 1280), 768, 32, 307200, (384, 736)),
    ((272, 640), 20, 28, 602112, (280, 644)),
    ((272, 640), 20, 32, 786432, (256, 640)),
    ((144, 176), 10, 28, 602112, (308, 364)),
    ((144, 176), 10, 32, 786432, (352, 416)),
])  # fmt: skip
def test_pixel_budget_table(size, n, factor, cap, want):
    assert frame_cap(n, factor) == cap
    assert frame_size(*size, n, factor=factor) == want


def test_pixels_are_capped():
    assert frame_size(1080, 1920, 16, factor=28, max_pixels=151200) == (280, 504)  # Video-CoM
    assert frame_cap(16, 28, min_pixels=128 * 28**2, sequence=1) == 105369  # Video-R1
    assert frame_size(720, 1280, 10, factor=28, max_pixels=10**9) == (560, 1008)  # the cap holds


@pytest.mark.parametrize("size, most, want", [
    ((480, 640), 16384 * 784, (476, 644)), ((1080, 1920), 16384 * 784, (1092, 1932)),
    ((20, 20), 16384 * 784, (56, 56)), ((100, 2000), 16384 * 784, (112, 1988)),
    ((720, 1280), 128 * 784, (224, 420)), ((1080, 1920), 128 * 784, (224, 420)),
    ((42, 560), 16384 * 784, (56, 560)), ((70, 560), 16384 * 784, (56, 560)),  # 1.5 and 2.5 both round to 2
    ((10, 2000), 16384 * 784, (28, 1988)), ((10, 2000), 128 * 784, (28, 1988)),
])  # fmt: skip
def test_smart_resize_of_pictures(size, most, want):
    assert smart_resize(*size, factor=28, min_pixels=4 * 784, max_pixels=most) == want


def test_sizes_that_are_refused():
    for size in ((0, 10), (10, 2001)):
        with pytest.raises(ValueError, match="200:1"):
            smart_resize(*size, factor=28, min_pixels=784, max_pixels=7840)
    with pytest.raises(ValueError, match="above max_pixels"):
        smart_resize(10, 10, factor=28, min_pixels=7841, max_pixels=7840)
    with pytest.raises(ValueError, match="at least 1"):
        frame_cap(0, 28)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 800), st.sampled_from([28, 32]))
def test_sizes_are_multiples_near_the_budget(height, width, n, factor):
    if max(height, width) > 200 * min(height, width):
        return
    h, w = frame_size(height, width, n, factor=factor)
    assert h % factor == w % factor == 0 and min(h, w) >= factor
    # rounding up from the minimum may pass the cap, by less than one factor on each side
    assert (h - factor) * (w - factor) < frame_cap(n, factor)


def test_time_of_temporal_patches():
    times = np.array([0, 15, 29, 44, 58, 73, 87, 102, 116, 131]) / 25
    assert np.allclose(patch_seconds(times), [0.3, 1.46, 2.62, 3.78, 4.94])
    assert second_marks(times)[:2] == ["<0.3 seconds>", "<1.5 seconds>"]
    assert patch_seconds([0.0, 1.0, 5.0]).tolist() == [0.5, 5.0]
    assert seconds_per_grid(10, 132 / 25) == pytest.approx(2 / (10 / 132 * 25)) == pytest.approx(1.056)
    with pytest.raises(ValueError, match="above 0"):
        seconds_per_grid(0, 1.0)
