"""Where made-once files lie: pre-trained tiny models, rendered pictures."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root() -> Path:
    """$MMRL_CACHE, else $XDG_CACHE_HOME/mmrl, else ~/.cache/mmrl; absolute."""
    if "MMRL_CACHE" in os.environ:
        return Path(os.environ["MMRL_CACHE"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).absolute() / "mmrl"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make(work)` if it is not there: one process makes it, others wait.

    `make` writes beside the target and the folder is renamed at the end, so a stopped run leaves nothing half made.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            work = folder.with_name(folder.name + ".part")
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            make(work)
            work.rename(folder)
    return folder
