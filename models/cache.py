"""Where files go that can be made again: converted weights, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: `TOKENMARK_CACHE`, else tokenmark's place in the user's cache."""
    if chosen := os.environ.get("TOKENMARK_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tokenmark"
