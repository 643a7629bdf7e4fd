"""Pictures from disk to RGB behind limits, and how large the model families make them (sizes, tiles, tokens).

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

from mmrl.embedded import is_embedded
from vision.foreign import attribute

Box = tuple[float, float, float, float]  # x0, y0, x1, y1

# raster formats only: PIL would hand e.g. PostScript to an external program
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class ImageError(ValueError):
    """A picture that cannot be used: the message names the file, the cause and what to do."""


@dataclass(frozen=True)
class Limits:
    """What is refused before decoding. The aspect ratio is long side / short side, as in Qwen's processor."""

    max_pixels: int = 64_000_000
    max_bytes: int = 64 * 2**20
    max_aspect: float = 200.0


def resolve(path: str | Path, root: str | Path) -> Path:
    """The absolute path of a file below `root`, links resolved; a relative `path` starts at `root`.

    A picture that was taken out of a row lies in the cache and may be used under any root.

    Raises:
        ImageError: no such file, not a regular file, or it lies outside `root`.
    """
    try:
        base = Path(root).resolve()
        full = (base / path).resolve()
        is_file = full.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise ImageError(f"{str(path)!r} is no usable path ({error}); name a file below {root}") from error
    if not full.is_relative_to(base) and not is_embedded(path):
        raise ImageError(
            f"{path} leads to {full}, outside of the media root {base}; move the file below it or widen media_root"
        )
    if not is_file:
        what = "is not a regular file" if full.exists() else "does not exist"
        raise ImageError(f"{full} {what}; check the row's image path and media_root (now {base})")
    return full


def check_image(path: str | Path, limits: Limits | None = None) -> tuple[int, int]:
    """(width, height) as stored, from the header alone: nothing is decoded and EXIF orientation is not applied.

    Raises:
        ImageError: no picture, several frames, or beyond `limits`.
    """
    with _open(Path(path), limits or Limits()) as image:
        return image.size


def load_image(source: str | Path | Image.Image, limits: Limits | None = None) -> Image.Image:
    """A decoded RGB picture, upright (EXIF orientation applied), transparency over white, 16 bit scaled to 8.

    The size is checked before decoding. Of a multi-picture JPEG (MPO, written by phones) the main picture is taken.

    Raises:
        ImageError: missing, empty, broken or truncated file, no picture, animation or several pages, beyond `limits`,
            or a mode without a defined range (32-bit integers beyond 16 bit, floats).
    """
    limits = limits or Limits()
    if isinstance(source, Image.Image):
        _check_size("the given picture", source.size, limits)
        _check_frames("the given picture", source)
        return _decode("the given picture", source)
    with _open(Path(source), limits) as image:
        return _decode(str(source), image)


def image_key(image: Image.Image) -> str:
    """Content hash of mode, size and pixels (hex, 64 characters): equal pictures have equal keys."""
    width, height = image.size
    return hashlib.sha256(f"{image.mode}:{width}x{height}:".encode() + image.tobytes()).hexdigest()


def _open(path: Path, limits: Limits) -> Image.Image:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ImageError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    if size == 0:
        raise ImageError(f"{path} is empty (0 bytes); fetch it again or drop the row")
    if size > limits.max_bytes:
        raise ImageError(f"{path} has {size} bytes, more than {limits.max_bytes}; compress it or raise max_bytes")
    try:
        image = Image.open(path, formats=_FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ImageError(
            f"{path} is no picture of a known format ({', '.join(_FORMATS)}); convert it or drop the row"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path}: {error}; scale it down before use") from error
    except Exception as error:  # header parsers raise struct.error, SyntaxError, KeyError and others
        raise _broken(str(path), error) from error
    try:
        _check_size(str(path), image.size, limits)
        _check_frames(str(path), image)
    except ImageError:
        image.close()
        raise
    return image


def _check_size(name: str, size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"{name} is {width}x{height} pixels, it has no content; drop the row")
    if width * height > limits.max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height} pixels, more than {limits.max_pixels}; "
            "scale it down or raise max_pixels"
        )
    if max(size) > limits.max_aspect * min(size):
        raise ImageError(
            f"{name} is {width}x{height}, longer than {limits.max_aspect:g}:1; crop it or raise max_aspect"
        )


def _check_frames(name: str, image: Image.Image) -> None:
    # the further pictures of a multi-picture JPEG are previews or depth maps of the first
    if image.format == "MPO":
        return
    try:
        frames = attribute(image, "n_frames", default=1)
    except Exception as error:
        raise _broken(name, error) from error
    if frames != 1:
        raise ImageError(f"{name} has {frames} frames or pages; save the one to use as a picture of its own")


def _decode(name: str, image: Image.Image) -> Image.Image:
    try:
        image.load()
        return _to_rgb(name, ImageOps.exif_transpose(image))
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, zlib.error and others
        raise _broken(name, error) from error


def _broken(name: str, error: Exception) -> ImageError:
    return ImageError(f"{name} is truncated or damaged ({error}); fetch it again or drop the row")


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ImageError(f"{name} holds floats without a defined range; save it with 8 bit per channel")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _to_8_bit(name, image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    out = image.convert("RGB")  # always a copy
    out.info = {}  # the file's metadata, such as `transparency`, would be applied a second time
    return out


def _to_8_bit(name: str, image: Image.Image) -> Image.Image:
    """0..65535 -> 0..255 (x / 257, rounded); PIL alone would clip or cut."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(f"{name} holds 32-bit integers beyond 0..65535; save it with 8 bit per channel")
    grey = (values + 128) // 257
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
    new = round(height / f) * f, round(width / f) * f
    if new[0] * new[1] > budget.max_pixels:
        shrink = math.sqrt(height * width / budget.max_pixels)
        return max(f, math.floor(height / shrink / f) * f), max(f, math.floor(width / shrink / f) * f)
    if new[0] * new[1] < budget.min_pixels:
        grow = math.sqrt(budget.min_pixels / (height * width))
        return math.ceil(height * grow / f) * f, math.ceil(width * grow / f) * f
    return new


def _check_sides(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"picture of {width}x{height} pixels: both sides must be at least 1")
