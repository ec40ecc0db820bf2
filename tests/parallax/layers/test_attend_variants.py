"""Soft caps and sinks: their definition, and that every way to compute attention agrees with it, forward and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from parallax.layers.attend import attend, attend_in_chunks
from parallax.layers.attend_blocks import attend_by_blocks
from parallax.layers.splash import attend_in_kernel

B, H, G, K = 2, 4, 2, 64
SOFTCAP = 1.5


def example(T, dtype=np.float32):
    """q, k, v, sinks [B, H], and weights of the result."""
    rng = np.random.default_rng(T)
    q, k, v, w = (rng.normal(size=(B, T, heads, K)) for heads in (H, G, G, H))
    return [x.astype(dtype) for x in (q / K**0.5 * 3, k, v, rng.normal(size=(B, H)), w)]


def at(T):
    return jnp.arange(T, dtype=jnp.int32)[None]


def dense(q, k, v, sinks, window, softcap=SOFTCAP):
    return attend(q, k, v, positions=(at(q.shape[1]),) * 2, window=window, softcap=softcap, sinks_BH=sinks)


def in_chunks(q, k, v, sinks, window):
    settings = {"window": window, "softcap": SOFTCAP, "chunk": 7}
    return attend_in_chunks(q, k, v, positions=(at(q.shape[1]),) * 2, sinks_BH=sinks, **settings)


def by_blocks(q, k, v, sinks, window):
    return attend_by_blocks(q, k, v, None, window, SOFTCAP, sinks)


def in_kernel(q, k, v, sinks, window):
    return attend_in_kernel(q, k, v, None, window, SOFTCAP, sinks)


def test_values_are_those_of_the_definition(x64):
    """A sink is one more key, seen by all queries, whose value is 0."""
    T, window = 6, 4
    q, k, v, sinks, _ = example(T, np.float64)
    out = np.asarray(jax.jit(dense, static_argnums=4)(q, k, v, sinks, window))
    for b, t, h in np.ndindex(B, T, H):
        seen = range(max(0, t - window + 1), t + 1)
        scores = np.array([SOFTCAP * np.tanh(q[b, t, h] @ k[b, s, h // 2] / SOFTCAP) for s in seen])
        weights = np.exp(scores) / (np.exp(scores).sum() + np.exp(sinks[b, h]))
        np.testing.assert_allclose(out[b, t, h], weights @ v[b, np.array(seen), h // 2], rtol=1e-12)


@pytest.mark.parametrize("function", [dense, by_blocks])
def test_gradients_match_finite_differences(function, x64):
    *arrays, _ = example(6, np.float64)
    apply = jax.jit(functools.partial(function, window=4))
    check_grads(apply, arrays, order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)  # differences are off by 1e-10


@pytest.mark.parametrize(
    ("function", "T", "window"),
    [(in_chunks, 30, 0), (in_chunks, 30, 9), (by_blocks, 150, 0), (by_blocks, 300, 70), (in_kernel, 128, 50)],
)
def test_every_way_gives_what_all_scores_give(function, T, window):
    *arrays, weights = example(T)

    def both(function):
        def objective(*arrays):
            out = function(*arrays, window)
            return jnp.sum(out * weights), out

        return jax.jit(jax.grad(objective, (0, 1, 2, 3), has_aux=True))(*arrays)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # float32 sums of up to 300 terms
    jax.tree.map(close, both(function), both(dense))


def test_a_high_cap_and_a_low_sink_change_nothing():
    q, k, v, sinks, _ = example(9)

    @jax.jit
    def both(q, k, v):
        return dense(q, k, v, sinks - 1e4, 0, softcap=1e6), attend(q, k, v, positions=(at(9), at(9)))

    np.testing.assert_allclose(*both(q, k, v), rtol=1e-4, atol=1e-4)
