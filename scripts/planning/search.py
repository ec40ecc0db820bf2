"""The largest batch, or the longest sequences, that a layout fits: by the estimate, then as the compiler corrects it.

Invariant: a size that is given as fitting was compiled. After TRIES compilations a larger one may fit, untried.
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
TRIES = 4
"""Compilations of one layout."""


def resized(choice: Choice, what: What, size: int) -> Choice:
    changes: dict[str, Any] = {what: size}
    return dataclasses.replace(choice, layout=dataclasses.replace(choice.layout, **changes))


def size_of(choice: Choice, what: What) -> int:
    return getattr(choice.layout, what)


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

    The next size is where the line through the state alone and the last peak meets the memory, between those that are
    known to fit and not to.
    """
    low, high, size = 0, most + unit, first
    for _ in range(TRIES):
        row = compiled(size)
        yield row
        low, high = (max(low, size), high) if row.fits(memory) else (low, min(high, size))
        state = row.parameter_bytes + row.optimizer_bytes
        room = max(0.0, memory - state) / max(1.0, row.needed_bytes - state)
        if row.report is not None and not row.report.fits:
            room = min(room, 0.9)  # the compiler does not say by how much
        size = min(max(int(size * room) // unit * unit, low + unit), high - unit)
        if not low < size < high:
            return
