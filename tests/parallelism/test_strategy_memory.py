"""fsdp: a device holds its share of parameters and optimizer, and no more."""

import jax
import numpy as np
import pytest

SIZES = {"vocab_size": 64, "embed_dim": 64, "num_layers": 2, "num_heads": 8, "num_kv_heads": 8}


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("fsdp", [2, 8])
def test_bytes_a_device_times_devices_are_the_total(make_tiny, fsdp):
    """Within 5%, of live arrays and by the compiler's account of a step's arguments."""
    tiny = make_tiny(**SIZES)
    strategy = tiny.strategy("mesh", f"data={8 // fsdp},fsdp={fsdp}")
    state = strategy.init()
    held = (state.params, state.opt_state)
    total = size_of(held)
    assert total > 3 * 4 * tiny.config.num_params() * 0.999
    by_device = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(held):
        for shard in leaf.addressable_shards:
            by_device[shard.device] += shard.data.nbytes
    assert [size * fsdp for size in by_device.values()] == pytest.approx([total] * 8, rel=0.05)

    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tiny.batch(0).items()}
    memory = strategy.lower(tiny.step(strategy), batch).compile().memory_analysis()
    of_batch = size_of(batch) / 8
    assert (memory.argument_size_in_bytes - of_batch) * fsdp == pytest.approx(total, rel=0.05)
    assert np.isfinite(memory.temp_size_in_bytes)
