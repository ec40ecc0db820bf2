"""The kernel gives what `attend` gives, values and gradients; here it is interpreted, on a TPU compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.layers import attention
from parallax.layers.attend import attend
from parallax.layers.splash import attend_in_kernel
from parallax.model.transformer import TransformerLM, init_params
from tests.parallax.inference.models import draw_params

B, T, H, G, K = 2, 256, 4, 2, 64


def example():
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    q, k, v = (jnp.asarray(rng.normal(0, 1, shape), jnp.float32) for shape in shapes)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (B, T)), axis=1), jnp.int32)
    return q / np.sqrt(K), k, v, segments, jnp.asarray(rng.normal(size=(B, T, H, K)), jnp.float32)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("segmented", [False, True])
def test_values_and_gradients_are_those_of_attend(window, segmented):
    q, k, v, segments, weights = example()
    segments = segments if segmented else None
    at = jnp.arange(T, dtype=jnp.int32)[None]
    pair = None if segments is None else (segments, segments)

    def plain(q, k, v):
        return attend(q, k, v, positions=(at, at), segments=pair, window=window)

    def kernel(q, k, v):
        return attend_in_kernel(q, k, v, segments, window)

    def both(function):
        def weighed(*x):
            y = function(*x)
            return jnp.sum(weights * y), y

        return jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    # float32, sums of up to 256 terms block by block
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, both(kernel), both(plain))


def test_a_model_gives_the_same_logits():
    config = TransformerConfig(embed_dim=64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, mlp_dim=64)
    params = draw_params(config)
    tokens = np.random.default_rng(1).integers(0, 65, (B, 128)).astype(np.int32)

    def logits(config):
        return jax.jit(lambda params: TransformerLM.from_params(config, params)(tokens)[0])(params)

    np.testing.assert_allclose(logits(config.replace(attention="splash")), logits(config), atol=1e-4)


def test_positions_or_a_cache_leave_the_kernel_alone(monkeypatch):
    """They are not the tokens in order, so XLA attends, as when generating."""

    def refuse(*_, **__):
        raise AssertionError("the kernel was asked")

    monkeypatch.setitem(attention.BY_BLOCKS, "splash", refuse)
    config = TransformerConfig(attention="splash")

    def forward(*inputs):
        return TransformerLM.from_params(config, init_params(config, jax.random.key(0)))(*inputs)[0]

    tokens, positions = np.zeros((1, 8), np.int32), np.arange(8, dtype=np.int32)[None]
    jax.eval_shape(forward, tokens, positions)
    with pytest.raises(AssertionError, match="the kernel was asked"):
        jax.eval_shape(forward, tokens)


def test_lengths_that_no_block_divides_are_refused():
    q, k, v, *_ = example()
    with pytest.raises(ValueError, match="attention=splash needs seq_len=200 to be a multiple of 128; try 256"):
        attend_in_kernel(q[:, :200], k[:, :200], v[:, :200], None, 0)
    with pytest.raises(ValueError, match="needs whole sequences on a device, not 128 of 256 tokens"):
        attend_in_kernel(q[:, :128], k, v, None, 0)


def test_a_config_that_drops_weights_is_refused():
    with pytest.raises(ValueError, match=r"attention=splash drops no weights, and dropout_rate=0.1; try"):
        TransformerConfig(attention="splash", dropout_rate=0.1)
