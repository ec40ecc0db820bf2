"""Attention itself: scores, mask, softmax, weighted sum.

Invariant: `attend_in_chunks` computes what `attend` computes, with memory linear in the number of tokens.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from parallax.layers.dropout import dropout as drop
from parallax.layers.dropout import fold_in

MASKED = -1e30
"""Finite, so that a chunk in which a query sees nothing gives weights of zero and not NaN."""

Pair = tuple[jax.Array, jax.Array]
"""One array for the queries [B, T] (or [1, T]) and one for the keys [B, S] (or [1, S])."""


def check_whole(attention: str, queries: int, keys: int) -> None:
    """Raises ValueError unless queries and keys are the same tokens: those of whole sequences."""
    if queries != keys:
        raise ValueError(
            f"attention={attention} needs whole sequences on a device, not {queries} of {keys} tokens; "
            "try --model.attention xla"
        )


def visible(positions: Pair, segments: Pair | None, window: int) -> jax.Array:
    """Which keys a query sees, [B, T, S] (B may be 1)."""
    distance = positions[0][:, :, None] - positions[1][:, None, :]
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    if segments is not None:
        seen = seen & (segments[0][:, :, None] == segments[1][:, None, :])
    return seen


def capped(scores: jax.Array, softcap: float) -> jax.Array:
    """c·tanh(score/c), within ±c (Gemma 2, arXiv:2408.00118, section 2); without a cap the scores."""
    return softcap * jnp.tanh(scores / softcap) if softcap else scores


def _scores(q_BTGRK: jax.Array, k_BSGK: jax.Array, seen_BTS: jax.Array, softcap: float) -> jax.Array:
    """Masked scores [B, G, R, T, S], at least float32."""
    wide = jnp.promote_types(q_BTGRK.dtype, jnp.float32)
    scores = capped(jnp.einsum("BTGRK,BSGK->BGRTS", q_BTGRK, k_BSGK, preferred_element_type=wide), softcap)
    return jnp.where(seen_BTS[:, None, None], scores, jnp.asarray(MASKED, wide))


def _grouped(q_BTHK: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    """Queries as [B, T, G, R, K]: R query heads share each key/value head."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    return q_BTHK.reshape(B, T, G, H // G, K)


def attend(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    positions: Pair,
    segments: Pair | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks_BH: jax.Array | None = None,
    dropout: tuple[float, jax.Array | None] = (0.0, None),
) -> jax.Array:
    """All scores at once; queries are scaled already. Returns [B, T, H, K] in the dtype of the values.

    `sinks_BH` are scores of a key that every query sees, and whose value is 0: they take weight from the others
    (Xiao et al. 2023, arXiv:2309.17453; gpt-oss, arXiv:2508.10925). `dropout` is a rate, and a key for each query of
    each head, [B, H, T].
    """
    scores = _scores(_grouped(q_BTHK, k_BSGK), k_BSGK, visible(positions, segments, window), softcap)
    rate, keys_BHT = dropout
    keys_BGRT = None if keys_BHT is None else keys_BHT.reshape(scores.shape[:-1])
    weights = drop(_softmax(scores, sinks_BH).astype(v_BSGK.dtype), rate, keys_BGRT)
    # In this order of dims XLA on CPUs reads a cache's values without transposing them, which it does with T here.
    heads_BGRTK = jnp.einsum("BGRTS,BSGK->BGRTK", weights, v_BSGK)
    return jnp.moveaxis(heads_BGRTK, 3, 1).reshape(q_BTHK.shape)


def _softmax(scores_BGRTS: jax.Array, sinks_BH: jax.Array | None) -> jax.Array:
    """Weights of the keys, [B, G, R, T, S]; with sinks their sums are below 1."""
    if sinks_BH is None:
        return jax.nn.softmax(scores_BGRTS, axis=-1)
    *dims, S = scores_BGRTS.shape
    sinks = jnp.broadcast_to(_grouped_sinks(sinks_BH, scores_BGRTS)[..., None], (*dims, 1))
    return jax.nn.softmax(jnp.concatenate([scores_BGRTS, sinks], axis=-1), axis=-1)[..., :S]


def _grouped_sinks(sinks_BH: jax.Array, of_BGR: jax.Array) -> jax.Array:
    """[B, G, R, 1], of the dtype and the heads of an array [B, G, R, ...]."""
    return sinks_BH.astype(of_BGR.dtype).reshape(*of_BGR.shape[:3], 1)


class _Running(NamedTuple):
    """Online softmax over the keys so far (Milakov & Gimelshein 2018, arXiv:1805.02867, algorithm 3)."""

    maximum: jax.Array  # [B, G, R, T]
    normaliser: jax.Array  # [B, G, R, T]
    weighted: jax.Array  # [B, G, R, T, K]


