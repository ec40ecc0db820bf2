"""The loss is a sum over target tokens: its values in closed form, its gradient, and what may not change it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.config import TrainConfig, TransformerConfig
from parallax.model.transformer import TransformerLM, init_params
from parallax.training import loss as loss_module
from parallax.training.loss import NO_TARGET, chunked_losses, make_evaluation, make_loss, token_losses

B, T, D, V = 2, 7, 5, 11
KINDS = [{}, {"label_smoothing": 0.3}, {"z_loss": 0.2}, {"label_smoothing": 0.1, "z_loss": 0.05}]
CONFIG = TransformerConfig(
    vocab_size=V, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)


SETTINGS = ("label_smoothing", "z_loss")
losses = jax.jit(functools.partial(token_losses, vocab_size=V), static_argnames=SETTINGS)


def objective(logits, targets, **kind):
    return token_losses(logits, targets, vocab_size=V, **kind)["loss"]


value_and_gradient = jax.jit(jax.value_and_grad(objective), static_argnames=SETTINGS)


def example(seed, masked=0.3):
    """Logits [B, T, V] in float64 and targets [B, T], a share of them masked."""
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((B, T)) < masked, NO_TARGET, rng.integers(0, V, (B, T))).astype(np.int32)
    return rng.normal(0, 2, (B, T, V)), targets


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@functools.cache
def params():
    """Weights from numpy, since compiling an initialisation takes longer than the tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def batch(seed, rows=4):
    rng = np.random.default_rng(seed)
    inputs = rng.integers(0, V, (rows, T)).astype(np.int32)
    targets = np.where(rng.random((rows, T)) < 0.2, NO_TARGET, rng.integers(0, V, (rows, T)))
    return {"inputs": inputs, "targets": targets.astype(np.int32)}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_matches_finite_differences(kind, x64):
    logits, targets = example(0)
    step = 1e-5  # truncation ~1e-10, rounding ~1e-11: far below the tolerance

    @jax.jit
    @jax.vmap
    def value(flat):
        return objective(flat.reshape(B, T, V), targets, **kind)

    nudges = step * np.eye(logits.size)
    flat = logits.reshape(1, -1)
    differences = (value(flat + nudges) - value(flat - nudges)) / (2 * step)
    _, gradient = value_and_gradient(logits, targets, **kind)
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(gradient.ravel(), differences, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_definition(kind, x64):
    """Cross-entropy against a mixture of the target's one-hot and the uniform distribution; weight times log²Z."""
    logits, targets = example(1)
    smoothing, weight = kind.get("label_smoothing", 0.0), kind.get("z_loss", 0.0)
    counted = targets != NO_TARGET
    mixture = (1 - smoothing) * np.eye(V)[np.where(counted, targets, 0)] + smoothing / V
    ce = -np.sum(mixture * log_softmax(logits), axis=-1)[counted].sum()
    z = weight * np.sum(np.log(np.exp(logits).sum(-1))[counted] ** 2)
    sums = losses(logits, targets, **kind)
    expected = {"loss": ce + z, "ce_loss": ce, "z_loss": z}
    assert set(sums) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_positions_count_for_nothing(kind, x64):
    logits, targets = example(2)
    masked = targets == NO_TARGET
    assert masked.any()
    value, gradient = value_and_gradient(logits, targets, **kind)
    other = np.where(masked[..., None], 50 * np.random.default_rng(3).normal(size=logits.shape), logits)
    value_other, gradient_other = value_and_gradient(other, targets, **kind)
    assert value == value_other
    np.testing.assert_array_equal(gradient, gradient_other)
    assert not gradient[masked].any()
    assert gradient[~masked].all()


@pytest.mark.parametrize("seed", range(2))
def test_additive_over_any_split_of_the_tokens(seed, x64):
    logits, targets = example(seed)
    part = np.random.default_rng(seed).integers(0, 3, targets.shape)
    kind = {"label_smoothing": 0.1, "z_loss": 0.05}
    whole = losses(logits, targets, **kind)
    parts = [losses(logits, np.where(part == i, targets, NO_TARGET), **kind) for i in range(3)]
    for name, value in whole.items():
        np.testing.assert_allclose(sum(sums[name] for sums in parts), value, rtol=1e-12, err_msg=name)


def logits(table_WD, x_BTD):
    return jnp.einsum("BTD,WD->BTW", x_BTD, table_WD)


@pytest.mark.parametrize("chunk", [1, 3, T - 1, T, T + 4])
def test_chunks_change_neither_value_nor_gradient(chunk, x64):
    rng = np.random.default_rng(5)
    x, table = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    targets = example(5)[1]

    def sums(x, table, chunk):
        kind = {"label_smoothing": 0.1, "z_loss": 0.01}
        values = chunked_losses(logits, table, x, targets, chunk=chunk, vocab_size=V, **kind)
        return values["loss"], values

    value = jax.jit(jax.value_and_grad(sums, argnums=(0, 1), has_aux=True), static_argnums=2)
    results = value(x, table, chunk)
    (whole, _), _ = expected = value(x, table, T)
    assert jnp.isfinite(whole)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-14), results, expected)


def test_chunks_save_memory():
    """Going back holds the logits of one chunk and not of all tokens."""
    long, wide = 64, 4096
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
    whole, chunked = jax.jit(both)(params(), data)
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

    (plain, tokens), (full, same_tokens) = both(params(), data)
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

    (packed, tokens), (expected, same_tokens) = both(params())
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
    logits, (total, tokens), dropped = all_of_them(params(), keys)
    counted = data["targets"] != NO_TARGET
    hits = np.take_along_axis(log_softmax(np.asarray(logits, np.float64)), data["targets"][..., None], -1)
    assert tokens == counted.sum()
    np.testing.assert_allclose(total, -hits[..., 0][counted].sum(), rtol=1e-6)  # float32 sum of 20 numbers
    assert dropped[0] == dropped[1]
    assert len({*dropped.tolist(), float(total)}) == 3, "dropout depends on the key and is not in evaluation"
