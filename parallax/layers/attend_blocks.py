"""Causal attention a block of queries at a time, over the keys up to its last query alone.

Invariant: it gives what `attend` gives, for queries and keys that are the same tokens in order. Scores live for one
block; the way back computes them again from what little it keeps (Dao et al. 2022, arXiv:2205.14135, algorithm 4).
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from parallax.layers.attend import MASKED, visible

SMALLEST = 64
"""Queries of a block; a shorter sequence is one block, in which nothing is skipped."""
MOST = 8
"""Blocks: each is a part of the program, and a longer program takes longer to compile."""


def attend_by_blocks(
    q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, segments_BT: jax.Array | None, window: int
) -> jax.Array:
    """Causal attention within segments and the window; queries are scaled already. Returns [B, T, H, K]."""
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    q_BGRTK = jnp.moveaxis(q_BTHK.reshape(B, T, G, H // G, K), 1, 3)
    k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (k_BTGK, v_BTGK))
    out_BGRTK: Any = _attend(window, q_BGRTK, k_BGTK, v_BGTK, segments_BT)
    return jnp.moveaxis(out_BGRTK, 3, 1).reshape(B, T, H, K)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """[B, G, R, T, K] from R query heads for each of G heads of keys and values [B, G, T, K]."""
    return _forward(window, q, k, v, segments)[0]


def _forward(
    window: int, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, tuple]:
    outs, log_normalisers = [], []
    for queries, keys in blocks(q.shape[3], window):
        scores = _scores(q, k, segments, queries, keys, window)
        maximum = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - maximum)
        normaliser = jnp.sum(weights, axis=-1, keepdims=True)
        weighted = _einsum("BGRTS,BGSK->BGRTK", weights.astype(v.dtype), v[:, :, keys])
        outs.append((weighted / normaliser).astype(v.dtype))
        log_normalisers.append(maximum + jnp.log(normaliser))
    out, log_normaliser = (jnp.concatenate(parts, axis=3) for parts in (outs, log_normalisers))
    return out, (q, k, v, segments, out, log_normaliser)


def _backward(window: int, kept: tuple, of_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, out, log_normaliser = kept
    # The barriers keep XLA from computing such arrays again within products that read them across, which takes longer.
    of_out = jax.lax.optimization_barrier(of_out)
    wide = log_normaliser.dtype
    shared = jnp.sum(of_out.astype(wide) * out.astype(wide), axis=-1, keepdims=True)
    of_q, of_k, of_v = [], jnp.zeros(k.shape, wide), jnp.zeros(v.shape, wide)
    for queries, keys in blocks(q.shape[3], window):
        scores = _scores(q, k, segments, queries, keys, window)
        weights = jnp.exp(scores - log_normaliser[:, :, :, queries])
        of_block = of_out[:, :, :, queries]
        of_weights = _einsum("BGRTK,BGSK->BGRTS", of_block, v[:, :, keys])
        of_scores = weights * (of_weights - shared[:, :, :, queries])
        weights, of_scores = jax.lax.optimization_barrier(
            (weights.astype(v.dtype), of_scores.astype(q.dtype))
        )
        of_q.append(_einsum("BGRTS,BGSK->BGRTK", of_scores, k[:, :, keys]).astype(q.dtype))
        of_k = of_k.at[:, :, keys].add(
            _einsum("BGRTS,BGRTK->BGSK", of_scores, q[:, :, :, queries]), unique_indices=True
        )
        of_v = of_v.at[:, :, keys].add(_einsum("BGRTS,BGRTK->BGSK", weights, of_block), unique_indices=True)
    return jnp.concatenate(of_q, axis=3), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that any of them may see."""
    size = max(SMALLEST, -(-length // MOST))
    for start in range(0, length, size):
        stop = min(start + size, length)
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


def _scores(
    q: jax.Array, k: jax.Array, segments: jax.Array | None, queries: slice, keys: slice, window: int
) -> jax.Array:
    """Masked scores of a block, [B, G, R, t, s], at least float32."""
    positions = jnp.arange(queries.start, queries.stop)[None], jnp.arange(keys.start, keys.stop)[None]
    within = None if segments is None else (segments[:, queries], segments[:, keys])
    scores = _einsum("BGRTK,BGSK->BGRTS", q[:, :, :, queries], k[:, :, keys])
    seen = visible(positions, within, window)[:, None, None]
    return jnp.where(seen, scores, jnp.asarray(MASKED, scores.dtype))


def _einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
