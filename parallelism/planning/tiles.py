"""What an array takes of a TPU's memory, which holds whole tiles.

Invariant: never less than its numbers, and as much whatever the order of its dims.
"""

import itertools
import math
from collections.abc import Sequence

LANES = 128
SUBLANES = 8


def tiled_size(shape: Sequence[int]) -> int:
    """Numbers that an array of this shape takes where one dim fills lanes and another sublanes.

    The compiler chooses both dims so that the least is wasted: f32[4,16,4,32] is stored as if it were [4, 16, 4, 128].
    """
    dims = [1] * (2 - len(shape)) + list(shape)
    sizes = []
    for lanes, sublanes in itertools.permutations(range(len(dims)), 2):
        laid = list(dims)
        laid[lanes] = _whole(dims[lanes], LANES)
        laid[sublanes] = _whole(dims[sublanes], _rows(dims[sublanes]))
        sizes.append(math.prod(laid))
    return min(sizes)


def _rows(size: int) -> int:
    """Rows of a tile; a short dim gets one of 1, 2 or 4 rows."""
    return min(SUBLANES, 1 << max(0, size - 1).bit_length())


def _whole(size: int, unit: int) -> int:
    return -(-size // unit) * unit
