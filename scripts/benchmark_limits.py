"""What the machine can do at most: float32 matrix products, and bytes read from memory.

Invariant: measured with all cores, by the fastest way that is installed, and the result says by which.
"""

import concurrent.futures
import time
from typing import Any

import numpy as np

from scripts.benchmark_settings import cores
from scripts.benchmark_torch import need
from scripts.benchmark_worker import Measure

SIDE = 2048
"""Of the square matrices; products of this size are bound by arithmetic."""
BUFFER = 2**31
"""Bytes that are read: larger than any processor's caches."""


def gemm(torch: bool) -> tuple[dict[str, Any], Measure]:
    """Operations a second of float32 matrix products, by torch or else by numpy, in rounds of `{"units": products}`."""
    draws = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
    left, right = draws
    out = np.empty((SIDE, SIDE), np.float32)
    multiply: Any = np.matmul
    if torch:
        library = need("torch")
        library.set_num_threads(cores())
        left, right, out = (library.from_numpy(each) for each in (left, right, out))
        multiply = library.matmul
    multiply(left, right, out=out)

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(request["units"]):
            multiply(left, right, out=out)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "flops": request["units"] * 2 * SIDE**3 / seconds}

    return {"by": "torch" if torch else "numpy", "side": SIDE}, measure


def bandwidth() -> tuple[dict[str, Any], Measure]:
    """Bytes a second that numpy reads while it folds a buffer by or, a part on each core; `{"units": passes}`."""
    parts = np.array_split(np.ones(BUFFER // 8, np.int64), cores())
    pool = concurrent.futures.ThreadPoolExecutor(len(parts))

    def measure(request: dict[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        for _ in range(request["units"]):
            list(pool.map(np.bitwise_or.reduce, parts))
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes_per_second": request["units"] * BUFFER / seconds}

    return {"by": "numpy.bitwise_or", "bytes": BUFFER, "threads": len(parts)}, measure
