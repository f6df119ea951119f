"""Where compiled code and engines are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return where this user's caches are kept: $XDG_CACHE_HOME/diffumask-fast, or ~/.cache/diffumask-fast."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffumask-fast"
