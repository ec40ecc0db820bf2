"""Choices that hold only where the target is a CPU, and what each gains there.

Invariant: results are those of every other device but for the last bits. A function here asks for what its caller's
arrays are placed on, or leaves the choice to the lowering, which knows its target.

The second half is what the lowering of parallax/layers/grouped.py chooses on a CPU: it multiplies rows that are sorted
by the weights that they are for, at any load. XLA gives a matmul of few rows to one core. So the first rows of all
groups are multiplied at once, where at least 5/8 of what is computed so is asked for; what is left, or all of it,
follows in blocks, as large as a group has rows for. Up to 1.6 times as many rows are computed as there are, and up to a
small block more of each group.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

FEW_LAYERS = 12
"""Layers that a CPU takes one by one; more are scanned, since a longer program takes longer to compile."""
IN_HALVES = 2048
"""From so many tokens on, rows × room for answers, the first half of the answers attends to a smaller cache.
NANO with 16 prompts and 128 tokens each takes 0.87 of the time; a second loop takes 0.4 s to compile."""
BLOCKS = (2048, 768, 256, 64)
"""Rows of a block: as many as a group still has, or nearly. A large block keeps all cores busy, a small one computes
little that nobody asked for."""
UNUSED_SHARE, UNUSED_ROWS = 3 / 8, 256
"""How much of a larger block may be other groups' rows, computed for nothing: the smaller blocks that it spares would
take as long. The share holds for the first rows of all groups, too."""
FIRST_ROWS = 192
"""From so many rows a group on, several are faster at once: XLA shares their matmuls out among the cores."""

Weights = tuple[jax.Array, ...]
"""One or several stacks of matrices, each [E, D, F] with an F of its own."""


def lists_layers(num_layers: int, params: Any) -> bool:
    """Whether inference is faster with weights and cache layer by layer: on a lone CPU, in a model of few layers.

    A CPU copies a layer out of the stack before it multiplies with it, at every token. Other devices read it in place
    and have no memory for a copy. On a mesh a layer's own cache would be gathered to be written.
    """
    devices = {device for x in jax.tree.leaves(params) if isinstance(x, jax.Array) for device in x.devices()}
    platforms = {device.platform for device in devices} or {jax.default_backend()}
    return platforms == {"cpu"} and len(devices) <= 1 and num_layers <= FEW_LAYERS


def first_room(num_rows: int, prompt_width: int, capacity: int) -> int:
    """For how many tokens a cache of listed layers has room at first: half of the answers, or all of them if few."""
    in_halves = num_rows * (capacity - prompt_width) >= IN_HALVES
    return (prompt_width + capacity) // 2 if in_halves else capacity


def project_joined(x_BTD: jax.Array, weights: Sequence[jax.Array]) -> list[jax.Array]:
    """x W for several weights [D, H, K] by one matmul with all of them side by side.

    Listed layers join them before the loop over tokens: SMALL-1365 generates 1.08 times as fast. NANO would train at
    0.92 of the speed.
    """
    heads = jnp.einsum("BTD,DHK->BTHK", x_BTD, jnp.concatenate(weights, axis=1))
    return _split(heads, [weight.shape[1] for weight in weights], axis=2)


def unembed(table_WD: jax.Array, x_BTD: jax.Array, dtype: Any) -> jax.Array:
    """Logits [B, T, W] in a dtype.

    One token each of several rows: XLA on CPUs copies the second operand, and takes 1.4 times as long if that is the
    table.
    """

    def table_last(table_WD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        return jnp.einsum("BTD,WD->BTW", x_BTD, table_WD, preferred_element_type=dtype)

    def table_first(table_WD: jax.Array, x_BTD: jax.Array) -> jax.Array:
        logits_WBT = jnp.einsum("WD,BTD->WBT", table_WD, x_BTD, preferred_element_type=dtype)
        # Without the barrier XLA would exchange the operands again.
        return jnp.moveaxis(jax.lax.optimization_barrier(logits_WBT), 0, -1)

    if x_BTD.shape[0] > x_BTD.shape[1] == 1:
        return jax.lax.platform_dependent(table_WD, x_BTD, cpu=table_first, default=table_last)
    return table_last(table_WD, x_BTD)


def argmax(logits_BV: jax.Array) -> jax.Array:
    """The first of a row's greatest, int32 [B]. XLA's own argmax takes several times as long on a CPU."""

    def first_equal(logits_BV: jax.Array) -> jax.Array:
        best_B1 = jnp.max(logits_BV, axis=1, keepdims=True)
        ids_1V = jnp.arange(logits_BV.shape[1], dtype=jnp.int32)[None]
        # Where nothing equals the greatest, which then is NaN, the last id is still one of the vocabulary.
        return jnp.min(jnp.where(logits_BV == best_B1, ids_1V, logits_BV.shape[1] - 1), axis=1)

    def reduced(logits_BV: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)

    return jax.lax.platform_dependent(logits_BV, cpu=first_equal, default=reduced)


def replace_if(wanted: jax.Array, make_new: Callable[[], Any], old: Any) -> Any:
    """The tree of arrays that `make_new` gives if `wanted`, bool [], is true, else `old`, which has the same shapes and
    dtypes. All devices want the same, since `make_new` may communicate.

    XLA's fusions have one result on CPUs. Where new moments are selected they are computed again for the parameters,
    from old ones that are copied before they are overwritten. In a branch each is computed once, in its place: nano-moe
    trains 1.05 to 1.08 times as fast with AdamW.
    """
    return jax.lax.platform_dependent(
        cpu=lambda: replace_in_branch(wanted, make_new, old), default=lambda: replace_by_select(wanted, make_new, old)
    )


def replace_in_branch(wanted: jax.Array, make_new: Callable[[], Any], old: Any) -> Any:
    """As `replace_if`, on CPUs."""
    return jax.lax.cond(wanted, make_new, lambda: old)


def replace_by_select(wanted: jax.Array, make_new: Callable[[], Any], old: Any) -> Any:
    """As `replace_if`, on other devices."""
    return jax.tree.map(lambda new, old: jnp.where(wanted, new, old), make_new(), old)


def rows_by_weights(x_nD: jax.Array, weights: Weights, sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Each group of rows times its own matrix [D, F] of each stack, [n, F] for each; rows of no group are zeros."""
    widths, weights = [w_EDF.shape[2] for w_EDF in weights], _joined(weights, x_nD.shape[0])

    def at_once(x_ErD: jax.Array) -> jax.Array:
        (w_EDF,) = weights  # one, for _joined joins them where _first_rows calls this
        return jnp.einsum("ErD,EDF->ErF", x_ErD, w_EDF)

    def multiply(block: Block, out_nF: jax.Array) -> jax.Array:
        return block.put(out_nF, block.of(x_nD) @ jnp.concatenate(block.matrices(weights), axis=1))

    return tuple(_split(_by_rows(at_once, multiply, x_nD, sizes_E, sum(widths)), widths))


