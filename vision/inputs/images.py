"""Pictures from disk to RGB, and how large the model families make them (sizes, tiles, tokens).

Size arithmetic is pure and follows each family's public processor, so that token counts are known before any model is
loaded. Sizes are (height, width) where a processor says so and (width, height) for boxes; every function names it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mmrl.reasoning.pictures import ImageError, Limits, broken, check_frames, check_size, open_picture

Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def load_image(source: str | Path | Image.Image, limits: Limits | None = None) -> Image.Image:
    """A decoded RGB picture, upright (EXIF orientation applied), transparency over white, 16 bit scaled to 8.

    The size is checked before decoding. Of a multi-picture JPEG (MPO, written by phones) the main picture is taken.

    Raises:
        ImageError: missing, empty, broken or truncated file, no picture, animation or several pages, beyond `limits`,
            or a mode without a defined range (32-bit integers beyond 16 bit, floats).
    """
    limits = limits or Limits()
    if isinstance(source, Image.Image):
        check_size("the given picture", source.size, limits)
        check_frames("the given picture", source)
        return _decode("the given picture", source)
    with open_picture(Path(source), limits) as image:
        return _decode(str(source), image)


def image_key(image: Image.Image) -> str:
    """Content hash of mode, size and pixels (hex, 64 characters): equal pictures have equal keys."""
    width, height = image.size
    return hashlib.sha256(f"{image.mode}:{width}x{height}:".encode() + image.tobytes()).hexdigest()


def _decode(name: str, image: Image.Image) -> Image.Image:
    """The picture as RGB; `name` is for messages."""
    try:
        image.load()
        return _to_rgb(name, ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:
        # Decoders raise OSError, SyntaxError, struct.error, zlib.error and others.
        raise broken(name, error) from error


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floats without a defined range; save it with 8 bit per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bit(name, image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    rgb = image.convert("RGB")  # always a copy
    # The file's metadata, such as `transparency`, would be applied a second time.
    rgb.info = {}
    return rgb


def _to_8_bit(name: str, image: Image.Image) -> Image.Image:
    """0..65535 -> 0..255 (x / 257, rounded); PIL alone would clip or cut."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds 32-bit integers beyond 0..65535; save it with 8 bit per channel")
    grey = (values + 128) // 257  # 65535 / 255 = 257
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 255
    return Image.fromarray(grey.astype(np.uint8))


@dataclass(frozen=True)
class PixelBudget:
    """Bounds on the resized picture of the Qwen family, in pixels, and the side's multiple (patch x merge).

    Qwen2-VL and Qwen2.5-VL: factor 28; Qwen3-VL: factor 32, min 65,536, max 16,777,216.

    Raises:
        ValueError: not 0 < factor, 0 < min_pixels <= max_pixels.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 1280 * 28 * 28
    factor: int = 28

    def __post_init__(self) -> None:
        if self.factor < 1 or not 0 < self.min_pixels <= self.max_pixels:
            raise ValueError(f"{self}: needs factor >= 1 and 0 < min_pixels <= max_pixels")


def smart_resize(height: int, width: int, budget: PixelBudget) -> tuple[int, int]:
    """(height, width) after Qwen's resize: multiples of the factor, inside the budget, aspect nearly kept.

    h' = round(h / f) f, halves to even. Above the budget: b = sqrt(hw / max), h' = max(f, floor(h / b / f) f);
    below: b = sqrt(min / (hw)), h' = ceil(h b / f) f. Very long pictures may leave the budget, as in the original.

    Raises:
        ValueError: a side below 1, or an aspect ratio above 200.
    """
    _check_sides(height, width)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"picture {width}x{height} is longer than 200:1; crop it, Qwen's processor refuses it")
    f = budget.factor
    new_height, new_width = round(height / f) * f, round(width / f) * f
    if new_height * new_width > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        return max(f, math.floor(height / shrink / f) * f), max(f, math.floor(width / shrink / f) * f)
    if new_height * new_width < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        return math.ceil(height * grow / f) * f, math.ceil(width * grow / f) * f
    return new_height, new_width


def _check_sides(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"picture of {width}x{height} pixels: both sides must be at least 1")
