"""What can be known of cuDNN's attention without a GPU: what it refuses, and rows of packed documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.layers.attend import attend
from parallax.layers.cudnn import attend_by_cudnn

B, T, H, G, K = 2, 128, 4, 2, 64


def example(dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = ((B, T, H, K), (B, T, G, K), (B, T, G, K))
    q, k, v = (rng.normal(0, 1, shape).astype(dtype) for shape in shapes)
    return q / np.sqrt(K).astype(dtype), k, v


@pytest.mark.parametrize("window", [0, 50])
def test_packed_documents_are_kept_apart(window):
    q, k, v = example()
    segments = np.sort(np.random.default_rng(1).integers(0, 3, (B, T), np.int32), axis=1)
    at = np.arange(T, dtype=np.int32)[None]

    @jax.jit
    def both(q, k, v, segments):
        expected = attend(q, k, v, positions=(at, at), segments=(segments, segments), window=window)
        return expected, attend_by_cudnn(q, k, v, segments, window)

    expected, found = both(q, k, v, segments)
    # both round scores and weights to bfloat16, in another order
    np.testing.assert_allclose(np.float32(found), np.float32(expected), atol=0.03)


def test_what_it_cannot_take_is_refused():
    q, k, v = example(jnp.float32)
    with pytest.raises(ValueError, match=r"attention=cudnn needs bfloat16 .* not float32 and head_dim=64; try"):
        attend_by_cudnn(q, k, v, None, 0)
    with pytest.raises(ValueError, match="attention=cudnn needs whole sequences on a device, not 64 of 128 tokens"):
        attend_by_cudnn(q[:, :64], k, v, None, 0)
    with pytest.raises(ValueError, match=r"attention=cudnn drops no weights, and dropout_rate=0\.1; try xla"):
        TransformerConfig(attention="cudnn", dropout_rate=0.1)
