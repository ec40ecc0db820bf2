"""Matmuls of rows that are sorted by the weights that they are for.

Invariant: a row costs about what one matmul with its own weights costs, however many weights there are and however
unevenly they are used. No row is dropped, and rows beyond all groups are zero.

A CPU multiplies the first rows of all groups at once where they have many, and the rest in blocks (parallax/cpu.py). A
TPU has ragged dots, and Megablox's kernel for the gradients of weights. XLA's compiler for GPUs makes of a ragged dot a
dense matmul of all rows by all weights, so GPUs have Triton kernels, written here in Pallas, whose Triton backend JAX
0.12 calls deprecated. They were compiled for GPUs and interpreted on a CPU, and never ran on a GPU.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from parallax import cpu

TILE = 128
"""Rows and columns of a result that one program of a GPU's kernel computes."""
DEPTH = 128
"""Bytes that it loads at a time along the dim that is summed over: 64 numbers in bfloat16."""
WARPS, LOADS = 8, 3
"""Warps of a program, and the depth of Triton's pipeline of loads: 96 KiB of shared memory on H100, 64 on L4, which has
99."""
BAND = 8
"""Rows of tiles that are computed beside each other, column by column: they share what they load through the cache."""

IN_KERNELS = (jnp.bfloat16, jnp.float32)
"""The dtypes that kernels take; others are multiplied by ragged dots on TPUs and GPUs."""


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
def grouped_matmul(x_nD: jax.Array, weights: cpu.Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Each group of rows times its own matrix of each stack, [n, F] for each in the dtype of x.

    The first sizes[0] rows are multiplied by w[0], the next sizes[1] by w[1], and so on. What is left of the n rows
    gives zeros, and must be finite: gradients are multiplied by zero there. Those of the weights are added up in
    float32.

    Args:
      sizes_E: int32, not negative; their sum is at most n.
    """
    return _forward(x_nD, weights, sizes_E)[0]


def _forward(x_nD: jax.Array, weights: cpu.Weights, sizes_E: jax.Array) -> tuple[tuple[jax.Array, ...], tuple]:
    def ragged(x_nD: jax.Array, weights: cpu.Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.ragged_dot(x_nD, w_EDF, sizes_E) for w_EDF in weights)

    def in_triton(x_nD: jax.Array, weights: cpu.Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(rows_by_weights_in_triton((x_nD,), (w_EDF,), sizes_E) for w_EDF in weights)

    choices: dict[str, Any] = {"cpu": cpu.rows_by_weights, "default": ragged}
    if x_nD.dtype in IN_KERNELS:
        choices["cuda"] = in_triton
    return jax.lax.platform_dependent(x_nD, weights, sizes_E, **choices), (x_nD, weights, sizes_E)


def _backward(inputs: tuple, grads: tuple[jax.Array, ...]) -> tuple[jax.Array, cpu.Weights, None]:
    x_nD, weights, sizes_E = inputs
    return _grads_by_weights(grads, weights, sizes_E), _rows_by_rows(x_nD, grads, sizes_E), None


grouped_matmul.defvjp(_forward, _backward)


def _grads_by_weights(grads: tuple[jax.Array, ...], weights: cpu.Weights, sizes_E: jax.Array) -> jax.Array:
    """Σ_w g_i w_e(i)ᵀ over the stacks, [n, D]."""

    def ragged(grads: tuple[jax.Array, ...], weights: cpu.Weights, sizes_E: jax.Array) -> jax.Array:
        transposed = [jnp.swapaxes(w_EDF, 1, 2) for w_EDF in weights]
        first, *others = (jax.lax.ragged_dot(g, w, sizes_E) for g, w in zip(grads, transposed, strict=True))
        return sum(others, first)

    choices: dict[str, Any] = {"cpu": cpu.grads_by_weights, "default": ragged}
    if grads[0].dtype in IN_KERNELS:
        choices["cuda"] = functools.partial(rows_by_weights_in_triton, transposed=True)
    return jax.lax.platform_dependent(grads, weights, sizes_E, **choices)


def _rows_by_rows(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Σ_i x_i g_iᵀ over the rows of each group, [E, D, F] for each g: added up in float32, and in x's dtype."""
    wide = jnp.promote_types(x_nD.dtype, jnp.float32)

    def ragged(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
        found = (jax.lax.ragged_dot_general(x_nD, g_nF, sizes_E, dims, preferred_element_type=wide) for g_nF in grads)
        return tuple(each.astype(x_nD.dtype) for each in found)

    def in_megablox(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(rows_by_rows_in_megablox(x_nD, g_nF, sizes_E).astype(x_nD.dtype) for g_nF in grads)

    def in_triton(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(rows_by_rows_in_triton(x_nD, g_nF, sizes_E) for g_nF in grads)

    choices: dict[str, Any] = {"cpu": cpu.rows_by_rows, "default": ragged}
    if x_nD.dtype in IN_KERNELS:
        choices |= {"tpu": in_megablox, "cuda": in_triton}
    return jax.lax.platform_dependent(x_nD, grads, sizes_E, **choices)


def rows_by_rows_in_megablox(
    x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array, interpret: bool = False
) -> jax.Array:
    """On a TPU: of the ragged dots libtpu 0.0.42 makes this one E dense matmuls of all rows.

    The kernel needs whole tiles of the rows that it sums over; tiles that reach beyond D and F lose nothing.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # late: Pallas takes its time to import

    tile = next((rows for rows in (512, 256) if x_nD.shape[0] % rows == 0), 128)
    x_nD, g_nF = (jnp.pad(x, ((0, -x.shape[0] % tile), (0, 0))) for x in (x_nD, g_nF))
    tiling = (tile, *(min(512, -(-x.shape[1] // 128) * 128) for x in (x_nD, g_nF)))
    with jax.numpy_rank_promotion("allow"):
        return tgmm(x_nD.T, g_nF, sizes_E, jnp.float32, tiling, interpret=interpret)


def rows_by_weights_in_triton(
    rows: tuple[jax.Array, ...],
    weights: cpu.Weights,
    sizes_E: jax.Array,
    transposed: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """On a GPU: Σ over the pairs of [n, K] and [E, K, F] of each row by its group's matrix, [n, F].

    A tile of rows is of one group, of which it begins with the first row or TILE rows after the tile before. What of it
    belongs to the next group is masked, and reads as zeros.

    Args:
      transposed: the matrices are [E, F, K].
    """
    from jax.experimental import pallas as pl  # late: Pallas takes its time to import
    from jax.experimental.pallas import triton

    n, E, F = rows[0].shape[0], weights[0].shape[0], weights[0].shape[1 if transposed else 2]
    group_t, first_t, end_t = _tiles_of_rows(sizes_E, n)
    shape = len(group_t), pl.cdiv(F, TILE)

    def kernel(group_ref: Any, first_ref: Any, end_ref: Any, *refs: Any) -> None:
        *pairs, y_ref = refs
        tile, column = _place(pl.program_id(0), *shape)
        group, first, end = group_ref[tile], first_ref[tile], end_ref[tile]
        into, out = pl.ds(first, TILE), pl.ds(column * TILE, TILE)
        own_r1, own_c = _below(first, TILE, end)[:, None], _below(column * TILE, TILE, F)

        def add_pair(y_rc: jax.Array, x_ref: Any, w_ref: Any) -> jax.Array:
            K, depth = x_ref.shape[1], DEPTH // x_ref.dtype.itemsize

            def add(step: jax.Array, y_rc: jax.Array) -> jax.Array:
                deep, own_k = pl.ds(step * depth, depth), _below(step * depth, depth, K)
                x_rk = triton.load(x_ref.at[into, deep], mask=own_r1 & own_k[None], other=0.0)
                if transposed:
                    w_ck = triton.load(w_ref.at[group, out, deep], mask=own_c[:, None] & own_k[None], other=0.0)
                    return y_rc + _dot(x_rk, w_ck, 1, 1)
                w_kc = triton.load(w_ref.at[group, deep, out], mask=own_k[:, None] & own_c[None], other=0.0)
                return y_rc + _dot(x_rk, w_kc, 1, 0)

            # Rows of no group, where the loop ends at once, are zeros.
            return jax.lax.fori_loop(0, (group < E).astype(jnp.int32) * pl.cdiv(K, depth), add, y_rc)

        y_rc = jnp.zeros((TILE, TILE), jnp.float32)
        for x_ref, w_ref in zip(pairs[: len(rows)], pairs[len(rows) :], strict=True):
            y_rc = add_pair(y_rc, x_ref, w_ref)
        triton.store(y_ref.at[into, out], y_rc.astype(y_ref.dtype), mask=own_r1 & own_c[None])

    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((n, F), rows[0].dtype),
        grid=(math.prod(shape),),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=LOADS),
        interpret=interpret,
        name="rows_by_weights",
    )(group_t, first_t, end_t, *rows, *weights)


def _tiles_of_rows(sizes_E: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of each tile, E where its rows are of none, its first row, and the end of the group; int32.

    They are as many as any sizes could need, in whole bands. What is left over begins beyond the last row.
    """
    sizes_G = jnp.append(sizes_E, n - jnp.sum(sizes_E, dtype=jnp.int32))
    until_G, tiles_G = jnp.cumsum(sizes_G, dtype=jnp.int32), -(-sizes_G // TILE)
    before_G, most = jnp.cumsum(tiles_G, dtype=jnp.int32) - tiles_G, (n + len(sizes_G) * (TILE - 1)) // TILE
    number_t = jnp.arange(-(-most // BAND) * BAND, dtype=jnp.int32)
    group_t = jnp.searchsorted(before_G[1:], number_t, side="right", method="compare_all")
    first_t = (until_G - sizes_G)[group_t] + (number_t - before_G[group_t]) * TILE
    return group_t, first_t, until_G[group_t]


def rows_by_rows_in_triton(x_nD: jax.Array, g_nF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """On a GPU: [E, D, F] in x's dtype, of which a program adds up one tile over all rows of the group."""
    from jax.experimental import pallas as pl  # late: Pallas takes its time to import
    from jax.experimental.pallas import triton

    E, D, F, depth = len(sizes_E), x_nD.shape[1], g_nF.shape[1], DEPTH // x_nD.dtype.itemsize
    shape = pl.cdiv(D, TILE), pl.cdiv(F, TILE)

    def kernel(first_ref: Any, end_ref: Any, x_ref: Any, g_ref: Any, w_ref: Any) -> None:
        tile, column = _place(pl.program_id(0), *shape)
        group = pl.program_id(1)
        first, end = first_ref[group], end_ref[group]
        into, out = pl.ds(tile * TILE, TILE), pl.ds(column * TILE, TILE)
        own_d, own_f = _below(tile * TILE, TILE, D), _below(column * TILE, TILE, F)

        def add(step: jax.Array, w_df: jax.Array) -> jax.Array:
            start = first + step * depth
            some, own_r1 = pl.ds(start, depth), _below(start, depth, end)[:, None]
            x_rd = triton.load(x_ref.at[some, into], mask=own_r1 & own_d[None], other=0.0)
            g_rf = triton.load(g_ref.at[some, out], mask=own_r1 & own_f[None], other=0.0)
            return w_df + _dot(x_rd, g_rf, 0, 0)

        w_df = jax.lax.fori_loop(0, (end - first + depth - 1) // depth, add, jnp.zeros((TILE, TILE), jnp.float32))
        triton.store(w_ref.at[group, into, out], w_df.astype(w_ref.dtype), mask=own_d[:, None] & own_f[None])

    until_E = jnp.cumsum(sizes_E, dtype=jnp.int32)
    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((E, D, F), x_nD.dtype),
        grid=(math.prod(shape), E),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=LOADS),
        interpret=interpret,
        name="rows_by_rows",
    )(until_E - sizes_E, until_E, x_nD, g_nF)


def _place(number: jax.Array, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """The row and column of the tile that a program with this number computes."""
    band = math.gcd(BAND, rows)
    within = number % (band * columns)
    return number // (band * columns) * band + within % band, within // band


def _below(start: jax.Array, count: int, end: jax.Array | int) -> jax.Array:
    """Which of so many numbers from `start` on are. Of a dim in whole steps all are: Triton drops such a mask."""
    if isinstance(end, int) and end % count == 0:
        return jnp.ones(count, bool)
    return start + jnp.arange(count, dtype=jnp.int32) < end


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Summed over these dims in float32.

    Float32 is rounded to TF32 before, as in a GPU's dense matmuls, unless jax_default_matmul_precision says otherwise.
    """
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
