"""Where tradespace keeps what it may lose: measurements, compiled kernels, models from packages."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """TRADESPACE_HOME, else the platform's cache folder."""
    if stated := os.environ.get("TRADESPACE_HOME"):
        return Path(stated).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "tradespace"
    if sys.platform == "win32" and (local := os.environ.get("LOCALAPPDATA")):
        return Path(local) / "tradespace"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tradespace"
