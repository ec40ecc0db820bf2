"""Causal attention a block of queries at a time, over the keys up to its last query alone.

Invariant: it gives what `attend` gives, for queries and keys that are the same tokens in order. Scores live for one
block; the backward pass computes them again from what little it keeps (Dao et al. 2022, arXiv:2205.14135, algorithm 4).
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from parallax.layers.attend import MASKED, capped, check_whole, visible

SMALLEST = 64
"""Queries of a block; a shorter sequence is one block, in which nothing is skipped."""
MOST = 8
"""Blocks: each is a part of the program, and a longer program takes longer to compile."""
LARGEST = 128
"""Queries at a time: a loop goes over the parts of a larger block, so that memory stays linear in the length."""


def attend_by_blocks(
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    softcap: float = 0.0,
    sinks_BH: jax.Array | None = None,
) -> jax.Array:
    """Causal attention within segments and the window; queries are scaled already. Returns [B, T, H, K].

    Raises ValueError if a device holds a part of each sequence.
    """
    B, T, H, K = q_BTHK.shape
    check_whole("blocks", T, k_BTGK.shape[1])
    G = k_BTGK.shape[2]
    q_BGRTK = jnp.moveaxis(q_BTHK.reshape(B, T, G, H // G, K), 1, 3)
    k_BGTK, v_BGTK = (jnp.swapaxes(x, 1, 2) for x in (k_BTGK, v_BTGK))
    sinks = None if sinks_BH is None else sinks_BH.reshape(B, G, H // G, 1, 1)
    out_BGRTK: Any = _attend(_Shape(window, softcap), q_BGRTK, k_BGTK, v_BGTK, segments_BT, sinks)
    return jnp.moveaxis(out_BGRTK, 3, 1).reshape(B, T, H, K)


class _Shape(NamedTuple):
    """The settings that scores are made with."""

    window: int
    softcap: float


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sinks: jax.Array | None
) -> jax.Array:
    """[B, G, R, T, K] from R query heads for each of G heads of keys and values [B, G, T, K]; sinks [B, G, R, 1, 1]."""
    return _forward(shape, q, k, v, segments, sinks)[0]


def _forward(
    shape: _Shape, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, sinks: jax.Array | None
) -> tuple[jax.Array, tuple]:
    outs, log_normalisers = [], []
    for queries, keys in blocks(q.shape[3], shape.window):

        def attend(nothing: None, part: _Queries, keys: slice = keys):
            scores = _scores(part, k, segments, keys, shape)
            maximum = jnp.max(scores, axis=-1, keepdims=True)
            if sinks is not None:
                maximum = jnp.maximum(maximum, sinks.astype(scores.dtype))
            weights = jnp.exp(scores - maximum)
            normaliser = jnp.sum(weights, axis=-1, keepdims=True)
            if sinks is not None:
                normaliser = normaliser + jnp.exp(sinks.astype(scores.dtype) - maximum)
            weighted = _einsum("BGRTS,BGSK->BGRTK", weights.astype(v.dtype), v[:, :, keys])
            return nothing, ((weighted / normaliser).astype(v.dtype), maximum + jnp.log(normaliser))

        _, (out, log_normaliser) = _in_parts(attend, None, _Queries.of(queries, q, segments))
        outs.append(out)
        log_normalisers.append(log_normaliser)
    out, log_normaliser = (jnp.concatenate(parts, axis=3) for parts in (outs, log_normalisers))
    return out, (q, k, v, segments, sinks, out, log_normaliser)


def _backward(shape: _Shape, kept: tuple, grad_out: jax.Array) -> tuple[Any, ...]:
    q, k, v, segments, sinks, out, log_normaliser = kept
    # The barriers keep XLA from computing such arrays again within matmuls that read them across, which takes longer.
    grad_out = jax.lax.optimization_barrier(grad_out)
    wide = log_normaliser.dtype
    # A sum as a matmul with ones: on CPUs XLA's sum of rows of 32 takes 20 times as long.
    ones = jnp.ones((out.shape[-1], 1), wide)
    shared = jnp.matmul(grad_out.astype(wide) * out.astype(wide), ones, precision="highest")
    # Those of keys and values with their length last, so that no scores are transposed for a matmul.
    grad_q, grad_keys = [], tuple(jnp.zeros_like(jnp.swapaxes(x, 2, 3), dtype=wide) for x in (k, v))
    for queries, keys in blocks(q.shape[3], shape.window):

        def attend_back(grad_keys: tuple[jax.Array, jax.Array], part: _Queries, keys: slice = keys):
            log_normaliser, grad_out, shared = part.beside
            scores = _scores(part, k, segments, keys, shape)
            weights = jnp.exp(scores - log_normaliser)
            grad_weights = _einsum("BGRTK,BGSK->BGRTS", grad_out, v[:, :, keys])
            grad_scores = weights * (grad_weights - shared)
            if shape.softcap:  # the slope of the tanh, 0 where a score is masked
                grad_scores = grad_scores * (1 - (jnp.maximum(scores, -shape.softcap) / shape.softcap) ** 2)
            weights, grad_scores = jax.lax.optimization_barrier((weights.astype(v.dtype), grad_scores.astype(q.dtype)))
            grad_q = _einsum("BGRTS,BGSK->BGRTK", grad_scores, k[:, :, keys]).astype(q.dtype)
            grad_k, grad_v = (
                so_far.at[..., keys].add(_einsum("BGRTK,BGRTS->BGKS", left, right), unique_indices=True)
                for so_far, left, right in zip(grad_keys, (part.q, grad_out), (grad_scores, weights), strict=True)
            )
            return (grad_k, grad_v), grad_q

        beside = tuple(x[:, :, :, queries] for x in (log_normaliser, grad_out, shared))
        grad_keys, grad_block = _in_parts(attend_back, grad_keys, _Queries.of(queries, q, segments, beside))
        grad_q.append(grad_block)
    # XLA on CPUs has no matmul of bfloat16 whose result is transposed in it.
    grad_keys = jax.lax.optimization_barrier(grad_keys)
    grad_k, grad_v = (jnp.swapaxes(grad_x, 2, 3).astype(x.dtype) for grad_x, x in zip(grad_keys, (k, v), strict=True))
    grad_sinks = None
    if sinks is not None:
        grad_weights = -jnp.exp(sinks.astype(wide) - log_normaliser) * shared
        grad_sinks = jnp.sum(grad_weights, axis=3, keepdims=True).astype(sinks.dtype)
    return jnp.concatenate(grad_q, axis=3), grad_k, grad_v, None, grad_sinks


_attend.defvjp(_forward, _backward)


def blocks(length: int, window: int) -> Iterator[tuple[slice, slice]]:
    """The queries of each block, and the keys that any of them may see."""
    size = max(SMALLEST, -(-length // MOST))
    if size > LARGEST:
        size += -size % LARGEST
    cuts = {*range(0, length, size), length}
    if size > LARGEST:
        cuts.add(length - length % LARGEST)  # behind it is no whole part
    for start, stop in itertools.pairwise(sorted(cuts)):
        yield slice(start, stop), slice(max(0, start - window + 1) if window else 0, stop)


class _Queries(NamedTuple):
    """The queries of a block, or of a part of one."""

    q: jax.Array  # [B, G, R, t, K]
    positions: jax.Array  # [t]
    segments: jax.Array | None  # [B, t]
    beside: tuple[jax.Array, ...]  # each [B, G, R, t, ...]

    @classmethod
    def of(cls, queries: slice, q: jax.Array, segments: jax.Array | None, beside: tuple = ()) -> "_Queries":
        positions = jnp.arange(queries.start, queries.stop)
        return cls(q[:, :, :, queries], positions, None if segments is None else segments[:, queries], beside)


def _in_parts(function: Callable, carry: Any, queries: _Queries) -> tuple[Any, Any]:
    """`function` of (carry, queries), which gives (carry, arrays [B, G, R, t, ...]), over at most LARGEST at a time."""
    length = queries.positions.shape[0]
    if length <= LARGEST:
        return function(carry, queries)

    def cut(x: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, LARGEST, *x.shape[axis + 1 :]), axis, 0)

    def joined(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 3)
        return x.reshape(*x.shape[:3], length, *x.shape[5:])

    parts = _Queries(
        q=cut(queries.q, 3),
        positions=cut(queries.positions, 0),
        segments=None if queries.segments is None else cut(queries.segments, 1),
        beside=tuple(cut(x, 3) for x in queries.beside),
    )

    def one(carry: Any, part: _Queries) -> tuple[Any, Any]:
        # Without the barrier XLA hoists the masks of all parts out of the loop, and keeps them.
        return function(carry, jax.lax.optimization_barrier(part))

    carry, results = jax.lax.scan(one, carry, parts)
    return carry, jax.tree.map(joined, results)


def _scores(part: _Queries, k: jax.Array, segments: jax.Array | None, keys: slice, shape: _Shape) -> jax.Array:
    """Masked scores, [B, G, R, t, s], at least float32."""
    positions = part.positions[None], jnp.arange(keys.start, keys.stop)[None]
    within = None
    if part.segments is not None and segments is not None:
        within = part.segments, segments[:, keys]
    scores = capped(_einsum("BGRTK,BGSK->BGRTS", part.q, k[:, :, keys]), shape.softcap)
    seen = visible(positions, within, shape.window)[:, None, None]
    return jnp.where(seen, scores, jnp.asarray(MASKED, scores.dtype))


def _einsum(formula: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
