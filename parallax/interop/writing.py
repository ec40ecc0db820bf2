"""Parameters into safetensors files.

Invariant: beside the parameters no more than a few pieces of PIECE elements are held: the files are written a piece of
a tensor at a time, which the safetensors library, taking all of a file at once, cannot do.
"""

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from parallax.config import TransformerConfig
from parallax.interop.llama import Tensor, named
from parallax.interop.reading import INDEX, SINGLE
from parallax.model.transformer import Params

DTYPES = {"float32": ("F32", np.dtype(np.float32)), "bfloat16": ("BF16", np.dtype(jnp.bfloat16))}
MAX_FILE_BYTES = 5 * 10**9
PIECE = 2**18
"""Elements written at a time, of which a few copies are made: 1 MiB in float32."""

_cut = jax.jit(jax.lax.dynamic_slice, static_argnums=2)


def write_params(
    params: Params,
    config: TransformerConfig,
    folder: Path,
    dtype: str = "float32",
    max_file_bytes: int = MAX_FILE_BYTES,
    piece: int = PIECE,
) -> None:
    """Writes model.safetensors, or several files of at most `max_file_bytes` with their index.

    A tensor that is larger alone gets a file of its own. Raises OSError if a file cannot be written.
    """
    _, kind = DTYPES[dtype]
    entries = named(config)
    sizes = {name: math.prod(entry.shape_there) * kind.itemsize for name, (entry, _) in entries.items()}
    groups = _groups(sizes, max_file_bytes)
    files = [SINGLE] if len(groups) == 1 else [
        f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)
    ]  # fmt: skip
    for file, group in zip(files, groups, strict=True):
        with (folder / file).open("wb") as out:
            _write_header(out, {name: entries[name][0] for name in group}, dtype)
            for name in group:
                for rows in _rows(params, *entries[name], piece):
                    out.write(rows.astype(kind, copy=False).reshape(-1).view(np.uint8).data)
            out.flush()
            os.fsync(out.fileno())
    if len(groups) > 1:
        file_of = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _groups(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names file by file, in their order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_header(out: BinaryIO, entries: dict[str, Tensor], dtype: str) -> None:
    """The length of the header in eight bytes, and the header: dtype, shape and place of each tensor as JSON."""
    spelled, kind = DTYPES[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers reads no other
    end = 0
    for name, entry in entries.items():
        start, end = end, end + math.prod(entry.shape_there) * kind.itemsize
        header[name] = {"dtype": spelled, "shape": list(entry.shape_there), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begin where any number may begin
    out.write(len(text).to_bytes(8, "little") + text)


def _rows(params: Params, entry: Tensor, numbers: tuple[int, ...], piece: int) -> Iterator[np.ndarray]:
    """A tensor as it is stored there, some rows at a time."""
    place = [stacked.index(number) for stacked, number in zip(entry.stack, numbers, strict=True)]
    for bounds in entry.cut(entry.whole, piece):
        start = tuple(np.int32(at) for at in (*place, *(s.start for s in bounds)))
        sizes = (*(1 for _ in place), *(s.stop - s.start for s in bounds))
        turns = []
        for path in entry.turns or (entry.path,):
            block = np.asarray(_cut(functools.reduce(dict.__getitem__, path, params), start, sizes))
            turns.append(entry.send(block.reshape(sizes[len(place) :])))
        yield np.stack(turns, axis=-1) if entry.turns else turns[0]
