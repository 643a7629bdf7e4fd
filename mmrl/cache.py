"""The cache of files that are made once and kept: pre-trained tiny models, rendered pictures."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from mmrl.workdir import publish

log = logging.getLogger(__name__)

# In every folder of the cache: its files with their sizes in bytes, to recognise a damaged one.
SIZES = ".sizes.json"


def cache_root() -> Path:
    """$MMRL_CACHE, else $XDG_CACHE_HOME/mmrl, else ~/.cache/mmrl; absolute."""
    if "MMRL_CACHE" in os.environ:
        return Path(os.environ["MMRL_CACHE"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).absolute() / "mmrl"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(work)` if it is not there as it was made: one process makes it, others wait.

    It is published when `make` ends: a stopped run leaves nothing half made. It is made anew where a file is missing
    or has another size.
    """
    if _is_whole(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        # Another process may have made it while this one waited.
        if not _is_whole(folder):
            if folder.exists():
                log.warning("%s is damaged and made anew", folder)
            with publish(folder) as work:
                work.mkdir()
                make(work)
                sizes = {}
                for file in work.rglob("*"):
                    if file.is_file():
                        sizes[str(file.relative_to(work))] = file.stat().st_size
                (work / SIZES).write_text(json.dumps(sizes))
    return folder


def _is_whole(folder: Path) -> bool:
    """True for a folder that has every file, in the size that was written."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
