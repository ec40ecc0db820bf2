"""RMSNorm: its definition, its gradient, and float32 statistics whatever the input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from parallax.axes import names_of
from parallax.layers.normalization import RMSNorm

DIM = 6


@functools.cache
def split(eps=1e-5):
    return nnx.split(RMSNorm(DIM, "embed", eps=eps, rngs=nnx.Rngs(0)))


@functools.partial(jax.jit, static_argnums=2)
def normalise(x, scale, eps=1e-5):
    """The module applied with another scale."""
    graph, state = split(eps)
    return nnx.merge(graph, jax.tree.map(lambda _: scale, state))(x)


def example(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (*shape, DIM)), rng.normal(1, 0.5, DIM)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_gradient_matches_finite_differences(eps, x64):
    # Central differences with this step are off by about 1e-10.
    check = functools.partial(check_grads, order=1, eps=1e-5, atol=1e-7, rtol=1e-7)
    check(lambda x, scale: normalise(x, scale, eps), example(0, 2, 3))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4)])
def test_value_is_that_of_the_definition(shape, x64):
    x, scale = example(1, *shape)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 0.5) * scale
    np.testing.assert_allclose(normalise(x, scale, 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("factor", [0.01, 7.0, 1e4])
def test_scale_of_the_input_does_not_matter(factor, x64):
    x, scale = example(2, 2, 3)
    tiny = 1e-12  # ε shifts the result by about half of ε over the mean square
    np.testing.assert_allclose(normalise(factor * x, scale, tiny), normalise(x, scale, tiny), rtol=1e-7)
    np.testing.assert_allclose(normalise(-x, scale, tiny), -normalise(x, scale, tiny), rtol=1e-12)


def test_zero_stays_zero_and_has_a_finite_gradient():
    zeros, ones = np.zeros((2, DIM), np.float32), np.ones(DIM, np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(normalise(x, ones) ** 2 + normalise(x, ones))))
    assert not np.any(normalise(zeros, ones))
    assert np.isfinite(gradient(zeros)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_statistics_are_float32_whatever_the_input(dtype):
    x, scale = example(5, 4)
    x, scale = x.astype(dtype), scale.astype(np.float32)
    y = normalise(x, scale)
    assert y.dtype == dtype
    expected = np.asarray(normalise(x.astype(np.float32), scale)).astype(dtype)
    np.testing.assert_array_equal(y, expected)  # one rounding, at the end


def test_large_half_precision_values_do_not_overflow():
    x = np.full((1, DIM), 3e4, np.float16)  # the square is far above float16's 65504
    np.testing.assert_allclose(normalise(x, np.ones(DIM, np.float32)), 1, rtol=1e-3)


def test_scale_starts_at_one_with_its_axis():
    norm = RMSNorm(DIM, "head_dim", eps=1e-5, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(norm.scale[...], np.ones(DIM, np.float32))
    assert names_of(norm.scale) == ("head_dim",)
