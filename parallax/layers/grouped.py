"""Matmuls of rows that are sorted by the weights that they are for.

Invariant: a row costs what one matmul with its own weights costs, however many weights there are and however unevenly
they are used. No row is dropped, and rows beyond all groups are zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

BLOCK = 128
"""Rows that a CPU multiplies at a time, at most."""


@jax.custom_vjp
def grouped_matmul(x_nD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Each group of rows times its own matrix, [n, F] in the dtype of x.

    The first sizes[0] rows are multiplied by w[0], the next sizes[1] by w[1], and so on. What is left of the n rows
    gives zeros. The gradient of w is added up in float32.

    Args:
      sizes_E: int32, not negative; their sum is at most n.
    """
    return _forward(x_nD, w_EDF, sizes_E)[0]


def _forward(x_nD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, tuple]:
    return _rows_by_weights(x_nD, w_EDF, sizes_E), (x_nD, w_EDF, sizes_E)


def _backward(inputs: tuple, g_nF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_nD, w_EDF, sizes_E = inputs
    of_x = _rows_by_weights(g_nF, jnp.swapaxes(w_EDF, 1, 2), sizes_E)
    return of_x, _rows_by_rows(x_nD, g_nF, sizes_E).astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _rows_by_weights(x_nD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """x_i w_e(i), [n, F]."""
    return jax.lax.platform_dependent(x_nD, w_EDF, sizes_E, cpu=_rows_by_weights_in_blocks, default=jax.lax.ragged_dot)


def _rows_by_rows(x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Σ_i x_i g_iᵀ over the rows of each group, [E, D, F] in float32."""

    def ragged(x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array) -> jax.Array:
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        wide = jnp.promote_types(x_nD.dtype, jnp.float32)
        return jax.lax.ragged_dot_general(x_nD, g_nF, sizes_E, dims, preferred_element_type=wide)

    choices = {"cpu": _rows_by_rows_in_blocks, "default": ragged}
    if x_nD.dtype in (jnp.bfloat16, jnp.float32):
        choices["tpu"] = _rows_by_rows_in_kernel
    return jax.lax.platform_dependent(x_nD, g_nF, sizes_E, **choices)


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


def _rows_by_weights_in_blocks(x_nD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    n, F = x_nD.shape[0], w_EDF.shape[2]
    rows = block_rows(n, w_EDF.shape[0])
    padded_nD = jnp.pad(x_nD, ((0, rows), (0, 0)))

    def multiply(expert: jax.Array, start: jax.Array, held: jax.Array, out_nF: jax.Array) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(padded_nD, start, rows)
        weights = jax.lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)
        # Where the block reaches beyond its group, the blocks of the next groups write over it.
        return jax.lax.dynamic_update_slice_in_dim(out_nF, block @ weights, start, axis=0)

    out_nF = _over_blocks(multiply, sizes_E, rows, n, jax.lax.full_like(x_nD, 0, shape=(n + rows, F)))
    nothing = jax.lax.full_like(out_nF, 0, shape=(rows, F))
    return jax.lax.dynamic_update_slice_in_dim(out_nF, nothing, jnp.sum(sizes_E), axis=0)[:n]


def _rows_by_rows_in_blocks(x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    (n, D), F, E = x_nD.shape, g_nF.shape[1], sizes_E.shape[0]
    rows, wide = block_rows(n, E), jnp.promote_types(x_nD.dtype, jnp.float32)
    padded_nD, padded_nF = (jnp.pad(x, ((0, rows), (0, 0))) for x in (x_nD, g_nF))

    def multiply(expert: jax.Array, start: jax.Array, held: jax.Array, sums_EDF: jax.Array) -> jax.Array:
        left, right = (jax.lax.dynamic_slice_in_dim(x, start, rows) for x in (padded_nD, padded_nF))
        left = jnp.where(jnp.arange(rows)[:, None] < held, left, 0)
        found = jnp.einsum("nD,nF->DF", left, right, preferred_element_type=wide)
        return jax.lax.dynamic_update_index_in_dim(sums_EDF, sums_EDF[expert] + found, expert, axis=0)

    return _over_blocks(multiply, sizes_E, rows, n, jax.lax.full_like(x_nD, 0, wide, shape=(E, D, F)))


def block_rows(n: int, num_groups: int) -> int:
    """Rows of a block: as many as a group has on average, rounded up to a power of two, and at most BLOCK."""
    average = max(1, n // num_groups)
    return min(BLOCK, 1 << (average - 1).bit_length())


def _over_blocks(multiply: Callable, sizes_E: jax.Array, rows: int, n: int, start: jax.Array) -> jax.Array:
    """Folds multiply(group, its first row, how many rows are its own, value) over blocks of each group in turn.

    The loop ends with the last block that holds a row, so its time goes with the rows alone.
    """
    most = n // rows + sizes_E.shape[0]
    blocks_E = -(-sizes_E // rows)
    ends_E = jnp.cumsum(blocks_E)
    number = jnp.arange(most, dtype=sizes_E.dtype)
    group = jnp.sum(ends_E[None, :] <= number[:, None], axis=1)
    group = jnp.minimum(group, sizes_E.shape[0] - 1)
    done = (number - (ends_E - blocks_E)[group]) * rows
    first = (jnp.cumsum(sizes_E) - sizes_E)[group] + done
    held = jnp.minimum(sizes_E[group] - done, rows)

    def body(block: jax.Array, value: jax.Array) -> jax.Array:
        return multiply(group[block], first[block], held[block], value)

    return jax.lax.fori_loop(0, ends_E[-1], body, start)
