import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmrl.reasoning.pictures import ImageError, Limits, check_image, resolve
from vision.inputs.images import PixelBudget, image_key, load_image, smart_resize

QWEN2 = PixelBudget()
PRM = PixelBudget(min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28)
QWEN3 = PixelBudget(min_pixels=65_536, max_pixels=16_777_216, factor=32)

# w, h | Qwen2-VL | 256..1280 x 784 | Qwen3-VL (h', w')
WORKED = [
    (256, 256, (252, 252), (448, 448), (256, 256)),
    (512, 512, (504, 504), (504, 504), (512, 512)),
    (640, 480, (476, 644), (476, 644), (480, 640)),
    (1280, 720, (728, 1288), (728, 1288), (704, 1280)),
    (1920, 1080, (728, 1316), (728, 1316), (1088, 1920)),
    (100, 30, (28, 112), (252, 840), (160, 480)),
    (3000, 3000, (980, 980), (980, 980), (3008, 3008)),
    (4000, 3000, (840, 1148), (840, 1148), (3008, 4000)),
]  # fmt: skip


@pytest.mark.parametrize("width, height, qwen2, prm, qwen3", WORKED)
def test_worked_table(width, height, qwen2, prm, qwen3):
    for budget, want in ((QWEN2, qwen2), (PRM, prm), (QWEN3, qwen3)):
        assert smart_resize(height, width, budget) == want


sides = st.integers(1, 5000)


@settings(max_examples=300, deadline=None)
@given(sides, sides, st.sampled_from([QWEN2, PRM, QWEN3]))
def test_smart_resize_as_in_transformers(height, width, budget):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="200:1"):
            smart_resize(height, width, budget)
        return
    want = theirs(height, width, budget.factor, budget.min_pixels, budget.max_pixels)
    assert smart_resize(height, width, budget) == tuple(want)


@pytest.mark.parametrize("width, height", [(256, 256), (640, 480), (100, 30)])
def test_sizes_are_those_of_the_processor(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    size = {"shortest_edge": QWEN2.min_pixels, "longest_edge": QWEN2.max_pixels}
    grid = Qwen2VLImageProcessorPil(size=size)(Image.new("RGB", (width, height)), return_tensors="np")[
        "image_grid_thw"
    ]
    assert tuple(14 * grid[0, 1:]) == smart_resize(height, width, QWEN2)


@pytest.mark.parametrize("call", [
    lambda: smart_resize(0, 5, QWEN2), lambda: smart_resize(5, -1, QWEN2),
    lambda: PixelBudget(10, 5), lambda: PixelBudget(factor=0),
])  # fmt: skip
def test_impossible_sizes_are_errors(call):
    with pytest.raises(ValueError, match="at least 1|min_pixels"):
        call()


def save(image, path, **options):
    image.save(path, **options)
    return path


RED, HALF = (255, 0, 0), (255, 128, 128)


@pytest.mark.parametrize("mode, colour, want, name", [
    ("RGB", (10, 20, 30), (10, 20, 30), "a.png"),
    ("L", 77, (77, 77, 77), "a.png"),
    ("1", 1, (255, 255, 255), "a.png"),
    ("LA", (0, 128), (127, 127, 127), "a.png"),
    ("RGBA", (255, 0, 0, 0), (255, 255, 255), "a.png"),
    ("RGBA", (255, 0, 0, 127), HALF, "a.png"),
    ("I;16", 65535, (255, 255, 255), "a.png"),
    ("I;16", 32768, (128, 128, 128), "a.png"),
    ("I;16", 257, (1, 1, 1), "a.tif"),
    ("CMYK", (0, 255, 255, 0), RED, "a.tif"),
    ("I", 65535, (255, 255, 255), "a.tif"),
])  # fmt: skip
def test_every_mode_becomes_rgb(tmp_path, mode, colour, want, name):
    image = load_image(save(Image.new(mode, (3, 2), colour), tmp_path / name))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((1, 1)) == want


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 0)
    plain = load_image(save(image, tmp_path / "plain.png"))
    clear = load_image(save(image, tmp_path / "clear.png", transparency=0))
    assert plain.getpixel((0, 0)) == (0, 0, 0) and clear.getpixel((0, 0)) == (255, 255, 255)
    assert plain.getpixel((1, 1)) == clear.getpixel((1, 1)) == RED


@pytest.mark.parametrize("mode, key", [("L", 9), ("RGB", (9, 9, 9)), ("I;16", 9)])
def test_transparent_colour_becomes_white(tmp_path, mode, key):
    image = load_image(save(Image.new(mode, (3, 3), key), tmp_path / "a.png", transparency=key))
    assert image.getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    "orientation, size, red_at", [(1, (4, 2), (0, 0)), (3, (4, 2), (3, 1)), (6, (2, 4), (1, 0)), (8, (2, 4), (0, 3))]
)
def test_exif_orientation_is_applied(tmp_path, orientation, size, red_at):
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(image, tmp_path / "a.png", exif=exif)
    upright = load_image(path)
    assert upright.size == size and upright.getpixel(red_at) == RED
    assert not upright.getexif() and check_image(path) == (4, 2)


