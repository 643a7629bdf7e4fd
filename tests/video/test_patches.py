import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from unpatch import unpatchify

from video.acting.labels import RED, WHITE, ink, number, paint
from video.reading.patches import CLIP, HALF, patchify, resize
from video.reading.sampling import smart_resize


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("merge", [1, 2])
def test_a_still_picture_has_the_rows_of_transformers(merge):
    from transformers import Qwen2VLImageProcessorPil

    low, high = 4 * 784, 60 * 784
    processor = Qwen2VLImageProcessorPil(merge_size=merge, size={"shortest_edge": low, "longest_edge": high})
    picture = noise(70, 130, 3)
    want = processor(images=[Image.fromarray(picture)], return_tensors="np")
    size = smart_resize(70, 130, factor=14 * merge, min_pixels=low, max_pixels=high)
    rows, grid = patchify(resize(picture[None], size), patch=14, merge=merge)
    assert [list(grid)] == want["image_grid_thw"].tolist()
    np.testing.assert_allclose(rows, want["pixel_values"], atol=2e-6, rtol=0)
    twice, _ = patchify(resize(np.stack([picture, picture]), size), patch=14, merge=merge)
    assert np.array_equal(rows, twice)


@pytest.mark.parametrize("n, patch, merge, norm", [(4, 14, 2, CLIP), (5, 16, 2, HALF), (1, 14, 1, CLIP)])
def test_patchify_and_back(n, patch, merge, norm):
    frames = noise(n, 4 * patch, 6 * patch, 3)
    rows, grid = patchify(frames, patch=patch, merge=merge, norm=norm)
    assert grid == ((n + 1) // 2, 4, 6) and rows.shape == (grid[0] * 24, 6 * patch**2) and rows.dtype == np.float32
    back = unpatchify(rows, grid, patch=patch, merge=merge, norm=norm)
    assert np.array_equal(back[:n], frames)
    assert n % 2 == 0 or np.array_equal(back[-1], frames[-1])  # the last one was repeated


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3))
def test_every_layout_comes_back(n, down, across, merge, temporal):
    frames = noise(n, 2 * merge * down, 2 * merge * across, 3)
    rows, grid = patchify(frames, patch=2, merge=merge, temporal=temporal)
    assert np.array_equal(unpatchify(rows, grid, patch=2, merge=merge, temporal=temporal)[:n], frames)


def test_one_row_by_hand():
    # two frames of 4 x 4 pixels, patch 1, merge 2: the second token starts with the pixel (0, 2)
    frames = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    frames[0, 0, 2], frames[1, 0, 2] = (255, 0, 51), (0, 255, 102)
    rows, grid = patchify(frames, patch=1, merge=2, norm=HALF)
    assert grid == (1, 4, 4)
    np.testing.assert_allclose(rows[4], [1, -1, -1, 1, -0.6, -0.2], atol=1e-6)  # channel by channel, frame by frame
    assert (np.delete(rows, 4, axis=0) == -1).all()
    clip, _ = patchify(frames, patch=1, merge=2)
    assert clip[4, 0] == pytest.approx((1 - 0.48145466) / 0.26862954)


def test_resize_is_pillow_frame_by_frame():
    frames = noise(3, 20, 30, 3)
    out = resize(frames, (28, 56))
    assert out.shape == (3, 28, 56, 3)
    assert np.array_equal(out[1], np.asarray(Image.fromarray(frames[1]).resize((56, 28), Image.Resampling.BICUBIC)))
    assert resize(frames, (20, 30)) is frames


@pytest.mark.parametrize("call, match", [
    (lambda: patchify(noise(2, 30, 28, 3), patch=14, merge=2), "multiples of 28"),
    (lambda: patchify(noise(0, 28, 28, 3), patch=14, merge=2), "at least one"),
    (lambda: patchify(noise(2, 28, 28, 3).astype(np.float32), patch=14, merge=2), "uint8"),
    (lambda: patchify(noise(2, 3, 28, 28), patch=14, merge=2), "RGB"),
    (lambda: resize(noise(28, 28, 3), (28, 28)), "RGB"),
    (lambda: resize(noise(1, 28, 28, 3), (0, 28)), "at least 1"),
])  # fmt: skip
def test_what_is_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_labels_count_from_one_and_leave_the_frames_alone():
    assert number(56, 3) == "Segment-3\nFrame-57" and number(0) == "Frame-1" and number(segment=2) == "Segment-2"
    frames = np.stack([np.full((140, 140, 3), v, dtype=np.uint8) for v in (0, 250, 0)])
    frames[2] = (230, 20, 20)
    out = paint(frames, [number(0, 1)] * 3)
    assert (frames[0] == 0).all() and out.shape == frames.shape
    changed = [(out[i] != frames[i]).any(axis=-1) for i in range(3)]
    for c in changed:
        assert c[:40, :90].any() and not c[40:].any() and not c[:, 90:].any()  # top left
    assert tuple(out[0][changed[0]].max(axis=0)) == WHITE and tuple(out[2][changed[2]].max(axis=0)) == WHITE
    assert out[1][changed[1]][:, 0].min() >= 250 and out[1][changed[1]][:, 1].min() < 50  # red on bright
    with pytest.raises(ValueError, match="2 labels for 3 frames"):
        paint(frames, ["a", "b"])


def test_labels_fit_any_frame():
    assert paint(noise(1, 14, 14, 3), [number(123456, 9)]).shape == (1, 14, 14, 3)


@pytest.mark.parametrize("colour, want", [
    ((149, 149, 149), WHITE), ((150, 150, 150), RED), ((255, 204, 204), WHITE), ((255, 210, 210), RED),
    ((100, 255, 255), RED),
])  # fmt: skip
def test_ink(colour, want):
    assert ink(np.full((2, 2, 3), colour, dtype=np.uint8)) == want
    assert ink(np.zeros((0, 0, 3), dtype=np.uint8)) == WHITE
