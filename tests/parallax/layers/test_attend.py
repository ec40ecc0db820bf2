"""The attention product: its definition, its gradient, its masks, and the chunked form equal to the dense one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from parallax.layers.attend import attend, attend_in_chunks, visible

B, G, R, K = 2, 2, 3, 4
CASES = {
    "plain": {},
    "window": {"window": 3},
    "segments": {"segmented": True},
    "both": {"window": 4, "segmented": True},
    "cache": {"T": 3, "S": 11},
    "cache, window": {"T": 3, "S": 11, "window": 2},
}


def example(seed=0, T=7, S=None, window=0, segmented=False, dtype=np.float64):
    """q [B, T, G·R, K], k and v [B, S, G, K], and how they see each other.

    With S, queries stand at random positions of a cache, whose later slots hold rubbish.
    """
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(B, T, G * R, K)).astype(dtype)
    k, v = rng.normal(size=(2, B, S or T, G, K)).astype(dtype)
    at = np.arange(T)[None]
    if S:
        at = np.sort(rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1)[:, :T], axis=1)
    positions = (at.astype(np.int32), np.arange(S or T, dtype=np.int32)[None])
    cuts = np.sort(rng.integers(0, 3, (B, T)), axis=1)
    return (q, k, v), {"positions": positions, "segments": (cuts, cuts) if segmented else None, "window": window}


def defined(q, k, v, positions, segments, window):
    """One query head after the other, one query after the other, over the keys it sees."""
    out = np.zeros_like(q)
    for b, t, h in np.ndindex(q.shape[:3]):
        at = positions[0][b % len(positions[0]), t]
        seen = [
            s
            for s in range(k.shape[1])
            if s <= at
            and (not window or s > at - window)
            and (segments is None or segments[0][b, t] == segments[1][b, s])
        ]
        scores = k[b, seen, h // R] @ q[b, t, h]
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ v[b, seen, h // R]
    return out


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_definition(case, x64):
    arrays, how = example(1, **CASES[case])
    values = jax.jit(functools.partial(attend, **how))(*arrays)
    np.testing.assert_allclose(values, defined(*arrays, **how), rtol=1e-12, atol=1e-14)


def test_gradient_matches_finite_differences(x64):
    arrays, how = example(2, window=4, segmented=True)
    apply = jax.jit(functools.partial(attend, **how))
    check_grads(apply, arrays, order=1, eps=1e-5, atol=1e-7, rtol=1e-7)  # differences are off by 1e-10


def value_and_gradients(function, arrays, **how):
    weight = np.random.default_rng(9).normal(size=arrays[0].shape)

    def value(*arrays):
        out = function(*arrays, **how)
        return jnp.sum(out * weight), out

    return jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*arrays)


@pytest.mark.parametrize(("case", "chunk"), [("plain", 100), ("both", 2), ("cache, window", 1), ("segments", 5)])
def test_chunks_change_neither_values_nor_gradients(case, chunk, x64):
    """Lengths are no multiples of the chunk, and some chunks show a query nothing."""
    arrays, how = example(3, **CASES[case])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13),
        value_and_gradients(attend_in_chunks, arrays, chunk=chunk, **how),
        value_and_gradients(attend, arrays, **how),
    )


@pytest.mark.parametrize("function", [attend, functools.partial(attend_in_chunks, chunk=3)])
def test_bfloat16_scores_and_sums_are_float32(function):
    arrays, how = example(5, dtype=np.float32)
    low = [x.astype(jnp.bfloat16) for x in arrays]
    out = jax.jit(functools.partial(function, **how))(*low)
    assert out.dtype == jnp.bfloat16
    exact = jax.jit(functools.partial(attend, **how))(*(x.astype(np.float32) for x in low))
    # Weights and result are rounded to 2⁻⁹ each; values are at most about 3.
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.02)


@pytest.mark.parametrize(("T", "S"), [(4, 1024), (1024, 4)], ids=["keys", "queries"])
def test_gradients_in_bfloat16_are_summed_over_chunks_in_float32(T, S):
    """Over 512 chunks of keys, and of queries: summed in bfloat16 gradients are off by 0.023 and 0.09."""
    rng = np.random.default_rng(6)
    q, (k, v) = rng.normal(size=(B, T, G * R, K)), rng.normal(size=(2, B, S, G, K))
    low = [x.astype(jnp.bfloat16) for x in (q + 1, k, v + 1)]
    at = (np.full((1, T), S, np.int32), np.arange(S, dtype=np.int32)[None])

    def gradients(arrays):
        function = functools.partial(attend_in_chunks, chunk=2, positions=at)
        return jax.grad(lambda *arrays: jnp.sum(function(*arrays).astype(jnp.float32)), argnums=(0, 1, 2))(*arrays)

    exact = jax.jit(gradients)([x.astype(np.float32) for x in low])
    for found, expected in zip(jax.jit(gradients)(low), exact, strict=True):
        error = np.linalg.norm(np.asarray(found, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.02


@pytest.mark.parametrize(("case", "chunk"), [*((case, None) for case in CASES), ("both", 2), ("cache, window", 2)])
def test_keys_have_a_gradient_exactly_where_they_are_visible(case, chunk):
    arrays, how = example(7, dtype=np.float32, **CASES[case])
    function = attend if chunk is None else functools.partial(attend_in_chunks, chunk=chunk)
    seen = np.broadcast_to(visible(**how), (B, arrays[0].shape[1], arrays[1].shape[1]))
    # A query that sees a single key gives it the weight 1 whatever its score: only the value has a gradient.
    lone = seen & (seen.sum(-1, keepdims=True) == 1)

    @jax.jit
    @functools.partial(jax.jacrev, argnums=(1, 2))
    def gradients(q, k, v):
        """Of each query's output with regard to all keys and values, [T, B, S, G, K]."""
        return jnp.sum(jnp.sin(function(q, k, v, **how)), axis=(0, 2, 3))

    for gradient, excused in zip(gradients(*arrays), (lone, False), strict=True):
        touched = np.moveaxis(np.asarray(gradient != 0).any((-1, -2)), 0, 1)
        np.testing.assert_array_equal(touched | excused, seen)


