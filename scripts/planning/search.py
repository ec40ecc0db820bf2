"""The largest batch, or the longest sequences, that a layout fits: by the estimate, then as the compiler corrects it.

Invariant: a size that is given as fitting was compiled, and so was one, refused, that is larger by a step or by a 64th
of it at most. After TRIES compilations, or at the most that is allowed, that larger one may be missing.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

from parallelism.planning.planner import Choice, Row

What = Literal["batch_size", "seq_len"]
MAX = "max"
UNIT = 128
"""Tokens by which sequences grow: whole blocks of every attention kernel."""
MOST = 2**20
"""Rows of a device at most, of a model that no batch fills it with."""
TRIES = 6
"""Compilations of one layout."""
PRECISION = 64
"""Within what part of a size the largest is found where it is many steps."""


def resized(choice: Choice, what: What, size: int) -> Choice:
    changes: dict[str, Any] = {what: size}
    return dataclasses.replace(choice, layout=dataclasses.replace(choice.layout, **changes))


def largest(unit: int, most: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of `unit`, up to `most`, that fits, within an eighth, which the compiler corrects; or 0.

    Args:
      fits: false from some size on.
    """
    good, bad, size = 0, most // unit, 1
    if fits(bad * unit):
        return bad * unit
    while size < bad and fits(size * unit):
        good, size = size, 4 * size
    bad = min(bad, size)
    while bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle * unit) else (good, middle)
    return good * unit


def corrected(first: int, unit: int, most: int, compiled: Callable[[int], Row], memory: float) -> Iterator[Row]:
    """Rows of sizes around the largest that fits, as the compiler was asked, `first` the first of them.

    The next size is where the line through the state alone and the last peak meets the memory. Where that is not
    between the sizes that are known to fit and not to, since peaks are no such line, it is their middle.
    """
    most = most // unit * unit
    low, high, size = 0, most + unit, first
    for _ in range(TRIES):
        row = compiled(size)
        yield row
        fits = row.fits(memory)
        low, high = (size, high) if fits else (low, size)
        step = max(unit, low // PRECISION // unit * unit)
        if high - low <= step:
            return
        size = min(int(size * _room(row, memory)) // unit * unit, most)
        size = max(size, low + step) if fits else min(size, high - step)
        if not low < size < high:
            size = (low + high) // 2 // unit * unit


def _room(row: Row, memory: float) -> float:
    """How much larger a step may be than a row's."""
    needed, state = row.needed_bytes, row.parameter_bytes + row.optimizer_bytes
    if row.report is not None and not row.report.fits:
        if row.report.shortage is None:
            return 0.9
        needed, memory = row.report.shortage
    return max(0.0, memory - state) / max(1.0, needed - state)
