"""Replicas that stay equal, a batch dealt over them, and no device dim outside."""

import re

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
def compiled(strategy, tiny):
    """The step, compiled from shapes alone."""
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch(0).items()}
    return strategy.lower(tiny.step(strategy), batch).compile()


@pytest.fixture(scope="module")
def trained(strategy, tiny, compiled):
    """The placed state after five steps, their metrics, and whether the first state was donated."""
    state = first = strategy.init()
    rows = []
    for k in range(5):
        state, metrics = compiled(state, strategy.put_batch(tiny.batch(k)))
        rows.append(jax.device_get(metrics))
    return state, rows, all(leaf.is_deleted() for leaf in jax.tree.leaves(first))


def replicas(leaf):
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_each_device_holds_one_replica_and_they_stay_equal(strategy, trained):
    for state in (strategy.init(), trained[0]):
        for leaf in jax.tree.leaves(state):
            assert leaf.shape[0] == 8
            first, *others = replicas(leaf)
            assert len(others) == 7
            assert first.shape == (1, *leaf.shape[1:])
            for other in others:
                np.testing.assert_array_equal(other, first)


def test_a_step_learns_reports_scalars_and_donates(trained):
    state, rows, donated = trained
    assert donated
    np.testing.assert_array_equal(state.step, 5)
    for metrics in rows:
        assert all(value.shape == () for value in metrics.values())
        assert all(jnp.isfinite(value) for value in metrics.values())
    assert len({float(metrics["loss"]) for metrics in rows}) == 5


def test_canonical_arrays_have_no_device_dim(strategy, trained):
    canonical, abstract = strategy.canonical(trained[0]), strategy.abstract()

    def check(leaf, shape, replicated):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
        assert leaf.is_fully_replicated
        assert leaf.shape == replicated.shape[1:]
        np.testing.assert_array_equal(leaf, replicated[0])

    jax.tree.map(check, canonical, abstract, trained[0])


def test_adopting_the_canonical_state_gives_back_the_state(strategy, trained):
    back = strategy.adopt(strategy.canonical(trained[0]))
    assert_same_bits(back, trained[0])
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.sharding.is_equivalent_to(b.sharding, a.ndim), True),
                 back, trained[0])  # fmt: skip


def test_batch_is_dealt_in_blocks_of_rows(strategy, tiny):
    batch = tiny.batch(0)
    placed = strategy.put_batch(batch)
    assert strategy.rows(16).tolist() == list(range(16))
    for name, x in batch.items():
        assert placed[name].shape == (8, 2, 6)
        for device, shard in enumerate(placed[name].addressable_shards):
            assert shard.device == jax.devices()[device]
            np.testing.assert_array_equal(shard.data[0], x[2 * device : 2 * device + 2])


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 12, 31, 100])
def test_a_batch_that_cannot_be_dealt_is_refused_with_a_remedy(tiny, batch_size, accumulate):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be divisible by devices=8") as caught:
        tiny.strategy("pmap", accumulate=accumulate, batch_size=batch_size)
    assert "\n" not in str(caught.value)
    remedy = int(re.search(r"try --batch-size (\d+)$", str(caught.value))[1])
    assert len(tiny.strategy("pmap", accumulate=accumulate, batch_size=remedy).rows(remedy)) == remedy


def test_devices_drop_different_values_of_equal_rows(strategy):
    """Equal rows on all devices: with one key the averaged gradient would be 0 or 2 wherever dropout decides it."""

    def loss_fn(params, batch, key):
        kept = dropout(batch["x"][0] * params["w"], 0.5, key)
        return {"loss": jnp.sum(kept)}, jnp.int32(1)

    def step(state, batch):
        _, tokens, gradient = strategy.gradients(loss_fn)(state, batch, jax.random.key(0))
        return state, {"tokens": tokens, "gradient": gradient["w"]}

    state = {"w": jnp.ones((8, 256))}
    _, results = strategy.compile(step)(state, strategy.put_batch({"x": np.ones((8, 256), np.float32)}))
    assert results["tokens"] == 8
    heads = 8 * results["gradient"] / 2
    np.testing.assert_array_equal(heads, np.round(heads))
    assert 1 < np.var(heads) < 4, (
        "256 binomials of variance 2, within a factor of two; one key for all would give 16"
    )


def test_evaluation_of_a_host_batch_is_over_all_of_its_rows(strategy, tiny):
    evaluate = strategy.compile_evaluation(lambda params, batch: batch["inputs"].sum() + params["bias"])
    batch = tiny.batch(1)
    assert evaluate({"bias": 3}, batch) == batch["inputs"].sum() + 3


def test_constraints_of_the_model_are_off_inside(strategy, tiny):
    """Whatever is bound outside, a replica computes alone."""

    class Refusing:
        def constrain(self, x, names):
            raise AssertionError("bound inside pmap")

        local = constrain

    def step(state, batch):
        return state, axes.constrain(batch["inputs"], "batch", "length").sum()

    batch = tiny.batch(2)
    with axes.bound(Refusing()):
        _, total = strategy.compile(step)({"w": jnp.zeros((8, 1))}, strategy.put_batch(batch))
    assert total == batch["inputs"][:2].sum(), "the metrics are the first replica's"


def test_lowered_from_shapes_alone_it_tells_its_memory(strategy, tiny, compiled):
    memory = compiled.memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(strategy.abstract()))
    rows = sum(x.nbytes for x in tiny.batch(0).values()) / 8
    assert state + rows <= memory.argument_size_in_bytes <= 1.1 * (state + rows)  # of one device
    assert memory.temp_size_in_bytes > 0
