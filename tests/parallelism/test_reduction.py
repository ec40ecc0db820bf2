"""However a batch is cut into microbatches and devices, the sums and the averaged gradient are those of the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax.training.loss import NO_TARGET, token_losses
from parallelism import reduction

DEVICES, ROWS, T, D, V = 4, 16, 5, 3, 7
PARAMS = {"w": np.random.default_rng(0).normal(size=(D, V)).astype(np.float32)}
CUTS = [(1, 1), (1, 4), (DEVICES, 1), (DEVICES, 2)]


def loss_fn(params, batch, key):
    logits = jnp.einsum("BTD,DV->BTV", batch["x"], params["w"])
    return token_losses(logits, batch["targets"], vocab_size=V, z_loss=1e-2), jnp.sum(batch["targets"] != NO_TARGET)


def batch(seed, densities):
    """Rows with targets at the given densities, repeated over the batch."""
    rng = np.random.default_rng(seed)
    kept = rng.random((ROWS, T)) < np.resize(densities, ROWS)[:, None]
    targets = np.where(kept, rng.integers(0, V, (ROWS, T)), NO_TARGET).astype(np.int32)
    return {"x": rng.normal(size=(ROWS, T, D)).astype(np.float32), "targets": targets}


@functools.cache
def compiled(devices, microbatches, loss_fn=loss_fn):
    """A whole batch to (sums, tokens, gradient); devices are a mapped axis, as under pmap, with rows in blocks."""
    if devices == 1:
        return jax.jit(reduction.mean(microbatches)(loss_fn))
    function = jax.vmap(
        reduction.pmean("batch", microbatches)(loss_fn), in_axes=(None, 0, None), axis_name="batch", axis_size=devices
    )

    def dealt(params, batch, key):
        return function(params, jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch), key)

    return jax.jit(dealt)


def reduced(devices, microbatches, data, loss_fn=loss_fn, key=0):
    """What each device ends with, [devices, ...]."""
    results = compiled(devices, microbatches, loss_fn)(PARAMS, data, jax.random.key(key))
    return jax.tree.map(lambda x: np.asarray(x)[None], results) if devices == 1 else results


@jax.jit
def whole(params, data):
    """Sums of a whole batch, and the gradient of its mean loss."""

    def mean_loss(params):
        sums, counted = loss_fn(params, data, None)
        return sums["loss"] / counted, sums

    gradient, sums = jax.grad(mean_loss, has_aux=True)(params)
    return sums, gradient


@pytest.mark.parametrize("densities", [[1.0], [1, 1, 0, 0.5], [0, 0, 0, 0.3]], ids=str)
@pytest.mark.parametrize(("devices", "microbatches"), CUTS)
def test_gradient_is_that_of_the_global_mean(devices, microbatches, densities):
    """Uneven numbers of targets included, down to a microbatch, a row or a device with none."""
    data = batch(1, densities)
    sums, tokens, gradient = jax.device_get(reduced(devices, microbatches, data))
    expected, truth = jax.device_get(whole(PARAMS, data))
    assert tokens.shape == (devices,)
    np.testing.assert_array_equal(tokens, np.sum(data["targets"] != NO_TARGET))
    for name, value in expected.items():
        np.testing.assert_allclose(sums[name], np.full(devices, value), rtol=1e-6, err_msg=name)
    for of_device in gradient["w"]:
        np.testing.assert_allclose(of_device, truth["w"], rtol=1e-5, atol=1e-7)  # order of float32 sums
    np.testing.assert_array_equal(gradient["w"], np.broadcast_to(gradient["w"][0], gradient["w"].shape))


@pytest.mark.parametrize(("devices", "microbatches"), CUTS)
def test_a_batch_without_targets_teaches_nothing(devices, microbatches):
    sums, tokens, gradient = reduced(devices, microbatches, batch(2, [0.0]))
    for leaf in jax.tree.leaves((sums, tokens, gradient)):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("microbatches", [2, 4])
def test_each_microbatch_holds_rows_of_every_block(microbatches):
    """Dealt like cards: on a mesh, where devices hold blocks of rows, no microbatch leaves a device idle."""

    def first_rows(params, batch, key):
        marks = jnp.zeros(ROWS).at[batch["row"]].set(1) * 2.0 ** jnp.sum(batch["row"] == 0)
        return {"loss": jnp.sum(params["w"]) * 0, "marks": marks}, jnp.int32(1)

    sums, _, _ = reduced(1, microbatches, {"row": np.arange(ROWS)}, loss_fn=first_rows)
    with_row_zero = np.flatnonzero(sums["marks"][0] == 2)
    assert len(with_row_zero) == ROWS // microbatches
    per_block = np.bincount(with_row_zero // (ROWS // DEVICES), minlength=DEVICES)
    np.testing.assert_array_equal(per_block, ROWS // microbatches // DEVICES)


def coins(params, batch, keys):
    """64 flips of each row's key, [ROWS, 64]; rows that are elsewhere have none."""
    flips = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (64,)))(keys)
    return {"loss": jnp.sum(params["w"]), "heads": jnp.zeros((ROWS, 64)).at[batch["row"]].set(flips)}, jnp.int32(1)


@pytest.mark.parametrize(("devices", "microbatches"), CUTS)
def test_a_row_has_a_key_of_its_own_whatever_device_and_microbatch_it_is_in(devices, microbatches):
    def heads(*cut, key=0):
        return np.asarray(reduced(*cut, {"row": np.arange(ROWS)}, loss_fn=coins, key=key)[0]["heads"][0])

    found = heads(devices, microbatches)
    np.testing.assert_array_equal(found, heads(1, 1))
    assert len(np.unique(found, axis=0)) == ROWS
    assert 0.4 < found.mean() < 0.6
    assert np.any(found != heads(devices, microbatches, key=1))
