"""The sha256 of the arrays of a checkpoint, piece by piece: taken of what is written, compared with what is read.

Invariant: no byte is read to be hashed. Whoever writes a part of an array hashes it in memory, and whoever reads a part
compares it on the way.

A chunk of a stored array is what one device wrote, in C order. It is hashed in pieces of whole rows, so that some rows
can be read and compared without the rest.
"""

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from parallax.storage import write_whole

PIECE_BYTES = 2**20
PREFIX = "sha256.process_"
"""How the name of the file begins that each process leaves beside the arrays."""


class DamageError(Exception):
    """The fault of a checkpoint, as a clause that names the file or the array."""


class Cut(NamedTuple):
    """How a chunk is cut into pieces: `step` neighbours in one dim, with all of the dims behind it."""

    dim: int
    step: int
    row_bytes: tuple[int, ...]
    """For each dim, the bytes of one index of it with all of the dims behind."""


class Hashes(NamedTuple):
    """The hashes of one array."""

    piece_bytes: int
    chunks: Mapping[str, Sequence[str]]
    """From the place of a chunk in the grid, as `0.3`, to the hashes of its pieces in their order."""


def cut(chunk: Sequence[int], itemsize: int, piece_bytes: int) -> Cut:
    """How a chunk with at least one dim is cut into pieces of at most so many bytes."""
    row_bytes = tuple(itemsize * math.prod(chunk[dim + 1 :]) for dim in range(len(chunk)))
    dim = next(dim for dim, nbytes in enumerate(row_bytes) if nbytes <= piece_bytes)
    return Cut(dim, piece_bytes // row_bytes[dim], row_bytes)


def hash_chunk(value: np.ndarray, piece_bytes: int) -> list[str]:
    """The sha256 of each piece."""
    if value.ndim == 0:
        return [hash_piece(value.tobytes())]
    dim, step, row_bytes = cut(value.shape, value.itemsize, piece_bytes)
    content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    outer = value.shape[dim] * row_bytes[dim]
    starts = itertools.product(range(0, content.size, outer), range(0, outer, step * row_bytes[dim]))
    pieces = (content[at + start : at + min(start + step * row_bytes[dim], outer)] for at, start in starts)
    return [hash_piece(piece) for piece in pieces]


def hash_piece(content: Any) -> str:
    """The sha256 of anything with bytes."""
    return hashlib.sha256(content).hexdigest()


def read_hashes(folder: epath.Path) -> dict[str, Hashes]:
    """The hashes of the arrays in a folder that `hashing_handler` wrote, by name; empty where whole files were hashed.

    Raises DamageError if they are not as they were written.
    """
    found: dict[str, Hashes] = {}
    for file in folder.iterdir():
        if not file.name.startswith(PREFIX):
            continue
        try:
            arrays = {name: Hashes(**held) for name, held in json.loads(file.read_text()).items()}
        except (ValueError, TypeError, AttributeError):
            raise DamageError(f"{folder.name}/{file.name} cannot be read") from None
        for name, held in arrays.items():
            earlier = found[name].chunks if name in found else {}
            found[name] = Hashes(held.piece_bytes, {**earlier, **held.chunks})
    return found


def hashing_handler() -> Any:
    """What Orbax writes jax.Arrays with, which leaves their hashes beside them."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint._src.futures.future import CommitFutureAwaitingContractedSignals
    from orbax.checkpoint._src.metadata.array_metadata_store import Store
    from orbax.checkpoint._src.serialization import replica_slices

    class Hashing(ocp.type_handlers.ArrayHandler):
        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
            held: list[Any] = []
            with _overhearing(replica_slices, "transfer_arrays_to_host", held.extend):
                futures = await super().serialize(values, infos, args)
            return [*futures, CommitFutureAwaitingContractedSignals(_leave_hashes(infos, held), name="sha256")]

    # Replicas share the writing of an array, each a part, but not where to cut the part takes longer than to write it.
    # Orbax bounds the part and not the array, so one of many replicas writes an array of some hundred MiB alone.
    return Hashing(array_metadata_store=Store(), min_slice_bytes_for_replica_parallel=PIECE_BYTES)


async def _leave_hashes(infos: Any, held: list[Any]) -> None:
    """Writes the hashes of what this process holds on the host; Orbax commits when this is done too."""
    import jax

    arrays: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor() as pool:
        for info, array in zip(infos, held, strict=True):  # a release of Orbax that copies otherwise ends here
            chunks = {_key(part.index, array.local_shape): part.data() for part in array.replica_slices}
            hashes = {key: pool.submit(hash_chunk, value, PIECE_BYTES) for key, value in chunks.items()}
            arrays[info.name] = {"piece_bytes": PIECE_BYTES, "chunks": hashes}
    for held_array in arrays.values():
        held_array["chunks"] = {key: future.result() for key, future in held_array["chunks"].items()}
    await infos[0].await_path_creation()
    write_whole(infos[0].parent_dir / f"{PREFIX}{jax.process_index()}.json", json.dumps(arrays))


def _key(index: Sequence[slice], chunk: Sequence[int]) -> str:
    """A chunk's place in the grid, as zarr names it."""
    return ".".join(str((part.start or 0) // size) for part, size in zip(index, chunk, strict=True)) or "0"


@contextlib.contextmanager
def _overhearing(module: Any, name: str, hear: Callable[[Any], None]) -> Iterator[None]:
    """Passes on what a function of a module returns: Orbax gives its copies of arrays on the host to nobody else."""
    function = getattr(module, name)

    def overheard(*args: Any, **keywords: Any) -> Any:
        result = function(*args, **keywords)
        hear(result)
        return result

    setattr(module, name, overheard)
    try:
        yield
    finally:
        setattr(module, name, function)
