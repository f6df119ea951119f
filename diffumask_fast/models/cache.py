"""The folder that keeps compiled code and engines between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of this user's caches: $XDG_CACHE_HOME/diffumask-fast, or ~/.cache/diffumask-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffumask-fast"