def grads_by_weights(grads: tuple[jax.Array, ...], weights: Weights, sizes_E: jax.Array) -> jax.Array:
    """Σ_w g_i w_e(i)ᵀ over the stacks, [n, D]; rows of no group are zeros."""
    weights = _joined(weights, grads[0].shape[0])

    def at_once(g_ErF: jax.Array) -> jax.Array:
        (w_EDF,) = weights  # one, as above
        return jnp.einsum("ErF,EDF->ErD", g_ErF, w_EDF)

    def multiply(block: Block, out_nD: jax.Array) -> jax.Array:
        w_DF = jnp.concatenate(block.matrices(weights), axis=1)
        return block.put(out_nD, jnp.einsum("rF,DF->rD", block.of(g_nF), w_DF))

    g_nF = jnp.concatenate(grads, axis=1)
    return _by_rows(at_once, multiply, g_nF, sizes_E, weights[0].shape[1])


def rows_by_rows(x_nD: jax.Array, grads: tuple[jax.Array, ...], sizes_E: jax.Array) -> tuple[jax.Array, ...]:
    """Σ_i x_i g_iᵀ over the rows of each group, [E, D, F] for each g: added up in float32, and in x's dtype."""
    E, D, widths = sizes_E.shape[0], x_nD.shape[1], [g_nF.shape[1] for g_nF in grads]
    wide = jnp.promote_types(x_nD.dtype, jnp.float32)
    g_nF = jnp.concatenate(grads, axis=1)

    def at_once(row_Er: jax.Array, own_Er: jax.Array) -> jax.Array:
        x_ErD = jnp.where(own_Er[..., None], x_nD[row_Er], 0)
        return jnp.einsum("ErD,ErF->EDF", x_ErD, g_nF[row_Er], preferred_element_type=wide)

    def multiply(block: Block, sums_EDF: jax.Array) -> jax.Array:
        x_rD = jnp.where(block.own_r1, block.of(x_nD), 0)
        part = jnp.einsum("rD,rF->DF", x_rD, block.of(g_nF), preferred_element_type=wide)
        (sum_DF,) = block.matrices((sums_EDF,))
        return jax.lax.dynamic_update_index_in_dim(sums_EDF, sum_DF + part, block.group, axis=0)

    nothing = jax.lax.full_like(x_nD, 0, wide, shape=(E, D, sum(widths)))
    sums_EDF, done_E = _first_rows(at_once, sizes_E, x_nD.shape[0], nothing)
    sums_EDF = _over_blocks(multiply, sizes_E, done_E, x_nD.shape[0], sums_EDF)
    return tuple(_split(sums_EDF.astype(x_nD.dtype), widths))


