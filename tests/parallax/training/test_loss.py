"""The loss is a sum over target tokens: its values and gradients by definition, and what may not change them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parallax.config import TrainConfig, TransformerConfig
from parallax.layers.embedding import Embedding
from parallax.model.transformer import TransformerLM
from parallax.training import loss as loss_module
from parallax.training.loss import NO_TARGET, chunked_losses, make_evaluation, make_loss
from tests.parallax.inference.models import draw_params

B, T, D, V, W = 2, 7, 6, 11, 16
KINDS = [{}, {"label_smoothing": 0.3}, {"z_loss": 0.2}, {"label_smoothing": 0.1, "z_loss": 0.05}]
CONFIG = TransformerConfig(
    vocab_size=V, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)


def definition(logits_BTV, targets_BT, label_smoothing=0.0, z_loss=0.0):
    """Cross-entropy against a mixture of the target's one-hot and the uniform distribution; weight times log²Z."""
    counted = targets_BT != NO_TARGET
    log_Z = jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))
    mixture = (1 - label_smoothing) * np.eye(V)[np.where(counted, targets_BT, 0)] + label_smoothing / V
    ce = jnp.sum(jnp.where(counted, log_Z - jnp.sum(mixture * logits_BTV, axis=-1), 0))
    z = jnp.sum(jnp.where(counted, z_loss * log_Z**2, 0))
    return {"loss": ce + z, "ce_loss": ce, "z_loss": z}


def example(dtype, softcap):
    """A table whose last rows hold anything, input [B, T, D], and targets of which some are masked."""
    config = CONFIG.replace(embed_dim=D, logit_softcap=softcap)
    graph, state = nnx.split(nnx.eval_shape(lambda: Embedding(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    table = np.concatenate([rng.normal(size=(V, D)), rng.normal(0, 1e3, (W - V, D))]).astype(dtype)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[:, 2] = targets[0, 5] = NO_TARGET
    return nnx.merge(graph, state).logits, jnp.asarray(table), jnp.asarray(rng.normal(size=(B, T, D)), dtype), targets


params = functools.cache(functools.partial(draw_params, scale=0.3))


def batch(seed, rows=4):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, V, (rows, T)).astype(np.int32)
    targets = np.where(rng.random((rows, T)) < 0.2, NO_TARGET, rng.integers(0, V, (rows, T)))
    return {"inputs": inputs, "targets": targets.astype(np.int32)}


@pytest.mark.parametrize(
    ("kind", "dtype", "softcap"),
    [*((kind, np.float64, softcap) for kind in KINDS for softcap in (0.0, 2.0)), (KINDS[-1], np.float32, 2.0)],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition_in_chunks_of_any_size(kind, dtype, softcap):
    """A table with more rows than tokens counts by its first rows alone, and a masked position not at all."""
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
            chunks = (1, 3, T, T + 4)
            found = [differentiated(functools.partial(padded, chunk=chunk))(table, x) for chunk in chunks]
            return found, differentiated(plain)(table[:V], x)

        found, ((_, expected), (of_table, of_x)) = both(table, x)
        close = {"rtol": 1e-11, "atol": 1e-13} if dtype == np.float64 else {"rtol": 1e-5, "atol": 1e-5}
        for (_, sums), (found_of_table, found_of_x) in found:
            assert sums.keys() == expected.keys()
            for name, value in expected.items():
                assert sums[name].dtype == dtype
                np.testing.assert_allclose(sums[name], value, **close)
            np.testing.assert_allclose(found_of_table[:V], of_table, **close)
            np.testing.assert_allclose(found_of_x, of_x, **close)
            assert np.abs(of_table).max() > 0.1
            np.testing.assert_array_equal(found_of_table[V:], 0)
            np.testing.assert_array_equal(found_of_x[targets == NO_TARGET], 0)


@pytest.mark.parametrize(("dtype", "tied"), [("float32", True), ("bfloat16", False)])
def test_what_stands_in_rows_without_a_token_changes_no_bit_of_a_step(dtype, tied):
    """Of loss, evaluation and the gradients of all parameters; those of these rows are zero."""
    config, data = CONFIG.replace(tie_embeddings=tied, dtype=dtype), batch(1)
    loss_fn = make_loss(config, TrainConfig(label_smoothing=0.2, z_loss=0.1))

    @jax.jit
    def all_of_it(params):
        value_and_gradient = jax.value_and_grad(lambda params: loss_fn(params, data, None)[0]["loss"])
        return value_and_gradient(params), make_evaluation(config)(params, data)

    def filled(value):
        def fill(path, leaf):
            table = path[-1].key == "table"
            return np.concatenate([leaf[:V], np.full_like(leaf[V:], value)]) if table else leaf

        return jax.tree_util.tree_map_with_path(fill, params(config))

    zero, small, large = (all_of_it(filled(value)) for value in (0.0, -3.0, 1e9))
    assert np.isfinite(zero[0][0])
    for other in (small, large):
        jax.tree.map(np.testing.assert_array_equal, other, zero)
    tables = [leaf for path, leaf in jax.tree.leaves_with_path(zero[0][1]) if path[-1].key == "table"]
    assert len(tables) == 2 - tied
    assert tables[-1][:V].any(axis=1).all(), "the output gives every token a gradient"
    for table in tables:
        assert not table[V:].any()


def test_chunks_save_memory():
    """The backward pass holds the logits of one chunk and not of all tokens."""
    long, wide = 64, 4096

    def logits(table_WD, x_BTD):
        return jnp.einsum("BTD,WD->BTW", x_BTD, table_WD)

    shapes = (jax.ShapeDtypeStruct((B, long, D), jnp.float32), jax.ShapeDtypeStruct((wide, D), jnp.float32))
    targets = np.zeros((B, long), np.int32)

    def temporary(chunk):
        def objective(x, table):
            sums = chunked_losses(logits, table, x, targets, chunk=chunk, vocab_size=wide, z_loss=1e-4)
            return sums["loss"]

        compiled = jax.jit(jax.grad(objective, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(long) > 4 * B * long * wide / 2
    assert temporary(4) < temporary(long) / 4


def test_objective_takes_logits_in_chunks_when_a_row_of_them_is_large(monkeypatch):
    data, settings = batch(6), TrainConfig(label_smoothing=0.1, z_loss=1e-2)
    sizes = []

    def recorded(*arguments, chunk, **keywords):
        sizes.append(chunk)
        return chunked_losses(*arguments, chunk=chunk, **keywords)

    def both(params, data):
        whole = make_loss(CONFIG, settings)(params, data, None)
        monkeypatch.setattr(loss_module, "ROW_LOGITS", 3 * V)
        return whole, make_loss(CONFIG, settings)(params, data, None)

    monkeypatch.setattr(loss_module, "chunked_losses", recorded)
    whole, chunked = jax.jit(both)(params(CONFIG), data)
    assert sizes[0] >= T
    assert sizes[1] == 3
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), chunked, whole)  # float32 sums


def test_objective_counts_its_targets_and_follows_its_settings():
    data = batch(7)
    counted = np.sum(data["targets"] != NO_TARGET)
    settings = TrainConfig(z_loss=0.0), TrainConfig(label_smoothing=0.2, z_loss=0.5)

    @jax.jit
    def both(params, data):
        return [make_loss(CONFIG, setting)(params, data, None) for setting in settings]

    (plain, tokens), (full, same_tokens) = both(params(CONFIG), data)
    assert tokens == same_tokens == counted
    assert plain["loss"] == plain["ce_loss"]
    assert plain["z_loss"] == 0
    assert full["z_loss"] > 0
    assert full["ce_loss"] != plain["ce_loss"]
    np.testing.assert_allclose(full["loss"], full["ce_loss"] + full["z_loss"], rtol=1e-6)


def test_packed_documents_cost_what_they_cost_apart():
    """A row of two documents and padding, against the same documents in rows of their own."""
    data = batch(8, rows=1)
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]], np.int32)
    data["targets"] = np.where(segments == 0, NO_TARGET, data["targets"])
    second = {name: np.pad(values[:, 3:5], ((0, 0), (0, 1))) for name, values in data.items()}
    second["targets"][:, 2:] = NO_TARGET
    apart = {name: np.concatenate([values[:, :3], second[name]]) for name, values in data.items()}

    @jax.jit
    def both(params):
        loss_fn = make_loss(CONFIG, TrainConfig())
        return loss_fn(params, data | {"segments": segments}, None), loss_fn(params, apart, None)

    (packed, tokens), (expected, same_tokens) = both(params(CONFIG))
    assert tokens == same_tokens
    for name, value in expected.items():
        # float32 sums; rotary angles are those of other positions
        np.testing.assert_allclose(packed[name], value, rtol=1e-5, err_msg=name)


