"""What every process that computes sets up before JAX does: the allocator, a cache of compiled programs, its log.

Invariant: no result changes. Memory use may grow to the peak of a step and stays there; what the user set for JAX's own
cache stands, and a folder that cannot be written costs a compilation, no more.
"""

import contextlib
import ctypes
import logging
import os
from pathlib import Path

import jax

from parallax.storage import cache_folder

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
KEPT_BYTES = 2**31
"""Those that were read last stay. JAX's own limit is not used: a process killed at the wrong moment breaks it."""

GPUS = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg")
"""What Linux has where there is an NVIDIA GPU; the others are a Jetson's and Windows's."""


def expect_no_gpu() -> None:
    """Call it before JAX finds its devices. Where the plugin for GPUs is installed and there is none, as after
    `pip install -e ".[plan-gpu]"`, JAX logs a traceback of the plugin at each start, and goes on without it."""
    if not any(os.path.exists(device) for device in GPUS):
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_no_missing_gpu)


def _is_no_missing_gpu(record: logging.LogRecord) -> bool:
    return not (record.msg.startswith("Jax plugin configuration error") and "xla_cuda" in record.getMessage())


def keep_large_buffers() -> None:
    """Call it before JAX computes. Saves page faults, a fifth of the CPU time of small models; without glibc a no-op.

    Only the main thread's arena can hold blocks this large, so a CPU's steps run on the thread that calls them. One
    arena for all threads would do too, but those that compile would wait for each other: 3.4 instead of 2.0 s for NANO.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl and macOS do not
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
        jax.config.update("jax_cpu_enable_async_dispatch", False)


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
