"""The arrays of a checkpoint: written in their order in memory, read a piece at a time to where they are placed.

Invariant: on a CPU neither way makes a second copy of an array. So a shard is stored as one value without compression:
what is compressed or divided waits in memory until its file is full, and can be read only as a whole.
"""

import collections
import contextlib
import functools
import itertools
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from parallax.filling import Bounds, fill
from parallax.training.checkpoint_hashes import (
    PIECE_BYTES,
    DamageError,
    Hashes,
    cut,
    hash_piece,
    hashing_handler,
    read_hashes,
)

AHEAD = 4
"""How many pieces are on their way at a time."""
DAMAGE_CODES = ("DATA_LOSS", "NOT_FOUND", "OUT_OF_RANGE", "INVALID_ARGUMENT", "FAILED_PRECONDITION")
"""TensorStore's, of what is there and makes no sense; others are of a disk or a network that does not answer."""


def array_handler() -> Any:
    """What Orbax writes a tree of jax.Arrays with."""
    import orbax.checkpoint as ocp

    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, hashing_handler()))
    return ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)


def read_arrays(folder: epath.Path, abstract: Any, as_saved: bool = False) -> Any:
    """A tree of the arrays in a folder that `array_handler` wrote. There may be others in it, which are not read.

    Args:
      abstract: the tree to fill, of jax.ShapeDtypeStruct with shardings; by default all on the first device.
      as_saved: whether arrays keep the dtypes that they have there; else each piece that is read takes that asked for.

    Raises:
      DamageError: an array is missing, or has other contents than were hashed when they were written.
      ValueError: it cannot be read.
    """
    import orbax.checkpoint as ocp

    context, hashes = ocp.type_handlers.get_ts_context(), read_hashes(folder)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    filled = []
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if hashes and name not in hashes:
            raise DamageError(f"{name.replace('.', '/')} has no hashes")
        stored = StoredArray(folder, name, context, hashes.get(name))
        if as_saved:
            leaf = jax.ShapeDtypeStruct(leaf.shape, stored.dtype, sharding=leaf.sharding)
        filled.append(fill(leaf, stored.pieces))
    return structure.unflatten(filled)


class Read(NamedTuple):
    """A piece of an array that is on its way."""

    block: Bounds
    """Where in the array it is."""
    value: Future[np.ndarray]


class StoredArray:
    """An array in a folder that Orbax wrote: a grid of chunks, each of which is one value.

    Args:
      folder: that of the whole tree.
      name: the keys to the array, joined by dots.
      context: TensorStore's, which holds the index that all arrays share.
      hashes: what the pieces are compared with; without them nothing is.
    """

    def __init__(self, folder: epath.Path, name: str, context: Any, hashes: Hashes | None = None):
        import orbax.checkpoint as ocp
        import tensorstore as ts

        info = ocp.type_handlers.ParamInfo(name=name, parent_dir=folder, use_zarr3=False, ts_context=context)
        spec = ocp.type_handlers.get_json_tspec_read(info, use_ocdbt=True)
        self._name, self._hashes = name.replace(".", "/"), hashes
        self._piece_bytes = hashes.piece_bytes if hashes else PIECE_BYTES
        with self._errors():
            self._array: Any = ts.open(ts.Spec(spec), context=context, open=True, read=True).result()
        self._chunk: tuple[int, ...] = self._array.chunk_layout.read_chunk.shape or ()  # a scalar's is None
        self.dtype = self._array.dtype.numpy_dtype
        chunk_bytes = self.dtype.itemsize * math.prod(self._chunk)
        plain = self._array.codec.to_json()["compressor"] is None
        self._is_cut = plain and bool(self._chunk) and (hashes is not None or chunk_bytes > PIECE_BYTES)

    def pieces(self, shard: Bounds) -> Iterator[tuple[list[int], np.ndarray]]:
        """Where in a shard each piece begins, and the piece. Raises DamageError or ValueError."""
        reads = (read for place in self._places(shard) for read in self._reads(place, shard))
        asked = collections.deque(itertools.islice(reads, AHEAD))
        while asked:
            block, value = asked.popleft()
            piece = value.result()
            asked.extend(itertools.islice(reads, 1))
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
        key = ".".join(map(str, place)) or "0"
        if self._is_cut:
            yield from self._reads_of_rows(key, origin, block)
        else:
            value = self._array[block].read()
            yield Read(block, _reader().submit(self._whole, value, key))

    def _reads_of_rows(self, key: str, origin: list[int], block: Bounds) -> Iterator[Read]:
        """The pieces of a chunk that a block has a part in."""
        dim, step, row_bytes = cut(self._chunk, self.dtype.itemsize, self._piece_bytes)
        size, behind = self._chunk[dim], self._chunk[dim + 1 :]
        groups = -(-size // step)
        first, last = block[dim].start - origin[dim], block[dim].stop - origin[dim]
        inner = tuple(
            slice(s.start - at, s.stop - at) for s, at in zip(block[dim + 1 :], origin[dim + 1 :], strict=True)
        )
        for outer in itertools.product(*(range(s.start, s.stop) for s in block[:dim])):
            before = [index - at for index, at in zip(outer, origin, strict=False)]
            begin = sum(index * nbytes for index, nbytes in zip(before, row_bytes, strict=False))
            number = begin // (size * row_bytes[dim]) * groups
            for group in range(first // step, -(-last // step)):
                start, stop = group * step, min((group + 1) * step, size)
                span = slice(begin + start * row_bytes[dim], begin + stop * row_bytes[dim])
                value = self._array.kvstore.read(key, byte_range=span)
                own = slice(max(first, start), min(last, stop))
                part = (*[slice(None)] * dim, slice(own.start - start, own.stop - start), *inner)
                yield Read(
                    (
                        *(slice(index, index + 1) for index in outer),
                        slice(own.start + origin[dim], own.stop + origin[dim]),
                        *block[dim + 1 :],
                    ),
                    _reader().submit(self._rows, value, key, number + group, (*[1] * dim, stop - start, *behind), part),
                )

    def _rows(self, value: Any, key: str, number: int, shape: tuple[int, ...], part: Bounds) -> np.ndarray:
        """Part of a piece whose bytes are on their way."""
        with self._errors():
            content = value.result().value
        self._compare(content, key, number)
        return np.frombuffer(content, self.dtype).reshape(shape)[part]

    def _whole(self, value: Any, key: str) -> np.ndarray:
        """A chunk that is on its way, or a part of one that has no hashes."""
        with self._errors():
            content = value.result()
        if self._hashes is not None:
            self._compare(content.tobytes(), key, 0)
        return content

    def _compare(self, content: bytes, key: str, number: int) -> None:
        """Raises DamageError if these are not the bytes of a chunk's piece with that number."""
        if self._hashes is not None and hash_piece(content) != self._hashes.chunks[key][number]:
            raise DamageError(f"{self._name} has other contents than were saved")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What TensorStore raises, as damage where it says that what it read makes no sense."""
        try:
            yield
        except ValueError as error:
            reason = str(error).splitlines()[0]
            if any(code in reason for code in DAMAGE_CODES):
                raise DamageError(f"{self._name} cannot be read: {reason}") from None
            raise ValueError(f"{self._name} cannot be read: {reason}") from error


@functools.cache
def _reader() -> ThreadPoolExecutor:
    """Threads in which pieces are hashed while others are placed."""
    return ThreadPoolExecutor(AHEAD, thread_name_prefix="read-arrays")
