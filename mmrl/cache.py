"""Where made-once files lie: pre-trained tiny models, rendered pictures."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$MMRL_CACHE, else $XDG_CACHE_HOME/mmrl, else ~/.cache/mmrl; absolute."""
    if "MMRL_CACHE" in os.environ:
        return Path(os.environ["MMRL_CACHE"]).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")).absolute() / "mmrl"
