"""The table: looked up, and multiplied into float32 logits, of which those without a token are masked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax.axes import names_of
from parallax.config import TransformerConfig
from parallax.layers.embedding import MASKED, Embedding
from parallax.layers.normalization import RMSNorm

V, W, D = 7, 8, 4
TOKENS = np.array([[0, 6, 3], [3, 3, 1]])


def embedding(**changes):
    return Embedding(TransformerConfig(vocab_size=V, embed_dim=D, **changes), rngs=nnx.Rngs(0))


@functools.cache
def hidden():
    return jnp.asarray(np.random.default_rng(0).normal(0, 100, (2, 3, D)), jnp.float32)


def test_embed_reads_rows():
    made = embedding()
    np.testing.assert_array_equal(made.embed(TOKENS), made.table[...][TOKENS])
    assert names_of(made.table) == ("vocab", "embed")


def test_only_the_rows_read_have_a_gradient():
    graph, state = nnx.split(embedding())
    gradient = jax.grad(lambda state: nnx.merge(graph, state).embed(TOKENS).sum())(state)
    counts = np.bincount(TOKENS.ravel(), minlength=W)
    np.testing.assert_array_equal(gradient["table"][...], np.repeat(counts[:, None], D, axis=1))


def test_unembed_multiplies_by_the_same_table():
    made = embedding()
    logits = made.unembed(hidden())
    assert logits.shape == (2, 3, W)
    np.testing.assert_allclose(logits[..., :V], hidden() @ made.table[:V].T, rtol=1e-5)  # float32 sums


@pytest.mark.parametrize("vocab_size", [1, 7, 8])
@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16"}, {"logit_softcap": 30.0}], ids=str)
def test_logits_of_rows_without_a_token_are_masked_whatever_stands_there(vocab_size, changes):
    made = Embedding(TransformerConfig(vocab_size=vocab_size, embed_dim=D, **changes), rngs=nnx.Rngs(0))
    before = made.unembed(hidden().astype(made.dtype))
    made.table[...] = made.table[...].at[vocab_size:].set(1e6 * jnp.arange(D)[None] - 1e6)
    after = made.unembed(hidden().astype(made.dtype))
    assert after.shape == (2, 3, -(-vocab_size // 8) * 8)
    np.testing.assert_array_equal(after[..., vocab_size:], np.float32(MASKED))
    np.testing.assert_array_equal(after, before)
    assert np.abs(after[..., :vocab_size]).max() < 1e5 < -MASKED


def test_bfloat16_vectors_give_float32_logits():
    made = embedding(dtype="bfloat16")
    assert made.embed(TOKENS).dtype == jnp.bfloat16
    x = hidden().astype(jnp.bfloat16)
    logits = made.unembed(x)
    assert logits.dtype == jnp.float32
    rounded = made.table[:V].astype(jnp.bfloat16).astype(jnp.float32)
    exact = x.astype(jnp.float32) @ rounded.T  # only the operands are bfloat16: sums are float32
    np.testing.assert_allclose(logits[..., :V], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap_bounds_and_keeps_order(cap):
    plain, capped = (embedding(logit_softcap=c).unembed(hidden())[..., :V] for c in (0.0, cap))
    assert np.abs(plain).max() > cap
    assert np.abs(capped).max() <= cap
    np.testing.assert_allclose(capped, cap * np.tanh(plain / cap), rtol=1e-6)  # float32 rounding


def test_first_logits_have_variance_one_sixteenth():
    made = Embedding(TransformerConfig(vocab_size=512, embed_dim=64), rngs=nnx.Rngs(1))
    x = np.random.default_rng(2).normal(size=(1, 64, 64)).astype(np.float32)
    np.testing.assert_allclose(np.var(made.unembed(x)), 1 / 16, rtol=0.05)  # 64 independent rows


def test_the_gradient_of_a_row_that_is_read_often_is_summed_in_float32():
    """A bfloat16 sum of ones ends at 256."""
    graph, state = nnx.split(embedding(dtype="bfloat16"))
    often = np.full((1, 13_700), 3)
    gradient = jax.jit(jax.grad(lambda state: nnx.merge(graph, state).embed(often).astype(jnp.float32).sum()))(state)
    np.testing.assert_allclose(gradient["table"][3], 13_700, rtol=2**-8)  # it is rounded once, at the end


@pytest.mark.parametrize("width", [64, 512, 4096, 16_384])
def test_what_is_looked_up_does_not_drown_in_the_epsilon_of_the_norm_behind_it(width):
    def normed(eps):
        config = TransformerConfig(vocab_size=64, embed_dim=width, norm_eps=eps)
        x = Embedding(config, rngs=nnx.Rngs(0)).embed(np.arange(64)[None])
        return RMSNorm(width, "embed", eps=eps, rngs=nnx.Rngs(0))(x)

    for found in jax.jit(lambda: (normed(1e-6), normed(1e-5)))():
        assert np.sqrt(np.mean(np.asarray(found) ** 2)) == pytest.approx(1, abs=0.02)


def test_a_table_that_only_unembeds_makes_small_logits_at_any_width():
    made = Embedding(TransformerConfig(vocab_size=64, embed_dim=4096), "output", rngs=nnx.Rngs(1))
    x = np.random.default_rng(2).normal(size=(1, 8, 4096)).astype(np.float32)
    np.testing.assert_allclose(np.var(made.unembed(x)), 1 / 16, rtol=0.2)  # of 512 logits
