"""Matmuls of rows that are sorted by the weights that they are for.

Invariant: a row costs what one matmul with its own weights costs, however many weights there are and however unevenly
they are used. No row is dropped, and rows beyond all groups are zero.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

BLOCKS = (768, 256, 64)
"""Rows that a CPU multiplies at a time: as many as a group still has. A large block keeps all cores busy, a small one
computes little that nobody asked for."""

Weights = tuple[jax.Array, ...]
"""One or several stacks of matrices, each [E, D, F] with an F of its own."""


def order_by_group(group_n: jax.Array, num_groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where rows come from if they are sorted by their groups, where each goes, and how many each group has; int32.

    Rows of one group stay in order. Those of a group that is none of them come last, and are not counted.

    Args:
      group_n: int32, from 0 to num_groups.
    """

    def sort(group_n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        from_n = jnp.argsort(group_n, stable=True).astype(jnp.int32)
        hit_nE = group_n[:, None] == jnp.arange(num_groups)[None]
        return from_n, jnp.argsort(from_n).astype(jnp.int32), jnp.sum(hit_nE, axis=0, dtype=jnp.int32)

    def count(group_n: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A CPU counts 3,072 rows of 8 groups in a fifth of the time that it sorts them in, twice."""
        hit_nE = (group_n[:, None] == jnp.arange(num_groups + 1)[None]).astype(jnp.int32)
        until_nE = jnp.cumsum(hit_nE, axis=0, dtype=jnp.int32)
        sizes_E = until_nE[-1]
        before_E = jnp.cumsum(sizes_E, dtype=jnp.int32) - sizes_E
        to_n = jnp.sum(hit_nE * (before_E[None] + until_nE - 1), axis=1, dtype=jnp.int32)
        number_n = jnp.arange(len(group_n), dtype=jnp.int32)
        return jnp.zeros_like(number_n).at[to_n].set(number_n, unique_indices=True), to_n, sizes_E[:-1]

    return jax.lax.platform_dependent(group_n, cpu=count, default=sort)


@jax.custom_vjp
def grouped_matmul(x_nD: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Each group of rows times its own matrix of each stack, [n, F] for each in the dtype of x.

    The first sizes[0] rows are multiplied by w[0], the next sizes[1] by w[1], and so on. What is left of the n rows
    gives zeros. The gradients of the weights are added up in float32.

    Args:
      sizes_E: int32, not negative; their sum is at most n.
    """
    return _forward(x_nD, weights, sizes_E)[0]


def _forward(x_nD: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[tuple[jax.Array, ...], tuple]:
    def ragged(x_nD: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.ragged_dot(x_nD, w_EDF, sizes_E) for w_EDF in weights)

    found = jax.lax.platform_dependent(x_nD, weights, sizes_E, cpu=_rows_by_weights_in_blocks, default=ragged)
    return found, (x_nD, weights, sizes_E)


def _backward(inputs: tuple, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, Weights, None]:
    x_nD, weights, sizes_E = inputs
    of_weights = _rows_by_rows(x_nD, grads, sizes_E)
    return (
        _grads_by_weights(grads, weights, sizes_E),
        tuple(found.astype(w_EDF.dtype) for found, w_EDF in zip(of_weights, weights, strict=True)),
        None,
    )


grouped_matmul.defvjp(_forward, _backward)


def _grads_by_weights(grads: tuple[jax.Array, ...], weights: Weights, sizes_E: jax.Array) -> jax.Array:
    """Σ_w g_i w_e(i)ᵀ over the stacks, [n, D]."""

    def ragged(grads: tuple[jax.Array, ...], weights: Weights, sizes_E: jax.Array) -> jax.Array:
        transposed = [jnp.swapaxes(w_EDF, 1, 2) for w_EDF in weights]
        first, *others = (jax.lax.ragged_dot(g, w, sizes_E) for g, w in zip(grads, transposed, strict=True))
        return sum(others, first)

    return jax.lax.platform_dependent(grads, weights, sizes_E, cpu=_grads_by_weights_in_blocks, default=ragged)


def _rows_by_rows(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Σ_i x_i g_iᵀ over the rows of each group, [E, D, F] in float32 for each g."""
    wide = jnp.promote_types(x_nD.dtype, jnp.float32)

    def ragged(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        return tuple(
            jax.lax.ragged_dot_general(x_nD, g_nF, sizes_E, dims, preferred_element_type=wide) for g_nF in grads
        )

    def in_kernel(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_rows_by_rows_in_kernel(x_nD, g_nF, sizes_E) for g_nF in grads)

    choices = {"cpu": _rows_by_rows_in_blocks, "default": ragged}
    if x_nD.dtype in (jnp.bfloat16, jnp.float32):
        choices["tpu"] = in_kernel
    return jax.lax.platform_dependent(x_nD, grads, sizes_E, **choices)


def _rows_by_rows_in_kernel(x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """By Megablox: of the ragged dots libtpu 0.0.42 makes this one E dense matmuls of all rows.

    The kernel needs whole tiles of the rows that it sums over; tiles that reach beyond D and F lose nothing.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # late: Pallas takes its time to import

    tile = next((rows for rows in (512, 256) if x_nD.shape[0] % rows == 0), 128)
    x_nD, g_nF = (jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) for x in (x_nD, g_nF))
    tiling = (tile, *(min(512, -(-x.shape[1] // 128) * 128) for x in (x_nD, g_nF)))
    with jax.numpy_rank_promotion("allow"):
        return tgmm(x_nD.T, g_nF, sizes_E, jnp.float32, tiling, interpret=interpret)


def _rows_by_weights_in_blocks(x_nD: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    widths = [w_EDF.shape[2] for w_EDF in weights]

    def multiply(block: Block, found: list[jax.Array]) -> list[jax.Array]:
        y_rF = block.of(x_nD) @ jnp.concatenate(block.matrices(weights), axis=1)
        return [block.put(out_nF, part) for out_nF, part in zip(found, _split(y_rF, widths), strict=True)]

    nothing = [jax.lax.full_like(x_nD, 0, shape=(x_nD.shape[0], width)) for width in widths]
    return tuple(_over_blocks(multiply, sizes_E, x_nD.shape[0], nothing))


def _grads_by_weights_in_blocks(grads: tuple[jax.Array, ...], weights: Weights, sizes_E: jax.Array) -> jax.Array:
    n = grads[0].shape[0]

    def multiply(block: Block, out_nD: jax.Array) -> jax.Array:
        g_rF = jnp.concatenate([block.of(g_nF) for g_nF in grads], axis=1)
        return block.put(out_nD, jnp.einsum("rF,DF->rD", g_rF, jnp.concatenate(block.matrices(weights), axis=1)))

    return _over_blocks(multiply, sizes_E, n, jax.lax.full_like(grads[0], 0, shape=(n, weights[0].shape[1])))


def _rows_by_rows_in_blocks(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    (n, D), E, widths = x_nD.shape, sizes_E.shape[0], [g_nF.shape[1] for g_nF in grads]
    wide = jnp.promote_types(x_nD.dtype, jnp.float32)

    def multiply(block: Block, sums: list[jax.Array]) -> list[jax.Array]:
        x_rD, g_rF = block.of(x_nD), jnp.concatenate([block.of(g_nF) for g_nF in grads], axis=1)
        if block.own_r1 is not None:
            x_rD = jnp.where(block.own_r1, x_rD, 0)
        parts = _split(jnp.einsum("rD,rF->DF", x_rD, g_rF, preferred_element_type=wide), widths)
        return [sums_EDF.at[block.group].add(part) for sums_EDF, part in zip(sums, parts, strict=True)]

    nothing = [jax.lax.full_like(x_nD, 0, wide, shape=(E, D, width)) for width in widths]
    return tuple(_over_blocks(multiply, sizes_E, n, nothing))


def _split(x_rF: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Its columns, so many for each."""
    return jnp.split(x_rF, list(itertools.accumulate(widths[:-1])), axis=1)


@dataclasses.dataclass(frozen=True)
class Block:
    """So many rows in a row, from `first` on, that are multiplied at once.

    own_r1: which of them are the block's group's, and of no block before; None if all are.
    """

    rows: int
    group: jax.Array
    first: jax.Array
    own_r1: jax.Array | None

    def matrices(self, weights: Weights) -> list[jax.Array]:
        """The group's own of each stack."""
        return [jax.lax.dynamic_index_in_dim(w_EDF, self.group, keepdims=False) for w_EDF in weights]

    def of(self, x_nD: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_nD, self.first, self.rows)

    def put(self, out_nF: jax.Array, y_rF: jax.Array) -> jax.Array:
        own_rF = y_rF if self.own_r1 is None else jnp.where(self.own_r1, y_rF, self.of(out_nF))
        return jax.lax.dynamic_update_slice_in_dim(out_nF, own_rF, self.first, axis=0)


def block_sizes(n: int, num_groups: int) -> list[int]:
    """Rows of a block, from the largest on: BLOCKS, and where groups have fewer rows on average a size like that."""
    average = 1 << (max(1, n // num_groups) - 1).bit_length()
    least = min(BLOCKS[-1], average, n)
    return [*(rows for rows in BLOCKS if least < rows <= n), least]


def _over_blocks(multiply: Callable[[Block, Any], Any], sizes_E: jax.Array, n: int, value: Any) -> Any:
    """Folds `multiply` over blocks of each group: as many of the largest as it fills, then smaller ones.

    A loop ends with the last block that holds a row, so that its time goes with the rows alone.
    """
    next_E, left_E = jnp.cumsum(sizes_E) - sizes_E, sizes_E
    *larger, least = block_sizes(n, sizes_E.shape[0])
    for rows in larger:
        value = _over_equal_blocks(multiply, rows, left_E // rows, next_E, value)
        next_E, left_E = next_E + left_E // rows * rows, left_E % rows

    def multiply_own(block: Block, value: Any) -> Any:
        # The last block of a group reaches beyond it, or beyond the rows, where it begins earlier instead.
        first = jnp.minimum(block.first, n - least)
        row_r = first + jnp.arange(least, dtype=sizes_E.dtype)
        own_r = (row_r >= block.first) & (row_r < (next_E + left_E)[block.group])
        return multiply(dataclasses.replace(block, first=first, own_r1=own_r[:, None]), value)

    return _over_equal_blocks(multiply_own, least, -(-left_E // least), next_E, value)


def _over_equal_blocks(
    multiply: Callable[[Block, Any], Any], rows: int, counts_E: jax.Array, next_E: jax.Array, value: Any
) -> Any:
    """Folds `multiply` over so many blocks of each group, whose first begins at `next`."""
    ends_E = jnp.cumsum(counts_E)

    def body(number: jax.Array, value: Any) -> Any:
        group = jnp.sum(ends_E <= number)
        first = next_E[group] + (number - (ends_E - counts_E)[group]) * rows
        return multiply(Block(rows, group, first, None), value)

    return jax.lax.fori_loop(0, ends_E[-1], body, value)
