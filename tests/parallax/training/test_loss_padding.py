"""A table with more rows than tokens gives the loss, and the gradient, of its first rows alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax.config import TrainConfig, TransformerConfig
from parallax.layers.embedding import Embedding
from parallax.model.transformer import init_params
from parallax.training.loss import NO_TARGET, chunked_losses, make_evaluation, make_loss

B, T, D, V, W = 2, 5, 6, 11, 16
KINDS = [{}, {"label_smoothing": 0.1, "z_loss": 0.05}]
SIZES = {"vocab_size": V, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 8}


def definition(logits_BTV, targets_BT, label_smoothing=0.0, z_loss=0.0):
    """The sums from exactly V logits, written from the formulas."""
    counted = targets_BT != NO_TARGET
    log_Z = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
    mixture = (1 - label_smoothing) * np.eye(V)[np.where(counted, targets_BT, 0)] + label_smoothing / V
    ce = jnp.sum(jnp.where(counted, log_Z - jnp.sum(mixture * logits_BTV, axis=-1), 0))
    z = jnp.sum(jnp.where(counted, z_loss * log_Z**2, 0))
    return {"loss": ce + z, "ce_loss": ce, "z_loss": z}


def example(dtype, softcap):
    """A table whose last rows hold anything, input [B, T, D], and targets of which some are masked."""
    config = TransformerConfig(embed_dim=D, logit_softcap=softcap, **SIZES)
    graph, state = nnx.split(nnx.eval_shape(lambda: Embedding(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(size=(V, D)), rng.normal(0, 1e3, (W - V, D))]).astype(dtype)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[:, 2] = NO_TARGET

    logits = nnx.merge(graph, state).logits
    return logits, jnp.asarray(table), jnp.asarray(rng.normal(size=(B, T, D)), dtype), targets


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_and_gradients_are_those_of_the_first_rows(kind, dtype, softcap):
    with jax.enable_x64(dtype == np.float64):
        logits, table, x, targets = example(dtype, softcap)

        def padded(table, x, chunk):
            sums = chunked_losses(logits, table, x, targets, chunk=chunk, vocab_size=V, **kind)
            return sums["loss"], sums

        def plain(table, x):
            plain = jnp.einsum("BTD,VD->BTV", x, table)
            sums = definition(softcap * jnp.tanh(plain / softcap) if softcap else plain, targets, **kind)
            return sums["loss"], sums

        @jax.jit
        def both(table, x):
            differentiated = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
            found = [differentiated(functools.partial(padded, chunk=chunk))(table, x) for chunk in (T, 2)]
            return found, differentiated(plain)(table[:V], x)

        found, ((_, expected), (of_table, of_x)) = both(table, x)
        close = {"rtol": 1e-11, "atol": 1e-13} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-6}
        for (_, sums), (found_of_table, found_of_x) in found:
            assert sums.keys() == expected.keys()
            for name, value in expected.items():
                assert sums[name].dtype == dtype
                np.testing.assert_allclose(sums[name], value, **close)
            np.testing.assert_allclose(found_of_table[:V], of_table, **close)
            np.testing.assert_allclose(found_of_x, of_x, **close)
            assert np.abs(of_table).max() > 0.1
            np.testing.assert_array_equal(found_of_table[V:], 0)


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_what_stands_in_rows_without_a_token_changes_no_bit_of_a_step(dtype, tied):
    """Of loss, evaluation and the gradients of all parameters; those of these rows are zero."""
    config = TransformerConfig(embed_dim=8, tie_embeddings=tied, dtype=dtype, **SIZES)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    batch = {name: rng.integers(0, V, (B, T)).astype(np.int32) for name in ("inputs", "targets")}
    loss_fn = make_loss(config, TrainConfig(label_smoothing=0.2, z_loss=0.1))

    @jax.jit
    def all_of_it(params):
        return jax.value_and_grad(lambda params: loss_fn(params, batch, None)[0]["loss"])(params), (
            make_evaluation(config)(params, batch)
        )

    def filled(value):
        def fill(path, leaf):
            table = path[-1].key == "table"
            return np.concatenate([leaf[:V], np.full_like(leaf[V:], value)]) if table else leaf

        return jax.tree_util.tree_map_with_path(fill, params)

    zero, small, large = (all_of_it(filled(value)) for value in (0.0, -3.0, 1e9))
    assert np.isfinite(zero[0][0])
    for other in (small, large):
        jax.tree.map(np.testing.assert_array_equal, other, zero)
    tables = [leaf for path, leaf in jax.tree.leaves_with_path(zero[0][1]) if path[-1].key == "table"]
    assert len(tables) == 2 - tied
    assert tables[-1][:V].any(axis=1).all(), "the output gives every token a gradient"
    for table in tables:
        assert not table[V:].any()