def _by_rows(
    at_once: Callable[[jax.Array], jax.Array],
    multiply: Callable[["Block", Any], Any],
    x_nD: jax.Array,
    sizes_E: jax.Array,
    width: int,
) -> jax.Array:
    """[n, width]: the first rows of all groups by `at_once`, [E, r, D] to [E, r, width], and what is left in blocks."""
    n, E = x_nD.shape[0], sizes_E.shape[0]

    def multiply_first(row_Er: jax.Array, _: jax.Array) -> jax.Array:
        y_ErF, rows = at_once(x_nD[row_Er]), row_Er.shape[1]
        # Each row of n looks for its own among them; to write them all where they belong would take longer.
        row_n, end_E = jnp.arange(n, dtype=sizes_E.dtype), jnp.cumsum(sizes_E)
        group_n = jnp.minimum(_group_of(row_n, end_E), E - 1)
        number_n = row_n - (end_E - sizes_E)[group_n]
        found_n = (number_n < rows) & (row_n < end_E[-1])
        y_nF = y_ErF.reshape(E * rows, width)[jnp.where(found_n, group_n * rows + number_n, 0)]
        return jnp.where(found_n[:, None], y_nF, 0)

    nothing = jax.lax.full_like(x_nD, 0, shape=(n, width))
    out_nF, done_E = _first_rows(multiply_first, sizes_E, n, nothing)
    return _over_blocks(multiply, sizes_E, done_E, n, out_nF)


