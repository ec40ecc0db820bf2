"""Programs that XLA compiled once, kept in the user's cache folder, so that the next start finds them.

Invariant: what the user set for JAX's own cache stands; a folder that cannot be written costs a compilation, no more.
"""

import contextlib
import os
from pathlib import Path

import jax

from parallax.storage import cache_folder

KEPT_BYTES = 2**31
"""Those that were read last stay. JAX's own limit is not used: a process killed at the wrong moment breaks it."""


def keep_compiled_programs() -> None:
    """Call it before JAX compiles. `JAX_ENABLE_COMPILATION_CACHE=false` turns it off."""
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        folder = cache_folder() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        remove_oldest(folder, KEPT_BYTES)


def remove_oldest(folder: Path, limit: int) -> None:
    """Removes files of a folder, if there is one, until at most `limit` bytes are left."""
    with contextlib.suppress(OSError):  # another process may have been faster
        files = sorted((file.stat().st_atime, file.stat().st_size, file.path) for file in os.scandir(folder))
        size = sum(size for _, size, _ in files)
        for _, removed, path in files:
            if size <= limit:
                break
            os.remove(path)
            size -= removed
