"""Media that stand inside rows, as bytes or `data:` URLs, become files: prompts name media by their paths."""

from __future__ import annotations

import base64
import binascii
import hashlib
from pathlib import Path
from urllib.parse import unquote_to_bytes

from mmrl.cache import cache_root
from mmrl.jsonl import RowError
from mmrl.workdir import publish


def medium_path(value: object, where: str, kind: str = "image") -> str:
    """The path of one picture or film of a row: a path, a `data:` URL, or the datasets library's `{"bytes", "path"}`.

    What is embedded is written to `embedded_folder()`, once per content.

    Args:
        where, kind: the column, and `image` or `video`, for messages.
    Raises:
        RowError: none of these, a web address, or bytes that cannot be decoded.
    """
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), str):
            raise RowError(f"bad {kind} path: column {where!r} holds bytes as text; write data:image/png;base64,..")
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key)), None)
    if isinstance(value, bytes):
        return str(_stored(value))
    if not isinstance(value, str) or not value:
        raise RowError(f"bad {kind} path: column {where!r} is neither a path nor a list of paths: {_short(value)}")
    scheme = value[:8].lower()
    if scheme.startswith("data:"):
        return str(_stored(_decoded(value, where)))
    if scheme.startswith(("http:", "https:")):
        raise RowError(
            f"web address: {where!r} is {value[:80]!r}; nothing is fetched, save the picture as a file first"
        )
    return value.removeprefix("file://")


def media_paths(value: object, where: str, kind: str = "image") -> tuple[str, ...]:
    """The paths of a medium or of a list of media; none for null and for what is empty.

    Raises:
        RowError: an entry is no medium, see `medium_path`.
    """
    if value is None or value == "":
        return ()
    entries = value if isinstance(value, list) else [value]
    return tuple(medium_path(entry, where, kind) for entry in entries)


def embedded_folder() -> Path:
    """The folder below the cache that holds media taken out of rows, named by their content."""
    return cache_root() / "embedded"


def is_embedded(path: str | Path) -> bool:
    """True for the path of a medium that was taken out of a row, which no media root holds."""
    return Path(path).parent == embedded_folder()


def _stored(data: bytes) -> Path:
    file = embedded_folder() / hashlib.sha256(data).hexdigest()
    if not file.exists():
        # Several processes may store one picture; the last one writes the same bytes.
        with publish(file, shared=True) as part:
            part.write_bytes(data)
    return file


def _decoded(url: str, where: str) -> bytes:
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        return base64.b64decode(body, validate=True) if head.endswith(";base64") else unquote_to_bytes(body)
    except (ValueError, binascii.Error) as error:
        raise RowError(f"broken data URL: {where!r} begins with {url[:40]!r} ({error})") from error


def _short(value: object) -> str:
    return repr(str(value)[:80])