def _first_rows(
    compute: Callable[[jax.Array, jax.Array], jax.Array], sizes_E: jax.Array, n: int, nothing: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `compute` gives for the first rows of all groups, and how many of each these are, [E].

    It is `nothing` and none if groups are small, or if too much would be computed for nobody.

    Args:
      compute: of the numbers of the rows, [E, r], and of which of them are the group's own, [E, r].
    """
    E, none_E = sizes_E.shape[0], jnp.zeros_like(sizes_E)
    if not _are_large(n, E):
        return nothing, none_E
    rows = -(-n // E // BLOCKS[-1]) * BLOCKS[-1]
    first_E, taken_E = jnp.cumsum(sizes_E) - sizes_E, jnp.minimum(sizes_E, rows)

    def first_rows() -> jax.Array:
        number_r = jnp.arange(rows, dtype=sizes_E.dtype)
        row_Er = jnp.minimum(first_E[:, None] + number_r[None], n - 1)
        return compute(row_Er, number_r[None] < taken_E[:, None])

    are_even = jnp.sum(taken_E) >= int((1 - UNUSED_SHARE) * E * rows)
    # Selected and not another result of the branch: XLA sees that it is the same for all matmuls of a layer.
    return jax.lax.cond(are_even, first_rows, lambda: nothing), jnp.where(are_even, taken_E, none_E)


def _group_of(number_n: jax.Array, end_E: jax.Array) -> jax.Array:
    """How many groups end at or before each number, which is the group that it is in, [n]."""
    return jnp.searchsorted(end_E, number_n, side="right", method="compare_all").astype(end_E.dtype)


def _are_large(n: int, num_groups: int) -> bool:
    """Whether n rows are enough to multiply the first ones of all groups at once."""
    return n // num_groups >= FIRST_ROWS


def _joined(weights: Weights, n: int) -> Weights:
    """If groups are large the stacks side by side as one, else as they are, for each block to join its own.

    One copy then serves the first rows and all blocks, forward and backward: XLA finds that it is the same.
    """
    return (jnp.concatenate(weights, axis=2),) if _are_large(n, len(weights[0])) else weights


def _split(x: jax.Array, widths: list[int], axis: int = -1) -> list[jax.Array]:
    """Along an axis, by default its columns, so many for each."""
    return jnp.split(x, list(itertools.accumulate(widths[:-1])), axis)


@dataclasses.dataclass(frozen=True)
class Block:
    """So many rows in a row, from `first` on, that are multiplied at once.

    own_r1: which of them are the block's group's, and of no block before.
    """

    rows: int
    group: jax.Array
    first: jax.Array
    own_r1: jax.Array

    def matrices(self, stacks: Weights) -> list[jax.Array]:
        """The group's own of each stack."""
        return [jax.lax.dynamic_index_in_dim(w_EDF, self.group, keepdims=False) for w_EDF in stacks]

    def of(self, x_nD: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x_nD, self.first, self.rows)

    def put(self, out_nF: jax.Array, y_rF: jax.Array) -> jax.Array:
        own_rF = jnp.where(self.own_r1, y_rF, self.of(out_nF))
        return jax.lax.dynamic_update_slice_in_dim(out_nF, own_rF, self.first, axis=0)


def block_sizes(n: int, num_groups: int) -> list[int]:
    """Rows of a block, from the largest on: BLOCKS, and where groups have fewer rows on average a size like that.

    Of no rows there are none.
    """
    average = 1 << (max(1, n // num_groups) - 1).bit_length()
    least = min(BLOCKS[-1], average, n)
    return [*(rows for rows in BLOCKS if least < rows <= n), least] if n else []


def _over_blocks(
    multiply: Callable[[Block, Any], Any], sizes_E: jax.Array, done_E: jax.Array, n: int, value: Any
) -> Any:
    """Folds `multiply` over blocks of what is not done of each group: of the largest as many as it nearly fills, then
    smaller ones.

    A loop ends with the last block that holds a row, so that its time goes with the rows alone.
    """
    end_E = jnp.cumsum(sizes_E)
    next_E = end_E - sizes_E + done_E
    sizes = block_sizes(n, sizes_E.shape[0])
    for rows in sizes:
        unused = rows - 1 if rows == sizes[-1] else min(int(rows * UNUSED_SHARE), UNUSED_ROWS)
        counts_E = (end_E - next_E + unused) // rows
        blocks = _blocks(rows, n, counts_E, next_E, end_E)

        def step(number: jax.Array, value: Any, rows: int = rows, blocks: tuple[jax.Array, ...] = blocks) -> Any:
            return multiply(_block(rows, n, blocks, number), value)

        value = jax.lax.fori_loop(0, jnp.sum(counts_E), step, value)
        next_E = jnp.minimum(next_E + counts_E * rows, end_E)
    return value


def _blocks(
    rows: int, n: int, counts_E: jax.Array, next_E: jax.Array, end_E: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The group of each block, where it begins and where the rows of its group end, [b]: counts[e] blocks for group e,
    of which the first begins at next[e].

    They are the same for all matmuls of a layer, so that XLA computes them once; a loop looks up what it needs. A group
    has at most one block that it does not fill.
    """
    until_E, most = jnp.cumsum(counts_E), n // rows + min(n, len(counts_E))
    number_b = jnp.arange(most, dtype=counts_E.dtype)
    group_b = _group_of(number_b, until_E)
    begin_b = (next_E - (until_E - counts_E) * rows)[group_b] + number_b * rows
    return group_b, begin_b, end_E[group_b]


def _block(rows: int, n: int, blocks: tuple[jax.Array, ...], number: jax.Array) -> Block:
    """The one with this number of `_blocks`.

    The last of a group may reach beyond its end. Where that is beyond all n rows, it begins earlier instead.
    """
    group, begin, end = (jax.lax.dynamic_index_in_dim(x_b, number, keepdims=False) for x_b in blocks)
    first = jnp.minimum(begin, n - rows)
    row_r = first + jnp.arange(rows, dtype=begin.dtype)
    own_r = (row_r >= begin) & (row_r < end)
    return Block(rows, group, first, own_r[:, None])
