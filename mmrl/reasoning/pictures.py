"""Picture files behind limits: what every reader of rows and every policy refuses, by one rule.

Nothing is decoded here; `vision.inputs.images` does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmrl.jsonl import RowError
from mmrl.reasoning.embedded import is_embedded

# Raster formats only: PIL would hand e.g. PostScript to an external program
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


class ImageError(RowError):
    """A picture that cannot be used: the message names the file, the cause and what to do."""


@dataclass(frozen=True)
class Limits:
    """Limits beyond which a picture is refused before it is decoded.

    The aspect ratio is long side / short side, as in Qwen's processor.
    """

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


def check_image(path: str | Path, limits: Limits | None = None, *, verify: bool = False) -> tuple[int, int]:
    """(width, height) as stored, from the header alone: nothing is decoded and EXIF orientation is not applied.

    verify: look for damage behind the header too, as far as a format can tell without decoding.

    Raises:
        ImageError: no picture, several frames, or beyond `limits`.
    """
    with open_picture(Path(path), limits or Limits()) as image:
        if verify:
            try:
                image.verify()
            except Exception as error:
                # Checks raise OSError, SyntaxError and others.
                raise broken(str(path), error) from error
        return image.size


def open_picture(path: Path, limits: Limits) -> Image.Image:
    """The picture of a file, its header read.

    Raises:
        ImageError: as `check_image`.
    """
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
    except Exception as error:
        # Header parsers raise struct.error, SyntaxError, KeyError and others.
        raise broken(str(path), error) from error
    try:
        check_size(str(path), image.size, limits)
        check_frames(str(path), image)
    except ImageError:
        image.close()
        raise
    return image


def check_size(name: str, size: tuple[int, int], limits: Limits) -> None:
    """ImageError for a size (width, height) without pixels or beyond the limits."""
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


def check_frames(name: str, image: Image.Image) -> None:
    """ImageError for an animation, or a file of several pages."""
    # The further pictures of a multi-picture JPEG are previews or depth maps of the first
    if image.format == "MPO":
        return
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:
        raise broken(name, error) from error
    if frames != 1:
        raise ImageError(f"{name} has {frames} frames or pages; save the one to use as a picture of its own")


def broken(name: str, error: Exception) -> ImageError:
    """The error about a file that is damaged."""
    return ImageError(f"{name} is truncated or damaged ({error}); fetch it again or drop the row")