def attend_in_chunks(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    *,
    positions: Pair,
    segments: Pair | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks_BH: jax.Array | None = None,
    dropout: tuple[float, jax.Array | None] = (0.0, None),
    chunk: int,
) -> jax.Array:
    """`attend`, with scores of at most [chunk, chunk] at a time, recomputed in the backward pass.

    Rabe & Staats 2021, arXiv:2112.05682. Lengths need not be multiples of the chunk: both sides are padded.
    """
    T = q_BTHK.shape[1]
    rate, keys_BHT = dropout
    dtype, wide = v_BSGK.dtype, jnp.promote_types(q_BTHK.dtype, jnp.float32)

    def one_query_chunk(q: jax.Array, keys: tuple, beside: tuple) -> jax.Array:
        """[B, t, H, K] of queries [B, t, G, R, K], over chunks of keys and values, and with sinks."""
        (k_chunks, v_chunks, sinks_BH), ((q_at, q_in, dropout_keys), (k_at, k_in)) = keys, beside
        wide_q = q.astype(wide)  # its gradient is a sum over the chunks of keys

        @jax.checkpoint
        def one_key_chunk(running: _Running, numbered):
            k, v, k_position, k_segment, j = numbered
            pair = None if q_in is None else (q_in, k_segment)
            scores = _scores(wide_q.astype(q.dtype), k, visible((q_at, k_position), pair, window), softcap)
            maximum = jnp.maximum(running.maximum, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - maximum[..., None])
            shrink = jnp.exp(running.maximum - maximum)
            normaliser = running.normaliser * shrink + jnp.sum(weights, axis=-1)
            block_keys = None if dropout_keys is None else fold_in(dropout_keys, j)
            dropped = drop(weights.astype(v.dtype), rate, block_keys)
            update = jnp.einsum("BGRTS,BSGK->BGRTK", dropped, v, preferred_element_type=scores.dtype)
            return _Running(maximum, normaliser, running.weighted * shrink[..., None] + update), None

        B, t, G, R, K = q.shape
        fill = functools.partial(jax.lax.full_like, q, dtype=wide)  # inside shard_map as different as q between devices
        start = _Running(fill(MASKED, shape=(B, G, R, t)), fill(0, shape=(B, G, R, t)), fill(0, shape=(B, G, R, t, K)))
        if sinks_BH is not None:  # as of a first key
            maximum = fill(0, shape=(B, G, R, t)) + _grouped_sinks(sinks_BH, start.maximum)
            start = start._replace(maximum=maximum, normaliser=fill(1, shape=(B, G, R, t)))
        numbered = (k_chunks, v_chunks, k_at, k_in, jnp.arange(k_at.shape[0]))
        end, _ = jax.lax.scan(one_key_chunk, start, numbered)
        return jnp.moveaxis(end.weighted / end.normaliser[..., None], 3, 1).astype(dtype)

    q_chunks = cut(_grouped(q_BTHK, k_BSGK), chunk)
    keys = cut(k_BSGK, chunk), cut(v_BSGK, chunk), sinks_BH
    # Padded keys get a position that no query reaches; what padded queries compute is cut off below.
    q_at, k_at = cut(positions[0], chunk), cut(positions[1], chunk, jnp.iinfo(jnp.int32).max // 2)
    q_in, k_in = (None, None) if segments is None else (cut(segments[0], chunk), cut(segments[1], chunk))
    dropout_keys = None
    if keys_BHT is not None:
        chunks, B, _, G, R, _ = q_chunks.shape
        queries = jnp.minimum(jnp.arange(chunks * chunk), T - 1).reshape(chunks, chunk)
        dropout_keys = jnp.moveaxis(keys_BHT.reshape(B, G, R, T)[..., queries], 3, 0)
    beside = (q_at, q_in, dropout_keys), (k_at, k_in)
    out = _over_queries(one_query_chunk)(q_chunks, keys, beside)
    out = jnp.moveaxis(out, 0, 1).reshape(q_BTHK.shape[0], -1, *q_BTHK.shape[2:])
    return out[:, :T]


def _over_queries(function: Callable[[jax.Array, tuple, tuple], jax.Array]) -> Callable:
    """`function(query, keys, (of query, of keys))` for each of a leading dim of the queries and of what is of them.

    Computed again in the backward pass from its arguments, whatever a policy around it keeps: `jax.checkpoint` does not
    hold inside another one, where what the outer policy lets be saved is saved. The gradient of the keys, a sum over
    the queries, is added up in float32. There is no forward mode through this.
    """

    @jax.custom_vjp
    def mapped(queries, keys, beside):
        of_queries, of_keys = beside
        return jax.lax.map(lambda one: function(one[0], keys, (one[1], of_keys)), (queries, of_queries))

    def forward(queries, keys, beside):
        return mapped(queries, keys, beside), (queries, keys, beside)

    def backward(kept, grad_out):
        queries, keys, (of_queries, of_keys) = kept

        def add(total, one):
            query, of_query, cotangent = one
            _, pull = jax.vjp(lambda query, keys: function(query, keys, (of_query, of_keys)), query, keys)
            grad_query, grad_keys = pull(cotangent)
            return jax.tree.map(lambda sofar, x: sofar + x.astype(sofar.dtype), total, grad_keys), grad_query

        zeros = jax.tree.map(lambda x: jax.lax.full_like(x, 0, jnp.promote_types(x.dtype, jnp.float32)), keys)
        total, grad_queries = jax.lax.scan(add, zeros, (queries, of_queries, grad_out), reverse=True)
        return grad_queries, jax.tree.map(lambda x, key: x.astype(key.dtype), total, keys), None

    mapped.defvjp(forward, backward)
    return mapped


def cut(x: jax.Array, chunk: int, fill: int = 0) -> jax.Array:
    """[B, T, ...] to [chunks, B, chunk, ...], padded with `fill` at the end."""
    padding = [(0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)]
    padded = jnp.pad(x, padding, constant_values=fill)
    return jnp.moveaxis(padded.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)
