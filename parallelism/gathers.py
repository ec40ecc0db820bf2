"""The model on one device's own rows, with parameters gathered as they are used.

Invariant: inside `shard_map` nothing is left to the compiler: what travels is what this file sends.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from parallax import axes
from parallelism.rules import Rules, split_by

TILE_ROWS = 8
"""Of a TPU's registers; a device whose share has fewer rows is sent all of them."""
WHOLE_COLUMNS = 1024
"""Rows of a length that is no multiple of this are not cut either; only long ones are worth padding."""
PIECE_COLUMNS = 16 * WHOLE_COLUMNS
"""Gradients of longer rows, which are those of an embedding table, are sent in pieces."""
LARGE = 2**28
"""Numbers of a table that is gathered in pieces too: below, a second copy costs less than the buffer for pieces."""


class ShardPlacement(axes.Placement):
    """Bound inside shard_map over all axes of a mesh, each of which splits the batch."""

    def __init__(self, rules: Rules, mesh_shape: Mapping[str, int], ragged: bool = False):
        self._rules, self._mesh_shape, self.ragged = rules, mesh_shape, ragged

    def gather(self, x: jax.Array, names: axes.Names) -> jax.Array:
        for dim, name in enumerate(names):
            over = split_by(name or "", self._rules, self._mesh_shape)
            if over and name != "experts":  # tokens travel to these
                x = _gather(x, dim, tuple(over.items()))
        return x

    def group(self, name: str) -> tuple[str, ...]:
        return tuple(split_by(name, self._rules, self._mesh_shape))


class OnShards(axes.Placement):
    """Bound inside `local` of a mesh: arrays are what a device holds, and nothing in them is to be placed.

    Args:
      split: the mesh axes that split each logical axis of the arguments.
    """

    def __init__(self, split: Mapping[str, tuple[str, ...]], ragged: bool):
        self._split, self.ragged = split, ragged

    def group(self, name: str) -> tuple[str, ...]:
        return self._split.get(name, ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, dim: int, over: tuple[tuple[str, int], ...]) -> jax.Array:
    """The whole of an array cut along `dim` over axes of these sizes, outermost first; its gradient comes in shards.

    One axis after another, not all at once: a TPU's compiler makes a reduce-scatter only along one dim of its network.
    """
    return _gathered(x, dim, over)[0]


def _gathered(x: jax.Array, dim: int, over: tuple[tuple[str, int], ...]) -> tuple[jax.Array, None]:
    def gather(x: jax.Array, dim: int = 0) -> jax.Array:
        for axis, _ in reversed(over):
            x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
        return x

    rows, columns = x.shape[dim], x.size // x.shape[dim]
    if columns <= PIECE_COLUMNS or x.size * _devices(over) < LARGE:
        return gather(x, dim), None
    shares_first = jnp.moveaxis(x, dim, 0)
    whole = _in_pieces(gather, shares_first.reshape(rows, columns), rows * _devices(over))
    return jnp.moveaxis(whole.reshape(-1, *shares_first.shape[1:]), 0, dim), None


def _scatter(dim: int, over: tuple[tuple[str, int], ...], nothing: None, gradient: jax.Array) -> tuple[jax.Array]:
    """The transpose of `_gather`, over rows of a matrix: a TPU's compiler cuts others only after it has summed them."""

    def scatter(x: jax.Array) -> jax.Array:
        x = with_layout_constraint(x, Layout((0, 1)))
        for axis, _ in over:
            x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
        return x

    rows_first = jnp.moveaxis(gradient, dim, 0)
    length, *rest = rows_first.shape
    devices = _devices(over)
    tall = length < TILE_ROWS * devices and rows_first.size % (TILE_ROWS * devices) == 0
    x = rows_first.reshape(TILE_ROWS * devices if tall else length, -1)
    columns = x.shape[1]
    if columns > PIECE_COLUMNS:
        x = _in_pieces(scatter, x, x.shape[0] // devices)
    elif columns > 8 * WHOLE_COLUMNS:
        x = scatter(jnp.pad(x, ((0, 0), (0, -columns % WHOLE_COLUMNS))))[:, :columns]
    else:
        x = scatter(x)
    return (jnp.moveaxis(x.reshape(length // devices, *rest), 0, dim),)


def _in_pieces(send: Callable[[jax.Array], jax.Array], x: jax.Array, rows: int) -> jax.Array:
    """`send(x)`, a matrix of so many rows, some columns after others: what it copies on the way is then small."""
    columns = x.shape[1]
    pieces = math.ceil(columns / PIECE_COLUMNS)
    width = math.ceil(columns / pieces / WHOLE_COLUMNS) * WHOLE_COLUMNS

    def one(number: jax.Array, sent: jax.Array) -> jax.Array:
        start = jnp.minimum(number * width, columns - width)  # the last overlaps the one before
        piece = send(jax.lax.dynamic_slice_in_dim(x, start, width, axis=1))
        return jax.lax.dynamic_update_slice_in_dim(sent, piece, start, axis=1)

    return jax.lax.fori_loop(0, pieces, one, jax.lax.full_like(x, 0, shape=(rows, columns)))


def _devices(over: tuple[tuple[str, int], ...]) -> int:
    return math.prod(size for _, size in over)


_gather.defvjp(_gathered, _scatter)
