"""What the machine can do at most: float32 matmuls, and bytes read from memory.

Invariant: measured with all cores, by the fastest way that is installed, and the result names that way.
"""

import concurrent.futures
import contextlib
import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from scripts.benchmarks.report import begin, show, write_report
from scripts.benchmarks.rounds import Timing, Worker, measure
from scripts.benchmarks.settings import Measure, cores
from scripts.common.command_line import parse

SIDE = 2048
"""Of the square matrices; matmuls of this size are bound by arithmetic."""
BUFFER = 2**31
"""Bytes that are read: larger than any processor's caches."""


def limits(args: Sequence[str]) -> int:
    """Measures both in turn; returns 0."""
    flags = parse(Timing, description="Measure the matmuls and the reads of memory of this machine.", args=args)
    busy = begin()
    with contextlib.ExitStack() as stack:
        torch = importlib.util.find_spec("torch") is not None
        gemm = stack.enter_context(contextlib.closing(Worker("matmuls", "gemm", torch=torch)))
        memory = stack.enter_context(contextlib.closing(Worker("memory", "bandwidth")))
        found = measure([gemm, memory], flags, "limits")
    results = {
        f"{gemm.facts['by']}, GFLOP/s": {"rate": [each["flops"] / 1e9 for each in found["matmuls"]]},
        f"{memory.facts['by']}, GB/s": {"rate": [each["bytes_per_second"] / 1e9 for each in found["memory"]]},
    }
    show("Limits of this machine", {"rate": ".1f"}, results)
    write_report(flags.output, "limits", results, busy=busy)
    return 0


def gemm(torch: bool) -> tuple[dict[str, Any], Measure]:
    """Operations a second of float32 matmuls, by torch or else by numpy, in rounds of `{"units": matmuls}`."""
    draws = np.random.default_rng(0).random((2, SIDE, SIDE), np.float32)
    left, right = draws
    out = np.empty((SIDE, SIDE), np.float32)
    multiply: Any = np.matmul
    if torch:
        library = importlib.import_module("torch")
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
