"""The count of operations against the compiler's own, and against the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import TransformerConfig
from parallax.model.cost import forward_flops, state_bytes, step_flops
from parallax.model.transformer import TransformerLM, init_params

SIZES = {"embed_dim": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "mlp_dim": 256}


def compiled_flops(config, batch_size, seq_len):
    """Of one forward pass; with a single layer the compiler, which counts the body of a loop once, counts all."""
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)

    def forward(params, tokens):
        return TransformerLM.from_params(config, params)(tokens)[0]

    return jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("changes", "T"),
    [
        ({"vocab_size": 512}, 32),
        ({"num_kv_heads": 1, "tie_embeddings": False}, 48),
        ({"num_layers": 1, "mlp_dim": 128, "num_heads": 8, "sliding_window": 8}, 96),
    ],
    ids=["matrices", "grouped", "attention"],
)
def test_forward_flops_agree_with_the_compiler(changes, T):
    config = TransformerConfig(**{**SIZES, **changes})
    # The compiler multiplies masked keys too, which the model does not need: all T keys a query, not the visible.
    visible = np.mean(np.minimum(np.arange(1, T + 1), config.sliding_window or T))
    masked = 4 * config.num_heads * config.head_dim * (T - visible)
    ratio = compiled_flops(config, 2, T) / (2 * T * (forward_flops(config, T) + masked))
    assert 1 <= ratio < 1.05  # norms, softmax and gates come on top


@pytest.mark.parametrize("window", [0, 1, 5, 12, 13, 100])
def test_attention_counts_the_visible_keys(window):
    T = 13
    config = TransformerConfig(**SIZES, sliding_window=window)
    keys = np.mean([sum(not window or t - s < window for s in range(t + 1)) for t in range(T)])
    matrices = config.num_params() - 3 * 64  # without the norms' scales; the tied table counts once
    expected = 2 * matrices + 4 * 4 * 16 * keys
    assert forward_flops(config, T) == pytest.approx(expected, rel=1e-12)


def test_deeper_costs_as_much_again():
    by_depth = [forward_flops(TransformerConfig(**{**SIZES, "num_layers": n}), 20) for n in (1, 2, 5)]
    assert by_depth[2] - by_depth[0] == pytest.approx(4 * (by_depth[1] - by_depth[0]))


def test_a_step_costs_three_forward_passes_of_the_batch():
    config = TransformerConfig(**SIZES)
    assert step_flops(config, 6, 20) == pytest.approx(3 * 6 * 20 * forward_flops(config, 20))


def test_state_is_three_float32_trees():
    assert state_bytes(TransformerConfig(**SIZES)) == 12 * TransformerConfig(**SIZES).num_params()
