"""The attention layer: its gradient, its definition from its parts, and its place in time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from parallax.config import TransformerConfig
from parallax.layers.attention import Attention

B, T = 2, 6
SIZES = {"embed_dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "num_layers": 1}
VARIANTS = {
    "grouped": {},
    "full": {"num_kv_heads": 4},
    "everything": {"num_kv_heads": 1, "qk_norm": True, "attention_bias": True, "sliding_window": 3},
}
POSITIONS = np.arange(T, dtype=np.int32)[None]


def example(variant, dtype=np.float32, **changes):
    """Structure, random weights (biases and norm scales too), and input [B, T, D]."""
    config = TransformerConfig(**{**SIZES, **VARIANTS[variant], **changes})
    rng = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.6, leaf.shape), dtype), state)
    return graph, weights, jnp.asarray(rng.normal(size=(B, T, config.embed_dim)), dtype)


@functools.partial(jax.jit, static_argnums=0)
def apply(graph, weights, x, positions=POSITIONS, segments=None, keys=None):
    return nnx.merge(graph, weights)(x, positions, segments, None, keys)[0]


@pytest.mark.parametrize("variant", ["grouped", "everything"])
def test_gradient_of_all_weights_matches_finite_differences(variant, x64):
    graph, weights, x = example(variant, np.float64)
    segments = np.array([[1, 1, 1, 2, 2, 2], [1] * 6])
    check_grads(
        lambda weights, x: apply(graph, weights, x, segments=segments),
        (weights, x),
        order=1,
        modes=["rev"],
        eps=1e-5,
        atol=1e-7,
        rtol=1e-7,  # central differences are off by 1e-9
    )


def by_hand(module, x, positions):
    """One head after the other in numpy, with pairs turned as complex numbers."""
    config = module.config
    weight = {name: np.asarray(getattr(module, name)[...]) for name in ("query", "key", "value", "out")}
    K, out = config.head_dim, 0
    turn = np.exp(1j * positions[:, None] * config.rope_theta ** (-2 * np.arange(K // 2) / K))

    def head(name, x, i):
        y = x @ weight[name][:, i]
        return y + np.asarray(getattr(module, f"{name}_bias")[...])[i] if config.attention_bias else y

    def turned(y, norm):
        if config.qk_norm:
            scale = np.asarray(getattr(module, norm).scale[...])
            y = y / np.sqrt(np.mean(y**2, -1, keepdims=True) + config.norm_eps) * scale
        return (y[:, : K // 2] + 1j * y[:, K // 2 :]) * turn

    distance = positions[:, None] - positions[None]
    hidden = (distance < 0) | (distance >= (config.sliding_window or 10**9))
    for h in range(config.num_heads):
        g = h // (config.num_heads // config.num_kv_heads)
        q, k = turned(head("query", x, h), "query_norm"), turned(head("key", x, g), "key_norm")
        scores = np.where(hidden, -np.inf, np.real(q @ k.conj().T) / np.sqrt(K))
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ head("value", x, g) @ weight["out"][h]
    return out


@pytest.mark.parametrize("variant", VARIANTS)
def test_value_is_that_of_the_definition(variant, x64):
    graph, weights, x = example(variant, np.float64)
    module = nnx.merge(graph, weights)
    y = apply(graph, weights, x)
    for b in range(B):
        expected = by_hand(module, np.asarray(x[b]), np.arange(T))
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=1e-6)  # float32 ω


def test_dropout_needs_a_key_and_a_rate():
    def keys(seed):
        return jax.random.split(jax.random.key(seed), B)

    graph, weights, x = example("grouped", dropout_rate=0.5)
    plain = apply(graph, weights, x)
    first, again, other = (apply(graph, weights, x, keys=keys(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    assert np.abs(first - plain).max() > 0.01
    still, *_ = example("grouped", dropout_rate=0.0)
    np.testing.assert_array_equal(apply(still, weights, x, keys=keys(1)), plain)


def test_initial_output_shrinks_with_depth():
    """The residual stream sums 2N branches, each with the factor 1/√(2N)."""
    for layers in (1, 8):
        config = TransformerConfig(num_layers=layers, embed_dim=64, num_heads=8, num_kv_heads=8, head_dim=32)
        out = np.asarray(Attention(config, rngs=nnx.Rngs(1)).out[...])
        np.testing.assert_allclose(out.std(), (2 * layers * 256) ** -0.5, rtol=0.02)  # 16384 samples: 0.6%
