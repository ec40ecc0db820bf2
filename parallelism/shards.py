"""The model on one device's own rows, with parameters gathered as they are used.

Invariant: inside `shard_map` nothing is left to the compiler: what travels is what this file sends.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from parallax import axes
from parallelism.rules import Rules, split_by

TILE_ROWS = 8
"""Of a TPU's registers; a device whose share has fewer rows is sent all of them."""
WHOLE_COLUMNS = 1024
"""Rows of a length that is no multiple of this are not cut either; only long ones are worth padding."""


class ShardPlacement:
    """Bound inside shard_map over all axes of a mesh, each of which splits the batch."""

    def __init__(self, rules: Rules, mesh_shape: Mapping[str, int]):
        self._rules, self._mesh_shape = rules, mesh_shape

    def constrain(self, x: jax.Array, names: axes.Names) -> jax.Array:
        return x

    def gather(self, x: jax.Array, names: axes.Names) -> jax.Array:
        for dim, name in enumerate(names):
            if over := split_by(name or "", self._rules, self._mesh_shape):
                x = _gather(x, dim, tuple(over.items()))
        return x

    def local(self, fn: Callable, in_names: Sequence[axes.Names], out_names: axes.Names) -> Callable:
        return fn


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: jax.Array, dim: int, over: tuple[tuple[str, int], ...]) -> jax.Array:
    """The whole of an array cut along `dim` over axes of these sizes, outermost first; its gradient comes in shards.

    One axis after another, not all at once: a TPU's compiler makes a reduce-scatter only along one dim of its network.
    """
    return _gathered(x, dim, over)[0]


def _gathered(x: jax.Array, dim: int, over: tuple[tuple[str, int], ...]) -> tuple[jax.Array, None]:
    for axis, _ in reversed(over):
        x = jax.lax.all_gather(x, axis, axis=dim, tiled=True)
    return x, None


def _scatter(
    dim: int, over: tuple[tuple[str, int], ...], nothing: None, gradient: jax.Array
) -> tuple[jax.Array]:
    """The transpose of `_gather`, over rows of a matrix: a TPU's compiler cuts others only after it has summed them."""
    rows_first = jnp.moveaxis(gradient, dim, 0)
    length, *rest = rows_first.shape
    devices = math.prod(size for _, size in over)
    tall = length < TILE_ROWS * devices and rows_first.size % (TILE_ROWS * devices) == 0
    x = rows_first.reshape(TILE_ROWS * devices if tall else length, -1)
    columns = x.shape[1]
    if columns > 8 * WHOLE_COLUMNS:
        x = jnp.pad(x, ((0, 0), (0, -columns % WHOLE_COLUMNS)))
    x = with_layout_constraint(x, Layout((0, 1)))
    for axis, _ in over:
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(x[:, :columns].reshape(length // devices, *rest), 0, dim),)


_gather.defvjp(_gathered, _scatter)