def test_pil_pictures_take_the_same_way():
    source = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert load_image(source).getpixel((0, 0)) == (255, 255, 255)
    assert source.mode == "RGBA"
    with pytest.raises(ImageError, match="max_pixels"):
        load_image(source, Limits(max_pixels=3))


def bomb(path, width, height):
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    return path


def truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    data = save(Image.fromarray(noise), path).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def gif(path):
    frames = [Image.new("L", (4, 4), v) for v in (0, 255)]
    return save(frames[0], path, save_all=True, append_images=frames[1:])


def written(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("make, message", [
    (lambda d: d / "none.png", "cannot be read"),
    (lambda d: d, "cannot be read|damaged"),
    (lambda d: written(d / "a.png", b""), "empty"),
    (lambda d: written(d / "a.png", b"hello, I am a text"), "known format"),
    (lambda d: written(d / "a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "known format"),
    (lambda d: truncated(d / "a.png"), "truncated or damaged"),
    (lambda d: truncated(d / "a.jpg"), "truncated or damaged"),
    (lambda d: gif(d / "a.gif"), "2 frames"),
    (lambda d: gif(d / "a.tif"), "2 frames or pages"),
    (lambda d: gif(d / "a.webp"), "2 frames"),
    (lambda d: bomb(d / "a.png", 10_000, 8_000), "80000000 pixels"),
    (lambda d: bomb(d / "a.png", 60_000, 60_000), "scale it down"),
    (lambda d: bomb(d / "a.png", 2010, 10), "200:1"),
    (lambda d: save(Image.new("F", (2, 2)), d / "a.tif"), "floats"),
    (lambda d: save(Image.new("I", (2, 2), 70_000), d / "a.tif"), "32-bit"),
])  # fmt: skip
def test_unusable_files_say_why(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(ImageError, match=message) as error:
        load_image(path)
    assert str(path) in str(error.value)


def test_header_is_refused_before_decoding(tmp_path):
    path = bomb(tmp_path / "a.png", 100, 100)  # no pixel data: decoding would fail, the header check must not
    assert check_image(path) == (100, 100)
    with pytest.raises(ImageError, match="max_pixels"):
        load_image(path, Limits(max_pixels=9_999))
    with pytest.raises(ImageError, match="max_bytes"):
        check_image(path, Limits(max_bytes=10))


def test_multi_picture_jpeg_gives_its_main_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.mpo", save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((4, 4))[0] > 240


def test_key_is_of_the_content(tmp_path):
    image = Image.new("RGB", (4, 2), RED)
    same = load_image(save(image, tmp_path / "a.png")), load_image(save(image, tmp_path / "b.bmp"))
    assert image_key(same[0]) == image_key(same[1]) == image_key(image)
    assert image_key(image) != image_key(image.resize((2, 4)))
    assert image_key(image) != image_key(Image.new("RGB", (4, 2), "blue"))


def test_paths_stay_below_the_root(tmp_path):
    root = tmp_path / "media"
    root.mkdir()
    inside = save(Image.new("L", (1, 1)), root / "a.png")
    outside = save(Image.new("L", (1, 1)), tmp_path / "b.png")
    (root / "link.png").symlink_to(outside)
    assert resolve("a.png", root) == resolve(inside, root) == inside.resolve()
    for path in ("../b.png", outside, "link.png", "../media2/a.png"):
        with pytest.raises(ImageError, match="outside of the media root"):
            resolve(path, root)
    for path, message in (("c.png", "does not exist"), (".", "not a regular file"), ("a\0.png", "no usable path")):
        with pytest.raises(ImageError, match=message):
            resolve(path, root)


@pytest.mark.parametrize("size, first", [((56, 28), "rows"), ((28, 56), "columns"), ((40, 40), "columns")])
def test_resizing_is_that_of_pillow_13(size, first):
    """Pillow rounds between its two passes. Up to 12 columns always came first, which pixels of models show."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    middle = (64, size[1]) if first == "rows" else (size[0], 64)
    passes = Image.fromarray(noise).resize(middle, Image.Resampling.BICUBIC).resize(size, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(passes))
    others = Image.fromarray(noise).resize(
        (size[0], 64) if first == "rows" else (64, size[1]), Image.Resampling.BICUBIC
    )
    other = others.resize(size, Image.Resampling.BICUBIC)
    assert (np.asarray(whole) != np.asarray(other)).any()
