"""The arrays of a checkpoint: written in their order in memory, read a piece at a time to where they are placed.

Invariant: on a CPU neither way makes a second copy of an array. So a shard is stored as one value without compression:
what is compressed or divided waits in memory until its file is full, and can be read only as a whole.
"""

import collections
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from parallax.filling import Bounds, fill

PIECE_BYTES = 2**20
AHEAD = 4
"""How many pieces are on their way at a time."""


def array_handler() -> Any:
    """What Orbax writes a tree of arrays with."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_compression=False)


def read_arrays(folder: epath.Path, abstract: Any, as_saved: bool = False) -> Any:
    """A tree of the arrays in a folder that `array_handler` wrote. There may be others in it.

    Args:
      abstract: the tree to fill, of jax.ShapeDtypeStruct with shardings; by default all on the first device.
      as_saved: whether arrays keep the dtypes that they have there; else each piece that is read takes that asked for.

    Raises:
      ValueError: an array is missing or cannot be read.
    """
    import orbax.checkpoint as ocp

    context = ocp.type_handlers.get_ts_context()
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    filled = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        stored = StoredArray(folder, name, context)
        if as_saved:
            leaf = jax.ShapeDtypeStruct(leaf.shape, stored.dtype, sharding=leaf.sharding)
        filled.append(fill(leaf, stored.pieces))
    return structure.unflatten(filled)


class Read(NamedTuple):
    """A piece of an array that is on its way."""

    block: Bounds
    """Where in the array it is."""
    value: Any
    """A future of an array, or of the bytes of some rows of a chunk."""
    rows: tuple[int, ...] | None = None
    """The shape of these rows."""
    part: Bounds = ()
    """The block in these rows."""


class StoredArray:
    """An array in a folder that Orbax wrote: a grid of chunks, each of which is one value.

    Args:
      folder: that of the whole tree.
      name: the keys to the array, joined by dots.
      context: TensorStore's, which holds the index that all arrays share.
    """

    def __init__(self, folder: epath.Path, name: str, context: Any):
        import orbax.checkpoint as ocp
        import tensorstore as ts

        info = ocp.type_handlers.ParamInfo(name=name, parent_dir=folder, use_zarr3=False, ts_context=context)
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        self._array: Any = ts.open(ts.Spec(spec), context=context, open=True, read=True).result()
        self._chunk: tuple[int, ...] = self._array.chunk_layout.read_chunk.shape or ()  # a scalar's is None
        self.dtype = self._array.dtype.numpy_dtype
        chunk_bytes = self.dtype.itemsize * math.prod(self._chunk)
        self._is_cut = chunk_bytes > PIECE_BYTES and self._array.codec.to_json()["compressor"] is None

    def pieces(self, shard: Bounds) -> Iterator[tuple[list[int], np.ndarray]]:
        """Where in a shard each piece begins, and the piece."""
        reads = (read for place in self._places(shard) for read in self._reads(place, shard))
        asked = collections.deque(itertools.islice(reads, AHEAD))
        while asked:
            block, value, rows, part = asked.popleft()
            piece = value.result()
            asked.extend(itertools.islice(reads, 1))
            if rows is not None:
                piece = np.frombuffer(piece.value, self.dtype).reshape(rows)[part]
            yield [s.start - whole.start for s, whole in zip(block, shard, strict=True)], piece

    def _places(self, shard: Bounds) -> Iterator[tuple[int, ...]]:
        """Where in the grid the chunks are that a shard needs."""
        sides = zip(shard, self._chunk, strict=True)
        return itertools.product(*(range(s.start // size, -(-s.stop // size)) for s, size in sides))

    def _reads(self, place: tuple[int, ...], shard: Bounds) -> Iterator[Read]:
        """Asks for what a shard needs of a chunk, at once or some rows at a time."""
        origin = [at * size for at, size in zip(place, self._chunk, strict=True)]
        block = tuple(
            slice(max(s.start, first), min(s.stop, first + size))
            for s, first, size in zip(shard, origin, self._chunk, strict=True)
        )
        if self._is_cut:
            yield from self._reads_of_rows(".".join(map(str, place)), origin, block)
        else:
            yield Read(block, self._array[block].read())

    def _reads_of_rows(self, key: str, origin: list[int], block: Bounds) -> Iterator[Read]:
        """Rows are contiguous parts of a chunk: neighbours in one dim, and all of the dims behind it."""
        row_bytes = [self.dtype.itemsize * math.prod(self._chunk[dim + 1 :]) for dim in range(len(block))]
        dim = next(dim for dim, nbytes in enumerate(row_bytes) if nbytes <= PIECE_BYTES)
        step = PIECE_BYTES // row_bytes[dim]
        inner, behind = block[dim + 1 :], self._chunk[dim + 1 :]
        part = tuple(slice(s.start - first, s.stop - first) for s, first in zip(inner, origin[dim + 1 :], strict=True))
        for outer in itertools.product(*(range(s.start, s.stop) for s in block[:dim])):
            for start in range(block[dim].start, block[dim].stop, step):
                stop = min(start + step, block[dim].stop)
                begin = sum(
                    (index - first) * nbytes
                    for index, first, nbytes in zip((*outer, start), origin, row_bytes, strict=False)
                )
                end = begin + (stop - start) * row_bytes[dim]
                yield Read(
                    (*(slice(index, index + 1) for index in outer), slice(start, stop), *inner),
                    self._array.kvstore.read(key, byte_range=slice(begin, end)),
                    (*[1] * dim, stop - start, *behind),
                    (*[slice(None)] * (dim + 1), *part),
                )
