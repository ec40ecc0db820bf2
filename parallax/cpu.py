"""Choices that hold only where the target is a CPU, and what each gains there.

Invariant: results are those of every other device but for the last bits. A function here asks for what its caller's
arrays are placed on, or leaves the choice to the lowering, which knows its target.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

FEW_LAYERS = 12
"""Layers that a CPU takes one by one; more are scanned, since a longer program takes longer to compile."""
IN_HALVES = 2048
"""From so many tokens on, rows × room for answers, the first half of the answers attends to a smaller cache.
NANO with 16 prompts and 128 tokens each takes 0.87 of the time; a second loop takes 0.4 s to compile."""


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
    ends, total = [], 0
    for weight in weights[:-1]:
        ends.append(total := total + weight.shape[1])
    return jnp.split(heads, ends, axis=2)


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
