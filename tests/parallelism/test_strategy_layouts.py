"""Every axis, whole or in parts, computes what one device computes, whatever the model has switched on."""

import functools

import jax
import numpy as np
import pytest

from parallax import axes
from parallax.layers import attention
from parallelism.mesh import MeshPlacement
from parallelism.rules import RULE_SETS

MESHES = ["tensor=2,data=4", "sequence=2,data=4", "fsdp=2,sequence=2,tensor=2", "fsdp=2x4", "data=2,fsdp=2x2"]
EVERYTHING = {
    "qk_norm": True,
    "attention_bias": True,
    "tie_embeddings": False,
    "sliding_window": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "logit_softcap": 5.0,
}
LENGTH = 8


@functools.cache
def stepped(tiny, name, mesh="", segments=False):
    """Parameters less their gradient, and the metrics, after one batch with uneven targets; 11 words in 16 rows."""
    strategy = tiny.strategy(name, mesh, seq_len=LENGTH)
    batch = tiny.batch(3, length=LENGTH)
    if segments:
        batch["segments"] = (np.arange(LENGTH)[None] // 3 + np.zeros((16, 1))).astype(np.int32)
    state, metrics = strategy.compile(tiny.step(strategy))(strategy.init(), strategy.put_batch(batch))
    return jax.device_get((strategy.canonical(state).params, metrics))


def assert_same_gradient(tiny, mesh, segments):
    """Within the order of float32 sums."""
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, stepped(tiny, "mesh", mesh, segments), stepped(tiny, "single", "", segments))


@pytest.mark.parametrize("mesh", MESHES)
def test_the_gradient_is_that_of_one_device(make_tiny, mesh):
    assert_same_gradient(make_tiny("gradient", **EVERYTHING), mesh, segments=True)


def test_the_gradient_is_that_of_one_device_in_chunks(make_tiny, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK", 1)  # so that 8 tokens, or 4 of a shard, are long
    tiny = make_tiny("gradient", num_kv_heads=2)
    assert_same_gradient(tiny, "fsdp=2,sequence=2,tensor=2", segments=False)


@pytest.fixture
def placement():
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    return MeshPlacement(mesh, RULE_SETS["default"])


def test_every_device_draws_its_own_numbers(placement):
    def draw(x, nothing, key):
        assert nothing is None
        return x + jax.random.uniform(key, x.shape)

    names = ("batch", "length", "act_heads")

    def function(x, key):
        with axes.bound(placement):
            return axes.local(draw, (names, (), ()), names)(x, None, key)

    drawn = np.asarray(jax.jit(function)(np.zeros((2, 2, 2), np.float32), jax.random.key(0)))
    assert len(np.unique(drawn)) == 8


@pytest.mark.parametrize("mesh", ["tensor=2,data=4", "data=2,fsdp=4"])
def test_dropout_leaves_replicas_equal(make_tiny, mesh):
    """A device drops its own values, and all of them apply the same summed gradient."""
    tiny = make_tiny(num_kv_heads=2, dropout_rate=0.5)
    strategy = tiny.strategy("mesh", mesh)
    batch = strategy.put_batch(tiny.batch(1))
    state, _ = strategy.compile(tiny.step(strategy))(strategy.init(), batch)
    for leaf in jax.tree.leaves(state.params):
        copies = {}
        for shard in leaf.addressable_shards:
            copies.setdefault(str(shard.index), []).append(np.asarray(shard.data))
        for same in copies.values():
            assert all(np.array_equal(copy, same[0]) for copy in same)