def test_evaluation_is_plain_cross_entropy():
    """No dropout, smoothing or z-loss, and no key asked for, whatever the model was trained with."""
    config, data = CONFIG.replace(dropout_rate=0.5), batch(9)

    @jax.jit
    def all_of_them(params, keys):
        logits, _ = TransformerLM.from_params(CONFIG, params)(data["inputs"])
        training = make_loss(config, TrainConfig(z_loss=0.0))
        dropped = jax.lax.map(lambda key: training(params, data, key)[0]["loss"], keys)
        return logits, make_evaluation(config)(params, data), dropped

    keys = jax.vmap(jax.random.key)(jnp.array([0, 0, 1]))
    logits, (total, tokens), dropped = all_of_them(params(CONFIG), keys)
    counted = data["targets"] != NO_TARGET
    hits = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), data["targets"][..., None], -1)
    assert tokens == counted.sum()
    np.testing.assert_allclose(total, -hits[..., 0][counted].sum(), rtol=1e-6)  # float32 sum of 20 numbers
    assert dropped[0] == dropped[1]
    assert len({*dropped.tolist(), float(total)}) == 3, "dropout depends on the key and is not in evaluation"


@jax.jit
def losses_of_both(params, batch):
    """Of training and of evaluation."""
    return make_loss(CONFIG, TrainConfig())(params, batch, None)[0]["loss"], make_evaluation(CONFIG)(params, batch)[0]


@pytest.mark.parametrize("target", [-2, -100, V, W])
def test_a_target_that_no_logit_stands_for_makes_the_loss_nan(target):
    """It was counted, at the cost of log Z alone."""
    given = batch(0)
    given["targets"][1, 2] = target
    loss, evaluated = losses_of_both(params(CONFIG), given)
    assert np.isnan(loss)
    assert np.isnan(evaluated)


@pytest.mark.parametrize("chunk", [3, T])
def test_targets_of_another_shape_are_refused(chunk):
    """One row of them was compared with every row."""
    logits, table, x, targets = example(np.float32, 0.0)
    for given, found in ((targets[:1], r"int32\[1, 7\]"), (targets.astype(np.float32), r"float32\[2, 7\]")):
        with pytest.raises(ValueError, match=f"targets={found} must be integers " + r"\[2, 7\]; give one an input"):
            chunked_losses(logits, table, x, given, chunk=chunk, vocab_size=V)
