"""A block only adds to the residual stream, in the order that its docstring says."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parallax.config import TransformerConfig
from parallax.model.stack import TransformerBlock

B, T, D = 2, 5, 8
SIZES = {"embed_dim": D, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 12, "num_layers": 1}
POSITIONS = np.arange(T, dtype=np.int32)[None]


def example(zeroed=(), **changes):
    """A block with random weights, those named in `zeroed` 0, and an input [B, T, D]."""
    rng = np.random.default_rng(0)
    config = TransformerConfig(**SIZES, **changes)
    graph, state = nnx.split(nnx.eval_shape(lambda: TransformerBlock(config, rngs=nnx.Rngs(0))))

    def weights(path, leaf):
        zero = any(name in jax.tree_util.keystr(path) for name in zeroed)
        return jax.device_put((rng.normal(0.2, 0.5, leaf.shape) * (not zero)).astype(np.float32))

    block = nnx.merge(graph, jax.tree_util.tree_map_with_path(weights, state))
    return block, jax.device_put(rng.normal(size=(B, T, D)).astype(np.float32))


def test_adds_attention_of_the_norm_and_then_feedforward_of_the_norm():
    block, x = example()

    @jax.jit
    def both(x):
        attended = x + block.attention(block.attention_norm(x), POSITIONS)[0]
        y, cache, aux = block(x, POSITIONS)
        assert cache is None
        assert aux == {}
        return y, attended + block.mlp(block.mlp_norm(attended))[0]

    np.testing.assert_array_equal(*both(x))


def test_is_the_identity_without_output_weights():
    block, x = example(zeroed=["'out'", "'down'"])
    np.testing.assert_array_equal(jax.jit(lambda x: block(x, POSITIONS)[0])(x), x)


def test_without_attention_each_token_is_alone():
    block, x = example(zeroed=["'out'"])
    other = np.array(x)
    other[:, 2] = 9.0
    y, of_other = map(jax.jit(lambda x: block(x, POSITIONS)[0]), (x, other))
    changed = np.any(np.asarray(y) != np.asarray(of_other), axis=(0, 2))
    np.testing.assert_array_equal(changed, np.arange(T) == 2)


def test_the_three_places_of_dropout_use_different_keys():
    """With one key for the two residual sums, a dropped value of one would be dropped in the other too."""
    block, x = example(dropout_rate=0.5)
    block.attention = lambda x, *_: (jnp.ones_like(x), None)
    block.mlp = lambda x, *_: (jnp.ones_like(x), {})
    keys = jax.random.split(jax.random.key(0), B)
    added = jax.jit(lambda x: block(x, POSITIONS, dropout_keys_B=keys)[0] - x)(x)
    np.testing.assert_allclose(np.unique(np.round(added, 4)), [0, 2, 4])  # neither, one, both; scaled by 2


def test_dropout_keeps_the_mean():
    block, x = example(dropout_rate=0.3)
    keys = jax.random.split(jax.random.key(1), (4000, B))
    # Only the last sum is dropped linearly, so that is where an exact mean can be expected.
    block.attention = lambda x, *_: (jnp.zeros_like(x), None)
    samples = np.asarray(jax.jit(jax.vmap(lambda keys: block(x, POSITIONS, dropout_keys_B=keys)[0]))(keys))
    error = samples.std(0) / np.sqrt(len(samples))
    # Of 80 means one is beyond five standard errors in fewer than one of a thousand seeds.
    plain = jax.jit(lambda x: block(x, POSITIONS)[0])(x)
    assert np.all(np.abs(samples.mean(0) - plain) < 5 * error + 1e-6)


def test_compute_dtype_is_that_of_the_input():
    block, x = example(qk_norm=True, attention_bias=True)
    y, exact = jax.jit(lambda x: (block(x.astype(jnp.bfloat16), POSITIONS)[0], block(x, POSITIONS)[0]))(x)
    assert y.dtype == jnp.bfloat16
    assert np.abs(y.astype(jnp.float32) - exact).max() < 0.05 * np.abs(exact).max()  # roundings of 2⁻⁸
