"""One device, the first one, and nothing on any other."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="module")
def strategy(tiny):
    return tiny.strategy("single")


def test_everything_is_on_the_first_device(strategy, tiny):
    assert strategy.devices == jax.devices()[:1]
    assert "1 of 8 cpu devices" in strategy.describe()
    for tree in (strategy.init(), strategy.put_batch(tiny.batch(0)), strategy.adopt(strategy.init())):
        for leaf in jax.tree.leaves(tree):
            assert leaf.devices() == {jax.devices()[0]}


def test_abstract_state_is_the_state_without_its_values(strategy):
    def check(shape, leaf):
        assert (shape.shape, shape.dtype, shape.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)

    jax.tree.map(check, strategy.abstract(), strategy.canonical(strategy.init()))


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_holds_every_row(strategy, batch_size):
    np.testing.assert_array_equal(strategy.rows(batch_size), np.arange(batch_size))


def test_one_step_from_shapes_and_from_values(strategy, tiny):
    """The lowered step is the compiled one: it takes the same state and batch and donates the state."""
    step, batch = tiny.step(strategy), tiny.batch(0)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    lowered = strategy.lower(step, shapes).compile()
    memory = lowered.memory_analysis()
    state = strategy.init()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, batch)))
    assert held <= memory.argument_size_in_bytes <= 1.1 * held  # rounding up to whole words
    assert memory.temp_size_in_bytes > 0
    new, metrics = lowered(state, strategy.put_batch(batch))
    assert new.step == 1
    assert metrics["tokens"] == np.sum(batch["targets"] != -1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_evaluates_host_batches(strategy, tiny):
    evaluate = strategy.compile_evaluation(lambda params, batch: batch["inputs"].sum() + params["bias"])
    batch = tiny.batch(1)
    assert evaluate({"bias": 3}, batch) == batch["inputs"].sum() + 3
