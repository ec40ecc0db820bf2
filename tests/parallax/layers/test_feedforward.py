"""SwiGLU: its definition, its gradient, and that each token is alone."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.test_util import check_grads

from parallax.config import TransformerConfig
from parallax.layers.feedforward import GatedFeedForward

B, T, D, F = 2, 3, 6, 10
CONFIG = TransformerConfig(embed_dim=D, mlp_dim=F, num_layers=2)


def example(seed, dtype=np.float64):
    """Structure, weights and input [B, T, D]."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: GatedFeedForward(CONFIG, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), dtype), state)
    return graph, weights, jnp.asarray(rng.normal(size=(B, T, D)), dtype)


def test_gradient_matches_finite_differences(x64):
    graph, weights, x = example(0)
    apply = jax.jit(lambda weights, x: nnx.merge(graph, weights)(x)[0])
    # Differences are off by 1e-10.
    check_grads(apply, (weights, x), order=1, modes=["rev"], eps=1e-5, atol=1e-7, rtol=1e-7)


def test_value_is_that_of_the_definition(x64):
    graph, weights, x = example(1)
    module = nnx.merge(graph, weights)
    gate, up, down = (np.asarray(p[...]) for p in (module.gate, module.up, module.down))
    product = np.asarray(x) @ gate
    expected = (product / (1 + np.exp(-product)) * (np.asarray(x) @ up)) @ down
    np.testing.assert_allclose(module(x)[0], expected, rtol=1e-12)


def test_acts_on_each_token_alone():
    graph, weights, x = example(2, np.float32)
    jacobian = jax.jit(jax.jacobian(lambda x: nnx.merge(graph, weights)(x[None])[0][0]))(x[0])
    for t in range(T):
        for s in range(T):
            assert bool(jacobian[t, :, s].any()) == (t == s)


def test_bfloat16_stays_and_is_close():
    graph, weights, x = example(3, np.float32)
    module = nnx.merge(graph, weights)
    y, _ = module(x.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), module(x)[0], atol=0.1)  # three matmuls at 2⁻⁸ each


def test_initial_output_shrinks_with_depth():
    """The residual stream sums 2N branches, each with the factor 1/√(2N): its variance stays near 1."""
    for layers in (1, 8, 32):
        config = TransformerConfig(embed_dim=64, mlp_dim=256, num_layers=layers)
        down = np.asarray(GatedFeedForward(config, rngs=nnx.Rngs(1)).down[...])
        np.testing.assert_allclose(down.std(), (2 * layers * 256) ** -0.5, rtol=0.02)  # 16384 samples: 0.6%
