"""Dropout: nothing without a key, and with one the same value on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.layers.dropout import dropout

X = jnp.asarray(np.random.default_rng(0).normal(2, 1, 20_000), jnp.float32)


@pytest.mark.parametrize(("rate", "key"), [(0.5, None), (0.0, 1), (0.0, None)])
def test_without_key_or_rate_the_very_array_returns(rate, key):
    assert dropout(X, rate, None if key is None else jax.random.key(key)) is X


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_dropped_and_expectation(rate):
    y = dropout(X, rate, jax.random.key(1))
    kept = np.asarray(y != 0)
    # Five standard errors of a share, and of a mean whose values have variance E[x²] · rate / (1 - rate).
    assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / X.size)
    error = np.sqrt(jnp.mean(X**2) * rate / (1 - rate) / X.size)
    assert abs(y.mean() - X.mean()) < 5 * error
    np.testing.assert_allclose(y[kept], X[kept] / (1 - rate), rtol=1e-6)  # float32 rounding


def test_the_key_decides():
    first, again, other = (dropout(X, 0.5, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert 0.4 < np.mean(np.asarray((first == 0) != (other == 0))) < 0.6  # independent: half differ


def test_gradient_passes_where_values_do():
    gradient = jax.grad(lambda x: dropout(x, 0.25, jax.random.key(3)).sum())(X)
    kept = np.asarray(dropout(X, 0.25, jax.random.key(3)) != 0)
    np.testing.assert_allclose(gradient, kept / 0.75, rtol=1e-6)  # float32 rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtype_and_infinities_stay(dtype):
    """A dropped infinity is zero, not NaN: values are selected, not multiplied."""
    y = dropout(jnp.full(100, jnp.inf, dtype), 0.5, jax.random.key(4))
    assert y.dtype == dtype
    assert set(np.asarray(y, np.float32)) == {0.0, np.inf}