@pytest.mark.parametrize("chunk", [None, 4], ids=["dense", "chunked"])
def test_dropout_keeps_the_mean(chunk):
    rows, row = 800, [x[:1] for x in example(8, T=8, dtype=np.float32)[0]]
    function = attend if chunk is None else functools.partial(attend_in_chunks, chunk=chunk)
    # Every query sees every key, so that means are nearly normal.
    how = {"positions": (np.full((1, 8), 7, np.int32), np.arange(8, dtype=np.int32)[None])}
    apply = jax.jit(lambda keys, *arrays: function(*arrays, dropout=(0.4, keys), **how))
    dropped = np.asarray(
        apply(jax.random.split(jax.random.key(0), (rows, G * R, 8)), *(np.repeat(x, rows, axis=0) for x in row))
    )
    plain = jax.jit(functools.partial(attend, **how))(*row)[0]
    # Of 192 means one is beyond five standard errors in fewer than one of a thousand seeds.
    assert np.max(np.abs(dropped.mean(0) - plain) / dropped.std(0)) < 5 / np.sqrt(rows)
    assert dropped.std(0).min() > 0.05
    np.testing.assert_allclose(apply(None, *row)[0], plain, rtol=1e-4, atol=1e-5)  # float32 sums


def test_chunks_drop_different_entries():
    """All weights are equal and the values the identity, so that the result shows the mask."""
    S, chunk = 32, 4
    same, values = np.zeros((1, S, 1, S), np.float32), np.eye(S, dtype=np.float32)[None, :, None, :]
    last = (np.full((1, S), S, np.int32), np.arange(S, dtype=np.int32)[None])
    dropout = (0.5, jax.random.split(jax.random.key(1), (1, 1, S)))
    out = jax.jit(lambda q, k, v: attend_in_chunks(q, k, v, positions=last, dropout=dropout, chunk=chunk))(
        same, same, values
    )
    kept = (np.asarray(out)[0, :, 0] != 0).reshape(S // chunk, chunk, S // chunk, chunk)
    masks = {kept[i, :, j].tobytes() for i in range(S // chunk) for j in range(S // chunk)}
    assert len(masks) > 60  # of 64; two equal masks of 16 entries are rare
    assert 0.4 < kept.mean() < 0.6


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["alone", "inside a checkpoint"])
def test_what_is_dropped_in_chunks_has_the_gradient_of_finite_differences(wrap, x64):
    """The backward pass draws the same numbers again."""
    arrays, how = example(3, window=4, segmented=True)
    dropout = (0.3, jax.random.split(jax.random.key(2), (B, G * R, 7)))
    dropped = functools.partial(attend_in_chunks, dropout=dropout, chunk=3, **how)
    check_grads(jax.jit(wrap(dropped)), arrays, order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


def memory(function, T, **how):
    """Temporary bytes of the compiled forward and backward pass."""
    shapes = [jax.ShapeDtypeStruct((1, T, heads, 16), jnp.float32) for heads in (2, 1, 1)]
    at = np.arange(T, dtype=np.int32)[None]

    def value(*arrays):
        return jnp.sum(function(*arrays, positions=(at, at), **how) ** 2)

    compiled = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_is_linear_in_length_only_in_chunks():
    short, long = (memory(attend_in_chunks, T, chunk=32) for T in (512, 1024))
    assert long <= 2.1 * short
    dense_long, dense_longer = (memory(attend, T) for T in (1024, 2048))
    assert dense_longer >= 2.8 * dense_long
    assert long < dense_long / 8
