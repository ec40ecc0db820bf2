"""Where Parallax keeps what it can fetch or make again.

Invariant: nothing in it is the only copy of anything.
"""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Of this user; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "parallax"
