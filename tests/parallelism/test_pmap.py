"""Replicas that stay equal and are never copied, and a batch dealt over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallax import axes
from parallax.layers.dropout import dropout


@pytest.fixture(scope="module")
def strategy(tiny):
    return tiny.strategy("pmap")


@pytest.fixture(scope="module")
def trained(strategy, tiny):
    """The placed state after three steps, and their losses."""
    state, losses, take = strategy.init(), [], strategy.compile(tiny.step(strategy))
    for k in range(3):
        state, metrics = take(state, strategy.put_batch(tiny.batch(k)))
        losses.append(float(metrics["loss"]))
    return state, losses


def replicas(leaf):
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def test_each_device_holds_one_replica_and_they_stay_equal(strategy, trained):
    for state in (strategy.init(), trained[0]):
        for leaf in jax.tree.leaves(state):
            first, *others = replicas(leaf)
            assert len(others) == 7
            assert first.shape == leaf.shape
            for other in others:
                np.testing.assert_array_equal(other, first)


def buffers(state):
    return [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) for shard in leaf.addressable_shards]


def test_a_state_is_evaluated_saved_and_restored_in_its_own_buffers(strategy, trained):
    """Another replica of it beside these would not fit where the step just fits."""
    state, losses = trained
    assert len(set(losses)) == 3
    canonical = strategy.canonical(state)
    assert buffers(canonical) == buffers(state)
    for leaf, shape in zip(jax.tree.leaves(canonical), jax.tree.leaves(strategy.abstract()), strict=True):
        assert (leaf.shape, leaf.sharding) == (shape.shape, shape.sharding)
        assert leaf.is_fully_replicated
    back = strategy.adopt(canonical)
    assert buffers(back) == buffers(state)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_batch_is_dealt_in_blocks_of_rows(strategy, tiny):
    batch = tiny.batch(0)
    placed = strategy.put_batch(batch)
    assert strategy.rows(16).tolist() == list(range(16))
    for name, x in batch.items():
        assert placed[name].shape == (8, 2, 6)
        for device, shard in enumerate(placed[name].addressable_shards):
            assert shard.device == jax.devices()[device]
            np.testing.assert_array_equal(shard.data[0], x[2 * device : 2 * device + 2])


def test_devices_drop_different_values_of_equal_rows(strategy):
    """Equal rows on all devices: with one key the averaged gradient would be 0 or 2 wherever dropout decides it."""

    def loss_fn(params, batch, keys):
        kept = dropout(batch["x"] * params["w"][None], 0.5, keys)
        return {"loss": jnp.sum(kept)}, jnp.int32(1)

    def step(state, batch):
        _, tokens, gradient = strategy.gradients(loss_fn)(state, batch, jax.random.key(0))
        return state, {"tokens": tokens, "gradient": gradient["w"]}

    state = {"w": jnp.ones(256)}
    _, results = strategy.compile(step)(state, strategy.put_batch({"x": np.ones((8, 256), np.float32)}))
    assert results["tokens"] == 8
    heads = 8 * results["gradient"] / 2
    np.testing.assert_array_equal(heads, np.round(heads))
    assert 1 < np.var(heads) < 4, "256 binomials of variance 2, within a factor of two; one key for all would give 16"


def test_constraints_of_the_model_are_off_inside(strategy, tiny):
    """Whatever is bound outside, a replica computes alone."""

    class Refusing(axes.Placement):
        def constrain(self, x, names):
            raise AssertionError("bound inside pmap")

        local = constrain

    def step(state, batch):
        return state, axes.constrain(batch["inputs"], "batch", "length").sum()

    batch = tiny.batch(2)
    with axes.bound(Refusing()):
        _, total = strategy.compile(step)({"w": jnp.zeros(1)}, strategy.put_batch(batch))
    assert total == batch["inputs"][:2].sum(), "the metrics are the first replica's"


def test_the_mapped_axis_follows_the_devices_that_rows_are_dealt_to(tiny, monkeypatch):
    """In whatever order JAX lists them: exact reduction and dropout number the shards by the axis."""
    order = list(reversed(jax.devices()))
    monkeypatch.setattr(jax, "devices", lambda *_: order)
    strategy = tiny.strategy("pmap")
    placed = strategy.put_batch({"x": np.arange(16, dtype=np.float32)[:, None]})

    def step(state, batch):
        return state, jax.lax.all_gather(batch["x"][0, 0], "batch")

    _, first_rows = strategy.compile(step)({"w": jnp.zeros(1)}, placed)
    np.testing.assert_array_equal(first_rows, 2 * np.arange(8))
    assert list(first_rows.sharding.mesh.devices.flat) == order
    for shard in placed["x"].addressable_shards:
        assert shard.device == order[shard.index[0].start]
